"""Every solver on every problem; what one sample may and may not learn of the others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deq_jax as deq
from deq_jax import testing
from deq_jax.solvers import history

SOLVERS = [
    deq.Picard(max_steps=300),
    deq.Picard(max_steps=300, damping=0.7),
    deq.Anderson(max_steps=150),
    deq.Anderson(max_steps=150, memory=8, damping=0.8),
    deq.Broyden(max_steps=150),
    deq.Broyden(max_steps=150, memory=4),
]
PLAIN = SOLVERS[::2]
TOL = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 2e-2}
SOLVABLE = [p.name for p in testing.all_problems() if p.kind == "contraction"]


def name(solver) -> str:
    return repr(solver)


def with_tol(solver, dtype: str, stop: str = "rel"):
    return dataclasses.replace(solver, tol=TOL[dtype], stop=stop)


def run(solver, problem, **options):
    return deq.fixed_point(
        problem.f, problem.params, problem.z0, problem.x, solver=solver, **options
    )


def problem_named(which: str, dtype):
    return next(p for p in testing.all_problems(dtype=dtype) if p.name == which)


@pytest.mark.parametrize("solver", SOLVERS, ids=name)
@pytest.mark.parametrize("which", SOLVABLE)
def test_known_answers(x64, which, solver):
    problem = problem_named(which, jnp.float64)
    solver = with_tol(solver, "float64", "abs" if which == "chandrasekhar" else "rel")
    sol = run(solver, problem)
    assert sol.stats.converged.all()
    scale = 1 + max(abs(x).max() for x in jax.tree.leaves(sol.value))
    assert problem.error(sol.value).max() <= 3 * problem.condition * scale * solver.tol


@pytest.mark.parametrize("solver", PLAIN, ids=name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_is_kept_and_statistics_are_float32(dtype, solver):
    problem = testing.affine(dtype=jnp.dtype(dtype))
    sol = run(with_tol(solver, dtype), problem)
    assert sol.value.dtype == dtype and sol.value.shape == problem.z0.shape
    assert sol.stats.residual.dtype == sol.stats.trace.dtype == jnp.float32
    assert sol.stats.num_steps.dtype == jnp.int32 and sol.stats.converged.dtype == bool
    assert sol.stats.converged.all()


def test_acceleration_solves_what_picard_cannot():
    for problem in (testing.rotation(), testing.logistic(rate=3.3)):
        picard = run(deq.Picard(tol=1e-5, max_steps=200), problem)
        assert not picard.stats.converged.any()
        for solver in (deq.Anderson(tol=1e-5, max_steps=40), deq.Broyden(tol=1e-5, max_steps=40)):
            sol = run(solver, problem)
            assert sol.stats.converged.all(), (problem.name, solver)
            assert problem.error(sol.value).max() < 1e-3


@pytest.mark.parametrize("solver", SOLVERS, ids=name)
def test_no_fixed_point_is_reported(solver):
    sol = run(with_tol(solver, "float32"), testing.no_fixed_point())
    assert not sol.stats.converged.any()
    assert jnp.isfinite(sol.value).all() and jnp.isfinite(sol.stats.residual).all()


def test_a_length_that_overflows_is_not_convergence():
    """In float32 the square of f(z) is infinite here, that of f(z) - z is not."""
    z0 = jnp.full((2, 8), jnp.array([[1.5e19], [1.0]]))
    sol = deq.solve(deq.Picard(max_steps=3), lambda z: z + jnp.where(z > 9, 1e18, 0.0), z0)
    np.testing.assert_array_equal(sol.stats.converged, [False, True])
    np.testing.assert_array_equal(sol.value, z0)


@pytest.mark.parametrize("solver", SOLVERS, ids=name)
@pytest.mark.parametrize("stop", ["rel", "abs"])
def test_residual_is_that_of_the_value_returned(x64, stop, solver):
    problem = testing.affine(radius=0.9, dtype=jnp.float64)
    sol = run(dataclasses.replace(solver, tol=1e-4, max_steps=8, stop=stop), problem)
    image = problem.f(problem.params, sol.value, problem.x)
    gap = jnp.linalg.norm(image - sol.value, axis=1)
    expected = gap / jnp.linalg.norm(image, axis=1) if stop == "rel" else gap
    np.testing.assert_allclose(sol.stats.residual, expected, rtol=1e-6)
    np.testing.assert_array_equal(sol.stats.converged, sol.stats.residual <= 1e-4)
    np.testing.assert_array_equal(sol.stats.residual, sol.stats.trace.min(axis=0))


@pytest.mark.parametrize("solver", PLAIN, ids=name)
def test_steps_are_the_calls_of_f_and_the_trace_ends_there(solver):
    problem = testing.affine(batch=3)
    calls = []

    def f(z):
        jax.debug.callback(lambda: calls.append(1), ordered=True)
        return problem.f(problem.params, z, problem.x)

    sol = deq.solve(dataclasses.replace(solver, tol=1e-5), f, problem.z0)
    jax.effects_barrier()
    assert len(calls) == sol.stats.num_steps.max()
    for sample, steps in enumerate(np.asarray(sol.stats.num_steps)):
        assert np.isfinite(sol.stats.trace[:steps, sample]).all()
        assert np.isinf(sol.stats.trace[steps:, sample]).all()


@pytest.mark.parametrize("solver", SOLVERS, ids=name)
def test_a_sample_does_not_depend_on_its_batch(solver):
    testing.assert_batch_independent(with_tol(solver, "float32"), testing.affine(batch=5))


@pytest.mark.parametrize("solver", SOLVERS, ids=name)
def test_permuting_the_batch_permutes_the_answer(solver):
    problem = testing.affine(batch=6)
    order = jnp.array([3, 0, 5, 1, 4, 2])
    solver = with_tol(solver, "float32")
    straight = run(solver, problem)
    mixed = run(solver, dataclasses.replace(problem, x=problem.x[order], z0=problem.z0[order]))
    # Not bit for bit: a library may sum a row in an order that depends on its address.
    np.testing.assert_allclose(straight.value[order], mixed.value, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(straight.stats.num_steps[order], mixed.stats.num_steps, atol=1)


@pytest.mark.parametrize("solver", SOLVERS, ids=name)
def test_nan_in_one_sample_leaves_the_others_bit_identical(solver):
    problem = testing.affine(batch=4)
    solver = with_tol(solver, "float32")

    def f(params, z, x):
        image = problem.f(params, z, x["input"])
        late = jnp.abs(z).sum(axis=1, keepdims=True) > 0  # the first evaluation is finite
        return jnp.where(late, image * x["factor"], image)

    def solve_with(spoilt):
        factor = jnp.ones((4, 1)).at[2].set(spoilt)
        operands = {"input": problem.x, "factor": factor}
        return deq.fixed_point(f, problem.params, problem.z0, operands, solver=solver)

    clean, spoilt = solve_with(1.0), solve_with(jnp.nan)
    others = jnp.array([0, 1, 3])
    np.testing.assert_array_equal(clean.value[others], spoilt.value[others])
    np.testing.assert_array_equal(clean.stats.trace[:, others], spoilt.stats.trace[:, others])
    assert not spoilt.stats.converged[2]
    assert spoilt.stats.num_steps[2] == 2  # given up, so that the others need not wait
    np.testing.assert_array_equal(spoilt.value[2], problem.z0[2])  # its last finite best iterate


def test_max_steps_may_be_traced_and_costs_one_compilation():
    problem = testing.affine(radius=0.9)
    solver = deq.Anderson(tol=1e-30, max_steps=12)
    traces = []

    @jax.jit
    def go(budget):
        traces.append(1)
        return run(solver, problem, max_steps=budget).stats

    for budget in (0, 1, 5, 12, 40):
        stats = go(jnp.int32(budget))
        assert (stats.num_steps == min(budget, 12)).all()
        assert np.isinf(stats.trace[min(budget, 12) :]).all()
        static = run(solver, problem, max_steps=min(budget, 12)).stats
        np.testing.assert_allclose(static.residual, stats.residual, rtol=1e-3)
    assert len(traces) == 1


def test_zero_steps_return_the_start():
    problem = testing.affine()
    sol = run(deq.Broyden(), problem, max_steps=0)
    np.testing.assert_array_equal(sol.value, problem.z0)
    assert np.isinf(sol.stats.residual).all() and not sol.stats.converged.any()


def test_a_users_own_solver_needs_no_base_class():
    @dataclasses.dataclass(frozen=True)
    class Halving:
        tol: float = 1e-5
        max_steps: int = 200
        stop: str = "abs"

        def init(self, z):
            return jnp.zeros_like(z)

        def step(self, z, fz, state):
            return (z + fz) / 2, state + fz

    problem = testing.affine()
    sol = run(Halving(), problem)
    assert sol.stats.converged.all() and problem.error(sol.value).max() < 1e-4


def test_anderson_is_invariant_to_the_scale_of_the_problem(x64):
    """An absolute ridge would average iterates of a small state and do nothing to a large one."""
    problem = testing.affine(dtype=jnp.float64)
    solver = deq.Anderson(tol=1e-10, max_steps=60)
    steps = []
    for scale in (1e-6, 1.0, 1e6):
        bias = problem.params | {"b": problem.params["b"] * scale}
        scaled = dataclasses.replace(problem, x=problem.x * scale, params=bias)
        sol = run(solver, scaled)
        assert sol.stats.converged.all()
        steps.append(np.asarray(sol.stats.num_steps))
    assert np.ptp(np.stack(steps), axis=0).max() <= 1


@pytest.mark.parametrize("memory", [1, 2, 3, 7])
def test_anderson_weights_minimise_the_combined_residual(x64, memory):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2, memory, 9)) * 10.0 ** rng.integers(-3, 3, (2, memory, 1))
    gram = jnp.asarray(np.einsum("bmd,bnd->bmn", rows, rows))
    solver = deq.Anderson(memory=memory, ridge=0.0)
    a = np.asarray(solver.weights(gram, jnp.ones(memory, bool)))
    np.testing.assert_allclose(a.sum(1), 1, rtol=1e-12)
    for weights, residuals in zip(a, rows, strict=True):
        # Eliminate the constraint and solve the least-squares problem by QR.
        basis = residuals[1:] - residuals[:1]
        free = np.linalg.lstsq(basis.T, -residuals[0], rcond=None)[0]
        expected = np.concatenate([[1 - free.sum()], free])
        np.testing.assert_allclose(weights @ residuals, expected @ residuals, atol=1e-9)


def plain_broyden(f, z, steps):
    """Broyden's good method with a dense inverse Jacobian, as in the textbook."""
    inverse = -np.eye(z.size)
    iterates, g = [z], f(z) - z
    for _ in range(steps):
        s = -inverse @ g
        z = z + s
        g_new = f(z) - z
        y = g_new - g
        hy = inverse @ y
        inverse = inverse + np.outer(s - hy, s @ inverse) / (s @ hy)
        g = g_new
        iterates.append(z)
    return np.stack(iterates)


