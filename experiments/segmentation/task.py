"""Model, loss and measures of segmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from deq_jax.models.heads import SegmentationHead
from deq_jax.models.layers import resize_bilinear
from deq_jax.training import Batch, Mean, Output, metrics
from experiments import trunk
from experiments.segmentation.config import SegmentationConfig


class SegmentationTask:
    """Weighted cross-entropy of every pixel that has a label.

        loss = sum_p w[y_p] nll_p / sum_p w[y_p],  p: the labelled pixels of the whole batch

    Scores stand at the resolution of the finest branch and are resized to that of the labels first,
    bilinearly, without aligned corners: the published criterion.  There each device divides by its
    own pixels and the devices are averaged; here the number of devices changes nothing.
    """

    def __init__(
        self,
        config: SegmentationConfig,
        mesh: Mesh,
        *,
        names: Sequence[str],
        weights: np.ndarray,
    ) -> None:
        """Wires the model.

        Args:
          config: all but optim is read.
          mesh: the devices over which the solve is split.
          names: of the classes.
          weights: of the classes in the loss, float [classes].

        Raises:
          ValueError: names or weights of another number of classes than the model's.
        """
        part = config.model
        if len(names) != part.classes or np.shape(weights) != (part.classes,):
            raise ValueError(
                f"got {len(names)} names and weights of shape {np.shape(weights)}; wanted "
                f"model.classes = {part.classes} of each"
            )
        self._config = config
        self.names, self.weights = tuple(names), np.asarray(weights, np.float32)
        self._sample = (mesh.size, *config.data.crop, 3)
        self.model = trunk.build_mdeq(
            config, part, SegmentationHead(part.classes, part.momentum), mesh
        )

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Draws the initial weights; see `deq_jax.training.Task`."""
        return trunk.init(self.model, key, jnp.zeros(self._sample))

    def forward(
        self,
        params: Any,
        extra: Any,
        batch: Batch,
        *,
        key: jax.Array | None,
        train: bool,
        warmup: bool,
        max_steps: int | jax.Array,
        probe: Any,
    ) -> Output:
        """Loss and confusion matrix of a batch; see `deq_jax.training.Task`."""
        scores, solution, extra = trunk.forward(
            self._config.in_phase(self.model, train=train, warmup=warmup),
            params,
            extra,
            batch["image"],
            key=key,
            train=train,
            max_steps=max_steps,
            probe=probe,
        )
        _, height, width = batch["label"].shape
        scores = resize_bilinear(scores, (height, width))  # [B, H, W, classes]
        loss, sums = pixel_loss(scores, batch["label"], batch["mask"], jnp.asarray(self.weights))
        return Output(loss=loss, sums=sums, extra=extra, solution=solution, weight=sums["weight"])

    def predict(
        self, params: Any, extra: Any, images: jax.Array, max_steps: int | jax.Array
    ) -> jax.Array:
        """The most likely class of every pixel.

        Args:
          params: trained parameters.
          extra: batch statistics.
          images: float [B, H, W, 3].
          max_steps: budget of the solve.

        Returns:
          int32 [B, H, W].
        """
        scores, _, _ = trunk.forward(
            self._config.in_phase(self.model, train=False, warmup=False),
            params,
            extra,
            images,
            key=None,
            train=False,
            max_steps=max_steps,
            probe=None,
        )
        _, height, width, _ = images.shape
        return jnp.argmax(resize_bilinear(scores, (height, width)), -1).astype(jnp.int32)

    def summarize(self, means: Mapping[str, Mean]) -> dict[str, float]:
        """Turns merged sums into numbers: the hook of `train` and `evaluate`.

        Args:
          means: of one pass, or of the steps since the last line of metrics.

        Returns:
          What `metrics.compute` makes of the others, and "loss" (over all pixels at once), "miou",
          "accuracy" (share of the pixels that are right), and "iou/<class>" of the classes that
          occur.
        """
        own = ("nll", "weight", "confusion")
        values = metrics.compute({k: m for k, m in means.items() if k not in own})
        weight = float(means["weight"].total)
        values["loss"] = float(means["nll"].total) / weight if weight else 0.0
        matrix = np.asarray(means["confusion"].total, np.float64)
        each = iou(matrix)
        if matrix.sum() > 0:
            values["miou"] = float(np.nanmean(each))
            values["accuracy"] = float(np.trace(matrix) / matrix.sum())
        pairs = zip(self.names, each, strict=True)
        return values | {f"iou/{name}": float(v) for name, v in pairs if not np.isnan(v)}


def pixel_loss(
    scores: jax.Array, labels: jax.Array, mask: jax.Array, weights: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted mean of the cross-entropy over pixels, and the sums of a batch.

    Args:
      scores: float [B, H, W, classes].
      labels: integers [B, H, W]; a pixel whose label is not a class (255) counts for nothing.
      mask: float [B]; an image whose mask is 0 counts for nothing.
      weights: float [classes].

    Returns:
      The loss, 0 if no pixel counts, and "nll" and "weight" (its numerator and denominator),
      "confusion" and "count" (pixels, int32).
    """
    classes, labels = scores.shape[-1], labels.astype(jnp.int32)
    counted = (labels >= 0) & (labels < classes) & (mask.reshape(-1, 1, 1) > 0)
    labels = jnp.where(counted, labels, 0)
    weight = weights.astype(scores.dtype)[labels] * counted
    nll = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
    # where() because a padded image may have any scores, and 0 * inf would spoil the sum.
    nll, weight = jnp.where(counted, nll * weight, 0).sum(), weight.sum()
    predicted = jnp.argmax(scores, axis=-1)
    return nll / jnp.where(weight > 0, weight, 1), {
        "nll": nll,
        "weight": weight,
        "confusion": confusion_matrix(labels, predicted, counted, classes),
        "count": counted.sum(),
    }


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
