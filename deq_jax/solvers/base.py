"""The solver protocol and the one loop over z that runs every solver."""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import export, lax
from jax.core import Tracer

from deq_jax import traced, tree
from deq_jax.solvers import history
from deq_jax.traced import Traced
from deq_jax.tree import PyTree

StopMode = Literal["rel", "abs"]
Keep = Literal["best", "last"]

# How far norm(f(z)) may grow beyond the first images and still lower a relative residual.
_GROWTH = 100.0


class Solver(Protocol):
    """What `solve` needs of a root-finding method for z = f(z).

    A solver is a value: hashable, without state of its own.  ``init`` returns the state of one
    solve from its start ``z``; ``step`` turns an iterate ``z``, its image ``fz`` (both trees
    ``[B, ...]``) and the state into the next iterate and state.  Samples must not mix.
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

    def init(self, z: PyTree) -> Any:
        """Returns the state before the first step."""
        ...

    def step(self, z: PyTree, fz: PyTree, state: Any) -> tuple[PyTree, Any]:
        """Returns the next iterate and the next state."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SolveStats:
    """What one solve did, sample by sample.

    The residual of an iterate z is norm(f(z) - z) for ``stop="abs"`` and

        norm(f(z) - z) / min(norm(f(z)), 100 r),    0 / 0 = 0,

    for ``stop="rel"``, where r is the largest of norm(f(z_0)), norm(f(z_1)) and of all
    norm(f(z_k) - z_k) so far.  So an iterate that runs away does not look converged because it is
    long.  It is infinite, and the sample is given up, where f(z) is not finite, or so long that its
    rounding errors reach r.

    The statistics carry no gradient: `jax.grad` sees constants.  To penalise the residual, compute
    ``f(params, sol.value, x) - sol.value``.

    Attributes:
      num_steps: int32 ``[B]``, evaluations of f until the sample converged or was given up.
      residual: float32 ``[B]``, residual of the returned value (``keep="best"``), or of the last
        iterate that was evaluated (``keep="last"``); ``inf`` if it is not finite.
      converged: bool ``[B]``, whether ``residual <= tol``.
      trace: float32 ``[max_steps, B]``, the residual after each evaluation, ``inf`` where it is not
        finite and after the last one; None if it was not asked for.
    """

    num_steps: jax.Array
    residual: jax.Array
    converged: jax.Array
    trace: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Equation:
    """The equation z = f(params, z, x) that a layer solved.

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
    """The result of a solve.

    It is a pytree, so that it passes through `jax.jit`.  A jitted function that returns one returns
    all of its arrays, those of ``equation`` included: return ``sol.value`` and ``sol.stats``, or
    ``dataclasses.replace(sol, equation=None)``, if the weights are not wanted.

    Attributes:
      value: the fixed point of every sample, a tree like ``z0``.
      stats: how it was found.
      equation: set by the Flax layers, whose users hold neither f nor its parameters.
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


def serializable(*kinds: type) -> None:
    """Lets `jax.export` serialise functions that return dataclasses without static fields.

    Args:
      *kinds: registered dataclasses of this package.
    """
    for kind in kinds:
        export.register_pytree_node_serialization(
            kind,
            serialized_name=f"deq_jax.{kind.__name__}",
            serialize_auxdata=lambda _: b"",
            deserialize_auxdata=lambda _: (),
        )


serializable(SolveStats, Solution)


class _Loop(NamedTuple):
    """Carry of the loop; every array but ``k`` has a batch axis."""

    k: jax.Array
    z: PyTree
    state: Any
    best: PyTree | None
    done: jax.Array
    num_steps: jax.Array
    residual: jax.Array
    reference: jax.Array
    trace: jax.Array | None


