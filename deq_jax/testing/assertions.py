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
from deq_jax.implicit import fixed_point
from deq_jax.solvers import Broyden, Picard, Solution, Solver, solve
from deq_jax.solvers.base import StopMode
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
) -> None:
    """Asserts that the statistics of a solve are true of the value it returned.

    The residual is evaluated anew at ``sol.value``; ``converged`` must say whether it is within
    ``tol``, ``num_steps`` how many entries of ``trace`` are in use, and the smallest of these must
    be the residual.  A solve that failed and says so passes.

    Args:
      f: the map ``(params, z, x) -> z``.
      params: its parameters.
      sol: what `solve` or `fixed_point` returned, all of its residuals finite.
      x: the other operands of f.
      tol: the tolerance of the solver.
      stop: its stop mode, ``"rel"`` or ``"abs"``.

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
    stats = jax.tree.map(np.asarray, sol.stats)
    residual, slack = _residual(f, params, sol.value, x, stop)
    wrong = ~(np.abs(residual - stats.residual) <= slack + 1e-3 * residual)
    _refuse(wrong, "stats.residual", stats.residual, residual)
    _refuse(stats.converged != (stats.residual <= tol), "converged", stats.converged, residual)
    used = np.isfinite(stats.trace).sum(axis=0)
    _refuse(used != stats.num_steps, "num_steps", stats.num_steps, used)
    least = stats.trace.min(axis=0)
    _refuse(least != stats.residual, "smallest residual in trace", least, stats.residual)


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
      stop: how it is measured: ``"rel"``, norm(f(z) - z) / norm(f(z)), or ``"abs"``.

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


def assert_gradients_agree(
    f: _StateMap,
    params: PyTree,
    z0: PyTree,
    x: PyTree = None,
    *,
    solver: Solver | None = None,
    unroll: int = 400,
    damping: float = 1.0,
    directions: int = 3,
    rtol: float = 1e-5,
    key: jax.Array | None = None,
) -> None:
    """Asserts that three computations of the gradient of a solution agree, in float64.

    For loss = sum(c * z*) with a random c: the implicit gradient, the gradient by differentiating
    ``unroll`` steps of z <- (1 - damping) z + damping f(z) from the solution, and central
    differences along random directions, for all floating-point leaves of ``params`` and ``x``.
    The gradient in ``z0`` must be zero.

    Args:
      f: the map ``(params, z, x) -> z``; it must not cast to a fixed dtype.
      params: its parameters.
      z0: start, tree of arrays ``[B, ...]``.
      x: the other operands of f.
      solver: reaches the solution and solves the backward system; None for a Broyden method with a
        tolerance of 1e-12.
      unroll: number of steps; their contraction must make the last one negligible.
      damping: step length; less than 1 where the plain iteration does not converge.
      directions: number of random directions for the differences.
      rtol: largest difference allowed, relative to the size of the gradient.
      key: PRNG key of c and of the directions; None for a fixed one.

    Returns:
      None.

    Raises:
      AssertionError: saying which two computations disagree and where.

    Example:
      >>> import jax.numpy as jnp
      >>> f = lambda params, z, x: jnp.cos(params * z) + x
      >>> assert_gradients_agree(f, jnp.float32(0.9), jnp.ones((2, 3)), jnp.zeros((2, 3)))
    """
    with jax.enable_x64(True):
        z0, operands = _widen(z0), _widen((params, x))
        settings = solver or Broyden(tol=1e-12, max_steps=200, memory=50, stop="abs")
        free, rebuild = _floating(operands)
        keys = jax.random.split(jax.random.key(0) if key is None else key, 2 + directions)
        c = _normal_like(keys[0], z0)

        def answer(free: list[jax.Array], start: PyTree) -> tuple[jax.Array, Solution]:
            p, other = rebuild(free)
            sol = fixed_point(f, p, start, other, solver=settings)
            return tree.dot(sol.value, c).sum(), sol

        (_, sol), (implicit, from_z0) = jax.value_and_grad(answer, (0, 1), has_aux=True)(free, z0)
        done = np.asarray(sol.stats.converged)
        _refuse(~done, f"converged (residuals {sol.stats.residual})", done, True)

        def unrolled(free: list[jax.Array]) -> jax.Array:
            p, other = rebuild(free)

            def step(z: PyTree, _: None) -> tuple[PyTree, None]:
                mix = jax.tree.map(lambda a, b: a + damping * (b - a), z, f(p, z, other))
                return mix, None

            start = lax.stop_gradient(sol.value)
            return tree.dot(lax.scan(step, start, None, length=unroll)[0], c).sum()

        _close("implicit and unrolled gradient", implicit, jax.grad(unrolled)(free), rtol)
        _close("gradient in z0 and zero", from_z0, jax.tree.map(jnp.zeros_like, z0), rtol)

        along = [_normal_like(k, free) for k in keys[2:]]
        moved = [
            [a + eps * d for a, d in zip(free, direction, strict=True)]
            for direction in along
            for eps in (1e-5, -1e-5)
        ]
        # Under one map, all these solves are compiled once.
        stacked = jax.tree.map(lambda *a: jnp.stack(a), *moved)
        ends = lax.map(lambda point: answer(point, sol.value)[0], stacked).reshape(-1, 2)
        size = [sum(jnp.linalg.norm(a) for a in implicit)]
        for direction, (above, below) in zip(along, ends, strict=True):
            slope = sum(jnp.vdot(a, b) for a, b in zip(implicit, direction, strict=True))
            difference = (above - below) / 2e-5
            _close("implicit gradient and finite difference", [slope], [difference], rtol, size)


def assert_solver(solver: Solver, *, batch: int = 4, dtype: Any = jnp.float32) -> None:
    """Asserts that a solver does what the library expects of one, on all problems of this module.

    Of each problem: the statistics are true (`assert_honest`); the value keeps shape and dtype;
    what is reported as converged is near the known solution; a problem without a solution is never
    reported as converged; a contraction that plain iteration solves in half of the solver's budget
    is solved.  The first problem and the one of several resolutions are also solved sample by
    sample (`assert_batch_independent`).

    Args:
      solver: any object with ``tol``, ``max_steps``, ``stop``, ``init`` and ``step``.
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
    assert_honest(f, params, sol, x, tol=solver.tol, stop=solver.stop)
    converged = np.asarray(sol.stats.converged)
    if problem.kind == "unsolvable":
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
    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(image))
    rows, target = _rows(z), _rows(image)
    gap, size = np.linalg.norm(target - rows, axis=1), np.linalg.norm(target, axis=1)
    if stop == "abs":
        return gap, 20 * eps * size
    return gap / (size + 1e-9), np.full_like(gap, 20 * eps)


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


