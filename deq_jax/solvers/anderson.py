"""Anderson acceleration."""

from __future__ import annotations

import dataclasses
import functools
import numbers
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax.solvers import history
from deq_jax.solvers.base import StopMode, check_settings
from deq_jax.tree import PyTree

# Systems up to this size are solved by scalar operations that fuse into one kernel.
_FUSED = 8


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
    from one.  The Gram matrix gains one row a step and is kept in float32 (float64 for float64
    states).

    Args:
      tol: residual at which a sample has converged.
      max_steps: largest number of evaluations of f.
      stop: ``"rel"`` or ``"abs"``, see `SolveStats`.
      memory: iterates in the window; no more than ``max_steps`` are stored.
      ridge: Tikhonov term added to the Gram matrix of the *normalised* residuals; a pure number.
      damping: mixing in (0, 1]; 1 uses images only.

    Returns:
      A solver for `solve` and `fixed_point`.

    Raises:
      ValueError: for a setting out of range.

    Example:
      >>> import jax.numpy as jnp, deq_jax as deq
      >>> sol = deq.solve(deq.Anderson(tol=1e-6), jnp.cos, jnp.ones((1, 1)))
      >>> round(float(sol.value[0, 0]), 4)
      0.7391

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
        check_settings(self, counts=("memory",), fractions=("damping",))
        if not (isinstance(self.ridge, numbers.Real) and self.ridge >= 0):
            raise ValueError(f"Anderson: got ridge={self.ridge!r}; wanted a number >= 0")
        object.__setattr__(self, "ridge", float(self.ridge))

    def init(self, z: PyTree) -> AndersonState:
        """Returns an empty window for states like ``z``, a tree ``[B, ...]``."""
        m = self._rows
        return AndersonState(
            k=jnp.int32(0),
            images=history.empty(z, m),
            residuals=history.empty(z, m),
            gram=history.gram(z, m),
        )

    @property
    def _rows(self) -> int:
        return min(self.memory, self.max_steps)

    def step(self, z: PyTree, fz: PyTree, state: AndersonState) -> tuple[PyTree, AndersonState]:
        """Returns the next iterate, a tree ``[B, ...]``, and the window with ``z`` taken in."""
        m = self._rows
        rows = jnp.arange(m, dtype=jnp.int32)
        slot, filled = state.k % m, jnp.minimum(state.k + 1, m)
        g = jax.tree.map(jnp.subtract, fz, z)
        images = state.images.write(slot, fz)
        residuals = state.residuals.write(slot, g)
        row = residuals.inner(g, filled)  # [B, m]
        here = rows == slot
        gram = jnp.where(here[None, :, None], row[:, None, :], state.gram)
        gram = jnp.where(here[None, None, :], row[:, :, None], gram)  # [B, m, m]
        a = self.weights(gram, rows <= state.k)  # not filled: with k + 1 XLA would copy k
        z_next = images.combine(a, filled)
        if self.damping != 1.0:
            mixed = residuals.combine(a, filled)
            z_next = jax.tree.map(lambda x, r: x - (1 - self.damping) * r, z_next, mixed)
        z_next = jax.tree.map(lambda x, like: x.astype(like.dtype), z_next, z)
        return z_next, AndersonState(state.k + 1, images, residuals, gram)

    def weights(self, gram: jax.Array, valid: jax.Array) -> jax.Array:
        """Solves the constrained least-squares problem of one step.

        The minimiser is a = w / sum(w) with (G + ridge diag(G)) w = 1, where G is the Gram matrix:
        regularised alike at every scale of f.

        Args:
          gram: ``[B, m, m]`` inner products of the residuals.
          valid: bool ``[m]``, the rows in use.

        Returns:
          Weights ``[B, m]``, zero for rows not in use, each row summing to one.
        """
        eye = jnp.eye(gram.shape[-1], dtype=bool)
        diagonal = jnp.maximum(gram, jnp.finfo(gram.dtype).tiny) * (1 + self.ridge)
        diagonal = jnp.where(valid[:, None], diagonal, 1)
        return _solve_positive(jnp.where(eye, diagonal, gram), valid)


def _solve_positive(matrix: jax.Array, valid: jax.Array) -> jax.Array:
    """Solves small positive definite systems ``[B, m, m] w = 1``, and scales w to sum one.

    By elimination without pivoting, which positive definite systems do not need.  A library call
    would be one launch per factor on accelerators.
    """
    m = matrix.shape[-1]
    if m > _FUSED:
        return _solve_in_a_loop(matrix, valid)
    # All operations are on vectors [B] without a change of index, so that they fuse into one.
    a = [[matrix[:, i, j] for j in range(i + 1)] for i in range(m)]
    # w is homogeneous in the right-hand side: the smallest pivot keeps it in range.
    pivots = [jnp.where(valid[i], a[i][i], jnp.inf) for i in range(m)]
    smallest = functools.reduce(jnp.minimum, pivots)
    y = [jnp.where(valid[i], smallest, 0) for i in range(m)]
    for j in range(m):  # matrix = L D L^T: a becomes L D, y becomes L^-1 rhs
        for i in range(j + 1, m):
            factor = a[i][j] / a[j][j]
            for k in range(j + 1, i + 1):
                a[i][k] = a[i][k] - factor * a[k][j]
            y[i] = y[i] - factor * y[j]
    for i in reversed(range(m)):
        for k in range(i + 1, m):
            y[i] = y[i] - a[k][i] * y[k]
        y[i] = y[i] / a[i][i]
    total = functools.reduce(operator.add, y)
    return jnp.stack([a / total for a in y], axis=1)


def _solve_in_a_loop(matrix: jax.Array, valid: jax.Array) -> jax.Array:
    """The same, one column an iteration: compiling does not take longer for larger systems."""
    m = matrix.shape[-1]
    rows = jnp.arange(m, dtype=jnp.int32)

    def eliminate(i: jax.Array, table: jax.Array) -> jax.Array:
        here = (rows == i)[None, :, None]
        pivot = lax.dynamic_slice_in_dim(table, i, 1, axis=1)  # [B, 1, m + 1]
        pivot = pivot / lax.dynamic_slice_in_dim(pivot, i, 1, axis=2)
        column = lax.dynamic_slice_in_dim(table, i, 1, axis=2)  # [B, m, 1]
        return jnp.where(here, pivot, table - column * pivot)

    pivots = jnp.where(jnp.eye(m, dtype=bool) & valid[None], matrix, jnp.inf)
    smallest = jnp.min(pivots, axis=(1, 2))[:, None]  # [B, 1]
    rhs = jnp.where(valid, smallest, 0)
    table = jnp.concatenate([matrix, rhs[:, :, None]], axis=2)
    y = lax.fori_loop(jnp.int32(0), jnp.int32(m), eliminate, table)[:, :, m]
    return y / jnp.sum(y, axis=1, keepdims=True)