def check_settings(solver: Any, counts: Sequence[str] = (), fractions: Sequence[str] = ()) -> None:
    """Checks the settings of a solver, and turns NumPy's numbers into Python's.

    Args:
      solver: a frozen dataclass with ``tol``, ``max_steps`` and ``stop``.
      counts: its settings besides ``max_steps`` that are whole numbers of at least 1.
      fractions: its settings in (0, 1].

    Raises:
      ValueError: naming the setting, what was given and what would do.
    """
    name = type(solver).__name__
    if isinstance(solver.tol, Tracer):
        raise ValueError(
            f"{name}: got a traced tol; wanted a number, for a solver is static; build the solver "
            "outside jit, and one for each tolerance"
        )
    if not (isinstance(solver.tol, numbers.Real) and 0 < float(solver.tol) < math.inf):
        raise ValueError(
            f"{name}: got tol={solver.tol!r}; wanted a positive finite number; to run a fixed "
            "number of steps use a tiny tol such as 1e-30"
        )
    if solver.stop not in ("rel", "abs"):
        raise ValueError(
            f'{name}: got stop={solver.stop!r}; wanted "rel", norm(f(z) - z) / norm(f(z)), or '
            '"abs", norm(f(z) - z)'
        )
    object.__setattr__(solver, "tol", float(solver.tol))
    for setting in ("max_steps", *counts):
        value = check_count(name, setting, getattr(solver, setting))
        object.__setattr__(solver, setting, value)
    for setting in fractions:
        value = check_fraction(name, setting, getattr(solver, setting))
        object.__setattr__(solver, setting, value)


def check_count(name: str, setting: str, value: Any) -> int:
    """Raises for a setting that is not a whole number >= 1.

    Args:
      name: whose setting it is.
      setting: its name.
      value: what was given.

    Returns:
      The number as an int.

    Raises:
      ValueError: if ``value`` is not a whole number, or is below one.
    """
    number = _as_int(value)
    if number is None or number < 1:
        raise ValueError(f"{name}: got {setting}={value!r}; wanted a whole number of at least 1")
    return number


def check_fraction(name: str, setting: str, value: Any) -> float:
    """Raises for a setting that is not a number in (0, 1].

    Args:
      name: whose setting it is.
      setting: its name.
      value: what was given.

    Returns:
      The number as a float.

    Raises:
      ValueError: if ``value`` lies outside (0, 1].
    """
    if not (isinstance(value, numbers.Real) and 0 < float(value) <= 1):
        raise ValueError(f"{name}: got {setting}={value!r}; wanted a number in (0, 1]")
    return float(value)


def split_budget(
    solver: Solver, max_steps: int | jax.Array | None
) -> tuple[int | None, jax.Array | None]:
    """Checks the budget of one call.

    Args:
      solver: its ``max_steps`` is the limit.
      max_steps: a whole number, an integer scalar array, or None for the limit.  A traced scalar,
        whose value is not known yet, is cut off at 0 and the limit.

    Returns:
      The number and None, or None and the array.

    Raises:
      ValueError: for a number outside [0, limit], or an array that is no integer scalar.
    """
    if max_steps is None:
        return solver.max_steps, None
    if not isinstance(max_steps, jax.Array):
        steps = _as_int(max_steps)
        if steps is None or not 0 <= steps <= solver.max_steps:
            raise ValueError(
                f"got max_steps={max_steps!r} for a solver with max_steps={solver.max_steps}; "
                "wanted a whole number from 0 to the solver's, which sizes the trace; raise the "
                "solver's"
            )
        return steps, None
    if max_steps.shape or not jnp.issubdtype(max_steps.dtype, jnp.integer):
        raise ValueError(
            f"got max_steps of type {tree.describe(max_steps)}; wanted an int or an integer scalar"
        )
    if not isinstance(max_steps, Tracer):
        split_budget(solver, int(max_steps))  # raises for a number that is known to be wrong
    return None, jnp.minimum(max_steps, solver.max_steps)


