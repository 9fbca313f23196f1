"""The solver protocol and the one loop over z that runs every solver."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax import tree
from deq_jax.tree import PyTree

StopMode = Literal["rel", "abs"]

# Keeps norm(f(z) - z) / norm(f(z)) finite where f(z) = 0.
_TINY = 1e-9


class Solver(Protocol):
    """What `solve` needs of a root-finding method for z = f(z).

    A solver is a value: hashable, without state of its own.  ``init`` makes the state of one solve
    from the flattened start ``z [B, D]``; ``step`` turns an iterate ``z``, its image ``fz`` (both
    ``[B, D]``) and the state into the next iterate and state.  Samples must not mix.
    """

    @property
    def tol(self) -> float:
        """Residual at or below which a sample has converged."""
        ...

    @property
    def max_steps(self) -> int:
        """Largest number of evaluations of f."""
        ...

    @property
    def stop(self) -> StopMode:
        """``"rel"`` or ``"abs"``: how the residual is measured."""
        ...

    def init(self, z: jax.Array) -> Any:
        """Returns the state before the first step."""
        ...

    def step(self, z: jax.Array, fz: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """Returns the next iterate and the next state."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SolveStats:
    """What one solve did, sample by sample.

    Attributes:
      num_steps: int32 ``[B]``, evaluations of f until the sample converged or was given up.
      residual: float32 ``[B]``, residual of the returned value (``inf`` if none was finite).
      converged: bool ``[B]``, whether ``residual <= tol``.
      trace: float32 ``[max_steps, B]``, residual of every iterate, ``inf`` after the last one.
    """

    num_steps: jax.Array
    residual: jax.Array
    converged: jax.Array
    trace: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Equation:
    """The equation z = f(params, z, x) that a layer solved, with what stood still in it.

    Attributes:
      f: the map, static.
      params: its parameters as the solve saw them (weights already normalised).
      x: its other operands (injected input, dropout masks, keys).
    """

    f: Callable[[PyTree, PyTree, PyTree], PyTree] = dataclasses.field(metadata={"static": True})
    params: PyTree
    x: PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Solution:
    """The answer of a solve.

    Attributes:
      value: the best iterate of every sample, a tree like ``z0``.
      stats: how it was found.
      equation: filled in by the Flax layers, whose users hold neither f nor its parameters.
    """

    value: PyTree
    stats: SolveStats
    equation: Equation | None = None

    @property
    def at(self) -> tuple[Callable[..., PyTree], PyTree, PyTree, PyTree]:
        """``(f, params, z, x)``: the leading arguments of the functions in `deq_jax.jacobian`."""
        if self.equation is None:
            raise ValueError(
                "got a Solution without an equation; wanted one returned by a linen or nnx DEQ "
                "layer; pass f, params, z and x yourself after a bare fixed_point or solve"
            )
        return self.equation.f, self.equation.params, self.value, self.equation.x


class _Loop(NamedTuple):
    """Carry of the loop; every array but ``k`` has a batch axis."""

    k: jax.Array
    z: jax.Array
    state: Any
    best: jax.Array
    done: jax.Array
    num_steps: jax.Array
    residual: jax.Array
    trace: jax.Array


def check_settings(solver: Any) -> None:
    """Refuses settings that no solver can work with.

    Args:
      solver: anything with ``tol``, ``max_steps`` and ``stop``.

    Raises:
      ValueError: naming the setting, what was given and what would do.
    """
    name = type(solver).__name__
    if not (isinstance(solver.tol, (int, float)) and 0 < solver.tol < math.inf):
        raise ValueError(
            f"{name}: got tol={solver.tol!r}; wanted a positive finite number; to run a fixed "
            "number of steps use a tiny tol such as 1e-30"
        )
    check_count(name, "max_steps", solver.max_steps)
    if solver.stop not in ("rel", "abs"):
        raise ValueError(
            f'{name}: got stop={solver.stop!r}; wanted "rel", norm(f(z) - z) / norm(f(z)), or '
            '"abs", norm(f(z) - z)'
        )


