"""What `diagnose` measures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from deq_jax import tree
from deq_jax.diagnosis.advice import advise, plain_iteration
from deq_jax.fixed_point import fixed_point
from deq_jax.jacobian import frobenius_penalty, spectral_radius
from deq_jax.solvers import Anderson, Broyden, Picard, Solver
from deq_jax.solvers.base import Unbatched, as_batched, check_count, check_image
from deq_jax.tree import PyTree

_StateMap = Callable[[PyTree, PyTree, PyTree], PyTree]
_Arrays = Mapping[str, np.ndarray]
_Solved = Any  # a `Solution` whose statistics are NumPy arrays

# Probes of the penalty, and perturbations that measure how precise f is.
_PROBES = 10
# Least relative size of these perturbations: the spacing of TF32.
_NUDGE = 2.0**-10


@dataclasses.dataclass(frozen=True, eq=False)
class Diagnosis:
    """What `diagnose` measured, with advice; `str` and a notebook show it as Markdown tables.

    Attributes:
      value: the point at which the Jacobian was taken, a tree like ``z0``: for every sample plain
        iteration's fixed point where it has converged, else the iterate of least residual.
      trace: solver -> float32 ``[max_steps, B]``, residual after each evaluation, ``inf`` after the
        last one.
      steps: solver -> int32 ``[B]``, evaluations of f.
      converged: solver -> bool ``[B]``, whether the solver reports convergence and z has not run
        away.
      runaway: solver -> bool ``[B]``, whether the solver reports convergence at a z that has grown
        more than tenfold and has no fixed point near.
      alignment: solver -> float32 ``[B]``, smallest cosine between the fixed points reached from
        ``z0`` and from other starts; NaN where the solver has not converged twice.
      spectral_radius: float32 ``[B]``, of df/dz at ``value``.
      operator_norm: float32 ``[B]``, largest singular value of df/dz at ``value``, from below.
      penalty: `deq_jax.frobenius_penalty` at ``value``.
      rounding: float32 ``[B]``, relative size of the rounding errors of f at ``value``, a rough
        estimate: no residual falls far below it.
      dependent: bool ``[B]``, whether f(z) of the sample changes with the state of other samples.
      advice: sentences, the most important first; those that do not concern all samples begin with
        their number.
    """

    value: PyTree
    trace: _Arrays
    steps: _Arrays
    converged: _Arrays
    runaway: _Arrays
    alignment: _Arrays
    spectral_radius: np.ndarray
    operator_norm: np.ndarray
    penalty: float
    rounding: np.ndarray
    dependent: np.ndarray
    advice: tuple[str, ...] = ()

    def __str__(self) -> str:
        longest = max(map(len, self.trace.values()))
        marks = [*(2**i for i in range((longest - 1).bit_length())), longest]
        header = ["solver", "steps, median", "solved", "alignment", "residual, median, at step 1"]
        solvers = [header + [str(mark) for mark in marks[1:]]]
        for name, trace in self.trace.items():
            steps = self.steps[name]
            row = [name, f"{np.median(steps):g}", f"{self.converged[name].mean():.0%}"]
            row.append(_summary(self.alignment[name], ".2f")[1])
            for mark in marks:
                reached = np.take_along_axis(trace, np.clip(steps, 1, mark)[None] - 1, axis=0)
                row.append(f"{np.median(reached):.1e}")
            solvers.append(row)
        jacobian = [["df/dz", "min", "median", "max"]]
        for name in ("spectral_radius", "operator_norm"):
            jacobian.append([name.replace("_", " "), *_summary(getattr(self, name), ".3g")])
        advice = "".join(f"- {sentence}\n" for sentence in self.advice)
        tables = _table(solvers), _table(jacobian), f"penalty {self.penalty:.3g}\n", advice
        return "\n".join(tables)

    def _repr_markdown_(self) -> str:
        return str(self)


def diagnose(
    f: _StateMap,
    params: PyTree,
    z0: PyTree,
    x: PyTree = None,
    *,
    key: jax.Array,
    solvers: Mapping[str, Solver] | None = None,
    tol: float = 1e-3,
    max_steps: int = 30,
    iters: int = 100,
    batched: bool | None = None,
) -> Diagnosis:
    """Solves z = f(params, z, x) by several solvers, measures f around the answer, gives advice.

    * Jacobian: spectral radius, operator norm and Frobenius penalty of J = df/dz.  The operator
      norm is from power iteration on J^T J, sample by sample, where J v is the transpose of the
      vector-Jacobian product, because forward mode fails on a `jax.custom_vjp` inside f.  Where
      that cannot be transposed (a solve inside f), J v is a central difference.
    * Samples: the states of some samples are changed; f(z) of the others must stay the same.
    * Runaways: a small residual proves little where norm(z) has grown.  With g = f(z) - z, every
      fixed point of the linearised f is at least norm(g)^2 / norm(J^T g - g) away.
    * Path independence: each solver starts again from zero, and from ``z0`` plus noise as long as
      the fixed point.  ``alignment`` is the cosine between the answers, as in the asymptotic
      alignment score of Anil et al.: 1 if all starts lead to the same fixed point.  The cosine
      ignores lengths, so it says little of a state of one number.

    Solves and Jacobian are compiled.  What remains are a few dozen calls of f, operation by
    operation: for a large f, pass ``jax.jit(f)``.

    Args:
      f: the map ``(params, z, x) -> z``, as for `deq_jax.fixed_point`.
      params: its parameters, any tree.
      z0: start, tree of floating-point arrays ``[B, ...]``; a few samples will do.
      x: its other operands, any tree.
      key: a PRNG key, for the probes.
      solvers: name -> solver; None for plain iteration (`Picard`), `Anderson` and `Broyden`.
      tol: tolerance of the default solvers.
      max_steps: budget of the default solvers.
      iters: power iterations of radius and norm, at least 2.
      batched: as for `deq_jax.fixed_point`: False if z0 and f have no batch axis (what is returned
        has one, of length 1), True if z0 is ``[B]`` and every number is a sample.

    Returns:
      A `Diagnosis`.

    Raises:
      ValueError: if called under a transformation such as `jax.jit`, without a solver, with a
        setting out of range or a z0 without a batch axis, or if f changes tree, shape or dtype of
        z.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jnp.ones((4, 8))
      >>> w = 1.3 * jnp.eye(8)[::-1]
      >>> f = lambda w, z, x: z @ w + x
      >>> print(diagnose(f, w, jnp.zeros_like(x), x, key=jax.random.key(0)).advice[0])
      Plain iteration diverges: the spectral radius at the returned values is up to 1.30. Lower the
      scale of the weights by a factor of 1.3 or more, or train with deq.frobenius_penalty.

    Reference:
      Anil et al., Path Independent Equilibrium Models Can Better Exploit Test-Time Computation
      (2022), algorithm 1.
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((params, z0, x, key))):
        raise ValueError(
            "got traced arrays; wanted concrete ones, because a diagnosis is text; call diagnose "
            "outside of jit, vmap and grad"
        )
    check_count("diagnose", "iters", iters)
    if solvers is None:
        common: Any = {"tol": tol, "max_steps": max_steps}
        solvers = {kind.__name__: kind(**common) for kind in (Picard, Anderson, Broyden)}
    if not solvers:
        raise ValueError("got no solver; wanted one or more, or solvers=None for the usual three")
    z0 = as_batched(z0, batched)
    if batched is False:
        f = Unbatched(f, 1)
    image = f(params, z0, x)
    z0 = check_image(z0, jax.tree.map(jax.typeof, image))
    keys = jax.random.split(key, 2)
    rng = np.random.default_rng(np.asarray(_key_data(key)).ravel())

    def run(start: PyTree) -> dict[str, _Solved]:
        solutions = {
            name: fixed_point(f, params, start, x, solver=solver, batched=True)
            for name, solver in solvers.items()
        }
        return {
            name: dataclasses.replace(sol, stats=jax.device_get(sol.stats))
            for name, sol in solutions.items()
        }

    # Rows of numbers are NumPy's, in float64: nothing is compiled for them, and nothing overflows.
    with np.errstate(all="ignore"):
        solved = run(z0)
        ends = {n: _end(f, params, x, (z0, image), sol) for n, sol in solved.items()}
        runaway = {n: end["runaway"] for n, end in ends.items()}
        z = _closest(solved, runaway, plain_iteration(solvers))
        others = [run(start) for start in _starts(z0, z, rng)]

        @jax.jit
        def jacobian(params: PyTree, z: PyTree, x: PyTree, start: PyTree) -> list[jax.Array]:
            return [
                spectral_radius(f, params, z, x, key=keys[0], iters=iters),
                _operator_norm(f, params, z, x, start, iters),
                frobenius_penalty(f, params, z, x, key=keys[1], probes=_PROBES),
            ]

        start = _unravel(z, _unit(rng.normal(size=_rows(z).shape)))
        radius, norm, penalty = jacobian(params, z, x, start)
        found = Diagnosis(
            value=z,
            trace={n: s.stats.trace for n, s in solved.items()},
            steps={n: s.stats.num_steps for n, s in solved.items()},
            converged={n: s.stats.converged & ~runaway[n] for n, s in solved.items()},
            runaway=runaway,
            alignment={
                n: _alignment(runaway[n], [o[n] for o in (solved, *others)]) for n in solved
            },
            spectral_radius=np.asarray(radius),
            operator_norm=np.asarray(norm),
            penalty=float(penalty),
            rounding=_rounding(f, params, z, x, rng),
            dependent=_dependent(f, params, z, x, rng),
        )
        finite = np.isfinite(_rows(image)).all(axis=1)
    spoiled = [] if finite.all() else _not_finite(params=params, z0=z0, x=x)
    return dataclasses.replace(found, advice=advise(found, solvers, ends, finite, spoiled))


