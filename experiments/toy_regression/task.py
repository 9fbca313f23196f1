"""Model, loss and data of the synthetic task."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from deq_jax.data import pipeline, synthetic
from deq_jax.models.mlp import ScalarDEQ
from deq_jax.training import Batch, DataIterator, EvalData, Output, UsageError
from deq_jax.training.parallel import make_fixed_point
from experiments.toy_regression.config import ToyConfig

EVAL_BATCH = 256
"""Examples in an evaluation batch; any number of devices that divides it will do."""


class ToyTask:
    """Least squares on the equilibrium itself: the prediction is z*."""

    def __init__(self, config: ToyConfig, mesh: Mesh) -> None:
        """Wires the model.

        Args:
          config: solver, backward, train and model are read.
          mesh: the devices over which the solve is split.
        """
        self._config, self._devices = config, mesh.size
        self.model = ScalarDEQ(
            solver=config.build_solver(),
            adjoint=config.backward.build_adjoint(),
            keep=config.solver.keep,
            hidden=config.model.hidden,
            weights=config.model.build_weights(),
            fixed_point=make_fixed_point(config, mesh),
        )

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Draws the initial weights; see `deq_jax.training.Task`."""
        variables = self.model.init(key, jnp.zeros((self._devices, 1)), train=False)
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
        """Predictions and squared error of a batch; see `deq_jax.training.Task`."""
        del key  # nothing is drawn
        model = self._config.in_phase(self.model, train=train, warmup=warmup)
        applied: Any = model.apply(
            {"params": params}, batch["x"], train=train, max_steps=max_steps, probe=probe
        )
        predicted, solution = applied
        error = jnp.square(predicted - batch["y"])[:, 0] * batch["mask"]
        count = batch["mask"].sum()
        return Output(
            loss=error.sum() / jnp.maximum(count, 1),
            sums={"squared_error": error.sum(), "count": count},
            extra=extra,
            solution=solution,
        )


def build_data(config: ToyConfig) -> tuple[DataIterator, EvalData]:
    """Draws the pairs.

    Args:
      config: data and train are read.

    Returns:
      Endless training batches, and a function that gives one pass over the test pairs.
    """
    data = config.data
    pairs = synthetic.regression(data.train_pairs, seed=data.seed, noise=data.noise)
    test = synthetic.regression(data.test_pairs, seed=data.seed + 1, noise=data.noise)
    shard = jax.process_index(), jax.process_count()
    for size in (config.train.batch_size, EVAL_BATCH):
        if size % shard[1]:
            raise UsageError(f"a batch of {size} must divide by the {shard[1]} processes")
    batches = pipeline.train_iterator(
        pairs,
        batch_size=config.train.batch_size // shard[1],
        seed=config.train.seed,
        shard=shard,
    )
    return batches, lambda: pipeline.eval_batches(
        test, batch_size=EVAL_BATCH // shard[1], shard=shard
    )
