"""What a solver meets at the equilibrium of a cell, and what would help, in words.

For the host: results are numpy arrays and sentences, so `diagnose` cannot be part of a compiled
function.
"""

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
from deq_jax.jacobian import frobenius_penalty, spectral_radius
from deq_jax.solvers import Anderson, Broyden, Picard, Solution, Solver, solve
from deq_jax.solvers.base import check_count, check_image
from deq_jax.testing.advice import advise, plain_iteration
from deq_jax.tree import PyTree

_StateMap = Callable[[PyTree, PyTree, PyTree], PyTree]
_RowMap = Callable[[jax.Array], jax.Array]

# Probes of the penalty, and perturbations that measure how precise f is.
_PROBES = 10
# Relative size of these perturbations: the spacing of TF32, a quarter of bfloat16's.
_NUDGE = 2.0**-10


@dataclasses.dataclass(frozen=True, eq=False)
class Diagnosis:
    """What `diagnose` found; `str` makes a short report of it.

    Attributes:
      value: the point at which the Jacobian was taken, a tree like ``z0``: for every sample plain
        iteration's fixed point where it has converged, else the iterate of least residual.
      trace: solver -> float32 ``[max_steps, B]``, residual of every iterate, ``inf`` after the end
        of a sample's solve.
      steps: solver -> int32 ``[B]``, evaluations of f.
      converged: solver -> bool ``[B]``.
      spectral_radius: float32 ``[B]``, of df/dz at ``value``.
      operator_norm: float32 ``[B]``, largest singular value of df/dz at ``value``, from below.
      penalty: `deq_jax.frobenius_penalty` at ``value``.
      rounding: float32 ``[B]``, relative size of the rounding errors of f at ``value``, a rough
        estimate: no residual falls far below it.
      advice: sentences, the most important first.
    """

    value: PyTree
    trace: Mapping[str, np.ndarray]
    steps: Mapping[str, np.ndarray]
    converged: Mapping[str, np.ndarray]
    spectral_radius: np.ndarray
    operator_norm: np.ndarray
    penalty: float
    rounding: np.ndarray
    advice: tuple[str, ...] = ()

    def __str__(self) -> str:
        longest = max(map(len, self.trace.values()))
        marks = [*(2**i for i in range((longest - 1).bit_length())), longest]
        solvers = [["solver", "steps, median", "solved", "residual, median, at step 1"]]
        solvers[0] += map(str, marks[1:])
        for name, trace in self.trace.items():
            steps = self.steps[name]
            row = [name, f"{np.median(steps):g}", f"{self.converged[name].mean():.0%}"]
            for mark in marks:
                reached = np.take_along_axis(trace, np.clip(steps, 1, mark)[None] - 1, axis=0)
                row.append(f"{np.median(reached):.1e}")
            solvers.append(row)
        jacobian = [["df/dz", "min", "median", "max"]]
        for name in ("spectral_radius", "operator_norm"):
            known = getattr(self, name)
            known = known if np.isnan(known).all() else known[~np.isnan(known)]
            cells = [f"{pick(known):.3g}" for pick in (np.min, np.median, np.max)]
            jacobian.append([name.replace("_", " "), *cells])
        advice = "".join(f"- {sentence}\n" for sentence in self.advice)
        tables = _table(solvers), _table(jacobian), f"penalty {self.penalty:.3g}\n", advice
        return "\n".join(tables)


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
) -> Diagnosis:
    """Solves z = f(params, z, x) by several methods, measures df/dz there, and says what it means.

    The operator norm is that of J = df/dz by power iteration on J^T J, sample by sample, where
    J v is the transpose of the vector-Jacobian product: forward mode fails on a `jax.custom_vjp`
    inside f.  Where that cannot be transposed (a solve inside f), J v is a central difference.

    Nothing is compiled but the loops; a large f is traced and compiled once instead of operation
    by operation if it is given as ``jax.jit(f)``.

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

    Returns:
      A `Diagnosis`.

    Raises:
      ValueError: called under a transformation such as `jax.jit`, no solver, a setting out of
        range, or an f that changes tree, shape or dtype of z.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jnp.ones((4, 8))
      >>> w = 1.3 * jnp.eye(8)[::-1]
      >>> f = lambda w, z, x: z @ w + x
      >>> print(diagnose(f, w, jnp.zeros_like(x), x, key=jax.random.key(0)).advice[0])
      The spectral radius at the fixed point is 1.30: plain iteration diverges; lower the scale of
      the weights by 1.3 or more, or train with deq.frobenius_penalty.
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((params, z0, x, key))):
        raise ValueError(
            "got traced arrays; wanted concrete ones, as a diagnosis is made of words; call "
            "diagnose outside of jit, vmap and grad"
        )
    check_count("diagnose", "iters", iters)
    if solvers is None:
        common: Any = {"tol": tol, "max_steps": max_steps}
        solvers = {kind.__name__: kind(**common) for kind in (Picard, Anderson, Broyden)}
    if not solvers:
        raise ValueError("got no solver; wanted one or more, or solvers=None for the usual three")
    z0 = jax.tree.map(jnp.asarray, z0)
    image = f(params, z0, x)
    check_image(z0, image)
    solved = {name: solve(s, lambda z: f(params, z, x), z0) for name, s in solvers.items()}
    z = _closest(solved, plain_iteration(solvers))

    keys = jax.random.split(key, 4)
    stats = {name: jax.device_get(sol.stats) for name, sol in solved.items()}
    found = Diagnosis(
        value=z,
        trace={name: s.trace for name, s in stats.items()},
        steps={name: s.num_steps for name, s in stats.items()},
        converged={name: s.converged for name, s in stats.items()},
        spectral_radius=np.asarray(spectral_radius(f, params, z, x, key=keys[0], iters=iters)),
        operator_norm=np.asarray(_operator_norm(f, params, z, x, keys[1], iters)),
        penalty=float(frobenius_penalty(f, params, z, x, key=keys[2], probes=_PROBES)),
        rounding=np.asarray(_rounding(f, params, z, x, keys[3])),
    )
    finite = np.asarray(jnp.isfinite(tree.batch_ravel(image)[0]).all(axis=1))
    spoiled = [
        name
        for name, part in (("params", params), ("z0", z0), ("x", x))
        for leaf in jax.tree.leaves(part)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) and not jnp.isfinite(leaf).all()
    ]
    return dataclasses.replace(found, advice=advise(found, solvers, finite, spoiled))


def _closest(solved: Mapping[str, Solution], plain: str | None) -> PyTree:
    """Returns the best value of every sample, plain iteration's where that has converged.

    Other methods may find a fixed point that plain iteration would leave.
    """
    residuals = [
        jnp.where((name == plain) & sol.stats.converged, -1, sol.stats.residual)
        for name, sol in solved.items()
    ]
    best = jnp.argmin(jnp.stack(residuals), axis=0)  # [B]
    first, *others = [sol.value for sol in solved.values()]
    for i, value in enumerate(others, start=1):
        first = tree.where(best == i, value, first)
    return first


def _operator_norm(
    f: _StateMap, params: PyTree, z: PyTree, x: PyTree, key: jax.Array, iters: int
) -> jax.Array:
    """Estimates the largest singular value of df/dz for every sample, ``[B]``."""
    flat, unravel = tree.batch_ravel(z)
    wide = tree.stat_dtype(flat.dtype)
    _, pull = jax.vjp(lambda state: f(params, state, x), z)

    def back(u: jax.Array) -> jax.Array:  # J^T u
        return tree.batch_ravel(pull(unravel(u))[0])[0].astype(wide)

    start = _unit(jax.random.normal(key, flat.shape, wide))
    try:
        _, forth = jax.vjp(back, start)  # J v
        jax.eval_shape(forth, start)
    except (ValueError, TypeError, NotImplementedError):
        # What JAX raises for loops of unknown length, custom rules and new primitives.
        image, size = _on_rows(f, params, z, x), 1 + tree.norm(flat)[:, None]
        step = float(jnp.finfo(wide).eps) ** (1 / 3) * size
        forth = lambda v: [(image(flat + step * v) - image(flat - step * v)) / (2 * step)]  # noqa: E731

    def product(v: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        (u,) = forth(v)
        return _unit(back(_unit(u))), tree.norm(u)

    return lax.scan(product, start, None, length=iters)[1][-1].astype(jnp.float32)


def _on_rows(f: _StateMap, params: PyTree, z: PyTree, x: PyTree) -> _RowMap:
    """Returns f as a map of ``[B, D]``, in float32 or wider."""
    flat, unravel = tree.batch_ravel(z)
    wide = tree.stat_dtype(flat.dtype)
    return lambda rows: tree.batch_ravel(f(params, unravel(rows), x))[0].astype(wide)


def _rounding(f: _StateMap, params: PyTree, z: PyTree, x: PyTree, key: jax.Array) -> jax.Array:
    """Estimates how far f(z) is off by rounding, relative to its norm, ``[B]``.

    From f(z + d) - 2 f(z) + f(z - d), in which only the curvature of f is left beside rounding, a
    term of the order of `_NUDGE` squared.
    """
    image = _on_rows(f, params, z, x)
    flat = tree.batch_ravel(z)[0]
    rows = flat.astype(tree.stat_dtype(flat.dtype))
    middle = image(rows)
    size = tree.norm(middle)

    def wobble(probe: jax.Array) -> jax.Array:
        d = _NUDGE * rows * jax.random.normal(probe, rows.shape, rows.dtype)
        rest = tree.norm(image(rows + d) - 2 * middle + image(rows - d))
        return rest / (6**0.5 * jnp.where(size == 0, 1, size))

    return lax.map(wobble, jax.random.split(key, _PROBES)).max(axis=0).astype(jnp.float32)


def _unit(v: jax.Array) -> jax.Array:
    """Scales rows to length one; zero stays zero."""
    length = tree.norm(v)
    return v / jnp.where(length == 0, 1, length)[:, None]


def _table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the header first, that is readable as plain text too."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [[cell.rjust(n) for cell, n in zip(line, widths, strict=True)] for line in lines]
    rows = [[row[0].strip().ljust(widths[0]), *row[1:]] for row in rows]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (n - 1) + ":" for n in widths[1:])]
    return "".join(f"| {' | '.join(row)} |\n" for row in [rows[0], rule, *rows[1:]])