def test_broyden_iterates_are_those_of_the_dense_formula(x64):
    rng = np.random.default_rng(1)
    w = rng.standard_normal((12, 12)) * 0.4
    x = rng.standard_normal((3, 12))
    solver = deq.Broyden(tol=1e-30, max_steps=9)
    z = jnp.zeros((3, 12))
    state, iterates = solver.init(z), [np.zeros((3, 12))]
    for _ in range(9):
        z, state = solver.step(z, jnp.tanh(z @ w + x), state)
        iterates.append(np.asarray(z))
    for sample in range(3):
        expected = plain_broyden(lambda v, i=sample: np.tanh(v @ w + x[i]), np.zeros(12), 9)
        np.testing.assert_allclose(np.stack(iterates)[:, sample], expected, rtol=1e-9, atol=1e-11)


def test_broyden_memory_shorter_than_the_solve_still_converges(x64):
    problem = testing.affine(size=30, radius=0.7, dtype=jnp.float64)
    full = run(deq.Broyden(tol=1e-9, max_steps=100, memory=100), problem)
    short = run(deq.Broyden(tol=1e-9, max_steps=100, memory=6), problem)
    assert full.stats.converged.all() and short.stats.converged.all()
    assert full.stats.num_steps.min() > 6  # the memory was indeed too short
    assert short.stats.num_steps.max() <= 2 * full.stats.num_steps.max()


