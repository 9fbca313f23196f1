import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from deq_jax import testing
from deq_jax.fixed_point import fixed_point
from deq_jax.solvers import Anderson, Broyden, Picard, SolveStats, solve
from deq_jax.solvers.base import StopMode
from deq_jax.tree import describe

PROBLEMS = testing.all_problems(3)
NAMES = [problem.name for problem in PROBLEMS]
BY_NAME = dict(zip(NAMES, PROBLEMS, strict=True))
SOLVABLE = [problem.name for problem in PROBLEMS if problem.kind != "unsolvable"]
UNSOLVABLE = [problem.name for problem in PROBLEMS if problem.kind == "unsolvable"]


def run(solver, problem):
    return solve(solver, lambda z: problem.f(problem.params, z, problem.x), problem.z0)


# --- the problems ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_problems_keep_shapes_and_dtypes(dtype):
    for problem in testing.all_problems(2, dtype=dtype):
        image = problem.f(problem.params, problem.z0, problem.x)
        assert describe(image) == describe(problem.z0)
        assert jax.tree.structure(image) == jax.tree.structure(problem.x)
        assert all(a.dtype == dtype for a in jax.tree.leaves((problem.params, problem.x)))


@pytest.mark.parametrize("name", [n for n in SOLVABLE if n != "chandrasekhar"])
def test_known_solutions_are_fixed_points(name, x64):
    problem = {p.name: p for p in testing.all_problems(3, dtype=jnp.float64)}[name]
    z = problem.solution
    image = problem.f(problem.params, z, problem.x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-13), image, z)
    np.testing.assert_array_equal(problem.error(z), np.zeros(3))


@pytest.mark.parametrize("size", [1, 8, 33])
def test_mean_of_the_h_equation_holds_for_every_size(size, x64):
    problem = testing.chandrasekhar(2, size=size, dtype=jnp.float64)
    sol = run(Anderson(tol=1e-13, max_steps=100, stop="abs"), problem)
    np.testing.assert_allclose(sol.value.mean(axis=1), 2 / 0.9 * (1 - np.sqrt(0.1)), rtol=1e-12)
    assert float(problem.error(sol.value).max()) < 1e-12


@pytest.mark.parametrize("name", SOLVABLE)
def test_condition_and_kind_agree_with_the_jacobian(name, x64):
    problem = {p.name: p for p in testing.all_problems(2, dtype=jnp.float64)}[name]
    z = problem.solution
    if name == "chandrasekhar":
        z = run(Anderson(tol=1e-13, max_steps=100), problem).value
    flat, unravel = ravel_pytree(jax.tree.map(lambda a: a[:1], z))
    x = jax.tree.map(lambda a: a[:1], problem.x)

    def one(v):
        return ravel_pytree(problem.f(problem.params, unravel(v), x))[0]

    jac = np.asarray(jax.jacobian(one)(flat))
    inverse = np.linalg.inv(np.eye(len(jac)) - jac)
    assert np.linalg.norm(inverse, 2) <= problem.condition * (1 + 1e-9)
    radius = np.abs(np.linalg.eigvals(jac)).max()
    assert (radius < 1 - 1e-9) == (problem.kind == "contraction")


@pytest.mark.parametrize("name", UNSOLVABLE)
def test_residuals_without_a_solution_have_the_bounds_named(name, x64):
    """At many states near and far; "rel" divides by at most 400 norm(f(z0))."""
    problem = {p.name: p for p in testing.all_problems(50, dtype=jnp.float64)}[name]
    start = problem.f(problem.params, problem.z0, problem.x)
    directions = jax.random.normal(jax.random.key(1), problem.z0.shape)
    least = {"abs": np.inf, "rel": np.inf}
    for scale in np.logspace(-3, 6, 40):
        z = scale * directions
        image = problem.f(problem.params, z, problem.x)
        size = jnp.linalg.norm(image, axis=1)
        gap = jnp.where(jnp.isfinite(size), jnp.linalg.norm(image - z, axis=1), jnp.inf)
        most = 400 * jnp.linalg.norm(start, axis=1)
        least["abs"] = min(least["abs"], float(gap.min()))
        least["rel"] = min(least["rel"], float((gap / jnp.minimum(size, most)).min()))
    for stop in ("abs", "rel"):
        assert least[stop] >= problem.least.get(stop, 0)
    if name == "hyperbola":
        assert least["abs"] < 1e-5 and not problem.least
    else:
        assert least["abs"] < 1.3 * problem.least["abs"]  # and the bound is nearly reached


@pytest.mark.parametrize("stop", ["rel", "abs"])
@pytest.mark.parametrize("solver", [Picard, Anderson, Broyden])
@pytest.mark.parametrize("name", UNSOLVABLE)
def test_no_solver_reports_a_solution_where_there_is_none(name, solver, stop):
    problem = BY_NAME[name]
    sol = run(solver(tol=1e-3, max_steps=60, stop=stop), problem)
    testing.assert_honest(problem.f, problem.params, sol, problem.x, stop=stop, z0=problem.z0)
    if name != "hyperbola":  # its residual tends to 0 at infinity
        assert not sol.stats.converged.any()


def test_affine_gradients_are_in_closed_form(x64):
    problem = testing.affine(3, 5, dtype=jnp.float64)
    assert problem.vjp is not None
    c = jax.random.normal(jax.random.key(9), problem.z0.shape)

    def loss(params, x):
        eye = jnp.eye(5)
        return jnp.vdot(c, jnp.linalg.solve((eye - params["W"]).T, (x + params["b"][None, :]).T).T)

    want = jax.grad(loss, (0, 1))(problem.params, problem.x)
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
def test_our_solvers_pass(solver, dtype):
    testing.assert_solver(solver, batch=3, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLVABLE)
def test_three_gradients_agree(name):
    problem = BY_NAME[name]
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