def _key_data(key: jax.Array) -> jax.Array:
    """Returns the numbers of a new or an old PRNG key."""
    return jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key


def _not_finite(**operands: PyTree) -> list[str]:
    """Returns the names of the trees that hold numbers which are not finite."""
    return [
        name
        for name, operand in operands.items()
        for leaf in jax.tree.leaves(operand)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
        and not np.isfinite(np.asarray(leaf)).all()
    ]


def _closest(solved: Mapping[str, _Solved], runaway: _Arrays, plain: str | None) -> PyTree:
    """Returns the best value of every sample, plain iteration's where that has converged.

    Other solvers may find a fixed point that plain iteration would leave.
    """
    residuals = [
        np.where(runaway[n], np.inf, np.where((n == plain) & s.converged, -1, s.residual))
        for n, s in ((n, sol.stats) for n, sol in solved.items())
    ]
    best = np.argmin(residuals, axis=0)  # [B]
    rows = np.stack([_rows(sol.value) for sol in solved.values()])
    like = next(iter(solved.values())).value
    return _unravel(like, rows[best, np.arange(len(best))])


def _rows(z: PyTree) -> np.ndarray:
    """Returns a state as a matrix ``[B, D]``, in float64."""
    leaves = [np.asarray(leaf).astype(np.float64) for leaf in jax.tree.leaves(z)]
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)


