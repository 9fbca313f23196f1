"""The fully connected DEQ of the sweep."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from deq_jax.models import mlp
from deq_jax.training import Task
from deq_jax.training.solving import solve_options
from deq_jax.training.task import init
from experiments.common.families import FAMILIES
from experiments.image_classification.task import cross_entropy
from experiments.initialization.config import InitConfig

_ACTIVATIONS = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "hard_tanh": mlp.hard_tanh,
    "identity": mlp.identity,
}


def build_task(config: InitConfig, inputs: int, classes: int, family: str = "orthogonal") -> Task:
    """Cross-entropy of a classifier that reads the equilibrium of z = phi(W z + U x + b).

    Args:
      config: model, solver, backward, train and precision are read.
      inputs: numbers in an example.
      classes: number of classes.
      family: of W, at scale 1.

    Returns:
      The task.
    """
    model = mlp.MLPDEQ(
        outputs=classes,
        width=config.model.width,
        activation=_ACTIVATIONS[config.model.activation],
        kernel_init=FAMILIES[family](1.0),
        **solve_options(config, None),
    )
    batch = config.train.batch_size
    return Task(
        model=model,
        inputs=lambda batch, carry: (batch["x"],),
        loss=cross_entropy,
        sample={
            "x": jax.ShapeDtypeStruct((batch, inputs), jnp.float32),
            "label": jax.ShapeDtypeStruct((batch,), jnp.int32),
        },
    )


def draw_scaled(task: Task, key: jax.Array, scale: float | jax.Array) -> Any:
    """Initial weights whose W is scaled.

    Args:
      task: from `build_task`.
      key: a PRNG key.
      scale: a number or a traced scalar.

    Returns:
      The parameters.
    """
    params, _ = init(task, key)
    cell = params["equilibrium"]["f"]
    scaled = {"f": {**cell, "kernel": scale * cell["kernel"]}}
    return {**params, "equilibrium": scaled}
