"""Model, loss and data of image classification."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from deq_jax.models.heads import ClassificationHead
from deq_jax.models.mdeq import MDEQ
from deq_jax.models.resnet import ResNet
from deq_jax.training import Batch, Output
from experiments import trunk
from experiments.image_classification.config import ImageConfig

TOP = 5
"""Second measure: whether the label is among so many classes of the highest scores."""


class ImageTask:
    """Cross-entropy of a classifier whose features are an equilibrium, or of an explicit one."""

    def __init__(self, config: ImageConfig, mesh: Mesh) -> None:
        """Wires the model.

        Args:
          config: all but optim is read.
          mesh: the devices over which the solve is split.
        """
        data = config.data
        self._sample = (mesh.size, data.size, data.size, data.colors)
        self.classes = config.model.classes
        self._config = config
        self.model = build_model(config, mesh)

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
        """Logits, loss and accuracy of a batch; see `deq_jax.training.Task`."""
        logits, solution, extra = trunk.forward(
            self._config.in_phase(self.model, train=train, warmup=warmup),
            params,
            extra,
            batch["image"],
            key=key,
            train=train,
            max_steps=max_steps,
            probe=probe,
        )
        labels, mask = batch["label"], batch["mask"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels) * mask
        count = mask.sum()
        sums = {"accuracy": (jnp.argmax(logits, axis=-1) == labels) * mask}
        if self.classes > TOP:
            best = jax.lax.top_k(logits, TOP)[1]  # [B, TOP]
            sums[f"top{TOP}"] = (best == labels[:, None]).any(axis=1) * mask
        return Output(
            loss=losses.sum() / jnp.maximum(count, 1),
            sums={name: value.sum() for name, value in sums.items()} | {"count": count},
            extra=extra,
            solution=solution,
        )


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
        return trunk.build_mdeq(config, part, head, mesh)
    return ResNet(
        classes=part.classes,
        depth=int(part.name.removeprefix("resnet")),
        stem="imagenet" if part.downsample else "cifar",
        momentum=part.momentum,
    )
