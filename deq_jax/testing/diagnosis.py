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
from deq_jax.tree import PyTree

_StateMap = Callable[[PyTree, PyTree, PyTree], PyTree]
_RowMap = Callable[[jax.Array], jax.Array]

# Probes of the penalty, and perturbations that measure how precise f is.
_PROBES = 10
# Relative size of these perturbations: the spacing of TF32, a quarter of bfloat16's.
_NUDGE = 2.0**-10
# Spectral radius from which on plain iteration is not expected to converge in reasonable time.
_EDGE = 0.99


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
        solvers = [["solver", "steps, median", "solved", "last residual, median"]]
        for name, trace in self.trace.items():
            steps = self.steps[name]
            last = np.take_along_axis(trace, np.maximum(steps - 1, 0)[None], axis=0)
            solved = f"{self.converged[name].mean():.0%}"
            solvers.append([name, f"{np.median(steps):g}", solved, f"{np.median(last):.2g}"])
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
    z = _closest(solved, _plain(solvers))

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
    return dataclasses.replace(found, advice=_advise(found, solvers, finite, spoiled))


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


def _plain(solvers: Mapping[str, Solver]) -> str | None:
    """Name of the undamped iteration among the solvers."""
    plain = [n for n, s in solvers.items() if isinstance(s, Picard) and s.damping == 1]
    return plain[0] if plain else None


def _in(mask: np.ndarray) -> str:
    return "" if mask.all() else f" in {mask.sum()} of {len(mask)} samples"


def _advise(
    d: Diagnosis, solvers: Mapping[str, Solver], finite: np.ndarray, spoiled: Sequence[str]
) -> tuple[str, ...]:
    """At most four sentences, the most important first; ``finite [B]``: whether f(z0) is."""
    said = []
    if not finite.all():
        why = "look for an overflow in f, or start from another z0"
        if spoiled:
            why = f"see what is not finite in {' and '.join(dict.fromkeys(spoiled))}"
        said = [f"f(z0) is not finite{_in(~finite)}, where no solver can begin: {why}."]
    if not finite.any():
        return tuple(said)
    rho, sigma = d.spectral_radius, d.operator_norm
    stalled = {n: _stalled(d, n) for n in solvers}
    said += _of_rounding(d, stalled)
    said += _of_unsolved(d, solvers, finite & ~np.any([*stalled.values()], axis=0))
    said += _of_plain(d, solvers, finite, stalled)
    if (sigma[finite] < 1e-6).all():
        said.append(
            "f does not depend on z: its Jacobian is 0, and one evaluation of f is the answer; see "
            "that z enters f, through weights that are not 0 and units that are not dead."
        )
    elif not said:
        best = [n for n in solvers if d.converged[n].all()]
        each = ", ".join(f"{n} in {np.median(d.steps[n]):g}" for n in best) or "one or another"
        said.append(
            f"All is well: every sample is solved, by {each} steps (median), and the spectral "
            f"radius is at most {rho.max():.2f}."
        )
    skewed = finite & (rho < _EDGE) & (sigma > np.maximum(1, 1.5 * rho))
    if skewed.any():
        i = np.argmax(np.where(skewed, sigma, 0))
        said.append(
            f"The operator norm is {sigma[i]:.3g} where the spectral radius is {rho[i]:.2f}"
            f"{_in(skewed)}: f is not normal, and the first steps of plain iteration can grow "
            "before they shrink; orthogonal or symmetric weights (deq.init.orthogonal, "
            "deq.init.goe) keep the two together."
        )
    return tuple(said[:4])


