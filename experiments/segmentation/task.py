"""Model, loss and measures of segmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from deq_jax.models.heads import SegmentationHead
from deq_jax.models.layers import resize_bilinear
from deq_jax.training import Batch, Mean, Task, metrics
from experiments.common import mdeq
from experiments.segmentation.config import SegmentationConfig
from experiments.segmentation.data import Sets, choose_classes


def build_task(config: SegmentationConfig, mesh: Mesh, data: Sets | None = None) -> Task:
    """Weighted cross-entropy of every pixel that has a label.

        loss = sum_p w[y_p] nll_p / sum_p w[y_p],  p: the labelled pixels of the whole batch

    Scores stand at the resolution of the finest branch and are resized to that of the labels first,
    bilinearly, without aligned corners: the published criterion.  There each device divides by its
    own pixels and the devices are averaged; here the number of devices changes nothing.

    Args:
      config: the whole configuration.
      mesh: the devices over which the solve is split.
      data: holds the weights of the classes; None for equal weights.

    Returns:
      The task.
    """
    part, names = config.model, choose_classes(config).names
    weights = np.ones(len(names)) if data is None else data.weights

    def loss(scores: jax.Array, batch: Batch) -> dict[str, Mean]:
        scores = resize_bilinear(scores, batch["label"].shape[1:])  # [B, H, W, classes]
        return pixel_loss(scores, batch["label"], batch["mask"], jnp.asarray(weights, jnp.float32))

    return Task(
        model=mdeq.build_mdeq(config, part, SegmentationHead(part.classes, part.momentum), mesh),
        inputs=lambda batch, carry: (batch["image"],),
        loss=loss,
        sample=mdeq.image_shapes(config, (*config.data.crop, 3), config.data.crop),
        summarize=partial(summarize, names),
    )


def summarize(names: Sequence[str], means: Mapping[str, Mean]) -> dict[str, float]:
    """Turns merged means into numbers.

    Args:
      names: of the classes.
      means: of one pass, or of the steps since the last line of metrics.

    Returns:
      What `metrics.compute` makes of the others, and from the confusion matrix "miou", "accuracy"
      (share of the pixels that are right), and "iou/<class>" of the classes that occur.
    """
    values = metrics.compute({name: mean for name, mean in means.items() if name != "confusion"})
    matrix = np.asarray(means["confusion"].total, np.float64)
    each = iou(matrix)
    if matrix.sum() > 0:
        values["miou"] = float(np.nanmean(each))
        values["accuracy"] = float(np.trace(matrix) / matrix.sum())
    pairs = zip(names, each, strict=True)
    return values | {f"iou/{name}": float(v) for name, v in pairs if not np.isnan(v)}


def pixel_loss(
    scores: jax.Array, labels: jax.Array, mask: jax.Array, weights: jax.Array
) -> dict[str, Mean]:
    """Weighted mean of the cross-entropy over pixels, and their confusion matrix.

    Args:
      scores: float [B, H, W, classes].
      labels: integers [B, H, W]; a pixel whose label is not a class (255) counts for nothing.
      mask: float [B]; an image whose mask is 0 counts for nothing.
      weights: float [classes].

    Returns:
      "loss", and "confusion" (int32 [classes, classes]) over the number of pixels.
    """
    classes, labels = scores.shape[-1], labels.astype(jnp.int32)
    counted = (labels >= 0) & (labels < classes) & (mask.reshape(-1, 1, 1) > 0)
    labels = jnp.where(counted, labels, 0)
    weight = weights.astype(scores.dtype)[labels] * counted
    nll = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
    # where() because a padded image may have any scores, and 0 * inf would spoil the sum.
    nll = jnp.where(counted, nll * weight, 0).sum()
    confusion = confusion_matrix(labels, jnp.argmax(scores, axis=-1), counted, classes)
    return {"loss": Mean(nll, weight.sum()), "confusion": Mean(confusion, counted.sum())}


def confusion_matrix(
    labels: jax.Array, predicted: jax.Array, counted: jax.Array, classes: int
) -> jax.Array:
    """Counts pixels by true and predicted class, exactly up to 2^31 of them.

    Args:
      labels: int [B, H, W], in [0, classes).
      predicted: likewise.
      counted: bool [B, H, W]; False for pixels to leave out.
      classes: number of classes.

    Returns:
      int32 [classes, classes]: row the truth, column the prediction.

    Example:
      >>> truth, guess = jnp.asarray([[[0, 1, 1]]]), jnp.asarray([[[0, 1, 0]]])
      >>> confusion_matrix(truth, guess, truth >= 0, 2).tolist()
      [[1, 0], [1, 1]]
    """
    cells = classes * classes
    # One more cell takes what is left out.  A matrix for each image first: nothing crosses devices.
    index = jnp.where(counted, labels * classes + predicted, cells).reshape(labels.shape[0], -1)
    counts = jax.vmap(lambda row: jnp.zeros(cells + 1, jnp.int32).at[row].add(1))(index)
    return counts.sum(0)[:cells].reshape(classes, classes)


def iou(matrix: np.ndarray) -> np.ndarray:
    """Intersection over union of every class.

    iou_c = n_cc / (sum_j n_cj + sum_i n_ic - n_cc)

    Args:
      matrix: float64 [classes, classes] from `confusion_matrix`.

    Returns:
      float64 [classes]; nan for a class that neither the truth nor a prediction has, which the
      mean leaves out (as in the evaluation script of Cityscapes).

    Example:
      >>> iou(np.asarray([[1.0, 0, 0], [1, 2, 0], [0, 0, 0]])).round(3).tolist()
      [0.5, 0.667, nan]
    """
    hits = np.diagonal(matrix)
    union = matrix.sum(0) + matrix.sum(1) - hits
    return np.where(union > 0, hits / np.maximum(union, 1), np.nan)