def _close(what: str, a: PyTree, b: PyTree, rtol: float, size: PyTree | None = None) -> None:
    for x, y, s in zip(
        *(jax.tree.leaves(t) for t in (a, b, b if size is None else size)), strict=True
    ):
        x, y = np.asarray(x), np.asarray(y)
        gap, allowed = np.abs(x - y).max(initial=0), rtol * (1e-3 + np.abs(s).max(initial=0))
        if not gap <= allowed:
            raise AssertionError(
                f"{what} disagree: got {x} and {y}; wanted a difference of at most {allowed}"
            )


def _unstack(solutions: Solution, count: int) -> list[Solution]:
    return [jax.tree.map(lambda a, i=i: a[i], solutions) for i in range(count)]


def _widen(operand: PyTree) -> PyTree:
    """Casts floating-point leaves to float64."""

    def leaf(a: Any) -> jax.Array:
        a = jnp.asarray(a)
        return a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a

    return jax.tree.map(leaf, operand)


def _floating(operands: PyTree) -> tuple[list[jax.Array], Callable[[list[jax.Array]], PyTree]]:
    """Returns the floating-point leaves, and how to put others in their places."""
    leaves, treedef = jax.tree.flatten(operands)
    places = [i for i, a in enumerate(leaves) if jnp.issubdtype(a.dtype, jnp.floating)]

    def rebuild(free: list[jax.Array]) -> PyTree:
        filled = list(leaves)
        for i, a in zip(places, free, strict=True):
            filled[i] = a
        return treedef.unflatten(filled)

    return [leaves[i] for i in places], rebuild


def _normal_like(key: jax.Array, like: PyTree) -> PyTree:
    leaves, treedef = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    drawn = [jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, leaves, strict=True)]
    return treedef.unflatten(drawn)
