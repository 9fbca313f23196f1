"""Anderson acceleration."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deq_jax.solvers import history
from deq_jax.solvers.base import StopMode, check_count, check_fraction, check_settings
from deq_jax.tree import stat_dtype


class AndersonState(NamedTuple):
    """State of one solve: ring buffers of f(z) and of f(z) - z, and the Gram matrix of the latter.

    Attributes:
      k: int32 scalar, steps taken.
      images: history of f(z).
      residuals: history of f(z) - z.
      gram: ``[B, m, m]``, inner products of the residuals, float32 or wider.
    """

    k: jax.Array
    images: history.History
    residuals: history.History
    gram: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Anderson:
    """Anderson acceleration of z = f(z) with a window of ``memory`` iterates.

    The next iterate is sum_i a_i ((1 - damping) z_i + damping f(z_i)) over the window, where the
    weights minimise norm(sum_i a_i (f(z_i) - z_i))^2 subject to sum_i a_i = 1.  The window grows
    from one; the Gram matrix gains one row a step and is kept in float32 (float64 for float64
    states).

    Args:
      tol: residual at which a sample has converged.
      max_steps: largest number of evaluations of f.
      stop: ``"rel"``, norm(f(z) - z) / norm(f(z)), or ``"abs"``, norm(f(z) - z).
      memory: iterates in the window.
      ridge: Tikhonov term added to the Gram matrix of the *normalised* residuals; a pure number.
      damping: mixing in (0, 1]; 1 uses images only.

    Returns:
      A solver for `solve` and `fixed_point`.

    Raises:
      ValueError: for a setting out of range.

    Reference:
      Anderson, Iterative procedures for nonlinear integral equations, J. ACM 12 (1965);
      Walker and Ni, Anderson acceleration for fixed-point iterations, SIAM J. Numer. Anal. 49
      (2011), problem (1.2).
    """

    tol: float = 1e-3
    max_steps: int = 30
    stop: StopMode = "rel"
    memory: int = 5
    ridge: float = 1e-6
    damping: float = 1.0

    def __post_init__(self) -> None:
        check_settings(self)
        check_count("Anderson", "memory", self.memory)
        check_fraction("Anderson", "damping", self.damping)
        if not (isinstance(self.ridge, (int, float)) and self.ridge >= 0):
            raise ValueError(f"Anderson: got ridge={self.ridge!r}; wanted a number >= 0")

    def init(self, z: jax.Array) -> AndersonState:
        """Returns an empty window for states like ``z [B, D]``."""
        m = self.memory
        column = jnp.zeros_like(z[:, :1], dtype=stat_dtype(z.dtype))
        return AndersonState(
            k=jnp.int32(0),
            images=history.empty(z, m),
            residuals=history.empty(z, m),
            gram=jnp.broadcast_to(column[:, :, None], (z.shape[0], m, m)),
        )

    def step(
        self, z: jax.Array, fz: jax.Array, state: AndersonState
    ) -> tuple[jax.Array, AndersonState]:
        """Returns the next iterate ``[B, D]`` and the window with ``z`` taken in."""
        m = self.memory
        slot, filled = state.k % m, jnp.minimum(state.k + 1, m)
        g = fz - z
        images = history.write(state.images, slot, fz)
        residuals = history.write(state.residuals, slot, g)
        row = history.inner(residuals, g, filled)  # [B, m]
        here = jnp.arange(m) == slot
        gram = jnp.where(here[None, :, None], row[:, None, :], state.gram)
        gram = jnp.where(here[None, None, :], row[:, :, None], gram)  # [B, m, m]
        a = self.weights(gram, jnp.arange(m) < filled)
        z_next = history.combine(images, a, filled)
        if self.damping != 1.0:
            z_next -= (1 - self.damping) * history.combine(residuals, a, filled)
        return z_next, AndersonState(state.k + 1, images, residuals, gram)

    def weights(self, gram: jax.Array, valid: jax.Array) -> jax.Array:
        """Solves the constrained least-squares problem of one step.

        With R the residuals scaled to unit length, (R R^T + ridge I) y = 1 / norm and a is y / norm
        scaled to sum one: the minimiser, regularised alike at every scale of f.

        Args:
          gram: ``[B, m, m]`` inner products of the residuals.
          valid: bool ``[m]``, the rows in use.

        Returns:
          Weights ``[B, m]``, zero for rows not in use, each row summing to one.
        """
        used = valid[None]  # [1, m]
        diagonal = jnp.diagonal(gram, axis1=1, axis2=2)  # [B, m]
        length = jnp.sqrt(jnp.maximum(diagonal, jnp.finfo(gram.dtype).tiny))
        # Weights are homogeneous: measuring lengths by the shortest keeps 1 / norm in range.
        shortest = jnp.min(jnp.where(used, length, jnp.inf), axis=1, keepdims=True)
        inverse = jnp.where(used, shortest / length, 0)
        unit = jnp.where(used, 1 / length, 0)
        matrix = gram * unit[:, :, None] * unit[:, None, :]
        matrix += jnp.diag(jnp.where(valid, self.ridge, 1).astype(gram.dtype))[None]
        y = _solve_positive(matrix, inverse) * inverse
        return y / jnp.sum(y, axis=1, keepdims=True)


def _solve_positive(matrix: jax.Array, rhs: jax.Array) -> jax.Array:
    """Solves small positive definite systems ``[B, m, m] y = [B, m]`` by elimination.

    Without pivoting, which positive definite systems do not need: m fused elementwise operations,
    where a library call would be one launch per factor on accelerators.
    """
    m = matrix.shape[-1]
    table = jnp.concatenate([matrix, rhs[:, :, None]], axis=2)  # [B, m, m + 1]
    for i in range(m):
        pivot = table[:, i, :] / table[:, i, i, None]
        others = (jnp.arange(m) != i)[None, :, None]
        column = jnp.where(others, table[:, :, i, None], 0)
        table = jnp.where(others, table, pivot[:, None, :]) - column * pivot[:, None, :]
    return table[:, :, m]
