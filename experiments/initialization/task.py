"""The fully connected DEQ of the sweep."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from deq_jax.models import mlp
from deq_jax.training import Batch, Output
from deq_jax.training.parallel import make_fixed_point
from experiments.initial import FAMILIES
from experiments.initialization.config import InitConfig

_ACTIVATIONS = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "hard_tanh": mlp.hard_tanh,
    "identity": mlp.identity,
}


class MLPTask:
    """Cross-entropy of a classifier that reads the equilibrium of z = phi(W z + U x + b)."""

    def __init__(self, config: InitConfig, inputs: int, classes: int) -> None:
        """Wires the model.

        Args:
          config: model, solver, backward, eval and precision are read.
          inputs: numbers in an example.
          classes: number of classes.
        """
        self._config, self._inputs = config, inputs
        self.model = mlp.MLPDEQ(
            outputs=classes,
            width=config.model.width,
            solver=config.build_solver(),
            adjoint=config.backward.build_adjoint(),
            keep=config.solver.keep,
            activation=_ACTIVATIONS[config.model.activation],
            fixed_point=make_fixed_point(config, None),
        )

    def init(
        self, key: jax.Array, scale: float | jax.Array = 1.0, family: str = "orthogonal"
    ) -> tuple[Any, Any]:
        """Draws the initial weights; see `deq_jax.training.Task`.

        Args:
          key: a PRNG key.
          scale: what W is scaled by, a number or a traced scalar.
          family: of W.

        Returns:
          (params, {}).
        """
        model = self.model.clone(kernel_init=FAMILIES[family](1.0))
        variables: Any = model.init(key, jnp.zeros((1, self._inputs)), train=False, max_steps=0)
        params = variables["params"]
        cell = params["equilibrium"]["f"]
        scaled = {"f": {**cell, "kernel": scale * cell["kernel"]}}
        return {**params, "equilibrium": scaled}, {}

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
        del key  # nothing is drawn
        model = self._config.in_phase(self.model, train=train, warmup=warmup)
        applied: Any = model.apply(
            {"params": params}, batch["x"], train=train, max_steps=max_steps, probe=probe
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