def _stalled(d: Diagnosis, name: str) -> np.ndarray:
    """Whether a solve has ended in the rounding errors of f, ``[B]``."""
    halves = np.split(d.trace[name], [(len(d.trace[name]) + 1) // 2])
    first, second = (np.fmin.reduce(half, initial=np.inf) for half in halves)
    flat = (second > first / 2) & np.isfinite(second)
    return flat & ~d.converged[name] & (np.fmin(first, second) < 10 * d.rounding)


def _of_rounding(d: Diagnosis, stalled: Mapping[str, np.ndarray]) -> list[str]:
    names, mask = [n for n in stalled if stalled[n].any()], np.any([*stalled.values()], axis=0)
    if not names:
        return []
    floor = max(np.fmin.reduce(d.trace[n])[stalled[n]].max() for n in names)
    noise = np.median(d.rounding[mask])
    wider = "float32 with exact products (jax_default_matmul_precision)"
    return [
        f"{' and '.join(names)} stall{'s' * (len(names) == 1)} at a residual of {floor:.0e}"
        f"{_in(mask)}, as f is precise to {noise:.0e} only: set tol above {2 * floor:.0e}, or "
        f"compute f in {wider if noise > 1e-5 else 'float64'}."
    ]


def _of_unsolved(d: Diagnosis, solvers: Mapping[str, Solver], mask: np.ndarray) -> list[str]:
    mask = mask & ~np.any([*d.converged.values()], axis=0)
    if not mask.any():
        return []
    rest = {n: np.median(np.fmin.reduce(trace[:, mask])) for n, trace in d.trace.items()}
    name = min(rest, key=lambda n: rest[n])
    tol, budget = solvers[name].tol, solvers[name].max_steps
    start = (
        f"No solver reaches its tolerance{_in(mask)}; {name} comes closest, with a residual of "
        f"{rest[name]:.1g} (tolerance {tol:g}) in {budget} steps"
    )
    # Falling: from the middle to the end of the solve, the median of the least residual so far.
    least = np.median(np.fmin.accumulate(d.trace[name][:, mask]), axis=1)
    middle, end = least[budget // 2], least[-1]
    if budget > 3 and 0 < end < 0.7 * middle < np.inf:
        rate = np.log(end / middle) / (budget - 1 - budget // 2)
        return [f"{start}, and falling: about {budget + np.log(tol / end) / rate:.0f} would do."]
    if np.median(d.spectral_radius[mask]) >= _EDGE:
        return [f"{start}; there may be no fixed point."]  # what to do comes with the radius
    return [f"{start}: lower the scale of the weights, or give it more steps and memory."]


def _of_plain(
    d: Diagnosis,
    solvers: Mapping[str, Solver],
    finite: np.ndarray,
    stalled: Mapping[str, np.ndarray],
) -> list[str]:
    """What to say of samples that plain iteration does not solve, or others do not."""
    said, rho, plain = [], d.spectral_radius, _plain(solvers)
    solved = np.any([*d.converged.values()], axis=0)
    left = finite & ~(d.converged[plain] | stalled[plain]) if plain else finite
    unstable = left & (rho >= _EDGE)
    if unstable.any():
        largest = rho[unstable].max()
        up_to = "up to " if rho[unstable].min() < 0.95 * largest else ""
        skewed = d.operator_norm[unstable].max() > 1.2 * largest
        said.append(
            f"The spectral radius at the {'' if solved[unstable].all() else 'would-be '}fixed "
            f"point is {up_to}{largest:.2f}{_in(unstable)}: plain iteration "
            f"{'diverges' if largest > 2 - _EDGE else 'does not settle'}; lower the scale of the "
            f"weights {f'by {largest:.2g} or more' if largest > 1.05 else 'a little'}"
            f"{', start from orthogonal weights (deq.init.orthogonal)' if skewed else ''}, or "
            "train with deq.frobenius_penalty."
        )
    if plain is None:
        return said
    tol, others = solvers[plain].tol, [n for n in solvers if n != plain]
    slow = left & solved & (rho < _EDGE)
    if slow.any():
        radius = np.median(rho[slow])
        need = np.log(tol) / np.log(radius) if tol < 1 and radius > 0 else 0
        said.append(
            f"At a spectral radius of {radius:.2f} plain iteration needs about {need:.0f} steps "
            f"to {tol:g}{_in(slow)}."
            if need > 0.8 * solvers[plain].max_steps
            else f"Plain iteration does not come from z0 to the fixed point{_in(slow)}, though the "
            f"spectral radius there is {radius:.2f}: start nearer to it."
        )
    helped = {n: d.converged[n] & left for n in others}
    best = max(others, key=lambda n: (helped[n].sum(), -np.median(d.steps[n])), default="")
    if best and helped[best].any():
        said.append(
            f"{best} solves what plain iteration does not{_in(helped[best])}, in "
            f"{np.median(d.steps[best][helped[best]]):g} steps (median): use it."
        )
    for name in others:
        missed = d.converged[plain] & ~d.converged[name]
        if missed.any() and not stalled[name].any():
            said.append(f"{name} does not solve what plain iteration does{_in(missed)}.")
    return said


def _table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the header first, that is readable as plain text too."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [[cell.rjust(n) for cell, n in zip(line, widths, strict=True)] for line in lines]
    rows = [[row[0].strip().ljust(widths[0]), *row[1:]] for row in rows]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (n - 1) + ":" for n in widths[1:])]
    return "".join(f"| {' | '.join(row)} |\n" for row in [rows[0], rule, *rows[1:]])