def _as_int(value: Any) -> int | None:
    """The number if it is a whole one, also of NumPy's types."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def check_solver(solver: Any, argument: str = "solver") -> None:
    """Raises if an argument is not a solver.

    Args:
      solver: what was given.
      argument: name of the argument.

    Raises:
      ValueError: naming the argument.
    """
    if isinstance(solver, type):
        raise ValueError(
            f"got the class {solver.__name__} as {argument}; wanted an instance, such as "
            f"{solver.__name__}(tol=1e-4)"
        )
    if not all(hasattr(solver, name) for name in ("tol", "max_steps", "stop", "init", "step")):
        raise ValueError(
            f"got {solver!r} as {argument}; wanted a solver, such as deq.Anderson(tol=1e-4)"
        )


def check_image(z: PyTree, image: PyTree) -> PyTree:
    """Raises for an f that does not map the state to a state of the same kind.

    Args:
      z: the argument of f, tree of arrays.
      image: what `jax.typeof` says of f(z), leaf by leaf.

    Returns:
      z, sharded and varying over mesh axes as its image.

    Raises:
      ValueError: if tree structure, shapes or dtypes differ.
    """
    same = jax.tree.structure(z) == jax.tree.structure(image) and all(
        a.shape == b.shape and a.dtype == b.dtype
        for a, b in zip(jax.tree.leaves(z), jax.tree.leaves(image), strict=True)
    )
    if not same:
        raise ValueError(
            f"f returned {tree.describe(image)}; wanted {tree.describe(z)}, the tree, shapes and "
            "dtypes of z0; cast or reshape inside f, start from another z0, or compute what else "
            "f returns once, at the solution"
        )
    return tree.match(z, image)


def trace_map(
    trace: Callable[[PyTree], tuple[Traced, tuple[jax.Array, ...]]], z0: PyTree
) -> tuple[Traced, tuple[jax.Array, ...], PyTree]:
    """Traces f at a start that has the type of its image.

    Args:
      trace: traces f at a state.
      z0: the start, tree of arrays ``[B, ...]``.

    Returns:
      The program of f, what f closes over, and z0, sharded and varying over mesh axes as f(z0).

    Raises:
      ValueError: if f changes tree structure, shapes or dtypes.
    """
    program, consts = trace(z0)
    start = check_image(z0, program.out)
    if any(map(operator.is_not, jax.tree.leaves(start), jax.tree.leaves(z0))):
        program, consts = trace(start)
    return program, consts, start


def as_batched(z0: PyTree, batched: bool | None) -> PyTree:
    """Returns the start of a solve with a batch axis.

    Args:
      z0: tree ``[B, ...]``, or ``[...]`` if ``batched`` is False.
      batched: what the caller says of z0; None if nothing.

    Returns:
      Tree of arrays ``[B, ...]``.

    Raises:
      ValueError: if nothing is said and no leaf has a second axis, or for a bad state.
    """
    if batched is False:
        return tree.as_state(jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], z0))
    state = tree.as_state(z0)
    if batched is None and all(leaf.ndim == 1 for leaf in jax.tree.leaves(state)):
        raise ValueError(
            f"got a state {tree.describe(z0)}, whose only axis would be the batch; wanted a state "
            "[B, ...] with a second axis; add a batch axis with z0[None], or pass batched=False "
            "for one sample without a batch axis, or batched=True if every number is a sample"
        )
    return state


@dataclasses.dataclass(frozen=True)
class Unbatched:
    """A map of states without a batch axis as one of a batch of one.

    Attributes:
      f: maps ``(..., z, ...)`` with z at ``place``.
      place: position of z among the arguments.
    """

    f: Callable[..., PyTree]
    place: int

    def __call__(self, *operands: PyTree) -> PyTree:
        """Adds the axis to the image of the state without it."""
        given = list(operands)
        given[self.place] = jax.tree.map(lambda leaf: leaf[0], given[self.place])
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], self.f(*given))


def without_batch(solution: Solution) -> Solution:
    """Removes the batch axis of a batch of one.

    Args:
      solution: of a batch of one.

    Returns:
      The same with values ``[...]``, scalar statistics and a trace ``[max_steps]``.
    """
    stats = solution.stats
    first = jax.tree.map(lambda leaf: leaf[0], dataclasses.replace(stats, trace=None))
    trace = None if stats.trace is None else stats.trace[:, 0]
    value = jax.tree.map(lambda leaf: leaf[0], solution.value)
    return Solution(value=value, stats=dataclasses.replace(first, trace=trace))


def solve(
    solver: Solver,
    f: Callable[[PyTree], PyTree],
    z0: PyTree,
    *,
    max_steps: int | jax.Array | None = None,
    keep: Keep = "best",
    batched: bool | None = None,
    trace: bool = True,
) -> Solution:
    """Solves z = f(z) for every sample of a batch.

    One evaluation of f per step.  Each sample has its own residual (see `SolveStats`) and stops on
    its own; the loop ends when all samples have stopped or the budget is spent.  A sample whose
    residual is no longer finite is given up.  Not differentiable: see `deq_jax.fixed_point`.

    Args:
      solver: the method, e.g. ``Anderson(tol=1e-3, max_steps=30)``.
      f: maps a tree of arrays ``[B, ...]`` to the same tree, sample by sample.
      z0: start, tree of floating-point arrays ``[B, ...]``.
      max_steps: budget of this call, a whole number from 0 to the solver's own, or a traced integer
        scalar, which is cut off at these bounds.  0 returns ``z0`` unevaluated.
      keep: ``"best"`` returns the iterate of the smallest residual; ``"last"`` the one after the
        last step, or the one that converged.
      batched: False for a z0 without a batch axis; True for samples that are single numbers.
      trace: whether ``stats.trace`` is recorded.

    Returns:
      Solution with ``value`` like ``z0`` and the statistics.

    Raises:
      ValueError: for an empty batch, an f that changes tree, shape or dtype, or a bad budget.

    Example:
      >>> import jax.numpy as jnp, deq_jax as deq
      >>> sol = deq.solve(deq.Picard(tol=1e-6, max_steps=100), jnp.cos, jnp.ones((1, 1)))
      >>> round(float(sol.value[0, 0]), 4)
      0.7391
    """
    check_solver(solver)
    state = as_batched(z0, batched)
    if batched is False:
        f = Unbatched(f, 0)
    program, consts, state = trace_map(lambda z: traced.trace(f, z), state)
    static, budget = split_budget(solver, max_steps)
    how = (solver, static, keep, trace)
    solution = Solution(*traced.call(solve_traced, program, how, consts, (), state, (), budget))
    return without_batch(solution) if batched is False else solution


def solve_traced(
    program: Traced,
    solver: Solver,
    static: int | None,
    keep: Keep,
    trace: bool,
    consts: tuple[jax.Array, ...],
    before: tuple[PyTree, ...],
    z0: PyTree,
    after: tuple[PyTree, ...],
    budget: jax.Array | None,
) -> tuple[PyTree, SolveStats]:
    """Solves z = program(consts, *before, z, *after), for `traced.call`.

    Args:
      program: f, traced.
      solver: the method.
      static: the budget as a number, or None.
      keep: which iterate is returned.
      trace: whether the residuals of all steps are recorded.
      consts: what f closes over.
      before: arguments of f before z.
      z0: start, tree of arrays ``[B, ...]``.
      after: arguments of f after z.
      budget: the budget as an array, or None.

    Returns:
      The value and the statistics.
    """
    steps = budget if static is None else static
    return iterate(solver, lambda z: program(consts, *before, z, *after), z0, steps, keep, trace)


def iterate(
    solver: Solver,
    f: Callable[[PyTree], PyTree],
    z0: PyTree,
    budget: int | jax.Array | None,
    keep: Keep = "best",
    trace: bool = True,
) -> tuple[PyTree, SolveStats]:
    """Runs the loop of `solve` on arguments that have been checked.

    Args:
      solver: the method.
      f: maps a tree of arrays ``[B, ...]`` to the same tree.
      z0: start, tree of arrays ``[B, ...]``.
      budget: largest number of steps.
      keep: which iterate is returned.
      trace: whether the residuals of all steps are recorded.

    Returns:
      The value and the statistics.
    """
    if keep not in ("best", "last"):
        raise ValueError(f'got keep={keep!r}; wanted "best" or "last"')
    budget = solver.max_steps if budget is None else budget
    column = tree.column(z0)  # [B]
    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(z0))
    largest = float(jnp.finfo(jnp.float32).max)

    def body(c: _Loop) -> _Loop:
        fz = f(c.z)
        gap, size = tree.norm(jax.tree.map(jnp.subtract, fz, c.z)), tree.norm(fz)
        first = jnp.where(c.k < 2, size, 0)
        reference = jnp.maximum(c.reference, jnp.where(jnp.isfinite(gap), gap, 0))
        reference = jnp.maximum(reference, jnp.where(jnp.isfinite(first), first, 0))
        # Rounding f(z) must not cost as much as the first images had.
        finite = jnp.isfinite(gap) & (eps * size <= reference)
        if solver.stop == "rel":
            size = jnp.minimum(size, _GROWTH * reference)
            gap = jnp.where(gap == 0, 0, gap / size)
        r = jnp.where(finite, jnp.minimum(gap, largest), jnp.inf).astype(jnp.float32)  # [B]
        active = ~c.done
        better = active & (r < c.residual)
        done = c.done | (r <= solver.tol) | ~finite
        residual = jnp.where(better if keep == "best" else active, r, c.residual)
        num_steps = c.num_steps + active.astype(jnp.int32)
        row = jnp.where(active, r, jnp.inf)
        # One small kernel computes these; fused into the large ones below, it would be repeated,
        # and keep copies of what it replaces.
        better, done, residual, num_steps, row = lax.optimization_barrier(
            (better, done, residual, num_steps, row)
        )
        z_next, state = solver.step(c.z, fz, c.state)
        best = tree.where(better, c.z, c.best) if keep == "best" else None
        z_next = _kept(done, c.z, z_next) if keep == "best" else tree.where(done, c.z, z_next)
        residuals = c.trace
        if residuals is not None:
            residuals = lax.dynamic_update_index_in_dim(residuals, row, c.k, axis=0)
        return _Loop(
            k=c.k + 1,
            z=z_next,
            state=state,
            best=best,
            done=done,
            num_steps=num_steps,
            residual=residual,
            reference=reference,
            trace=residuals,
        )

    def loop(z0: PyTree, state: Any) -> tuple[PyTree, SolveStats]:
        last = _Loop(
            k=jnp.int32(0),
            z=z0,
            state=state,
            best=z0 if keep == "best" else None,
            done=column > 0,
            num_steps=column.astype(jnp.int32),
            residual=column + jnp.inf,
            reference=column.astype(tree.widest(z0)),
            trace=jnp.broadcast_to(column + jnp.inf, (solver.max_steps, column.shape[0]))
            if trace
            else None,
        )
        if not (isinstance(budget, int) and budget == 0):  # else there is nothing to compile
            last = lax.while_loop(lambda c: jnp.any(~c.done & (c.num_steps < budget)), body, last)
        stats = SolveStats(
            num_steps=last.num_steps,
            residual=last.residual,
            converged=last.residual <= solver.tol,
            trace=last.trace,
        )
        return last.z if last.best is None else last.best, stats

    state = solver.init(z0)
    if not history.is_large(state):
        return loop(z0, state)
    return lax.platform_dependent(
        z0,
        cpu=lambda z: loop(z, history.split(solver.init(z))),
        default=lambda z: loop(z, solver.init(z)),
    )


def _kept(done: jax.Array, z: PyTree, z_next: PyTree) -> PyTree:
    """Lets finished samples stay where it is cheap: nothing that is returned depends on them.

    On accelerators the choice is one kernel with that of the best iterate, and saves a copy of z.
    """
    return lax.platform_dependent(
        done, z, z_next, cpu=lambda done, z, z_next: z_next, default=tree.where
    )
