import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from deq_jax import testing
from deq_jax.fixed_point import fixed_point
from deq_jax.solvers import Anderson, Broyden, Picard, SolveStats, solve
from deq_jax.solvers.base import StopMode
from deq_jax.testing import assertions
from deq_jax.tree import describe

PROBLEMS = testing.all_problems(3)
NAMES = [problem.name for problem in PROBLEMS]
BY_NAME = dict(zip(NAMES, PROBLEMS, strict=True))
SOLVABLE = [problem.name for problem in PROBLEMS if problem.kind != "unsolvable"]
UNSOLVABLE = [problem.name for problem in PROBLEMS if problem.kind == "unsolvable"]


def side_by_side(problems):
    """One problem whose samples are those of several, padded with zeros; and the parts of a state.

    Samples are solved one by one, so that a single program solves all of them.
    """
    shapes = [p.z0.shape for p in problems]
    width, ends = max(n for _, n in shapes), np.cumsum([rows for rows, _ in shapes])

    def join(parts):
        return jnp.concatenate([jnp.pad(a, ((0, 0), (0, width - a.shape[1]))) for a in parts])

    def parts(z):
        return [z[end - rows : end, :n] for end, (rows, n) in zip(ends, shapes, strict=True)]

    @jax.jit
    def f(params, z, x):
        each = zip(problems, params, parts(z), x, strict=True)
        return join(p.f(q, a, b) for p, q, a, b in each)

    def observe(z):  # errors in units of the condition
        return join(p.observe(a) / p.condition for p, a in zip(problems, parts(z), strict=True))

    solved = problems[0].kind != "unsolvable"
    whole = testing.Problem(
        name=" beside ".join(p.name for p in problems),
        f=f,
        params=[p.params for p in problems],
        x=[p.x for p in problems],
        z0=join(p.z0 for p in problems),
        solution=join(p.solution / p.condition for p in problems) if solved else None,
        kind=problems[0].kind,
        observe=observe,
        least={} if solved else {m: min(p.least[m] for p in problems) for m in problems[0].least},
    )
    return whole, parts


def run(solver, problem):
    return solve(solver, lambda z: problem.f(problem.params, z, problem.x), problem.z0)


# --- the problems ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_problems_keep_shapes_and_dtypes(dtype):
    for problem in testing.all_problems(2, dtype=dtype):
        image = jax.eval_shape(problem.f, problem.params, problem.z0, problem.x)
        assert describe(image) == describe(problem.z0)
        assert jax.tree.structure(image) == jax.tree.structure(problem.x)
        assert all(a.dtype == dtype for a in jax.tree.leaves((problem.params, problem.x)))


def test_known_solutions_are_fixed_points(x64):
    problems = testing.all_problems(3, dtype=jnp.float64)
    problems = [p for p in problems if p.name in SOLVABLE and p.name != "chandrasekhar"]
    operands = [(p.params, p.solution, p.x) for p in problems]
    images = jax.jit(lambda at: [p.f(*a) for p, a in zip(problems, at, strict=True)])(operands)
    for problem, image in zip(problems, images, strict=True):
        close = functools.partial(
            np.testing.assert_allclose, rtol=1e-13, atol=1e-13, err_msg=problem.name
        )
        jax.tree.map(close, image, problem.solution)
        np.testing.assert_array_equal(problem.error(problem.solution), np.zeros(3))


@pytest.mark.parametrize("size", [1, 8, 33])
def test_mean_of_the_h_equation_holds_for_every_size(size, x64):
    problem = testing.chandrasekhar(2, size=size, dtype=jnp.float64)
    sol = run(Picard(tol=1e-13, max_steps=300, stop="abs"), problem)
    np.testing.assert_allclose(sol.value.mean(axis=1), 2 / 0.9 * (1 - np.sqrt(0.1)), rtol=1e-12)
    assert float(problem.error(sol.value).max()) < 1e-12


def test_condition_and_kind_agree_with_the_jacobian(x64):
    problems = [p for p in testing.all_problems(2, dtype=jnp.float64) if p.name in SOLVABLE]

    def jacobian(problem, z):
        flat, unravel = ravel_pytree(jax.tree.map(lambda a: a[:1], z))
        x = jax.tree.map(lambda a: a[:1], problem.x)
        return jax.jacobian(lambda v: ravel_pytree(problem.f(problem.params, unravel(v), x))[0])(
            flat
        )

    solutions = [
        run(Picard(tol=1e-13, max_steps=300), p).value if p.name == "chandrasekhar" else p.solution
        for p in problems
    ]
    jacobians = jax.jit(lambda zs: list(map(jacobian, problems, zs)))(solutions)
    for problem, jac in zip(problems, map(np.asarray, jacobians), strict=True):
        inverse = np.linalg.inv(np.eye(len(jac)) - jac)
        assert np.linalg.norm(inverse, 2) <= problem.condition * (1 + 1e-9), problem.name
        radius = np.abs(np.linalg.eigvals(jac)).max()
        assert (radius < 1 - 1e-9) == (problem.kind == "contraction"), problem.name