def check_count(name: str, setting: str, value: Any) -> None:
    """Refuses a setting that is not a whole number >= 1.

    Args:
      name: whose setting it is.
      setting: its name.
      value: what was given.

    Raises:
      ValueError: if ``value`` is not an int, or is below one.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: got {setting}={value!r}; wanted a whole number of at least 1")


def check_fraction(name: str, setting: str, value: Any) -> None:
    """Refuses a setting that is not a number in (0, 1].

    Args:
      name: whose setting it is.
      setting: its name.
      value: what was given.

    Raises:
      ValueError: if ``value`` lies outside (0, 1].
    """
    if not (isinstance(value, (int, float)) and 0 < value <= 1):
        raise ValueError(f"{name}: got {setting}={value!r}; wanted a number in (0, 1]")


def _budget(solver: Solver, max_steps: int | jax.Array | None) -> int | jax.Array:
    if max_steps is None:
        return solver.max_steps
    if isinstance(max_steps, int):
        if not 0 <= max_steps <= solver.max_steps:
            raise ValueError(
                f"got max_steps={max_steps} for a solver with max_steps={solver.max_steps}; wanted "
                "0 <= max_steps <= the solver's, which sizes stats.trace; raise the solver's"
            )
        return max_steps
    if jnp.shape(max_steps) or not jnp.issubdtype(jnp.result_type(max_steps), jnp.integer):
        raise ValueError(
            f"got max_steps of type {tree.describe(max_steps)}; wanted an int or an integer scalar"
        )
    return jnp.minimum(max_steps, solver.max_steps)


def check_image(z: PyTree, fz: PyTree) -> None:
    """Refuses an f that does not map the state to a state of the same kind.

    Args:
      z: the argument of f.
      fz: its image.

    Raises:
      ValueError: if tree structure, shapes or dtypes differ.
    """
    same = jax.tree.structure(z) == jax.tree.structure(fz) and all(
        jnp.shape(a) == jnp.shape(b) and jnp.result_type(a) == jnp.result_type(b)
        for a, b in zip(jax.tree.leaves(z), jax.tree.leaves(fz), strict=True)
    )
    if not same:
        raise ValueError(
            f"f returned {tree.describe(fz)}; wanted {tree.describe(z)}, the tree, shapes and "
            "dtypes of z0; cast or reshape inside f, or start from another z0"
        )


def solve(
    solver: Solver,
    f: Callable[[PyTree], PyTree],
    z0: PyTree,
    *,
    max_steps: int | jax.Array | None = None,
) -> Solution:
    """Solves z = f(z) for every sample of a batch.

    One evaluation of f per step.  Each sample has its own residual, norm(f(z) - z) / norm(f(z)) or
    norm(f(z) - z), stops on its own and returns its best iterate; the loop ends when all samples
    have stopped or the budget is spent.  A sample whose residual is no longer finite is given up
    with the best finite iterate it had.  Not differentiable: see `deq_jax.fixed_point`.

    Args:
      solver: the method, e.g. ``Anderson(tol=1e-3, max_steps=30)``.
      f: maps a tree of arrays ``[B, ...]`` to the same tree, sample by sample.
      z0: start, tree of floating-point arrays ``[B, ...]``.
      max_steps: budget of this call, an int or a traced integer scalar; at most the solver's own.
        0 returns ``z0`` unevaluated.

    Returns:
      Solution with ``value`` like ``z0`` and the statistics.

    Raises:
      ValueError: for an empty batch, an f that changes tree, shape or dtype, or a bad budget.

    Example:
      >>> import jax.numpy as jnp
      >>> sol = solve(Picard(tol=1e-6, max_steps=100), jnp.cos, jnp.ones((1, 1)))
      >>> round(float(sol.value[0, 0]), 4)
      0.7391
    """
    budget = _budget(solver, max_steps)
    z, unravel = tree.batch_ravel(z0)  # [B, D]
    column = jnp.zeros_like(z[:, 0], dtype=jnp.float32)  # [B], carries z's sharding

    def body(c: _Loop) -> _Loop:
        arg = unravel(c.z)
        image = f(arg)
        check_image(arg, image)
        fz, _ = tree.batch_ravel(image)
        gap = tree.norm(fz - c.z)
        if solver.stop == "rel":
            size = tree.norm(fz)
            # A length that has overflowed would make any gap look small.
            gap = jnp.where(jnp.isfinite(size), gap / (size + _TINY), jnp.inf)
        r = gap.astype(jnp.float32)  # [B]
        active = ~c.done
        better = active & (r < c.residual)
        done = c.done | (r <= solver.tol) | ~jnp.isfinite(r)
        z_next, state = solver.step(c.z, fz, c.state)
        return _Loop(
            k=c.k + 1,
            z=tree.where(done, c.z, z_next),
            state=state,
            best=tree.where(better, c.z, c.best),
            done=done,
            num_steps=c.num_steps + active,
            residual=jnp.where(better, r, c.residual),
            trace=c.trace.at[c.k].set(jnp.where(active, r, jnp.inf)),
        )

    start = _Loop(
        k=jnp.int32(0),
        z=z,
        state=solver.init(z),
        best=z,
        done=jnp.zeros_like(column, dtype=bool),
        num_steps=jnp.zeros_like(column, dtype=jnp.int32),
        residual=column + jnp.inf,
        trace=jnp.broadcast_to(column + jnp.inf, (solver.max_steps, column.shape[0])),
    )
    if isinstance(budget, int) and budget == 0:
        last = start  # nothing to compile
    else:
        last = lax.while_loop(lambda c: (c.k < budget) & ~jnp.all(c.done), body, start)
    stats = SolveStats(
        num_steps=last.num_steps,
        residual=last.residual,
        converged=last.residual <= solver.tol,
        trace=last.trace,
    )
    return Solution(value=unravel(last.best), stats=stats)