@pytest.mark.parametrize("batch", [1, 2])
def test_split_history_reads_and_writes_as_one_block(monkeypatch, batch):
    monkeypatch.setattr(history, "_SPLIT_BYTES", 0)
    rng = np.random.default_rng(0)
    like, rows = {"a": jnp.zeros((batch, 4)), "b": jnp.zeros((batch, 3, 2))}, 12
    blocks = history.split(history.empty(like, rows))
    assert blocks.counts == [5, 5, 2] and not history.is_large(jnp.zeros(3))
    dense = np.zeros((batch, rows, 10), np.float32)

    @jax.jit
    def turn(blocks, slot, filled, v, c):
        blocks = blocks.write(slot, v)
        return blocks, blocks.inner(v, filled), blocks.combine(c, filled)

    for k in range(30):
        flat = rng.standard_normal((batch, 10)).astype(np.float32)
        v = {"a": flat[:, :4], "b": flat[:, 4:].reshape(batch, 3, 2)}
        c = rng.standard_normal((batch, rows)).astype(np.float32)
        filled = min(k + 1, rows)
        c[:, filled:] = 0
        dense[:, k % rows] = flat
        blocks, inner, mixed = turn(blocks, k % rows, filled, v, c)
        mixed = np.concatenate([mixed["a"], mixed["b"].reshape(batch, 6)], axis=1)
        expected = np.einsum("bmd,bd->bm", dense, flat)
        np.testing.assert_allclose(inner, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(mixed, np.einsum("bm,bmd->bd", c, dense), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS[2:], ids=name)
def test_split_history_changes_nothing_but_the_cost(monkeypatch, x64, solver):
    problem = testing.affine(radius=0.95, dtype=jnp.float64)
    solver = with_tol(solver, "float64")
    whole = run(solver, problem)
    monkeypatch.setattr(history, "_SPLIT_BYTES", 0)
    split = run(solver, problem)
    np.testing.assert_allclose(whole.value, split.value, rtol=1e-9)
    np.testing.assert_array_equal(whole.stats.num_steps, split.stats.num_steps)


@pytest.mark.parametrize("make", [deq.Picard, deq.Anderson, deq.Broyden])
@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("tol", 0.0, "positive finite"),
        ("tol", -1e-3, "positive finite"),
        ("tol", float("nan"), "positive finite"),
        ("max_steps", 0, "at least 1"),
        ("max_steps", 2.5, "whole number"),
        ("stop", "relative", '"rel"'),
    ],
)
def test_bad_settings_are_refused_in_words(make, setting, value, words):
    with pytest.raises(ValueError, match=words) as caught:
        make(**{setting: value})
    assert f"got {setting}={value!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("make", "setting", "value"),
    [
        (deq.Anderson, "memory", 0),
        (deq.Broyden, "memory", -1),
        (deq.Anderson, "ridge", -1e-9),
        (deq.Anderson, "damping", 0.0),
        (deq.Picard, "damping", 1.5),
    ],
)
def test_bad_settings_of_one_solver(make, setting, value):
    with pytest.raises(ValueError, match=f"got {setting}="):
        make(**{setting: value})


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (lambda z: {"wrong": z}, "wrong"),
        (lambda z: z[:, :2], r"float32\[4,2\]"),
        (lambda z: z.astype(jnp.bfloat16), "bfloat16"),
    ],
)
def test_an_f_that_changes_its_state_is_refused(image, words):
    with pytest.raises(ValueError, match=words) as caught:
        deq.solve(deq.Picard(), image, jnp.ones((4, 3)))
    assert "wanted" in str(caught.value)


@pytest.mark.parametrize("budget", [-1, 31, jnp.ones(2, jnp.int32), jnp.float32(3)])
def test_bad_budgets_are_refused(budget):
    with pytest.raises(ValueError, match="max_steps"):
        deq.solve(deq.Picard(max_steps=30), jnp.cos, jnp.ones((1, 1)), max_steps=budget)
