"""The DEQ layer as a Linen module."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import core, errors
from flax import linen as nn

from deq_jax.adjoints import Adjoint, BackwardStats
from deq_jax.fixed_point import check_reparam, check_rule, fixed_point
from deq_jax.masks import has_method
from deq_jax.solvers import Equation, Keep, Solution, Solver
from deq_jax.tree import PyTree

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Map:
    """f(variables, z, x) of an unbound cell; equal for equal cells, so that nothing recompiles."""

    cell: nn.Module
    masked: bool

    def __call__(self, variables: PyTree, z: PyTree, x: PyTree) -> PyTree:
        operands = x if self.masked else () if x is None else (x,)
        with _named_errors():
            return self.cell.apply(variables, z, *operands)


def once(cell: Any, z: PyTree, x: PyTree = None, *masks: PyTree) -> PyTree:
    """Applies a cell once, after its method ``inject`` if it has one.

    Pass it as ``method=once`` to ``cell.init(key, z, x)`` and ``cell.apply(variables, z, x)``.

    Args:
      cell: a Linen module as `DEQ` takes it.
      z: state, tree of floating-point arrays ``[B, ...]``.
      x: operands of the cell, any tree; None calls ``cell(z)``.
      *masks: only for a cell with a method ``masks``: what that method drew, or None.

    Returns:
      A tree like ``z``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> variables = nn.Dense(3).init(jax.random.key(0), jnp.ones((2, 3)), method=once)
      >>> nn.Dense(3).apply(variables, jnp.ones((2, 3)), method=once).shape
      (2, 3)
    """
    x = cell.inject(x) if has_method(cell, "inject") else x
    return cell(z) if x is None and not masks else cell(z, x, *masks)


class DEQ(nn.Module):
    """Solves z = cell(z, x) for a Linen cell.

    The layer calls ``cell(z, x)``, or ``cell(z)`` if it is called without ``x``.  The cell returns
    a tree like ``z``.  Two optional methods of the cell change the call: a
    `deq_jax.masks.MaskedCell` takes dropout masks, a `deq_jax.masks.InjectingCell` computes once
    per solve whatever does not depend on z.

    The cell must be the same function at every step of a solve.  It must not draw random numbers
    or change variables: use ``nn.Dropout`` and ``nn.BatchNorm`` in evaluation mode only
    (``deterministic=True``, ``use_running_average=True``).  The solve does not update batch
    statistics.

    The layer stores the cell's variables under the name ``f``.  A module that the cell shares with
    its parent is an exception: its variables stay where the parent has them, and the gradient
    through the solve adds to the parent's.

    A jitted function that returns the Solution also returns ``sol.equation``: the weights and the
    operands.  Return ``sol.value`` and ``sol.stats``, or
    ``dataclasses.replace(sol, equation=None)``, to leave them out.

    Attributes:
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
      ValueError: if ``cell`` is not a Linen module, draws random numbers, changes variables, is
        applied outside this layer too, or shares a module whose weights ``reparam`` would split; or
        if solver and adjoint do not go together.

    Example:
      >>> import jax, jax.numpy as jnp, deq_jax as deq
      >>> from flax import linen as nn
      >>> init = deq.init.orthogonal(0.5)
      >>> class Cell(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, z, x):
      ...         return jnp.tanh(nn.Dense(z.shape[-1], kernel_init=init)(z) + x)
      >>> layer = deq.linen.DEQ(Cell(), solver=deq.Anderson(tol=1e-4))
      >>> x = jnp.ones((2, 4))
      >>> variables = layer.init(jax.random.key(0), jnp.zeros_like(x), x)
      >>> sol = layer.apply(variables, jnp.zeros_like(x), x)
      >>> sol.stats.converged.tolist()
      [True, True]

    Reference: Bai, Kolter, Koltun, Deep Equilibrium Models (2019).
    """

    cell: nn.Module
    solver: Solver
    adjoint: Adjoint | None = None
    reparam: Any = None
    keep: Keep = "best"
    states: tuple[int, ...] = ()
    fixed_point: Callable[..., Solution] = fixed_point

    def __post_init__(self) -> None:
        if not isinstance(self.cell, nn.Module):
            kind = self.cell if isinstance(self.cell, type) else type(self.cell)
            raise ValueError(
                f"got {kind} as cell; wanted an instance of a flax.linen.Module; call the class "
                "first, use deq_jax.nnx.DEQ for an NNX module, deq_jax.fixed_point for a function"
            )
        check_rule(self.solver, self.adjoint, self.keep)
        check_reparam(self.reparam)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        z0: PyTree,
        x: PyTree = None,
        train: bool = False,
        *,
        max_steps: int | jax.Array | None = None,
        probe: BackwardStats | None = None,
    ) -> Solution:
        """Solves for the batch.

        Args:
          z0: start, tree of floating-point arrays ``[B, ...]``.
          x: operands of the cell, any tree; None calls ``cell(z)``.
          train: whether to draw masks, from the stream ``dropout``; without effect on a cell that
            has no method ``masks``.  ``nn.vmap`` drops keyword arguments: pass it by position.
          max_steps: budget of this call, see `deq_jax.fixed_point`.
          probe: see `deq_jax.backward_probe`.

        Returns:
          Solution whose ``equation`` holds f, its parameters and operands; see
          `deq_jax.frobenius_penalty`.
        """
        cell, elsewhere = self.cell.unbind()
        if elsewhere:
            raise ValueError(
                f"got a cell that is applied outside this layer too ({type(cell).__name__}, with "
                f"variables at {'/'.join(self.cell.path)}); wanted a cell that only this layer "
                "applies, since it stores the cell's variables; share the cell's submodules instead"
            )
        borrowed = tuple(_borrowed(self.cell))
        masked = has_method(cell, "masks")
        masks = self._masks(cell, z0, x) if masked and train else None
        if not self.has_variable("params", "f"):
            operands = (x, masks) if masked else (x,)
            self._create(borrowed, lambda key: cell.init(key, z0, *operands, method=once))
        variables = {
            kind: nn.meta.unbox(self.get_variable(kind, "f"))
            for kind in self.variables
            if self.has_variable(kind, "f")
        }
        if self.reparam is not None:
            variables["params"] = self.reparam.merge(variables["params"])
        for path, module in borrowed:
            for kind, tree in core.unfreeze(nn.meta.unbox(module.variables)).items():
                if kind != "intermediates":
                    variables[kind] = _graft(variables.get(kind, {}), path, tree)
        if has_method(cell, "inject"):
            with _named_errors():
                x = cell.apply(variables, x, method="inject")
        f, operand = _Map(cell, masked), (x, masks) if masked else x
        sol = self.fixed_point(
            f,
            variables,
            z0,
            operand,
            solver=self.solver,
            adjoint=self.adjoint,
            max_steps=max_steps,
            probe=probe,
            keep=self.keep,
            states=self.states,
        )
        equation = sol.equation or Equation(f=f, params=variables, x=operand)
        return dataclasses.replace(sol, equation=equation)

    def _masks(self, cell: Any, z0: PyTree, x: PyTree) -> PyTree:
        if not self.has_rng("dropout"):  # a cell that drops nothing needs no key
            unused = jax.random.key(0)
            if not jax.tree.leaves(jax.eval_shape(cell.masks, unused, z0, x)):
                return cell.masks(unused, z0, x)
        return cell.masks(self.make_rng("dropout"), z0, x)

    def _create(
        self, borrowed: tuple[tuple[Path, nn.Module], ...], init: Callable[[jax.Array], PyTree]
    ) -> None:
        """Stores the initial variables: a shared module's with its parent, the others here."""
        others: dict[str, PyTree] = {}

        def params(key: jax.Array) -> PyTree:
            with _named_errors():
                fresh: dict[str, PyTree] = core.unfreeze(init(key))
            for path, module in reversed(borrowed):
                for kind in fresh:
                    fresh[kind], branch = _cut(fresh[kind], path)
                    if kind == "params" and self.reparam is not None:
                        self._check_whole(_graft({}, path, branch), module)
                    for name, value in branch.items():
                        if not module.has_variable(kind, name):
                            module.put_variable(kind, name, value)
            own = fresh.pop("params", {})
            others.update(fresh)
            return own if self.reparam is None else self.reparam.split(own)

        self.param("f", params)
        for kind, tree in others.items():
            if tree:
                self.put_variable(kind, "f", tree)

    def _check_whole(self, params: PyTree, module: nn.Module) -> None:
        if jax.tree.structure(self.reparam.split(params)) != jax.tree.structure(params):
            raise ValueError(
                f"got a cell that shares a module with its parent ({'/'.join(module.path)}), whose "
                "weights reparam would split; wanted the parent's weights whole; create the module "
                "in the cell, or leave it out by WeightNorm(select=...)"
            )


