"""Assertions about solvers, solutions and gradients, for use in tests.

Each raises ``AssertionError`` with what was got and what was wanted; none needs pytest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deq_jax import tree
from deq_jax.solvers import Picard, Solution, Solver, solve
from deq_jax.solvers.base import StopMode, Unbatched
from deq_jax.testing.problems import Problem, affine
from deq_jax.testing.systems import all_problems, multiscale
from deq_jax.tree import PyTree

_StateMap = Callable[[PyTree, PyTree, PyTree], PyTree]


def assert_honest(
    f: _StateMap,
    params: PyTree,
    sol: Solution,
    x: PyTree = None,
    *,
    tol: float = 1e-3,
    stop: StopMode = "rel",
    z0: PyTree = None,
) -> None:
    """Asserts that the statistics of a solve are true of the value it returned.

    Evaluates r = norm(f(z) - z), divided by norm(f(z)) for ``stop="rel"``, at z = ``sol.value``.

    * ``residual`` is r.  For ``"rel"`` it may be larger, because `solve` divides by a size that a
      runaway cannot inflate; if ``z0`` is passed, it must be r wherever norm(f(z)) is at most
      100 norm(f(z0)).  ``inf`` passes, as the residual of a sample that was given up.
    * ``converged`` is ``residual <= tol``.
    * ``trace`` (if there is one) has a residual for each of ``num_steps`` evaluations, the smallest
      of which is ``residual``, and ``inf`` elsewhere.  The last evaluation of a sample that failed
      has ``inf`` too.

    A solve that failed and says so passes.

    Args:
      f: the map ``(params, z, x) -> z``.
      params: its parameters.
      sol: what `solve` or `fixed_point` returned with ``keep="best"``; any dtypes, with a batch
        axis or without.
      x: the other operands of f.
      tol: the tolerance of the solver.
      stop: its stop mode, ``"rel"`` or ``"abs"``.
      z0: the start of the solve, for the sharper test of ``residual``.

    Returns:
      None.

    Raises:
      AssertionError: naming the samples concerned.

    Example:
      >>> import jax.numpy as jnp
      >>> from deq_jax.solvers import Picard, solve
      >>> sol = solve(Picard(tol=1e-3, max_steps=2), jnp.cos, jnp.ones((3, 1)))
      >>> assert_honest(lambda params, z, x: jnp.cos(z), None, sol)
    """
    residual, converged, num_steps = (
        np.atleast_1d(a) for a in (sol.stats.residual, sol.stats.converged, sol.stats.num_steps)
    )
    z = sol.value
    if jnp.ndim(sol.stats.residual) == 0:
        f = Unbatched(f, 1)
        z, z0 = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], (z, z0))
    true, noise = _residual(f, params, z, x, stop)
    slack = np.where(np.isfinite(true), 1e-3 * true + noise, 0)
    _refuse(~(residual >= true - slack) & ~np.isinf(residual), "stats.residual", residual, true)
    sharp = np.isfinite(residual)
    if stop == "rel":
        first, last = (
            np.inf if a is None else np.linalg.norm(_rows(f(params, a, x)), axis=1) for a in (z0, z)
        )
        sharp &= (z0 is not None) & (last <= 100 * first)
    _refuse(sharp & ~(residual <= true + slack), "stats.residual", residual, true)
    _refuse(converged != (residual <= tol), "converged", converged, true)
    if sol.stats.trace is None:
        return
    trace = np.asarray(sol.stats.trace)
    trace = trace.reshape(len(trace), -1)
    finite = np.isfinite(trace)
    last = num_steps - 1 - ~converged  # of a failed sample the last entry may be inf
    step = np.arange(len(trace))[:, None]
    wrong = (~finite & (step <= last)) | (finite & (step >= num_steps)) | ~(trace >= 0)
    wrong = wrong.any(axis=0) | (num_steps > len(trace))
    _refuse(wrong, "num_steps", num_steps, finite.sum(axis=0))
    least = trace.min(axis=0)
    _refuse(least != residual, "smallest residual in trace", least, residual)


def assert_fixed_point(
    f: _StateMap,
    params: PyTree,
    sol: Solution,
    x: PyTree = None,
    *,
    tol: float = 1e-3,
    stop: StopMode = "rel",
) -> None:
    """Asserts that every sample solves z = f(params, z, x) to ``tol`` and is reported so.

    Args:
      f: the map ``(params, z, x) -> z``.
      params: its parameters.
      sol: what `solve` or `fixed_point` returned.
      x: the other operands of f.
      tol: largest residual allowed.
      stop: the measure: ``"rel"``, norm(f(z) - z) / norm(f(z)), or ``"abs"``, norm(f(z) - z).

    Returns:
      None.

    Raises:
      AssertionError: naming the samples concerned.

    Example:
      >>> import jax.numpy as jnp
      >>> from deq_jax.solvers import Anderson, solve
      >>> sol = solve(Anderson(tol=1e-3), jnp.cos, jnp.ones((3, 1)))
      >>> assert_fixed_point(lambda params, z, x: jnp.cos(z), None, sol)
    """
    residual, slack = _residual(f, params, sol.value, x, stop)
    _refuse(~(residual <= tol + slack), f"residual (tol {tol})", residual, tol)
    converged = np.asarray(sol.stats.converged)
    _refuse(~converged, "converged", converged, True)


def assert_batch_independent(solver: Solver, problem: Problem) -> None:
    """Asserts that a sample's answer does not depend on its batch mates.

    Solved are the batch, its reverse, each sample alone, and the batch with the first sample's
    ``x`` replaced by NaN.  Values must agree to rounding; steps must agree too, but for one where
    rounding lifts a residual over the tolerance.  Beside the NaN sample everything must agree to
    the last bit; the NaN sample itself must return something finite and be reported as not
    converged.

    Args:
      solver: the solver to test.
      problem: a problem of at least two samples, best a well-conditioned contraction such as
        `affine`: where rounding decides the path, samples solved alone may differ.

    Returns:
      None.

    Raises:
      AssertionError: naming the samples concerned.

    Example:
      >>> from deq_jax.solvers import Anderson
      >>> assert_batch_independent(Anderson(tol=1e-4), affine(batch=3))
    """

    def run(operands: tuple[PyTree, PyTree]) -> Solution:
        z0, x = operands
        return solve(solver, lambda z: problem.f(problem.params, z, x), z0)

    plain = (problem.z0, problem.x)
    flipped = jax.tree.map(lambda a: a[::-1], plain)
    spoiled = (problem.z0, jax.tree.map(lambda a: a.at[0].set(jnp.nan), problem.x))
    # One compiled solve for the three batches, so that equal inputs are rounded equally.
    batches = jax.tree.map(lambda *a: jnp.stack(a), plain, flipped, spoiled)
    base, back, beside = _unstack(lax.map(run, batches), 3)
    singles = lax.map(run, jax.tree.map(lambda a: a[:, None], plain))
    alone = _rows(singles.value)

    want, steps = _rows(base.value), np.asarray(base.stats.num_steps)
    scale = np.abs(want).max(axis=1)
    rounding = 1e3 * float(jnp.finfo(jax.tree.leaves(problem.z0)[0].dtype).eps) * scale
    step_apart = 4 * problem.condition * solver.tol * (1 + np.linalg.norm(want, axis=1))

    def compare(what: str, value: np.ndarray, num_steps: np.ndarray) -> None:
        _refuse(abs(num_steps - steps) > 1, f"num_steps {what}", num_steps, steps)
        allowed = np.where(num_steps == steps, rounding, rounding + step_apart)
        far = ~(np.abs(value - want).max(axis=1) <= allowed)
        _refuse(far, f"value {what}", value, want)

    compare("in reverse order", _rows(back.value)[::-1], np.asarray(back.stats.num_steps)[::-1])
    compare("solved alone", alone, np.asarray(singles.stats.num_steps)[:, 0])
    got = _rows(beside.value)
    differs = (got != want).any(axis=1) | (np.asarray(beside.stats.num_steps) != steps)
    differs[0] = False
    _refuse(differs, "value beside a NaN sample", got, want)
    _refuse(~np.isfinite(got).all(axis=1), "value of a NaN sample", got, "finite numbers")
    _refuse(np.asarray(beside.stats.converged)[:1], "converged of a NaN sample", True, False)


def assert_solver(solver: Solver, *, batch: int = 4, dtype: Any = jnp.float32) -> None:
    """Asserts that a solver does what the library expects of one, on all problems of this module.

    For each problem of `all_problems`:

    * the statistics are true (`assert_honest`);
    * the value keeps shape and dtype;
    * a sample reported as converged is near the known solution;
    * a sample of a problem without a solution is not reported as converged, if the tolerance is
      below ``problem.least``;
    * a contraction that plain iteration solves in half of the solver's budget is solved.

    The first problem and the one of several resolutions are also solved sample by sample
    (`assert_batch_independent`).

    Args:
      solver: any object with ``tol``, ``max_steps``, ``stop``, ``init`` and ``step``.  States are
        trees of arrays ``[B, ...]``: an array, or a dict of two for the last of these problems.
      batch: number of samples, at least 2.
      dtype: dtype of the states.

    Returns:
      None.

    Raises:
      AssertionError: naming the problem.

    Example:
      >>> from deq_jax.solvers import Picard
      >>> assert_solver(Picard(tol=1e-3, max_steps=40, damping=0.9))
    """
    for problem in all_problems(batch, dtype=dtype):
        try:
            _check_problem(solver, problem)
        except AssertionError as error:
            raise AssertionError(f"{type(solver).__name__} on {problem.name}: {error}") from error
    for problem in (affine(batch, dtype=dtype), multiscale(batch, dtype=dtype)):
        assert_batch_independent(solver, problem)


def _check_problem(solver: Solver, problem: Problem) -> None:
    sol = solve(solver, lambda z: problem.f(problem.params, z, problem.x), problem.z0)
    want, got = tree.describe(problem.z0), tree.describe(sol.value)
    if want != got:
        raise AssertionError(f"got a value {got}; wanted {want}")
    f, params, x = problem.f, problem.params, problem.x
    assert_honest(f, params, sol, x, tol=solver.tol, stop=solver.stop, z0=problem.z0)
    converged = np.asarray(sol.stats.converged)
    if problem.kind == "unsolvable":
        if solver.tol < problem.least.get(solver.stop, 0.0):
            _refuse(converged, "converged", converged, False)
        return
    if problem.name.startswith("logistic"):
        converged = converged & (np.abs(_rows(sol.value)[:, 0]) > 0.1)  # its other solution is 0
    gap, slack = _residual(f, params, sol.value, x, "abs")
    error = np.asarray(problem.error(sol.value))
    allowed = 2 * problem.condition * (gap + slack)
    _refuse(converged & ~(error <= allowed), "error of the value", error, allowed)
    if problem.kind == "contraction":
        plain = Picard(tol=solver.tol, max_steps=max(1, solver.max_steps // 2), stop=solver.stop)
        easy = solve(plain, lambda z: f(params, z, x), problem.z0).stats.converged
        missed = np.asarray(easy) & ~np.asarray(sol.stats.converged)
        _refuse(missed, "residual", np.asarray(sol.stats.residual), solver.tol)


def _residual(
    f: _StateMap, params: PyTree, z: PyTree, x: PyTree, stop: StopMode
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the residual at z, ``[B]``, and how much of it may be rounding."""
    image = f(params, z, x)
    gap = np.linalg.norm(_rows(image) - _rows(z), axis=1)
    noise = 20 * _noise(image)
    if stop == "abs":
        return gap, noise
    size = np.linalg.norm(_rows(image), axis=1)
    limits = np.finfo(np.float32)
    size = np.maximum(size, limits.tiny)  # 0/0 := 0
    with np.errstate(invalid="ignore"):  # inf/inf, of a sample that was given up
        ratio, noise = gap / size, noise / size
    return np.where(np.isfinite(gap), np.minimum(ratio, limits.max), ratio), noise


def _noise(value: PyTree) -> np.ndarray:
    """Returns the norm of one rounding error in every element, ``[B]``."""
    leaves = [float(jnp.finfo(a.dtype).eps) * _rows(a) for a in jax.tree.leaves(value)]
    return np.linalg.norm(np.concatenate(leaves, axis=1), axis=1)


def _rows(value: PyTree) -> np.ndarray:
    """Returns a tree of arrays ``[B, ...]`` as one float64 matrix ``[B, D]``."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(value)]
    return np.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)


def _refuse(wrong: Any, what: str, got: Any, wanted: Any) -> None:
    """Raises AssertionError where ``wrong [B]`` holds for a sample."""
    samples = np.flatnonzero(np.asarray(wrong))
    if samples.size:

        def pick(a: Any) -> Any:
            return np.asarray(a)[samples] if np.ndim(a) else a

        raise AssertionError(
            f"{what}: got {pick(got)}; wanted {pick(wanted)}, in samples {samples.tolist()}"
        )


def _unstack(solutions: Solution, count: int) -> list[Solution]:
    return [jax.tree.map(lambda a, i=i: a[i], solutions) for i in range(count)]
