"""Model, loss and data of the synthetic task."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from deq_jax.data import synthetic
from deq_jax.models.mlp import ScalarDEQ
from deq_jax.training import Batch, Mean, Task
from deq_jax.training.solving import solve_options
from experiments.common import compare
from experiments.common.run import Data, open_batches
from experiments.toy_regression.config import ToyConfig

EVAL_BATCH = 256
"""Examples in an evaluation batch; any number of devices that divides it will do."""


def build_task(config: ToyConfig, mesh: Mesh, data: Any = None) -> Task:
    """Least squares on the equilibrium itself: the prediction is z*.

    Args:
      config: the whole configuration.
      mesh: the devices over which the solve is split.
      data: not used.

    Returns:
      The task.
    """
    del data
    model = ScalarDEQ(
        hidden=config.model.hidden,
        weights=config.model.build_weights(),
        **solve_options(config, mesh),
    )
    one = jax.ShapeDtypeStruct((config.train.batch_size, 1), jnp.float32)
    return Task(
        model=model,
        inputs=lambda batch, carry: (batch["x"],),
        loss=squared_error,
        sample={"x": one, "y": one},
    )


def squared_error(predicted: jax.Array, batch: Batch) -> dict[str, Mean]:
    """The loss, float [B, 1] against ``batch["y"]``."""
    error = jnp.square(predicted - batch["y"])[:, 0] * batch["mask"]
    mean = Mean(error.sum(), batch["mask"].sum())
    return {"loss": mean, "squared_error": mean}


def variants(config: ToyConfig) -> Mapping[str, ToyConfig]:
    """The configuration of the model of every gamma."""
    return {
        f"gamma_{gamma:g}": compare.in_folder(
            config, f"gamma_{gamma:g}", jac=dataclasses.replace(config.jac, gamma=gamma)
        )
        for gamma in config.gammas
    }


def open_data(config: ToyConfig) -> Data:
    """Draws the pairs.

    Args:
      config: data and train are read.

    Returns:
      Both sets.

    Raises:
      UsageError: a batch does not divide by the processes.
    """
    data = config.data
    pairs = synthetic.regression(data.train_pairs, seed=data.seed, noise=data.noise)
    test = synthetic.regression(data.test_pairs, seed=data.seed + 1, noise=data.noise)
    return open_batches(config, pairs, test, eval_batch=EVAL_BATCH)
