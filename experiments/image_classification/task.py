"""Model and loss of image classification."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from deq_jax.models.heads import ClassificationHead
from deq_jax.models.mdeq import MDEQ
from deq_jax.models.resnet import ResNet
from deq_jax.training import Batch, Mean, Task
from experiments.common import mdeq
from experiments.image_classification.config import ImageConfig

TOP = 5
"""Second measure: whether the label is among so many classes of the highest scores."""


def build_task(config: ImageConfig, mesh: Mesh, data: Any = None) -> Task:
    """Cross-entropy of a classifier whose features are an equilibrium, or of an explicit one.

    Args:
      config: the whole configuration.
      mesh: the devices over which the solve is split.
      data: not used.

    Returns:
      The task.
    """
    del data
    size = (config.data.size, config.data.size, config.data.colors)
    return Task(
        model=build_model(config, mesh),
        inputs=lambda batch, carry: (batch["image"],),
        loss=cross_entropy,
        sample=mdeq.image_shapes(config, size, ()),
    )


def cross_entropy(logits: jax.Array, batch: Batch) -> dict[str, Mean]:
    """The loss and the accuracies of a batch.

    Args:
      logits: float [B, classes].
      batch: "label" int [B] and "mask".

    Returns:
      "loss", "accuracy", and with more than five classes "top5".
    """
    labels, mask = batch["label"], batch["mask"]
    count = mask.sum()
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    each = {"loss": losses, "accuracy": jnp.argmax(logits, axis=-1) == labels}
    if logits.shape[-1] > TOP:
        best = jax.lax.top_k(logits, TOP)[1]  # [B, TOP]
        each[f"top{TOP}"] = (best == labels[:, None]).any(axis=1)
    return {name: Mean((value * mask).sum(), count) for name, value in each.items()}


def build_model(config: ImageConfig, mesh: Mesh) -> MDEQ | ResNet:
    """The network that the configuration names.

    Args:
      config: all but optim and data is read.
      mesh: the devices over which the solve is split.

    Returns:
      A Linen module.
    """
    part = config.model
    if part.name == "mdeq":
        head = ClassificationHead(part.classes, part.head, part.final, part.momentum)
        return mdeq.build_mdeq(config, part, head, mesh)
    return ResNet(
        classes=part.classes,
        depth=int(part.name.removeprefix("resnet")),
        stem="imagenet" if part.downsample else "cifar",
        width=part.width,
        momentum=part.momentum,
    )
