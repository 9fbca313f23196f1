"""The DEQ layer as an NNX module."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from deq_jax import implicit
from deq_jax.implicit import Adjoint, BackwardStats
from deq_jax.solvers import Equation, Solution, Solver
from deq_jax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class _Map:
    """f(params, z, x) of a cell; equal for equal cells, so that caches of compiled code hit."""

    graph: Any
    masked: bool

    def __call__(self, params: PyTree, z: PyTree, x: PyTree) -> PyTree:
        weights, others = params
        operands = x if self.masked else (x,)
        return nnx.merge(self.graph, nnx.State(weights), others)(z, *operands)


class DEQ(nnx.Module):
    """Solves z = cell(z, x) for an NNX cell.

    The cell is called as ``cell(z, x)`` and returns a tree like ``z``; it must not change its own
    variables.  A cell with a method ``masks(key, z, x)`` is called as ``cell(z, x, masks)``: masks
    are drawn once per solve when a key is given, and are None otherwise.  Of a cell with a method
    ``inject(x)`` the call is ``cell(z, cell.inject(x))``: what of it does not depend on z is
    computed once per solve.

    Args:
      cell: the module to iterate.  This layer takes its parameters over, as ``layer.params``.
      solver: the forward method.
      adjoint: the gradient rule; ``Implicit(solver)`` if None.
      reparam: an object with ``split`` and ``merge`` such as `deq_jax.weight_norm`; parameters are
        stored split and merged once per call, outside the solve.
      fixed_point: what solves; replace it to run the solve per device.

    Raises:
      ValueError: for a cell with random streams or batch statistics, which would change in a solve.

    Example:
      >>> import jax.numpy as jnp, deq_jax as deq
      >>> class Cell(nnx.Module):
      ...     def __init__(self, rngs):
      ...         init = deq.init.orthogonal(0.5)
      ...         self.linear = nnx.Linear(4, 4, kernel_init=init, rngs=rngs)
      ...     def __call__(self, z, x):
      ...         return jnp.tanh(self.linear(z) + x)
      >>> layer = DEQ(Cell(nnx.Rngs(0)), solver=deq.Anderson(tol=1e-4))
      >>> layer(jnp.zeros((2, 4)), jnp.ones((2, 4))).stats.converged.tolist()
      [True, True]
    """

    def __init__(
        self,
        cell: nnx.Module,
        *,
        solver: Solver,
        adjoint: Adjoint | None = None,
        reparam: Any = None,
        fixed_point: Callable[..., Solution] = implicit.fixed_point,
    ) -> None:
        graph, weights, changing, others = nnx.split(
            cell, nnx.Param, nnx.Any(nnx.RngState, nnx.BatchStat), ...
        )
        if jax.tree.leaves(changing):
            names = sorted(".".join(map(str, path)) for path, _ in nnx.to_flat_state(changing))
            raise ValueError(
                f"got a cell whose variables change when it is called, {', '.join(names)}; wanted "
                "parameters only; draw masks in a method masks(key, z, x), and keep batch "
                "statistics outside the cell"
            )
        plain = nnx.to_pure_dict(weights)
        stored = plain if reparam is None else reparam.split(plain)
        self.params = nnx.data(jax.tree.map(nnx.Param, stored))
        self.others = nnx.data(others)
        self.graph = graph
        self.masked = hasattr(cell, "masks")
        self.solver, self.adjoint = solver, adjoint
        self.reparam, self.fixed_point = reparam, fixed_point

    def __call__(
        self,
        z0: PyTree,
        x: PyTree,
        *,
        key: jax.Array | None = None,
        max_steps: int | jax.Array | None = None,
        probe: BackwardStats | None = None,
    ) -> Solution:
        """Solves for the batch.

        Args:
          z0: start, tree of floating-point arrays ``[B, ...]``.
          x: operands of the cell, any tree.
          key: PRNG key for the masks when training; None in evaluation.
          max_steps: budget of this call, see `deq_jax.fixed_point`.
          probe: see `deq_jax.backward_probe`.

        Returns:
          Solution with its ``equation`` filled in; see `deq_jax.frobenius_penalty`.
        """
        weights = nnx.to_pure_dict(nnx.state(self, nnx.Param))["params"]
        if self.reparam is not None:
            weights = self.reparam.merge(weights)
        f, params = _Map(self.graph, self.masked), (weights, self.others)
        cell: Any = nnx.merge(self.graph, nnx.State(weights), self.others)
        operand = cell.inject(x) if hasattr(cell, "inject") else x
        if self.masked:
            operand = (operand, None if key is None else cell.masks(key, z0, x))
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