@pytest.mark.parametrize("name", UNSOLVABLE)
def test_residuals_without_a_solution_have_the_bounds_named(name, x64):
    """At many states near and far; "rel" divides by at most 400 norm(f(z0))."""
    problem = {p.name: p for p in testing.all_problems(50, dtype=jnp.float64)}[name]
    f = jax.jit(problem.f)
    start = np.asarray(f(problem.params, problem.z0, problem.x))
    directions = np.random.default_rng(1).normal(size=problem.z0.shape)
    least = {"abs": np.inf, "rel": np.inf}
    for scale in np.logspace(-3, 6, 40):
        z = scale * directions
        image = np.asarray(f(problem.params, z, problem.x))
        most = 400 * np.linalg.norm(start, axis=1)
        with np.errstate(over="ignore", divide="ignore"):
            size, gap = (np.linalg.norm(a, axis=1) for a in (image, image - z))
            gap = np.where(np.isfinite(size), gap, np.inf)
            ratio = gap / np.minimum(size, most)
        least["abs"] = min(least["abs"], float(gap.min()))
        least["rel"] = min(least["rel"], float(ratio.min()))
    for stop in ("abs", "rel"):
        assert least[stop] >= problem.least.get(stop, 0)
    if name == "hyperbola":
        assert least["abs"] < 1e-5 and not problem.least
    else:
        assert least["abs"] < 1.3 * problem.least["abs"]  # and the bound is nearly reached


@pytest.mark.parametrize("stop", ["rel", "abs"])
@pytest.mark.parametrize("solver", [Picard, Anderson, Broyden])
def test_no_solver_reports_a_solution_where_there_is_none(solver, stop):
    *names, last = UNSOLVABLE
    assert last == "hyperbola"  # its residual tends to 0 at infinity
    problem, parts = side_by_side([BY_NAME[last], *(BY_NAME[name] for name in names)])
    sol = run(solver(tol=1e-3, max_steps=60, stop=stop), problem)
    testing.assert_honest(problem.f, problem.params, sol, problem.x, stop=stop, z0=problem.z0)
    assert not sol.stats.converged[len(parts(problem.z0)[0]) :].any()


def test_affine_gradients_are_in_closed_form(x64):
    problem = testing.affine(3, 5, dtype=jnp.float64)
    assert problem.vjp is not None
    c = jax.random.normal(jax.random.key(9), problem.z0.shape)

    def loss(params, x):
        eye = jnp.eye(5)
        return jnp.vdot(c, jnp.linalg.solve((eye - params["W"]).T, (x + params["b"][None, :]).T).T)

    want = jax.jit(jax.grad(loss, (0, 1)))(problem.params, problem.x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12), problem.vjp(c), want
    )


def test_error_refuses_a_problem_without_solution():
    problem = testing.no_fixed_point(2)
    with pytest.raises(ValueError, match="no-fixed-point"):
        problem.error(problem.z0)


# --- the assertions find what they are for ---------------------------------------------------


def test_assertions_pass_on_what_is_right():
    problem = testing.affine(3)
    sol = run(Picard(tol=1e-4, max_steps=40), problem)
    testing.assert_honest(problem.f, problem.params, sol, problem.x, tol=1e-4)
    testing.assert_fixed_point(problem.f, problem.params, sol, problem.x, tol=1e-4)
    failed = run(Picard(tol=1e-4, max_steps=3, stop="abs"), problem)
    testing.assert_honest(problem.f, problem.params, failed, problem.x, tol=1e-4, stop="abs")
    with pytest.raises(AssertionError, match="residual"):
        testing.assert_fixed_point(problem.f, problem.params, failed, problem.x, tol=1e-4)


