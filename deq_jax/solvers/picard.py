"""Picard iteration: apply f, over and over."""

from __future__ import annotations

import dataclasses

import jax

from deq_jax.solvers.base import StopMode, check_fraction, check_settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picard:
    """Damped fixed-point iteration, z <- (1 - damping) z + damping f(z).

    Converges where the spectral radius of (1 - damping) I + damping J_f(z*) is below one, and keeps
    no history.

    Args:
      tol: residual at which a sample has converged.
      max_steps: largest number of evaluations of f.
      stop: ``"rel"``, norm(f(z) - z) / norm(f(z)), or ``"abs"``, norm(f(z) - z).
      damping: step length in (0, 1]; 1 is the plain iteration.

    Returns:
      A solver for `solve` and `fixed_point`.

    Raises:
      ValueError: for a setting out of range.
    """

    tol: float = 1e-3
    max_steps: int = 30
    stop: StopMode = "rel"
    damping: float = 1.0

    def __post_init__(self) -> None:
        check_settings(self)
        check_fraction("Picard", "damping", self.damping)

    def init(self, z: jax.Array) -> tuple[()]:
        """Returns the empty state."""
        del z
        return ()

    def step(self, z: jax.Array, fz: jax.Array, state: tuple[()]) -> tuple[jax.Array, tuple[()]]:
        """Returns the next iterate ``[B, D]`` and the empty state."""
        if self.damping == 1.0:
            return fz, state
        return z + self.damping * (fz - z), state
