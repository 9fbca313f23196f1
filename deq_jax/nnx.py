"""The DEQ layer as an NNX module."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from deq_jax.adjoints import Adjoint, BackwardStats
from deq_jax.fixed_point import check_reparam, check_rule, fixed_point
from deq_jax.masks import has_method
from deq_jax.solvers import Equation, Keep, Solution, Solver
from deq_jax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class _Map:
    """f(params, z, x) of a cell; equal for equal cells, so that nothing recompiles."""

    graph: Any
    masked: bool

    def __call__(self, params: PyTree, z: PyTree, x: PyTree) -> PyTree:
        operands = x if self.masked else () if x is None else (x,)
        return self.call("__call__", params, z, *operands)

    def call(self, method: str, params: PyTree, *operands: PyTree) -> PyTree:
        cell: Any = nnx.merge(self.graph, *map(nnx.State, params))
        out = getattr(cell, method)(*operands)
        after = dict(jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(cell))))
        changed = [
            jax.tree_util.keystr(path[1:], simple=True, separator=".")
            for path, before in jax.tree.leaves_with_path(tuple(params))
            if after.get(path[1:]) is not before
        ]
        if changed:
            raise ValueError(
                f"got a cell whose variables change when it is called, {', '.join(changed)}; "
                "wanted the same function at every step; call layer.eval() or set Dropout and "
                "BatchNorm to evaluation mode, draw dropout masks in a method masks(key, z, x), "
                "and keep batch statistics outside the cell"
            )
        return out


class DEQ(nnx.Module):
    """Solves z = cell(z, x) for an NNX cell.

    The layer calls ``cell(z, x)``, or ``cell(z)`` if it is called without ``x``.  The cell returns
    a tree like ``z``.  Two optional methods of the cell change the call: a
    `deq_jax.masks.MaskedCell` takes dropout masks, a `deq_jax.masks.InjectingCell` computes once
    per solve whatever does not depend on z.

    The cell must be the same function at every step of a solve, so no call may change its
    variables.  Dropout and BatchNorm are accepted in evaluation mode: after ``layer.eval()``, or
    with ``deterministic=True`` and ``use_running_average=True``.

    The layer keeps the cell itself, as ``layer.cell``.  A module that the cell shares with another
    module has one set of weights: gradients add up and updates reach both.

    With a ``reparam``, the layer replaces every weight that ``split`` changes by its parts, in the
    cell: ``layer.cell.linear.kernel`` becomes ``{"g": ..., "v": ...}``.  From then on only the
    layer can call the cell.  Weights that ``split`` leaves alone may still be shared.

    A jitted function that returns the Solution also returns ``sol.equation``: the weights and the
    operands.  Return ``sol.value`` and ``sol.stats``, or
    ``dataclasses.replace(sol, equation=None)``, to leave them out.

    In a Linen model, ``nnx.bridge.ToLinen(lambda rngs: DEQ(Cell(rngs), solver=...))`` is a module.

    Args:
      cell: the module to iterate.
      solver: the forward method.
      adjoint: the gradient rule; ``Implicit(solver)`` if None.
      reparam: an object with ``split`` and ``merge`` such as `deq_jax.weight_norm`.  The layer
        stores the split parameters and merges them once per call, outside the solve.
      keep: the iterate to return, ``"best"`` (smallest residual) or ``"last"``.
      states: numbers of the iterates to sample into ``sol.states``, see `deq_jax.fixed_point`.
      fixed_point: the function that solves, called like `deq_jax.fixed_point`; replace it to solve
        on every device separately.

    Raises:
      ValueError: if ``cell`` is not an NNX module, or solver and adjoint do not go together.

    Example:
      >>> import jax.numpy as jnp, deq_jax as deq
      >>> from flax import nnx
      >>> class Cell(nnx.Module):
      ...     def __init__(self, rngs):
      ...         init = deq.init.orthogonal(0.5)
      ...         self.linear = nnx.Linear(4, 4, kernel_init=init, rngs=rngs)
      ...     def __call__(self, z, x):
      ...         return jnp.tanh(self.linear(z) + x)
      >>> layer = deq.nnx.DEQ(Cell(nnx.Rngs(0)), solver=deq.Anderson(tol=1e-4))
      >>> layer(jnp.zeros((2, 4)), jnp.ones((2, 4))).stats.converged.tolist()
      [True, True]

    Reference: Bai, Kolter, Koltun, Deep Equilibrium Models (2019).
    """

    def __init__(
        self,
        cell: nnx.Module,
        *,
        solver: Solver,
        adjoint: Adjoint | None = None,
        reparam: Any = None,
        keep: Keep = "best",
        states: Sequence[int] = (),
        fixed_point: Callable[..., Solution] = fixed_point,
    ) -> None:
        if not isinstance(cell, nnx.Module):
            kind = cell if isinstance(cell, type) else type(cell)
            raise ValueError(
                f"got {kind} as cell; wanted an instance of a flax.nnx.Module; call the class "
                "first, use deq_jax.linen.DEQ for a Linen module, deq_jax.fixed_point for a "
                "function"
            )
        check_rule(solver, adjoint, keep)
        check_reparam(reparam)
        self.cell = cell
        self.states = tuple(states)
        self.solver, self.adjoint, self.keep = solver, adjoint, keep
        self.reparam, self.fixed_point = reparam, fixed_point
        if reparam is not None:
            _apply(reparam.split, cell)

    def __call__(
        self,
        z0: PyTree,
        x: PyTree = None,
        *,
        key: jax.Array | None = None,
        max_steps: int | jax.Array | None = None,
        probe: BackwardStats | None = None,
    ) -> Solution:
        """Solves for the batch.

        Args:
          z0: start, tree of floating-point arrays ``[B, ...]``.
          x: operands of the cell, any tree; None calls ``cell(z)``.
          key: PRNG key of the masks in training, None in evaluation; without effect on a cell that
            has no method ``masks``.
          max_steps: budget of this call, see `deq_jax.fixed_point`.
          probe: see `deq_jax.backward_probe`.

        Returns:
          Solution whose ``equation`` holds f, its parameters and operands; see
          `deq_jax.frobenius_penalty`.

        Raises:
          ValueError: if calling the cell changes its variables.
        """
        cell = self.cell
        if self.reparam is not None:
            cell = nnx.merge(*nnx.split(cell))  # other modules, the same variables
            _apply(self.reparam.merge, cell)
        graph, *states = nnx.split(cell, nnx.Param, ...)
        params = tuple(nnx.to_pure_dict(state) for state in states)
        f = _Map(graph, has_method(cell, "masks"))
        operand = f.call("inject", params, x) if has_method(cell, "inject") else x
        if f.masked:
            operand = (operand, None if key is None else f.call("masks", params, key, z0, x))
        sol = self.fixed_point(
            f,
            params,
            z0,
            operand,
            solver=self.solver,
            adjoint=self.adjoint,
            max_steps=max_steps,
            probe=probe,
            keep=self.keep,
            states=self.states,
        )
        equation = sol.equation or Equation(f=f, params=params, x=operand)
        return dataclasses.replace(sol, equation=equation)


def _apply(change: Callable[[PyTree], PyTree], cell: nnx.Module) -> None:
    """Replaces the parameters that a function of their tree changes, in the modules themselves."""
    params = nnx.to_pure_dict(nnx.state(cell, nnx.Param))
    _replace(cell, params, change(params))


def _replace(node: Any, old: Mapping[Any, Any], new: Mapping[Any, Any]) -> None:
    for key, part in new.items():
        indexed = any((isinstance(key, int), isinstance(node, Mapping)))
        child = node[key] if indexed else getattr(node, key)
        if isinstance(part, Mapping) and isinstance(old[key], Mapping):
            _replace(child, old[key], part)
        elif part is not old[key]:
            # A part that is the old array, as v of weight_norm, keeps its variable.
            params = nnx.data(
                jax.tree.map(lambda a, o=old[key], c=child: c if a is o else nnx.Param(a), part)
            )
            if indexed:
                node[key] = params
            else:
                setattr(node, key, params)
