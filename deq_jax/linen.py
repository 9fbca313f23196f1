"""The DEQ layer as a Linen module."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from deq_jax import implicit
from deq_jax.implicit import Adjoint, BackwardStats
from deq_jax.solvers import Equation, Solution, Solver
from deq_jax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class _Map:
    """f(params, z, x) of a cell; equal for equal cells, so that caches of compiled code hit."""

    cell: nn.Module
    masked: bool

    def __call__(self, params: PyTree, z: PyTree, x: PyTree) -> PyTree:
        operands = x if self.masked else (x,)
        return self.cell.apply({"params": params}, z, *operands)


def once(cell: Any, z: PyTree, x: PyTree, *masks: PyTree) -> PyTree:
    """Applies a cell once, its method `inject` first if it has one.

    For ``cell.init(key, z, x, method=once)`` and ``cell.apply(params, z, x, method=once)``.

    Args:
      cell: a Linen module as `DEQ` takes it.
      z: state, tree of floating-point arrays ``[B, ...]``.
      x: operands of the cell, any tree.
      *masks: of a cell with a method `masks`: what it drew, or None.

    Returns:
      A tree like ``z``.
    """
    return cell(z, cell.inject(x) if hasattr(cell, "inject") else x, *masks)


class DEQ(nn.Module):
    """Solves z = cell(z, x) for a Linen cell.

    The cell is called as ``cell(z, x)`` and returns a tree like ``z``; it must be pure: parameters
    only, no batch statistics, no random streams.  A cell with a method ``masks(key, z, x)`` (any
    tree; no parameters used) is called as ``cell(z, x, masks)`` instead: masks are drawn once per
    solve when training, and are None otherwise.  Of a cell with a method ``inject(x)`` the call is
    ``cell(z, cell.inject(x))``: what of it does not depend on z is computed once per solve, with
    the cell's parameters.

    Attributes:
      cell: the module to iterate; its parameters are those of this layer, under ``f``.
      solver: the forward method.
      adjoint: the gradient rule; ``Implicit(solver)`` if None.
      reparam: an object with ``split`` and ``merge`` such as `deq_jax.weight_norm`; parameters are
        stored split and merged once per call, outside the solve.
      fixed_point: what solves; replace it to run the solve per device.

    Example:
      >>> import jax, jax.numpy as jnp, deq_jax as deq
      >>> init = deq.init.orthogonal(0.5)
      >>> class Cell(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, z, x):
      ...         return jnp.tanh(nn.Dense(z.shape[-1], kernel_init=init)(z) + x)
      >>> layer = DEQ(Cell(), solver=deq.Anderson(tol=1e-4))
      >>> x = jnp.ones((2, 4))
      >>> variables = layer.init(jax.random.key(0), jnp.zeros_like(x), x, train=False)
      >>> sol = layer.apply(variables, jnp.zeros_like(x), x, train=False)
      >>> sol.stats.converged.tolist()
      [True, True]
    """

    cell: nn.Module
    solver: Solver
    adjoint: Adjoint | None = None
    reparam: Any = None
    fixed_point: Callable[..., Solution] = implicit.fixed_point

    @nn.compact
    def __call__(
        self,
        z0: PyTree,
        x: PyTree,
        *,
        train: bool,
        max_steps: int | jax.Array | None = None,
        probe: BackwardStats | None = None,
    ) -> Solution:
        """Solves for the batch.

        Args:
          z0: start, tree of floating-point arrays ``[B, ...]``.
          x: operands of the cell, any tree.
          train: whether masks are drawn (stream ``dropout``).
          max_steps: budget of this call, see `deq_jax.fixed_point`.
          probe: see `deq_jax.backward_probe`.

        Returns:
          Solution with its ``equation`` filled in; see `deq_jax.frobenius_penalty`.
        """
        cell = self.cell.clone(parent=None, name=None)
        masked = hasattr(cell, "masks")
        masks = cell.masks(self.make_rng("dropout"), z0, x) if masked and train else None

        def make(key: jax.Array) -> PyTree:
            operands = (x, masks) if masked else (x,)
            params = cell.init(key, z0, *operands, method=once).get("params", {})
            return params if self.reparam is None else self.reparam.split(params)

        params = self.param("f", make)
        if self.reparam is not None:
            params = self.reparam.merge(params)
        if hasattr(cell, "inject"):
            x = cell.apply({"params": params}, x, method="inject")
        f, operand = _Map(cell, masked), (x, masks) if masked else x
        sol = self.fixed_point(
            f,
            params,
            z0,
            operand,
            solver=self.solver,
            adjoint=self.adjoint,
            max_steps=max_steps,
            probe=probe,
        )
        equation = sol.equation or Equation(f=f, params=params, x=operand)
        return dataclasses.replace(sol, equation=equation)
