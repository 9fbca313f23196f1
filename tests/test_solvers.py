"""Every solver on every problem; what one sample may and may not learn of the others."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_testing import side_by_side

import deq_jax as deq
from deq_jax import testing
from deq_jax.solvers import anderson, history

SOLVERS = [
    deq.Picard(max_steps=300),
    deq.Picard(max_steps=300, damping=0.7),
    deq.Anderson(max_steps=150),
    deq.Anderson(max_steps=150, memory=9, damping=0.8),  # solves its small systems in a loop
    deq.Broyden(max_steps=150),
    deq.Broyden(max_steps=150, memory=4),
]
PLAIN = SOLVERS[::2]
TOL = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 2e-2}


def name(solver) -> str:
    return repr(solver)


def with_tol(solver, dtype: str, stop: str = "rel"):
    return dataclasses.replace(solver, tol=TOL[dtype], stop=stop)


def run(solver, problem, **options):
    return deq.fixed_point(
        problem.f, problem.params, problem.z0, problem.x, solver=solver, **options
    )


@pytest.mark.parametrize("solver", SOLVERS, ids=name)
def test_known_answers(x64, solver):
    """The residual is absolute for a problem of whose solution only the mean is known."""
    problems = testing.all_problems(dtype=jnp.float64)
    problems = [p for p in problems if p.kind == "contraction"]
    *arrays, tree = sorted(problems, key=lambda p: p.name == "multiscale")
    assert len(arrays) == 7 and tree.name == "multiscale"
    whole, parts = side_by_side(arrays)
    first = run(with_tol(solver, "float64", "abs"), whole)
    second = run(with_tol(solver, "float64", "rel"), tree)
    assert first.stats.converged.all() and second.stats.converged.all()
    for problem, value in zip([*arrays, tree], [*parts(first.value), second.value], strict=True):
        scale = 1 + max(abs(x).max() for x in jax.tree.leaves(value))
        assert problem.error(value).max() <= 3 * problem.condition * scale * TOL["float64"]


def test_acceleration_solves_what_picard_cannot():
    problems = testing.rotation(), testing.logistic(rate=3.3)
    whole, parts = side_by_side(problems)
    assert not run(deq.Picard(tol=1e-5, max_steps=200), whole).stats.converged.any()
    for solver in (deq.Anderson(tol=1e-5, max_steps=40), deq.Broyden(tol=1e-5, max_steps=40)):
        sol = run(solver, whole)
        assert sol.stats.converged.all(), solver
        for problem, value in zip(problems, parts(sol.value), strict=True):
            assert problem.error(value).max() < 1e-3, (problem.name, solver)


def test_a_length_that_overflows_is_not_convergence():
    """In float32 the square of f(z) is infinite here, that of f(z) - z is not."""
    z0 = jnp.full((2, 8), jnp.array([[1.5e19], [1.0]]))
    sol = deq.solve(deq.Picard(max_steps=3), lambda z: z + jnp.where(z > 9, 1e18, 0.0), z0)
    np.testing.assert_array_equal(sol.stats.converged, [False, True])
    np.testing.assert_array_equal(sol.value, z0)


@pytest.mark.parametrize(
    ("stop", "solver"), [*(("rel", solver) for solver in SOLVERS), ("abs", SOLVERS[4])], ids=str
)
def test_residual_is_that_of_the_value_returned(x64, stop, solver):
    problem = testing.affine(radius=0.9, dtype=jnp.float64)
    sol = run(dataclasses.replace(solver, tol=1e-4, max_steps=8, stop=stop), problem)
    value, w, b, x = map(np.asarray, (sol.value, *problem.params.values(), problem.x))
    image = value @ w + b + x
    gap = np.linalg.norm(image - value, axis=1)
    expected = gap / np.linalg.norm(image, axis=1) if stop == "rel" else gap
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
    for steps, trace in zip(sol.stats.num_steps, np.asarray(sol.stats.trace).T, strict=True):
        assert np.isfinite(trace[:steps]).all() and np.isinf(trace[steps:]).all()


@pytest.mark.parametrize("solver", SOLVERS[1::2], ids=name)
def test_a_sample_does_not_depend_on_its_batch(solver):
    """Nor on its place in it, nor on its being alone; for the other solvers see test_testing.py."""
    testing.assert_batch_independent(with_tol(solver, "float32"), testing.affine(batch=5))


@pytest.mark.parametrize("solver", PLAIN, ids=name)
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


def test_max_steps_may_be_traced_and_costs_one_compilation(x64):
    problem = testing.affine(radius=0.9, dtype=jnp.float64)
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
        if budget in (0, 5):
            static = run(solver, problem, max_steps=budget).stats
            np.testing.assert_allclose(static.residual, stats.residual, rtol=1e-3)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("solver", "keep"), list(zip(PLAIN, ("last", "best", "last"), strict=True)), ids=str
)
def test_every_sample_may_have_a_budget_of_its_own(x64, solver, keep):
    """It is then solved as it would be alone with that budget, whatever its batch mates do."""
    problem = testing.affine(radius=0.5, dtype=jnp.float64)
    solver = dataclasses.replace(solver, tol=1e-6, max_steps=60)
    solve = jax.jit(lambda budget: run(solver, problem, keep=keep, max_steps=budget))
    budgets = np.array([0, 3, 60, 7], np.int32)  # the third converges
    sol = solve(budgets)
    assert sol.stats.converged.tolist() == [False, False, True, False]
    for i, budget in enumerate(budgets):
        alone = solve(jnp.full(4, budget))
        for own, wanted in zip(
            jax.tree.leaves((sol.value, dataclasses.replace(sol.stats, trace=sol.stats.trace.T))),
            jax.tree.leaves(
                (alone.value, dataclasses.replace(alone.stats, trace=alone.stats.trace.T))
            ),
            strict=True,
        ):
            np.testing.assert_allclose(own[i], wanted[i], rtol=1e-9)
        scalar = solve(jnp.int32(budget))
        np.testing.assert_allclose(sol.value[i], scalar.value[i], rtol=1e-9)
        assert sol.stats.num_steps[i] == scalar.stats.num_steps[i]


def test_zero_steps_return_the_start():
    problem = testing.affine()
    sol = run(deq.Broyden(), problem, max_steps=0)
    np.testing.assert_array_equal(sol.value, problem.z0)
    assert np.isinf(sol.stats.residual).all() and not sol.stats.converged.any()


def test_a_solution_shows_itself_in_one_line():
    """Arrays in it may be large, traced, or not arrays at all."""
    x = jnp.array([[1.0], [3.0]])
    f = lambda p, z, x: {"a": 0.1 * z["a"] + x}  # noqa: E731
    solver, shown = deq.Picard(tol=1e-3), []

    def show(x):
        sol = deq.fixed_point(f, None, {"a": 0 * x}, x, solver=solver, has_aux=False)
        shown.append(repr(sol))
        return sol

    sol = show(x)
    assert shown[0].startswith("Solution(value={'a': float32[2, 1]}, stats=SolveStats(2 of 2 conv")
    assert "4 to 4 steps, residual 9.0e-04 to 9.0e-04" in shown[0]
    jax.jit(show)(x)
    assert shown[1].endswith("stats=SolveStats(int32[2], float32[2], bool[2]))")
    assert "{'a': P()}" in repr(jax.tree.map(lambda _: PartitionSpec(), sol))


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
    a = np.asarray(jax.jit(solver.weights)(gram, jnp.ones(memory, bool)))
    np.testing.assert_allclose(a.sum(1), 1, rtol=1e-12)
    for weights, residuals in zip(a, rows, strict=True):
        # Eliminate the constraint and solve the least-squares problem by QR.
        basis = residuals[1:] - residuals[:1]
        free = np.linalg.lstsq(basis.T, -residuals[0], rcond=None)[0]
        expected = np.concatenate([[1 - free.sum()], free])
        np.testing.assert_allclose(weights @ residuals, expected @ residuals, atol=1e-9)


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
    np.testing.assert_allclose(whole.stats.num_steps, split.stats.num_steps, atol=1)


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


@pytest.mark.parametrize(
    "budget",
    [-1, 31, jnp.ones(2, jnp.int32), jnp.float32(3), np.array([31]), jnp.array([-1]), np.ones(1)],
)
def test_bad_budgets_are_refused(budget):
    with pytest.raises(ValueError, match="max_steps"):
        deq.solve(deq.Picard(max_steps=30), jnp.cos, jnp.ones((1, 1)), max_steps=budget)


@pytest.mark.parametrize("budget", [np.int64(31), jnp.int32(31), jnp.int32(-1), True, 2.0])
def test_a_budget_that_is_known_has_to_be_right_whatever_its_type(budget):
    with pytest.raises(ValueError, match="max_steps"):
        deq.solve(deq.Picard(max_steps=30), jnp.cos, jnp.ones((1, 1)), max_steps=budget)


def test_numbers_of_numpy_are_numbers():
    ours = deq.Anderson(tol=1e-3, max_steps=30, damping=0.5, memory=4, ridge=0.25)
    theirs = deq.Anderson(
        tol=np.float64(1e-3),
        max_steps=np.int64(30),
        damping=np.float32(0.5),
        memory=np.int32(4),
        ridge=np.float32(0.25),
    )
    assert ours == theirs and type(theirs.damping) is float and type(theirs.memory) is int


def test_a_traced_tolerance_is_named():
    with pytest.raises(ValueError, match="a solver is static"):
        jax.jit(lambda tol: deq.Picard(tol=tol))(1e-3)


@pytest.mark.parametrize(
    ("solver", "words"),
    [
        (deq.Anderson, "the class Anderson as solver"),
        ("anderson", "got 'anderson' as solver"),
        (jnp.cos, "as solver; wanted a solver"),
    ],
)
def test_what_is_not_a_solver_is_named(solver, words):
    with pytest.raises(ValueError, match=words):
        deq.solve(solver, jnp.cos, jnp.ones((1, 1)))


def tutorial(w, z, x):
    return jnp.tanh(w @ z + x)


def test_a_state_without_a_batch_axis_is_refused_or_solved_as_one_sample():
    """W1: 64 numbers were taken for 64 samples, each frozen when its own number had settled."""
    keys = jax.random.split(jax.random.key(0))
    w = deq.init.orthogonal(0.9)(keys[0], (64, 64))
    x, solver = jax.random.normal(keys[1], (64,)), deq.Anderson(tol=1e-3, max_steps=200)
    with pytest.raises(ValueError, match="batched=False"):
        deq.fixed_point(tutorial, w, jnp.zeros(64), x, solver=solver)
    with pytest.raises(ValueError, match="batched=False"):
        deq.solve(solver, lambda z: tutorial(w, z, x), jnp.zeros(64))
    for sol in (
        deq.fixed_point(tutorial, w, jnp.zeros(64), x, solver=solver, batched=False),
        deq.solve(solver, lambda z: tutorial(w, z, x), jnp.zeros(64), batched=False),
    ):
        image = tutorial(w, sol.value, x)
        residual = jnp.linalg.norm(image - sol.value) / jnp.linalg.norm(image)
        assert sol.value.shape == (64,) and sol.stats.trace.shape == (200,)
        assert sol.stats.converged.shape == () and sol.stats.converged and residual <= 1.01e-3


def test_the_gradient_and_the_probe_of_one_sample_without_a_batch_axis(x64):
    keys = jax.random.split(jax.random.key(0))
    w = deq.init.orthogonal(0.5)(keys[0], (6, 6), jnp.float64)
    x, solver = jax.random.normal(keys[1], (6,)), deq.Anderson(tol=1e-12, max_steps=80)

    def loss(w, probe):
        z0 = jnp.zeros(6)
        options = {"solver": solver, "batched": False, "probe": probe}
        return jnp.sum(deq.fixed_point(tutorial, w, z0, x, **options).value ** 3)

    z = np.zeros(6)
    for _ in range(100):
        z = np.tanh(w @ z + x)
    slope = np.diag(1 - z**2)
    wanted = np.outer(slope @ np.linalg.solve(np.eye(6) - (slope @ w).T, 3 * z**2), z)
    ours, stats = jax.grad(loss, argnums=(0, 1))(w, deq.backward_probe(x, batched=False))
    np.testing.assert_allclose(ours, wanted, rtol=1e-8, atol=1e-10)
    assert stats.converged == 1 and stats.num_steps > 1


def test_samples_of_one_number_are_solved_if_the_caller_says_so():
    x = jnp.linspace(0.1, 0.9, 5)
    sol = deq.solve(deq.Anderson(tol=1e-6), lambda z: x * jnp.cos(z), 0 * x, batched=True)
    np.testing.assert_allclose(x * jnp.cos(sol.value), sol.value, atol=1e-5)
    assert sol.stats.converged.all() and sol.stats.num_steps.min() < sol.stats.num_steps.max()


RUNAWAYS = {
    "shift": lambda w, z, x: z + x,
    "pre-norm block": lambda w, z, x: z + 0.1 * jnp.tanh(z @ w) + x,
    "growing gap": lambda w, z, x: z + jnp.sqrt(1 + jnp.abs(z)),
    "quadratic": lambda w, z, x: z + 1 + z**2,
    "no fixed point": lambda w, z, x: 2 * jnp.sqrt(1 + z**2),
}


@pytest.mark.parametrize(
    ("stop", "solver"),
    [*(("rel", solver) for solver in SOLVERS), *(("abs", solver) for solver in PLAIN)],
    ids=str,
)
def test_a_runaway_is_not_convergence(stop, solver):
    """W2: norm(f(z) - z) / norm(f(z)) is small wherever z is long."""
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (2, 16))
    w = jax.random.normal(keys[1], (16, 16)) / 4
    solver = dataclasses.replace(solver, tol=1e-3, max_steps=60, stop=stop)

    def f(w, z, x):  # one program for all of them
        return jnp.concatenate([g(w, z[2 * i :][:2], x) for i, g in enumerate(RUNAWAYS.values())])

    sol = deq.fixed_point(f, w, jnp.zeros((2 * len(RUNAWAYS), 16)), x, solver=solver)
    assert not sol.stats.converged.any()
    assert jnp.isfinite(sol.value).all() and jnp.isfinite(sol.stats.residual).all()


class Leap(deq.Picard):
    """Visits 1e7 once, and 1e5 from then on."""

    def step(self, z, fz, state):
        return jnp.where(fz < 2, fz, jnp.where(fz < 100, 1e7, 1e5)), state


@pytest.mark.parametrize("growth", [jnp.sqrt, jnp.cbrt], ids=["sqrt", "cbrt"])
def test_one_leap_does_not_make_a_long_iterate_look_converged(growth):
    """The gap at 1e7, of sqrt 3e3, is no size of f, beside which that at 1e5, 3e2, is small."""
    sol = deq.solve(Leap(tol=5e-3, max_steps=9), lambda z: z + growth(1 + z), jnp.zeros((2, 3)))
    assert not sol.stats.converged.any()
    assert sol.stats.trace.min() > 9e-3  # 1 / 100 at its smallest


def test_a_long_solution_of_a_short_start_still_converges():
    """The bound on the size costs a solve some steps, not its answer."""
    for radius in (0.9, 0.99, 0.999):
        sol = deq.solve(
            deq.Broyden(tol=1e-4), lambda z, r=radius: r * z + 1, jnp.zeros((2, 3)), max_steps=20
        )
        np.testing.assert_allclose(sol.value, 1 / (1 - radius), rtol=2e-3)
        assert sol.stats.converged.all()


@pytest.mark.parametrize("solver", PLAIN, ids=name)
def test_a_small_state_is_solved_to_the_same_relative_accuracy(solver):
    """W4: an absolute floor in the residual made z0 = 0 the answer at 1e-12."""
    scales = np.repeat(np.float32([1e-6, 1e-10, 1e-12, 1e-15]), 2)[:, None]
    x = jnp.asarray(scales * np.tile(np.linspace(1, 2, 8, dtype=np.float32).reshape(2, 4), (4, 1)))
    sol = deq.solve(with_tol(solver, "float32"), lambda z: 0.5 * z + x, 0 * x)
    np.testing.assert_allclose(sol.value, 2 * x, rtol=1e-4)
    assert sol.stats.converged.all()


def test_a_state_that_is_zero_at_once_has_residual_zero():
    sol = deq.solve(deq.Picard(), lambda z: 0 * z, jnp.zeros((2, 3)))
    np.testing.assert_array_equal(sol.stats.residual, 0)
    sol = deq.solve(deq.Picard(), lambda z: jnp.maximum(-z - 1, 0), jnp.ones((2, 3)))
    assert sol.stats.converged.all() and (sol.value == 0).all()  # f(z0) = 0 is no reason to give up


@pytest.mark.parametrize("stop", ["rel", "abs"])
def test_the_trace_is_infinite_where_a_residual_is_not_finite(stop):
    """B5: with stop="abs" it was NaN, so that its minimum was."""
    factor = jnp.array([[1.0], [jnp.nan]])
    sol = deq.solve(
        deq.Picard(stop=stop, tol=1e-30, max_steps=5),
        lambda z: jnp.where(z > 0.9, jnp.cos(z) * factor, 0.95),
        jnp.zeros((2, 1)),
    )
    assert np.isinf(sol.stats.trace[1:, 1]).all()
    np.testing.assert_array_equal(sol.stats.trace.min(axis=0), sol.stats.residual)


def mixed(dtypes, batch=3):
    keys = jax.random.split(jax.random.key(0), len(dtypes))
    x = [jax.random.normal(k, (batch, 4)).astype(d) for k, d in zip(keys, dtypes, strict=True)]
    w = 0.2 * jnp.eye(4) + 0.1

    def f(w, z, x):
        return [jnp.tanh(a @ w.astype(a.dtype) + b) for a, b in zip(z, x, strict=True)]

    return f, w, [jnp.zeros_like(a) for a in x], x


@pytest.mark.parametrize("solver", PLAIN, ids=name)
def test_leaves_keep_their_dtypes_and_the_residual_is_that_of_the_value(solver):
    """B6: a promoted state was rounded on its way into f, and the residual was another's."""
    f, w, z0, x = mixed([jnp.bfloat16, jnp.float32])
    sol = deq.fixed_point(f, w, z0, x, solver=dataclasses.replace(solver, tol=1e-30, max_steps=7))
    image = jax.jit(f)(w, sol.value, x)
    assert [a.dtype for a in sol.value] == [jnp.bfloat16, jnp.float32]
    wide = [[np.asarray(a, np.float64) for a in leaves] for leaves in (sol.value, image)]
    gap = np.sqrt(sum(((a - b) ** 2).sum(1) for a, b in zip(*wide, strict=True)))
    size = np.sqrt(sum((b**2).sum(1) for b in wide[1]))
    # The difference of two bfloat16 numbers is rounded to bfloat16.
    np.testing.assert_allclose(sol.stats.residual, gap / size, rtol=1e-2)


