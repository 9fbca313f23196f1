"""Broyden's good method, stored by its steps alone."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax.solvers import history
from deq_jax.solvers.base import StopMode, check_count, check_settings
from deq_jax.tree import stat_dtype

# Least modulus of the update's denominator 1 + s^T H g / norm(s)^2.
_GUARD = 1e-3


class BroydenState(NamedTuple):
    """State of one solve: a ring buffer of steps and their Gram matrix.

    Attributes:
      k: int32 scalar, steps taken.
      steps: history of s_j = z_{j+1} - z_j.
      gram: ``[B, m, m]``, inner products of the steps, float32 or wider, indexed by slot.
    """

    k: jax.Array
    steps: history.History
    gram: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broyden:
    """Broyden's good method for f(z) - z = 0, started from the inverse Jacobian -I.

    With full steps s_j = -H_j g(z_j), g(z) = f(z) - z, the good update reads
    H_{j+1} = (I + s_{j+1} s_j^T / norm(s_j)^2) H_j, so H_k g is a combination of g and the steps,
    whose coefficients follow from the inner products of g with the steps and the steps' Gram matrix
    through a triangular system.  Only the steps are stored: half the memory of the usual pair of
    low-rank factors.

    Args:
      tol: residual at which a sample has converged.
      max_steps: largest number of evaluations of f.
      stop: ``"rel"``, norm(f(z) - z) / norm(f(z)), or ``"abs"``, norm(f(z) - z).
      memory: steps kept; the oldest factor of H is dropped beyond that.

    Returns:
      A solver for `solve` and `fixed_point`.

    Raises:
      ValueError: for a setting out of range.

    Reference:
      Broyden, A class of methods for solving nonlinear simultaneous equations, Math. Comp. 19
      (1965); Kelley, Iterative Methods for Linear and Nonlinear Equations, SIAM (1995), section
      7.3.
    """

    tol: float = 1e-3
    max_steps: int = 30
    stop: StopMode = "rel"
    memory: int = 20

    def __post_init__(self) -> None:
        check_settings(self)
        check_count("Broyden", "memory", self.memory)

    def init(self, z: jax.Array) -> BroydenState:
        """Returns an empty memory for states like ``z [B, D]``."""
        m = self._rows
        column = jnp.zeros_like(z[:, :1], dtype=stat_dtype(z.dtype))
        return BroydenState(
            k=jnp.int32(0),
            steps=history.empty(z, m),
            gram=jnp.broadcast_to(column[:, :, None], (z.shape[0], m, m)),
        )

    @property
    def _rows(self) -> int:
        return min(self.memory, self.max_steps)

    def step(
        self, z: jax.Array, fz: jax.Array, state: BroydenState
    ) -> tuple[jax.Array, BroydenState]:
        """Returns the next iterate ``[B, D]`` and the memory with the step to it taken in."""
        m = self._rows
        g = fz - z
        filled = jnp.minimum(state.k, m)
        # From the oldest step to the newest; slots not in use come last.
        order = (jnp.where(state.k > m, state.k, 0) + jnp.arange(m)) % m
        gram = state.gram[:, order][:, :, order]  # [B, m, m]
        p = history.inner(state.steps, g, filled)[:, order]  # [B, m]
        weights, last = _coefficients(gram, p, filled)
        scale = 1 / _guarded(1 + last)  # [B]
        in_slots = jnp.zeros_like(weights).at[:, order].set(weights)
        mixed = history.combine(state.steps, in_slots, filled)
        s = ((g - mixed) * scale[:, None].astype(z.dtype)).astype(z.dtype)
        slot = state.k % m
        steps = history.write(state.steps, slot, s)
        # The new row would also follow from p and gram by linearity, without this third pass, but
        # rounding then builds up: in float32 and bfloat16 hard problems stalled or blew up.
        row = history.inner(steps, s, jnp.minimum(state.k + 1, m))
        here = jnp.arange(m) == slot
        gram = jnp.where(here[None, :, None], row[:, None, :], state.gram)
        gram = jnp.where(here[None, None, :], row[:, :, None], gram)
        return z + s, BroydenState(state.k + 1, steps, gram)


def _coefficients(gram: jax.Array, p: jax.Array, filled: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights of the steps in -H g, and the inner product that scales the next step.

    With v_0 = -g and v_{j+1} = v_j + c_j s_{j+1}, c_j = s_j^T v_j / norm(s_j)^2, the last v is H g.
    Taking inner products with s_j makes this the unit lower triangular system
    c_j - sum_{i<j} (s_j^T s_{i+1} / norm(s_j)^2) c_i = -s_j^T g / norm(s_j)^2.

    Args:
      gram: ``[B, m, m]`` inner products of the steps, oldest first.
      p: ``[B, m]`` inner products of the steps with g.
      filled: integer scalar n, number of steps in use.

    Returns:
      The weight of every step in sum_i c_i s_{i+1}, ``[B, m]``, and c_{n-1} ``[B]`` (0 for n = 0).
    """
    m = gram.shape[-1]
    rows = jnp.arange(m)
    used = (rows < filled)[None]
    diagonal = jnp.diagonal(gram, axis1=1, axis2=2)
    tiny = jnp.finfo(gram.dtype).tiny
    inverse = jnp.where(used, 1 / jnp.maximum(diagonal, tiny), 0)  # [B, m]
    next_step = jnp.pad(gram[:, :, 1:], ((0, 0), (0, 0), (0, 1)))
    lower = jnp.tril(next_step, -1) * inverse[:, :, None]
    system = jnp.eye(m, dtype=gram.dtype)[None] - lower
    c = lax.linalg.triangular_solve(
        system, -(p * inverse)[:, :, None], left_side=True, lower=True, unit_diagonal=True
    )[:, :, 0]
    newest = (rows == filled - 1)[None]
    last = jnp.sum(jnp.where(newest, c, 0), axis=1)
    weights = jnp.pad(jnp.where(used & ~newest, c, 0)[:, :-1], ((0, 0), (1, 0)))
    return weights, last


def _guarded(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.abs(x) < _GUARD, jnp.where(x < 0, -_GUARD, _GUARD), x)