@pytest.mark.parametrize(
    ("field", "change", "said"),
    [
        ("residual", lambda a: 0.5 * a, r"stats.residual: got .* in samples \[0, 1, 2\]"),
        ("residual", lambda a: 2 * a, r"stats.residual: got .* in samples \[0, 1, 2\]"),
        ("residual", lambda a: a.at[1].set(jnp.nan), r"stats.residual: got .* in samples \[1\]"),
        ("converged", lambda a: a.at[1].set(False), r"converged: got .* in samples \[1\]"),
        ("num_steps", lambda a: a + 1, "num_steps"),
        ("num_steps", lambda a: a - 1, "num_steps"),
        ("trace", lambda a: a.at[0].set(0.0), "smallest residual in trace"),
        ("trace", lambda a: a.at[-1].set(jnp.nan), "num_steps"),
        ("trace", lambda a: a.at[0].set(jnp.inf), "num_steps"),
    ],
)
def test_false_statistics_are_found(field, change, said):
    problem = testing.cosine(3)
    sol = run(Picard(tol=1e-3, max_steps=30), problem)
    stats: SolveStats = dataclasses.replace(sol.stats, **{field: change(getattr(sol.stats, field))})
    with pytest.raises(AssertionError, match=said):
        testing.assert_honest(
            problem.f,
            problem.params,
            dataclasses.replace(sol, stats=stats),
            problem.x,
            z0=problem.z0,
        )


@pytest.mark.parametrize("stop", ["rel", "abs"])
def test_a_failed_step_counts_and_a_missing_trace_passes(stop):
    """Sample 0 meets an overflow in its second step, sample 1 in its first."""

    def f(params, z, x):
        return jnp.where(z > 2, jnp.inf, 2 * z + x)

    x = jnp.array([[0.5], [0.5], [-1.0]])
    sol = solve(
        Picard(max_steps=5, stop=stop), lambda z: f(None, z, x), jnp.array([[1.0], [3], [1]])
    )
    trace = jnp.where(jnp.isfinite(sol.stats.trace), sol.stats.trace, jnp.inf)
    assert sol.stats.num_steps.tolist() == [2, 1, 1]
    for shown in (trace, None):
        stats = dataclasses.replace(sol.stats, trace=shown)
        testing.assert_honest(f, None, dataclasses.replace(sol, stats=stats), x, stop=stop)
    stats = dataclasses.replace(sol.stats, trace=trace, num_steps=sol.stats.num_steps + 1)
    with pytest.raises(AssertionError, match=r"num_steps: .* in samples \[0, 1, 2\]"):
        testing.assert_honest(f, None, dataclasses.replace(sol, stats=stats), x, stop=stop)


def test_a_relative_residual_may_be_larger_where_the_state_has_run_away():
    """Divided by 100 times the first norms, as `solve` does; smaller than true it may never be."""
    problem = testing.translation(3)
    sol = run(Broyden(max_steps=3), problem)  # far away after three steps
    norm = jnp.linalg.norm(sol.value, axis=1)
    assert (norm > 900).all()
    gap = jnp.linalg.norm(problem.f(problem.params, sol.value, problem.x) - sol.value, axis=1)
    for residual, passes in ((gap / 100, True), (gap / norm, True), (gap / norm / 2, False)):
        stats = dataclasses.replace(
            sol.stats, residual=residual, converged=residual <= 1e-3, trace=None
        )
        changed = dataclasses.replace(sol, stats=stats)
        call = (problem.f, problem.params, changed, problem.x)
        if passes:
            testing.assert_honest(*call, z0=problem.z0)
        else:
            with pytest.raises(AssertionError, match=r"stats\.residual"):
                testing.assert_honest(*call, z0=problem.z0)


def test_statistics_of_one_sample_without_a_batch_axis():
    def f(params, z, x):
        return jnp.tanh(params @ z + x)

    w, x = 0.5 * jnp.eye(6), jnp.ones(6)
    sol = fixed_point(f, w, jnp.zeros(6), x, solver=Anderson(), batched=False)
    testing.assert_honest(f, w, sol, x, z0=jnp.zeros(6))
    stats = dataclasses.replace(sol.stats, residual=sol.stats.residual / 2)
    with pytest.raises(AssertionError, match=r"stats\.residual"):
        testing.assert_honest(f, w, dataclasses.replace(sol, stats=stats), x)


def test_statistics_of_mixed_dtypes_and_of_zero():
    def f(params, z, x):
        return jax.tree.map(lambda a: (a * 0.5).astype(a.dtype), z)

    z0 = {"low": jnp.ones((2, 3), jnp.bfloat16), "high": jnp.ones((2, 300))}
    sol = solve(Picard(tol=1e-6, max_steps=60, stop="abs"), lambda z: f(None, z, None), z0)
    testing.assert_honest(f, None, sol, tol=1e-6, stop="abs", z0=z0)
    zero = jax.tree.map(jnp.zeros_like, z0)
    sol = solve(Picard(max_steps=3), lambda z: f(None, z, None), zero)
    testing.assert_honest(f, None, sol, z0=zero)
    # 5 % would be within the rounding of a bfloat16 state; not here, where 3 of 303 elements are.
    sol = solve(Picard(tol=1e-6, max_steps=2), lambda z: f(None, z, None), z0)
    stats = dataclasses.replace(sol.stats, residual=0.95 * sol.stats.residual, trace=None)
    with pytest.raises(AssertionError, match=r"stats\.residual"):
        testing.assert_honest(f, None, dataclasses.replace(sol, stats=stats), tol=1e-6, z0=z0)