STRICT = [
    ("float32",),
    ("bfloat16",),
    ("float16", "float32"),
    ("float64",),
    ("float64", "bfloat16"),
]


@pytest.mark.parametrize(
    ("solver", "solved"),
    [
        *zip(
            [*PLAIN, deq.Anderson(memory=9, damping=0.9), deq.Broyden(damping=0.9)],
            STRICT,
            strict=True,
        )
    ],
    ids=str,
)
def test_strict_promotion(solver, solved):
    """B7, F3: bool + int32 and promotions of dtypes failed; where they do, tracing fails."""
    solver = dataclasses.replace(solver, tol=1e-2)
    for dtypes in [solved, *(mix for mix in STRICT if len(mix) > 1 and mix != solved)]:
        with jax.enable_x64("float64" in dtypes), jax.numpy_dtype_promotion("strict"):
            f, w, z0, x = mixed([jnp.dtype(d) for d in dtypes])

            def loss(w, f=f, z0=z0, x=x):
                sol = deq.fixed_point(f, w, z0, x, solver=solver)
                return sum(jnp.sum(a.astype(w.dtype)) for a in sol.value), sol

            if dtypes == solved:
                gradient, sol = jax.jit(jax.grad(loss, has_aux=True))(w)
                assert jnp.isfinite(gradient).all() and (gradient != 0).any()
                assert sol.stats.converged.all()
            else:
                gradient, sol = jax.eval_shape(jax.grad(loss, has_aux=True), w)
            assert gradient.dtype == w.dtype
        assert [a.dtype.name for a in sol.value] == list(dtypes)
        assert [a.shape for a in sol.value] == [a.shape for a in z0]
        assert sol.stats.residual.dtype == sol.stats.trace.dtype == jnp.float32
        assert sol.stats.num_steps.dtype == jnp.int32 and sol.stats.converged.dtype == bool


