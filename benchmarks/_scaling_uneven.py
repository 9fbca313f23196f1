"""A made task whose samples differ in difficulty, for the scaling benchmark."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import deq_jax as deq
from deq_jax.training import Batch, Config, Output


def contract(params: Any, z: jax.Array, x: Any) -> jax.Array:
    """The map tanh(rate z W + input), the slower to converge the nearer its rate is to 1.

    Args:
        params: W, orthogonal at first.
        z: [B, D].
        x: "rate" [B, 1] and "input" [B, D].

    Returns:
        [B, D].
    """
    return jnp.tanh(x["rate"] * (z @ params) + x["input"])


class UnevenTask:
    """Mean square of the fixed points of `contract`."""

    def __init__(self, config: Config, solve: Callable[..., deq.Solution], width: int) -> None:
        """Keeps what it is given.

        Args:
            config: solver and backward are read.
            solve: has the signature of `deq.fixed_point`.
            width: D.
        """
        self._config, self._solve, self._width = config, solve, width

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Draws W; see `deq_jax.training.Task`."""
        return deq.init.orthogonal(1.0)(key, (self._width, self._width), jnp.float32), {}

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
        """Solves; see `deq_jax.training.Task`."""
        del key, train, warmup
        solution = self._solve(
            contract,
            params,
            jnp.zeros_like(batch["input"]),
            {"rate": batch["rate"][:, None], "input": batch["input"]},
            solver=self._config.build_solver(),
            adjoint=self._config.backward.build_adjoint(),
            max_steps=max_steps,
            probe=probe,
        )
        mask = batch["mask"]
        loss = (mask * jnp.square(solution.value).mean(axis=1)).sum() / mask.sum()
        return Output(loss=loss, sums={"count": mask.sum()}, extra=extra, solution=solution)
