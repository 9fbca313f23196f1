"""Broyden's good method, stored by its steps alone."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax import tree
from deq_jax.solvers import history
from deq_jax.solvers.base import StopMode, check_settings
from deq_jax.tree import PyTree

# Least modulus of the update's denominator 1 + s^T H g / norm(s)^2.
_GUARD = 1e-3


class BroydenState(NamedTuple):
    """State of one solve.

    Attributes:
      k: int32 scalar, steps taken.
      steps: history of s_j = z_{j+1} - z_j.
      weights: ``[B, m, m]``, the matrix W of `Broyden`, by slot, float32 or wider.
    """

    k: jax.Array
    steps: history.History
    weights: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broyden:
    """Broyden's good method for f(z) - z = 0, started from the inverse Jacobian -I.

    With steps s_j = -damping H_j g(z_j), g(z) = f(z) - z, the good update reads

        H_{j+1} = (I + (s_{j+1} - (1 - damping) s_j) s_j^T / norm(s_j)^2) H_j.

    So H_k g is a combination of g and the steps, and only the steps are stored: half the memory of
    the usual pair of low-rank factors.  With v_0 = -g and c_j = s_j^T v_j / norm(s_j)^2,

        v_{j+1} = v_j + c_j (s_{j+1} - (1 - damping) s_j),

    the last v is H_k g.  The c_j solve (I - L) c = -p, with p_j = s_j^T g / norm(s_j)^2 and
    L_ji = s_j^T (s_{i+1} - (1 - damping) s_i) / norm(s_j)^2 for i < j.  A new step adds the row
    e + l T to T = (I - L)^-1; forgetting the oldest one sets its row and column to zero.  The state
    keeps W with W_{j+1,i} = T_ji / norm(s_i)^2.  Entry j + 1 of -W (s_i^T g)_i is c_j, in the slot
    of s_{j+1}: nothing has to be sorted.

    Args:
      tol: residual at which a sample has converged.
      max_steps: largest number of evaluations of f.
      stop: ``"rel"`` or ``"abs"``, see `SolveStats`.
      memory: steps kept; no more than ``max_steps`` are stored.
      damping: step length in (0, 1]; 1 is the full quasi-Newton step.
      restart: what happens when the memory is full: forget all steps and start again from -I if
        True, forget the oldest one if False.

    Returns:
      A solver for `solve` and `fixed_point`.

    Raises:
      ValueError: for a setting out of range.

    Example:
      >>> import jax.numpy as jnp, deq_jax as deq
      >>> sol = deq.solve(deq.Broyden(tol=1e-6), jnp.cos, jnp.ones((1, 1)))
      >>> round(float(sol.value[0, 0]), 4)
      0.7391

    Reference:
      Broyden, A class of methods for solving nonlinear simultaneous equations, Math. Comp. 19
      (1965); Kelley, Iterative Methods for Linear and Nonlinear Equations, SIAM (1995), section
      7.3.
    """

    tol: float = 1e-3
    max_steps: int = 30
    stop: StopMode = "rel"
    memory: int = 20
    damping: float = 1.0
    restart: bool = False

    def __post_init__(self) -> None:
        check_settings(self, counts=("memory",), fractions=("damping",))

    def init(self, z: PyTree) -> BroydenState:
        """Returns an empty memory for states like ``z``, a tree ``[B, ...]``."""
        return BroydenState(
            k=jnp.int32(0),
            steps=history.empty(z, self._rows),
            weights=history.gram(z, self._rows),
        )

    @property
    def _rows(self) -> int:
        return min(self.memory, self.max_steps)

    def step(self, z: PyTree, fz: PyTree, state: BroydenState) -> tuple[PyTree, BroydenState]:
        """Returns the next iterate, a tree ``[B, ...]``, and the memory with its step taken in."""
        m, lag = self._rows, 1 - self.damping
        slot = state.k % m
        slots = jnp.arange(m, dtype=jnp.int32)
        weights = state.weights
        if self.restart:
            weights = jnp.where(slot == 0, 0, weights)

        g = jax.tree.map(jnp.subtract, fz, z)
        p = state.steps.inner(g, jnp.minimum(state.k, m))  # [B, m]
        c = -_apply(weights, p)  # [B, m], of the steps after those in p
        last = lax.dynamic_slice_in_dim(c, slot, 1, axis=1)[:, 0]  # [B], of the step to be taken
        c = jnp.where(slots == slot, 0, c) - (lag * jnp.roll(c, -1, axis=1) if lag else 0)
        length = self.damping / _guarded(1 + self.damping * last)  # [B]
        mixed = state.steps.combine(c, jnp.minimum(state.k, m))

        def leaf(g: jax.Array, mixed: jax.Array) -> jax.Array:
            wide = (g.astype(mixed.dtype) - mixed) * tree.spread(length, g).astype(mixed.dtype)
            return wide.astype(g.dtype)

        s = jax.tree.map(leaf, g, mixed)
        steps = state.steps.write(slot, s)
        # The row would also follow from p and W by linearity, without this third pass, but rounding
        # then builds up: in float32 and bfloat16 hard problems stalled or blew up.
        row = steps.inner(s, jnp.minimum(state.k + 1, m))  # [B, m]
        square = lax.dynamic_slice_in_dim(row, slot, 1, axis=1)  # [B, 1]
        scale = 1 / jnp.maximum(square, jnp.finfo(row.dtype).tiny)
        if lag:
            row -= lag * jnp.roll(row, 1, axis=1)
        kept = jnp.where(slots == slot, 0, weights)  # without the step that is overwritten
        added = jnp.where(slots == slot, scale, _apply(kept.swapaxes(1, 2), row) * scale)
        here = slots == (slot + 1) % m
        weights = jnp.where(here[:, None], added[:, None, :], kept)
        z_next = jax.tree.map(jnp.add, z, s)
        return z_next, BroydenState(state.k + 1, steps, weights)

    def transposed_inverse(self, v: PyTree, state: BroydenState, moves: jax.Array) -> PyTree:
        """Applies -H^T, an approximation of (I - J)^-T with J = df/dz at the last iterate.

        From the definitions above, -H^T v = v + sum_i (W^T e)_i s_i, where e_{j+1} is the product
        of v with s_{j+1} - (1 - damping) s_j, in the slot of s_{j+1}.

        Args:
          v: tree ``[B, ...]``.
          state: from a solve.
          moves: int32 ``[B]``, how many steps of a sample to use; later ones are left out.

        Returns:
          Tree like ``v``.
        """
        m, lag = self._rows, 1 - self.damping
        filled = jnp.minimum(state.k, m)
        # Numbers of the steps by slot; the row of the oldest one belongs to a step not yet taken.
        number = state.k - 1 - (state.k - 1 - jnp.arange(m, dtype=jnp.int32)) % m
        first = jnp.maximum(0, state.k - m + 1)
        used = (number >= first)[None] & (number[None] < moves[:, None])  # [B, m]
        products = state.steps.inner(v, filled)  # [B, m]
        e = products - (lag * jnp.roll(products, 1, axis=1) if lag else 0)
        c = _apply(state.weights.swapaxes(1, 2), jnp.where(used, e, 0))
        mixed = state.steps.combine(c, filled)
        return jax.tree.map(lambda v, m: (v.astype(m.dtype) + m).astype(v.dtype), v, mixed)


def _apply(matrix: jax.Array, v: jax.Array) -> jax.Array:
    """Multiplies ``[B, m, m]`` by ``[B, m]``, elementwise: that fuses with its neighbours."""
    return jnp.sum(matrix * v[:, None, :], axis=2)


def _guarded(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.abs(x) < _GUARD, jnp.where(x < 0, -_GUARD, _GUARD), x)