def _unravel(like: PyTree, rows: np.ndarray) -> PyTree:
    """Returns a matrix ``[B, D]`` as a tree of the shapes and dtypes of a state."""
    leaves, treedef = jax.tree.flatten(like)
    ends = np.cumsum([leaf[0].size for leaf in leaves])[:-1]
    parts = zip(leaves, np.split(rows, ends, axis=1), strict=True)
    return treedef.unflatten(
        [jnp.asarray(part.astype(leaf.dtype).reshape(leaf.shape)) for leaf, part in parts]
    )


def _norm(rows: np.ndarray) -> np.ndarray:
    return np.linalg.norm(rows, axis=1)


def _unit(rows: np.ndarray) -> np.ndarray:
    """Scales rows to length one; zero stays zero."""
    length = _norm(rows)
    return rows / np.where(length == 0, 1, length)[:, None]


def _eps(z: PyTree) -> float:
    return max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(z))


def _end(
    f: _StateMap, params: PyTree, x: PyTree, start: tuple[PyTree, PyTree], sol: _Solved
) -> dict[str, np.ndarray]:
    """Measures how far norm(z) has grown and norm(f(z) - z) has fallen, and finds runaways."""
    z0, image = map(_rows, start)
    first, first_gap = np.maximum(_norm(z0), _norm(image)), _norm(image - z0)
    image, pull = jax.vjp(lambda z: f(params, z, x), sol.value)
    z, g = _rows(sol.value), _rows(image) - _rows(sol.value)
    size, gap = _norm(z), _norm(g)
    unit = _unit(g)
    distance = gap / _norm(_rows(pull(_unravel(sol.value, unit))[0]) - unit)
    # So far away, f(z) - z may be lost in rounding.
    lost = (size > 100 * first) & (np.maximum(gap, _eps(image) * size) > 0.1 * first_gap)
    far = (size > 10 * first) & (distance > 0.5 * size)
    return {
        "growth": size / first,
        "fall": gap / first_gap,
        "runaway": sol.stats.converged & (lost | far),
    }


def _starts(z0: PyTree, z: PyTree, rng: np.random.Generator) -> list[PyTree]:
    """Returns starts other than z0: with noise as long as z, and zero."""
    rows = _rows(z0)
    noise = _norm(_rows(z))[:, None] * _unit(rng.normal(size=rows.shape))
    others = [rows + noise] + [0 * rows] * bool((rows != 0).any())
    return [_unravel(z0, start) for start in others]


def _alignment(runaway: np.ndarray, solved: Sequence[_Solved]) -> np.ndarray:
    """Returns the smallest cosine of the first value with the others, ``[B]``; NaN if unknown."""
    first, *others = [(_unit(_rows(s.value)), s.stats.converged) for s in solved]
    cosines = [
        np.where(first[1] & converged & ~runaway, (first[0] * unit).sum(axis=1), np.nan)
        for unit, converged in others
    ]
    return np.fmin.reduce([cosine.astype(np.float32) for cosine in cosines])