@pytest.mark.parametrize("make", [deq.Anderson, deq.Broyden])
def test_no_more_rows_than_steps_are_stored(make):
    """B8: Anderson stored memory rows, also those that no budget can fill."""
    state = make(memory=50, max_steps=6).init(jnp.zeros((2, 3)))
    assert max(max(a.shape, default=0) for a in jax.tree.leaves(state)) == 6
    problem = testing.affine()
    short = run(make(memory=50, max_steps=6, tol=1e-30), problem)
    exact = run(make(memory=6, max_steps=6, tol=1e-30), problem)
    np.testing.assert_array_equal(short.value, exact.value)


@pytest.mark.parametrize("solver", PLAIN, ids=name)
def test_keep_last_returns_the_iterate_after_the_last_step(solver):
    """A looped model wants f^n(z0), not the iterate that looked best on the way."""
    problem = testing.affine(radius=0.9)
    solver = dataclasses.replace(solver, tol=1e-30, max_steps=5)
    z, state = problem.z0, solver.init(problem.z0)
    step = jax.jit(solver.step)
    for _ in range(5):
        z, state = step(z, problem.f(problem.params, z, problem.x), state)
    sol = run(solver, problem, keep="last")
    np.testing.assert_allclose(sol.value, z, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(sol.stats.residual, sol.stats.trace[4])


def test_keep_last_stops_each_sample_where_it_converged():
    problem = testing.affine(batch=4)
    solver = deq.Picard(tol=1e-4, max_steps=60)
    best, last = run(solver, problem), run(solver, problem, keep="last")
    assert best.stats.num_steps.min() < best.stats.num_steps.max()
    np.testing.assert_array_equal(best.value, last.value)
    np.testing.assert_array_equal(best.stats.residual, last.stats.residual)
    diverging = deq.solve(
        deq.Picard(max_steps=9), lambda z: 3 * z + 1, jnp.zeros((1, 1)), keep="last"
    )
    assert diverging.value[0, 0] == (3**9 - 1) / 2 and not diverging.stats.converged[0]
    with pytest.raises(ValueError, match='wanted "best" or "last"'):
        run(solver, problem, keep="first")


def test_the_trace_can_be_left_out():
    problem, solver = testing.affine(), deq.Picard(max_steps=300)
    full, without = run(solver, problem), run(solver, problem, trace=False)
    assert without.stats.trace is None
    np.testing.assert_array_equal(full.value, without.value)
    np.testing.assert_array_equal(full.stats.num_steps, without.stats.num_steps)


def test_debugging_of_infinities_finds_none_without_a_trace():
    """F8: the loop began with residuals of infinity, outside of any program."""
    problem = testing.affine()
    with jax.debug_infs(True), jax.debug_nans(True):
        sol = run(deq.Anderson(), problem, trace=False)
    assert sol.stats.converged.all()


def damped_broyden(f, z, steps, damping):
    """The good method with steps -damping H g and a dense inverse Jacobian."""
    inverse = -np.eye(z.size)
    iterates, g = [z], f(z) - z
    for _ in range(steps):
        s = -damping * inverse @ g
        z = z + s
        g_new = f(z) - z
        hy = inverse @ (g_new - g)
        inverse = inverse + np.outer(s - hy, s @ inverse) / (s @ hy)
        g = g_new
        iterates.append(z)
    return np.stack(iterates)


@pytest.mark.parametrize("damping", [1.0, 0.6])
def test_damped_broyden_iterates_are_those_of_the_dense_formula(x64, damping):
    rng = np.random.default_rng(1)
    w, x = rng.standard_normal((12, 12)) * 0.4, rng.standard_normal((3, 12))
    solver = deq.Broyden(tol=1e-30, max_steps=9, damping=damping)
    z, step = jnp.zeros((3, 12)), jax.jit(solver.step)
    state, iterates = solver.init(z), [np.zeros((3, 12))]
    for _ in range(9):
        z, state = step(z, np.tanh(np.asarray(z) @ w + x), state)
        iterates.append(np.asarray(z))
    for sample in range(3):
        f = lambda v, i=sample: np.tanh(v @ w + x[i])  # noqa: E731
        expected = damped_broyden(f, np.zeros(12), 9, damping)
        np.testing.assert_allclose(np.stack(iterates)[:, sample], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("damping", [1.0, 0.6])
def test_broyden_forgets_the_oldest_factor_or_all_of_them(x64, damping):
    """Beyond its memory: the product of the last m factors, or of those since the restart."""
    rng = np.random.default_rng(1)
    w, x, m = rng.standard_normal((8, 8)) * 0.3, rng.standard_normal(8), 3
    f = lambda v: np.tanh(v @ w + x)  # noqa: E731
    for restart in (False, True):
        z, steps, expected = np.zeros(8), [], [np.zeros(8)]
        for k in range(11):
            kept = steps[k - k % m :] if restart else steps[-m:]
            v = -(f(z) - z)
            for s, s_next in zip(kept[:-1], kept[1:], strict=True):
                v = v + (s @ v) / (s @ s) * (s_next - (1 - damping) * s)
            if kept:  # the newest factor, whose own next step is being computed
                s = kept[-1]
                c = (s @ v) / (s @ s)
                v = (v - (1 - damping) * c * s) / (1 + damping * c)
            steps.append(-damping * v)
            z = z + steps[-1]
            expected.append(z)
        solver = deq.Broyden(tol=1e-30, max_steps=20, memory=m, damping=damping, restart=restart)
        ours, step = jnp.zeros((1, 8)), jax.jit(solver.step)
        state, iterates = solver.init(ours), [np.zeros(8)]
        for _ in range(11):
            ours, state = step(ours, f(np.asarray(ours)), state)
            iterates.append(np.asarray(ours[0]))
        np.testing.assert_allclose(iterates, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("memory", [8, 9, 20])
def test_both_small_solves_agree_with_lapack(x64, memory):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((3, memory, memory + 4))
    matrix, used = rows @ rows.swapaxes(1, 2), memory - 2
    matrix[:, used:], matrix[:, :, used:] = 0, 0
    matrix += np.diag(np.arange(memory) >= used)
    ours = jax.jit(anderson._solve_positive)(jnp.asarray(matrix), jnp.arange(memory) < used)
    ones = (np.arange(memory) < used).astype(float)
    expected = np.linalg.solve(matrix, np.tile(ones[:, None], (3, 1, 1)))[..., 0]
    np.testing.assert_allclose(ours, expected / expected.sum(1, keepdims=True), rtol=1e-8)


BATCH, FEATURES = PartitionSpec("data"), PartitionSpec("data", None, "model")
KINDS = AxisType.Auto, AxisType.Explicit


def sharded(kind, spec, solver):
    """A differentiated solve, its operands, one of them placed, and the mesh."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    w, x = jnp.float32(0.4), jax.random.normal(jax.random.key(0), (4, 6, 8))
    solver = dataclasses.replace(solver, tol=1e-30, max_steps=6)

    def loss(w, x):
        f = lambda w, z, x: jnp.tanh(z * w + x)  # noqa: E731
        sol = deq.fixed_point(f, w, jnp.zeros_like(x), x, solver=solver)
        return jnp.sum(sol.value**2), sol.value

    gradient = jax.value_and_grad(loss, has_aux=True)
    return gradient, w, x, jax.device_put(x, NamedSharding(mesh, spec)), mesh


@pytest.mark.parametrize(
    ("kind", "spec", "solver"),
    [
        *((kind, FEATURES, solver) for kind in KINDS for solver in SOLVERS[1::2]),
        *((kind, BATCH, SOLVERS[1]) for kind in KINDS),
    ],
    ids=str,
)
def test_a_state_may_be_sharded_over_batch_and_features(kind, spec, solver):
    """F1, L5: flattening gathered the state, or failed on the axes of `jax.make_mesh`."""
    gradient, w, x, placed, _ = sharded(kind, spec, solver)
    (_, alone), expected = jax.jit(gradient)(w, x)
    program = jax.jit(gradient).lower(w, placed).compile()
    (_, value), slope = program(w, placed)
    assert value.sharding.is_equivalent_to(placed.sharding, 3)
    np.testing.assert_allclose(value, alone, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(slope, expected, rtol=1e-4)
    found = re.findall(r" (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", program.as_text())
    assert set(found) <= {"all-reduce"}


@pytest.mark.parametrize(
    ("kind", "solver"),
    [*((kind, SOLVERS[1]) for kind in KINDS), (AxisType.Explicit, SOLVERS[3])],
    ids=str,
)
def test_a_state_may_be_sharded_without_jit(kind, solver):
    gradient, w, x, placed, mesh = sharded(kind, FEATURES, solver)
    (_, alone), _ = jax.jit(gradient)(w, x)
    with jax.set_mesh(mesh):
        (_, value), _ = gradient(w, placed)
    np.testing.assert_allclose(value, alone, rtol=1e-5, atol=1e-6)
