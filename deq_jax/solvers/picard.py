"""Picard iteration: apply f, over and over."""

from __future__ import annotations

import dataclasses

import jax

from deq_jax.solvers.base import StopMode, check_settings
from deq_jax.tree import PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picard:
    """Damped fixed-point iteration.

        z <- (1 - damping) z + damping f(z)

    It converges where the spectral radius of (1 - damping) I + damping J_f(z*) is below one, and
    keeps no history.

    Args:
      tol: residual at which a sample has converged.
      max_steps: largest number of evaluations of f.
      stop: ``"rel"`` or ``"abs"``, see `SolveStats`.
      damping: step length in (0, 1]; 1 is the plain iteration.

    Returns:
      A solver for `solve` and `fixed_point`.

    Raises:
      ValueError: for a setting out of range.

    Example:
      >>> import jax.numpy as jnp, deq_jax as deq
      >>> sol = deq.solve(deq.Picard(tol=1e-6, max_steps=100), jnp.cos, jnp.ones((1, 1)))
      >>> round(float(sol.value[0, 0]), 4)
      0.7391
    """

    tol: float = 1e-3
    max_steps: int = 30
    stop: StopMode = "rel"
    damping: float = 1.0

    def __post_init__(self) -> None:
        check_settings(self, fractions=("damping",))

    def init(self, z: PyTree) -> tuple[()]:
        """Returns the empty state."""
        del z
        return ()

    def step(self, z: PyTree, fz: PyTree, state: tuple[()]) -> tuple[PyTree, tuple[()]]:
        """Returns the next iterate, a tree ``[B, ...]``, and the empty state."""
        if self.damping == 1.0:
            return fz, state
        return jax.tree.map(lambda a, b: a + self.damping * (b - a), z, fz), state
