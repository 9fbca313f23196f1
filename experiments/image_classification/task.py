"""Model, loss and data of image classification."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import deq_jax as deq
from deq_jax.data import images, pipeline
from deq_jax.models.convnet import ConvDEQ
from deq_jax.training import Batch, DataIterator, EvalData, Output
from deq_jax.training.parallel import sharded_fixed_point
from experiments.image_classification.config import ImageConfig

SHAPES = {"digits": (8, 8, 1)}
"""Height, width and channels of every set."""


class ImageTask:
    """Cross-entropy of a classifier whose features are an equilibrium."""

    def __init__(self, config: ImageConfig, mesh: Mesh) -> None:
        """Wires the model.

        Args:
          config: solver, backward, train, model and data are read.
          mesh: the devices over which the solve is split.
        """
        part = config.model
        self._sample = (mesh.size, *SHAPES[config.data.name])
        self.model = ConvDEQ(
            classes=10,
            solver=config.build_solver(),
            adjoint=config.backward.build_adjoint(),
            channels=part.channels,
            expansion=part.expansion,
            groups=part.groups,
            dropout=part.dropout,
            pool=part.pool,
            fixed_point=sharded_fixed_point(mesh),
        )
        self.tied = self.model.clone(adjoint=deq.Unroll(config.train.warmup_layers))

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Draws the initial weights; see `deq_jax.training.Task`."""
        variables = self.model.init(key, jnp.zeros(self._sample), train=False)
        return variables["params"], {}

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
        model = self.tied if warmup else self.model
        applied: Any = model.apply(
            {"params": params},
            batch["image"],
            train=train,
            max_steps=max_steps,
            probe=probe,
            rngs={"dropout": key} if key is not None else None,
        )
        logits, solution = applied
        labels, mask = batch["label"], batch["mask"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels) * mask
        right = (jnp.argmax(logits, axis=-1) == labels) * mask
        count = mask.sum()
        return Output(
            loss=losses.sum() / jnp.maximum(count, 1),
            sums={"accuracy": right.sum(), "count": count},
            extra=extra,
            solution=solution,
        )


def build_data(config: ImageConfig) -> tuple[DataIterator, EvalData]:
    """Opens the image set.

    Args:
      config: data and train are read.

    Returns:
      Endless training batches, and a function that gives one pass over the test set.
    """
    train, test = images.digits("train"), images.digits("test")
    standardize = images.Standardize.of(train)
    batches = pipeline.train_iterator(
        train,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        transform=standardize,
        augment=images.RandomShift(config.data.shift) if config.data.shift else None,
    )
    size = config.data.eval_batch_size
    return batches, lambda: pipeline.eval_batches(test, batch_size=size, transform=standardize)