@contextlib.contextmanager
def _named_errors() -> Iterator[None]:
    """Says what Flax's errors about a cell that is not a fixed function mean for a solve."""
    try:
        yield
    except (errors.InvalidRngError, errors.ModifyScopeVariableError) as error:
        raise ValueError(
            f"got a cell that draws random numbers or changes variables in its call: {error}; "
            "wanted the same function at every step; use Dropout and BatchNorm in evaluation mode "
            "(deterministic=True, use_running_average=True) and SpectralNorm with "
            "update_stats=False; draw dropout masks in a method masks(key, z, x)"
        ) from error


def _borrowed(module: nn.Module, path: Path = ()) -> Iterator[tuple[Path, nn.Module]]:
    """Yields the modules in the fields of a cell whose variables are not below the cell's own.

    The path is that of the variables in an unbound copy of the cell, where Flax names a submodule
    after its field.
    """
    for field in dataclasses.fields(module):
        if field.name == "parent":
            continue
        for keys, part in jax.tree.leaves_with_path(
            getattr(module, field.name), is_leaf=lambda a: isinstance(a, nn.Module)
        ):
            if isinstance(part, nn.Module):
                suffix = (jax.tree_util.keystr((key,), simple=True) for key in keys)
                here = (*path, "_".join((field.name, *suffix)))
                if part.path[: len(module.path)] != module.path:
                    yield here, part
                yield from _borrowed(part, here)


def _graft(tree: PyTree, path: Path, branch: PyTree) -> PyTree:
    if not path:
        return {**tree, **branch}
    return {**tree, path[0]: _graft(tree.get(path[0], {}), path[1:], branch)}


def _cut(tree: PyTree, path: Path) -> tuple[PyTree, PyTree]:
    """Returns the tree without the branch at ``path``, and the branch."""
    name, *rest = path
    if name not in tree:
        return tree, {}
    if not rest:
        return {key: value for key, value in tree.items() if key != name}, tree[name]
    inner, branch = _cut(tree[name], tuple(rest))
    return {**tree, name: inner}, branch
