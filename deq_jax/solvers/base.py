"""The solver protocol, what a solve returns, and the checks of its arguments."""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from jax import export
from jax.core import Tracer

from deq_jax import tree
from deq_jax.traced import Traced
from deq_jax.tree import PyTree

StopMode = Literal["rel", "abs"]
Keep = Literal["best", "last"]


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

    for ``stop="rel"``, where r is the largest of norm(f(z_0)), of norm(f(z_1)) and of those
    norm(f(z_k) - z_k) so far that are at least norm(f(z_k)) / 100.  So an iterate that runs away
    does not look converged because it is long.  The residual is infinite, and the sample is given
    up, where f(z) is not finite, or so long that its rounding errors reach r.

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

    def __repr__(self) -> str:
        arrays = self.num_steps, self.residual, self.converged
        if not all(map(_is_known, arrays)):
            return f"SolveStats({', '.join(map(_outline, arrays))})"
        steps, residual, converged = jax.device_get(arrays)
        return (
            f"SolveStats({converged.sum()} of {converged.size} converged, {steps.min()} to "
            f"{steps.max()} steps, residual {residual.min():.1e} to {residual.max():.1e})"
        )


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
      equation: set by the Flax layers, whose users hold neither f nor its parameters, and by
        `training.parallel.sharded_fixed_point`.
      states: the sampled iterates, trees like ``z0``; empty if none were asked for.
      aux: what f returns beside z, at ``value``; None without ``has_aux``.
    """

    value: PyTree
    stats: SolveStats
    equation: Equation | None = None
    states: tuple[PyTree, ...] = ()
    aux: PyTree = None

    def __repr__(self) -> str:
        parts = [f"value={_outline(self.value)}", f"stats={self.stats}"]
        if self.equation is not None:
            parts.append(f"equation={self.equation.f}")
        parts += [
            f"{name}={_outline(part)}"
            for name, part in (("states", self.states), ("aux", self.aux))
            if jax.tree.leaves(part)
        ]
        return f"Solution({', '.join(parts)})"

    @property
    def at(self) -> tuple[Callable[..., PyTree], PyTree, PyTree, PyTree]:
        """``(f, params, z, x)``: how `frobenius_penalty` and `spectral_radius` begin."""
        if self.equation is None:
            raise ValueError(
                "got a Solution without an equation; wanted one returned by a linen or nnx DEQ "
                "layer; pass f, params, z and x yourself after a bare fixed_point or solve"
            )
        return self.equation.f, self.equation.params, self.value, self.equation.x


def _is_known(leaf: Any) -> bool:
    known = hasattr(leaf, "__array__") and not isinstance(leaf, Tracer)
    return known and getattr(leaf, "is_fully_addressable", True)


def _outline(part: PyTree) -> str:
    """Returns a tree as text, with dtypes and shapes in place of the numbers."""

    class Shape(str):
        __repr__ = str.__str__

    def leaf(a: Any) -> Shape:
        if not hasattr(a, "shape"):
            return Shape(repr(a))
        return Shape(f"{a.dtype.name}[{', '.join(map(str, a.shape))}]")

    return repr(jax.tree.map(leaf, part))


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
    number = as_int(value)
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
    solver: Solver, max_steps: int | jax.Array | None, z0: PyTree
) -> tuple[int | None, jax.Array | None]:
    """Checks the budget of one call.

    Args:
      solver: its ``max_steps`` is the limit.
      max_steps: a whole number, an integer array, scalar or ``[B]``, or None for the limit.  A
        traced array, whose value is not known yet, is cut off at 0 and the limit.
      z0: start, tree of arrays ``[B, ...]``.

    Returns:
      The number and None, or None and the array.

    Raises:
      ValueError: for a number outside [0, limit], or an array of another dtype or shape.
    """
    if max_steps is None:
        return solver.max_steps, None
    if getattr(max_steps, "ndim", 0):  # NumPy's too
        max_steps = jnp.asarray(max_steps)
    if not isinstance(max_steps, jax.Array):
        steps = as_int(max_steps)
        if steps is None or not 0 <= steps <= solver.max_steps:
            raise ValueError(
                f"got max_steps={max_steps!r} for a solver with max_steps={solver.max_steps}; "
                "wanted a whole number from 0 to the solver's, which sizes the trace; raise the "
                "solver's"
            )
        return steps, None
    shapes = (), (tree.batch_size(z0),)
    if max_steps.shape not in shapes or not jnp.issubdtype(max_steps.dtype, jnp.integer):
        raise ValueError(
            f"got max_steps of type {tree.describe(max_steps)}; wanted an int, an integer scalar, "
            f"or integers of shape {shapes[1]}, one a sample"
        )
    if not isinstance(max_steps, Tracer):
        known: Any = max_steps.tolist()
        for steps in known if max_steps.ndim else [known]:
            split_budget(solver, steps, z0)  # raises for numbers that are known to be wrong
    return None, jnp.minimum(max_steps, solver.max_steps)


def as_int(value: Any) -> int | None:
    """Returns a whole number of Python's or NumPy's as int, and None for anything else."""
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


def check_keep(keep: Any) -> None:
    """Raises ValueError unless ``keep`` is a `Keep`."""
    if keep not in ("best", "last"):
        raise ValueError(f'got keep={keep!r}; wanted "best" or "last"')


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
            "dtypes of z0; cast or reshape inside f, start from another z0, or pass has_aux=True "
            "to fixed_point if f returns (z, aux)"
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
    while True:
        program, consts = trace(z0)
        start = check_image(z0, program.out)
        if all(map(operator.is_, jax.tree.leaves(start), jax.tree.leaves(z0))):
            return program, consts, start
        # What one leaf of z0 takes on, its image may pass to another leaf.
        z0 = start


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
    value, states = jax.tree.map(lambda leaf: leaf[0], (solution.value, solution.states))
    stats = dataclasses.replace(first, trace=trace)
    return dataclasses.replace(solution, value=value, stats=stats, states=states)