def _dependent(
    f: _StateMap, params: PyTree, z: PyTree, x: PyTree, rng: np.random.Generator
) -> np.ndarray:
    """Returns whether f(z) of a sample changes with the states of other samples, ``[B]``.

    Any two samples differ in some bit of their indices: for each bit, one half of the samples is
    changed, then the other half.
    """
    rows = _rows(z)
    size = _norm(rows) / rows.shape[1] ** 0.5
    noise = rng.normal(size=rows.shape) * np.where(size > 0, size, 1)[:, None]
    image = _rows(f(params, z, x))
    index, dependent = np.arange(len(rows)), np.zeros(len(rows), bool)
    for bit in range((len(rows) - 1).bit_length()):
        for half in (0, 1):
            changed = (index >> bit) & 1 == half
            moved = _unravel(z, np.where(changed[:, None], rows + noise, rows))
            gap = _norm(_rows(f(params, moved, x)) - image)
            same = (gap <= 8 * _eps(z) * _norm(image)) | ~np.isfinite(image).all(axis=1)
            dependent |= ~changed & ~same
    return dependent


def _operator_norm(
    f: _StateMap, params: PyTree, z: PyTree, x: PyTree, start: PyTree, iters: int
) -> jax.Array:
    """Estimates the largest singular value of df/dz for every sample, ``[B]``."""
    _, pull = jax.vjp(lambda state: f(params, state, x), z)
    back = lambda u: pull(u)[0]  # J^T u  # noqa: E731
    try:
        _, forth = jax.vjp(back, start)  # J v
        jax.eval_shape(forth, start)
    except (ValueError, TypeError, NotImplementedError):
        # What JAX raises for loops of unknown length, custom rules and new primitives.
        forth = lambda v: (_central_difference(f, params, z, x, v),)  # noqa: E731

    def unit(v: PyTree) -> tuple[PyTree, jax.Array]:
        length = tree.norm(v)
        scale = 1 / jnp.where(length == 0, 1, length)
        return jax.tree.map(lambda a: (a * tree.spread(scale, a)).astype(a.dtype), v), length

    def product(v: PyTree, _: None) -> tuple[PyTree, jax.Array]:
        u, length = unit(forth(v)[0])
        return unit(back(u))[0], length

    return lax.scan(product, start, None, length=iters)[1][-1].astype(jnp.float32)


def _central_difference(f: _StateMap, params: PyTree, z: PyTree, x: PyTree, v: PyTree) -> PyTree:
    """(f(z + step v) - f(z - step v)) / (2 step), a step of the size of z."""
    step = _eps(z) ** (1 / 3) * (1 + tree.norm(z))

    def moved(sign: int) -> PyTree:
        there = lambda a, b: (a + sign * tree.spread(step, a) * b).astype(a.dtype)  # noqa: E731
        return f(params, jax.tree.map(there, z, v), x)

    return jax.tree.map(
        lambda a, b: ((a - b) / (2 * tree.spread(step, a))).astype(a.dtype), moved(1), moved(-1)
    )


def _rounding(
    f: _StateMap, params: PyTree, z: PyTree, x: PyTree, rng: np.random.Generator
) -> np.ndarray:
    """Estimates how far f(z) is off by rounding, relative to its norm, ``[B]``.

    From f(z + d) - 2 f(z) + f(z - d), in which only the curvature of f is left beside rounding, a
    term of the order of the perturbation squared.
    """
    rows, nudge = _rows(z), max(_NUDGE, _eps(z))
    image = lambda a: _rows(f(params, _unravel(z, a), x))  # noqa: E731
    middle = image(rows)
    size, most = _norm(middle), np.zeros(len(rows))
    for _ in range(_PROBES):
        d = nudge * rows * rng.normal(size=rows.shape)
        rest = _norm(image(rows + d) - 2 * middle + image(rows - d))
        most = np.maximum(most, rest / (6**0.5 * np.where(size == 0, 1, size)))
    return most.astype(np.float32)


def _summary(numbers: np.ndarray, form: str) -> list[str]:
    """Returns minimum, median and maximum of what is known, as text."""
    known = numbers[~np.isnan(numbers)]
    return [f"{pick(known):{form}}" if known.size else "-" for pick in (np.min, np.median, np.max)]


def _table(lines: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table, the header first, that is readable as plain text too."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [[cell.rjust(n) for cell, n in zip(line, widths, strict=True)] for line in lines]
    rows = [[row[0].strip().ljust(widths[0]), *row[1:]] for row in rows]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (n - 1) + ":" for n in widths[1:])]
    return "".join(f"| {' | '.join(row)} |\n" for row in [rows[0], rule, *rows[1:]])