@dataclasses.dataclass(frozen=True)
class Mixing(Picard):
    """Wrong: every sample's step depends on the mean of the batch."""

    def step(self, z, fz, state):
        mix = lambda a, b: b + 0.01 * (b - a).mean(axis=0, keepdims=True)  # noqa: E731
        return jax.tree.map(mix, z, fz), state


@dataclasses.dataclass(frozen=True)
class Lazy(Picard):
    """Wrong: never moves."""

    def step(self, z, fz, state):
        return z, state


@dataclasses.dataclass(frozen=True)
class Heavy:
    """Right, and no class of ours: iteration with momentum."""

    tol: float = 1e-4
    max_steps: int = 60
    stop: StopMode = "rel"

    def init(self, z):
        return z

    def step(self, z, fz, state):
        return jax.tree.map(lambda a, b, last: b + 0.1 * (a - last), z, fz, state), z


def test_batch_dependence_is_found():
    problem = testing.affine(3)
    testing.assert_batch_independent(Picard(tol=1e-4, max_steps=30), problem)
    with pytest.raises(AssertionError, match="num_steps|value"):
        testing.assert_batch_independent(Mixing(tol=1e-4, max_steps=30), problem)


@pytest.mark.slow
def test_a_users_solver_passes_or_is_told_why():
    testing.assert_solver(Heavy(), batch=2)
    with pytest.raises(AssertionError, match="Lazy on affine-0.5: residual"):
        testing.assert_solver(Lazy(max_steps=60), batch=2)


def joined_problems(batch, *, dtype):
    """All problems; those with the same rules side by side."""
    problems = {p.name: p for p in testing.all_problems(batch, dtype=dtype)}
    apart = ["logistic-2.8", "logistic-3.3", "multiscale", "rotation", "hyperbola"]
    joined = [problems.pop(name) for name in apart]
    for kind in ("contraction", "unsolvable"):
        joined.append(side_by_side([p for p in problems.values() if p.kind == kind])[0])
    return joined


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "dtype"),
    [
        (Picard(tol=1e-3, max_steps=60), jnp.float32),
        (Anderson(tol=1e-3), jnp.float32),
        (Broyden(tol=1e-5, max_steps=60, stop="abs"), jnp.float32),
        (Anderson(tol=1e-2), jnp.bfloat16),
        (Broyden(tol=1e-2), jnp.bfloat16),
    ],
)
def test_our_solvers_pass(solver, dtype, monkeypatch):
    """One after the other, as for a user's solver, the problems take twice as long."""
    monkeypatch.setattr(assertions, "all_problems", joined_problems)
    testing.assert_solver(solver, batch=3, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        ("cosine", "exponential", "logistic-2.8", "kinsol", "chandrasekhar"),
        ("affine-0.5", "nonnormal"),
        ("logistic-3.3", "rotation"),
        ("multiscale",),
    ],
    ids=" beside ".join,
)
def test_three_gradients_agree(names):
    problems = [BY_NAME[name] for name in names]
    problem = problems[0] if len(problems) == 1 else side_by_side(problems)[0]
    damping = 0.4 if problem.kind == "solvable" else 1.0
    testing.assert_gradients_agree(
        problem.f, problem.params, problem.z0, problem.x, damping=damping
    )


def test_wrong_gradients_are_found():
    def cut(params, z, x):
        return jax.lax.stop_gradient(0.5 * jnp.cos(z)) + params * x

    x = jnp.linspace(0.5, 1.0, 4)[:, None]
    with pytest.raises(AssertionError, match="finite difference disagree"):
        testing.assert_gradients_agree(cut, jnp.float32(0.5), jnp.ones((4, 1)), x, unroll=50)


def test_gradients_with_keys_and_integers_among_the_operands():
    def f(params, z, x):
        mask = jax.random.bernoulli(x["key"], 0.5, z.shape)
        return 0.5 * jnp.tanh(params * z) * mask + x["in"][x["take"]]

    x = {"key": jax.random.key(3), "in": jnp.ones((2, 3)), "take": jnp.array([1, 0])}
    testing.assert_gradients_agree(f, jnp.float32(0.8), jnp.zeros((2, 3)), x, unroll=80)
    assert jnp.ones(1).dtype == jnp.float32  # float64 ended with the assertion
