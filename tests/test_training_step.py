"""The one training step: phases, penalty, budgets, statistics, donation, devices."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training_example as example

import deq_jax as deq
from deq_jax.training import (
    BackwardConfig,
    EvalConfig,
    Evaluator,
    JacConfig,
    OptimConfig,
    SolverConfig,
    TrainConfig,
    make_train_step,
    metrics,
    parallel,
)
from deq_jax.training.draw import draw_budget, draw_step, is_penalised, penalty_weight
from deq_jax.training.optim import make_optimizer
from deq_jax.training.parallel import place
from deq_jax.training.state import create_state, split_seed
from deq_jax.training.step import forward_metrics, make_update
from deq_jax.training.task import for_phase, forward

# Programs of plain iteration compile in a third of Anderson's time.
CONFIG = example.ExampleConfig(
    solver=SolverConfig(name="picard", max_steps=20, tol=1e-5),
    backward=BackwardConfig(solver="picard"),
    optim=OptimConfig(name="sgd", lr=0.5, schedule="constant", momentum=0.0),
    train=TrainConfig(steps=100, batch_size=16),
)
BATCH = example.make_batch(0, 16)


ANDERSON = dataclasses.replace(
    CONFIG,
    solver=SolverConfig(max_steps=20, tol=1e-5),
    backward=BackwardConfig(max_steps=2, tol=1e-9),
)


def with_jac(**settings):
    return dataclasses.replace(CONFIG, jac=JacConfig(**settings))


def build(config=CONFIG, devices=1, warmup=False, sharded=False, **changes):
    mesh = parallel.make_mesh(jax.devices()[:devices])
    solve = parallel.sharded_fixed_point(mesh) if sharded else deq.fixed_point
    task = example.Regression(config, solve, **changes)
    optimizer = make_optimizer(config.optim, config.train.steps)
    step = make_train_step(task, config, optimizer, mesh, warmup=warmup)
    return task, mesh, create_state(task, optimizer, config.train.seed, mesh), step


def compute(measured):
    return metrics.compute(jax.device_get(measured))


def at(state, step):
    return state.replace(step=jnp.full_like(state.step, step))


def test_a_step_is_the_gradient_step_of_loss_plus_gamma_times_penalty():
    config = with_jac(gamma=0.7)
    task, mesh, state, step = build(config)
    model_key, _, probe_key = jax.random.split(jax.random.fold_in(split_seed(0)[1], 0), 3)

    def objective(params):
        output = forward(
            task,
            config,
            params,
            state.extra,
            None,
            BATCH,
            key=model_key,
            train=True,
            max_steps=20,
            probe=None,
        )
        assert output.solution is not None
        return output.loss + 0.7 * deq.frobenius_penalty(*output.solution.at, key=probe_key)

    value, grads = jax.jit(jax.value_and_grad(objective))(state.params)
    wanted = jax.tree.map(lambda p, g: np.asarray(p - 0.5 * g), state.params, grads)
    state, measured = step(state, place(BATCH, mesh))
    got = compute(measured)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.params, wanted)
    np.testing.assert_allclose(got["loss"] + 0.7 * got["penalty"], value, rtol=1e-5)
    np.testing.assert_allclose(got["grad_norm"], optax.tree.norm(grads), rtol=1e-4)
    assert (got["gamma"], got["lr"], int(state.step)) == (pytest.approx(0.7), 0.5, 1)
    assert float(state.extra["seen"]["total"]) == 16


def test_the_penalty_is_drawn_with_its_probability_and_changes_what_is_learnt():
    task, mesh, state, step = build(with_jac(gamma=1.0, prob=0.3, budget_low=-5, budget_high=2))
    penalties, budgets = [], []
    for _ in range(60):
        state, measured = step(state, place(BATCH, mesh))
        measured = jax.device_get(measured)
        penalties.append(float(measured["penalty"].count))
        budgets.append(int(measured["budget"].value))
        assert (measured["penalty"].total > 0) == (measured["penalty"].count > 0)
    assert 8 <= sum(penalties) <= 28
    random = [b for b, p in zip(budgets, penalties, strict=True) if p]
    assert set(random) <= set(range(15, 23))
    assert len(set(random)) > 3
    assert {b for b, p in zip(budgets, penalties, strict=True) if not p} == {20}
    assert step._cache_size() == 1


def test_the_random_budget_can_be_drawn_on_every_step():
    config = with_jac(budget_low=-2, budget_on="all")
    keys = jax.random.split(jax.random.key(0), 200)
    drawn = jax.jit(jax.vmap(lambda key: draw_step(config, jnp.int32(0), key)))(keys)
    assert set(drawn.budget.tolist()) == {18, 19, 20}
    assert not drawn.penalise.any()


def test_a_budget_above_the_solvers_own_is_really_spent():
    config = with_jac(gamma=1.0, budget_high=6)
    solver = SolverConfig(name="picard", max_steps=2, tol=1e-12)
    # Weights hardly move: where tanh saturates, iteration ends before the budget does.
    optim = OptimConfig(lr=1e-6)
    config = dataclasses.replace(config, solver=solver, optim=optim)
    _, mesh, state, step = build(config)
    spent = set()
    for _ in range(12):
        state, measured = step(state, place(BATCH, mesh))
        got = compute(measured)
        assert got["fwd_steps"] == got["budget"]
        spent.add(got["budget"])
    assert max(spent) > 4


def test_gamma_follows_its_schedule():
    jac = JacConfig(gamma=2.0, increment=0.1, increment_every=10, stop_step=60, warmup_gamma=0.03)
    steps = jnp.array([0, 19, 20, 29, 30, 59, 60, 90])
    got = penalty_weight(jac, steps, TrainConfig(warmup_steps=20))
    np.testing.assert_allclose(got, [0.03, 0.03, 2.0, 2.0, 2.1, 2.3, 0, 0], rtol=1e-6)
    late = JacConfig(gamma=2.0, start=0.25)
    got = penalty_weight(late, jnp.array([0, 49, 50, 199]), TrainConfig(steps=200))
    np.testing.assert_array_equal(got, [0, 0, 2, 2])


def random_budgets(draw, limit=1000, count=20_000, **jac):
    config = with_jac(budget_draw=draw, budget_on="all", budget_mu=2.0, budget_sigma=0.5, **jac)
    config = dataclasses.replace(config, solver=SolverConfig(max_steps=limit))
    drawn = draw_budget(config, jnp.bool(False), jax.random.key(0), (count,))
    return np.asarray(drawn)


def test_random_budgets_have_the_moments_of_their_distribution():
    rate = np.exp(2 + 0.5**2 / 2)
    spread = rate**2 * (np.exp(0.5**2) - 1)
    lognormal, poisson = random_budgets("lognormal"), random_budgets("poisson")
    np.testing.assert_allclose(np.median(lognormal), 7, atol=0.5)  # exp(2) = 7.4, rounded
    np.testing.assert_allclose(lognormal.mean(), rate, rtol=0.02)
    np.testing.assert_allclose(lognormal.var(), spread, rtol=0.06)
    np.testing.assert_allclose(poisson.mean(), 1 + rate, rtol=0.02)
    np.testing.assert_allclose(poisson.var(), rate + spread, rtol=0.06)
    cut = random_budgets("lognormal", limit=6)
    assert (cut.min(), cut.max()) == (1, 6)


def test_every_example_can_draw_a_budget_of_its_own():
    config = with_jac(budget_draw="lognormal", budget_on="all", budget_per="example")
    solver = SolverConfig(name="picard", max_steps=16, tol=1e-12)
    config = dataclasses.replace(config, solver=solver, optim=OptimConfig(lr=1e-6))
    for parts in (1, 2):
        _, mesh, state, step = build(dataclasses.replace(config, accumulate=parts))
        means = []
        for _ in range(8):
            state, measured = step(state, place(BATCH, mesh))
            got = compute(measured)
            assert got["fwd_steps"] == pytest.approx(got["budget"])
            means.append(got["budget"])
        assert any(mean % 1 for mean in means)  # not one number for the whole batch
        assert len(set(means)) > 4


def test_blended_penalty_and_loss_share_the_weight():
    """The gradient is linear in both: three runs must add up."""

    def update(**jac):
        _, mesh, state, step = build(with_jac(**jac))
        before = jax.device_get(state.params)
        after = step(state, place(BATCH, mesh))[0].params
        return jax.tree.map(lambda a, b: np.asarray(a) - b, after, before)

    loss, both = update(), update(gamma=0.7)
    blended = update(gamma=0.7, blend=True)
    for part, b, got in zip(*map(jax.tree.leaves, (loss, both, blended)), strict=True):
        np.testing.assert_allclose(got, b - 0.7 * part, atol=1e-5)
        assert np.abs(0.7 * part).max() > 1e-3


@pytest.mark.parametrize("bad", [{"start": 1.5}, {"budget_draw": "normal"}, {"budget_sigma": -1.0}])
def test_settings_of_penalty_and_budget_are_checked(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        JacConfig(**bad)
    with pytest.raises(ValueError, match="gamma must be at most 1 with blend"):
        JacConfig(gamma=2.0, blend=True)


def test_without_a_penalty_none_is_compiled():
    _, mesh, state, step = build(CONFIG)
    assert "penalty" not in jax.eval_shape(step, state, place(BATCH, mesh))[1]
    assert is_penalised(with_jac(gamma=0.0, warmup_gamma=0.1), warmup=True)
    assert not is_penalised(with_jac(gamma=0.1), warmup=True)


def conditionals(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "cond":
            yield equation
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from conditionals(inner)


def test_of_the_penalty_only_its_gradient_is_kept():
    """A step without one fills as much with zeros, for which it reads nothing."""
    _, mesh, state, step = build(with_jac(gamma=1.0, prob=0.5))
    program = jax.make_jaxpr(step)(state, place(BATCH, mesh))
    weights, injected, mask = example.WIDTH**2, 16 * example.WIDTH, 16 * example.WIDTH
    kept = {e: sum(v.aval.size for v in e.outvars) for e in conditionals(program.jaxpr)}
    gate = max(kept, key=lambda e: kept[e])
    assert kept[gate] == 1 + weights + injected + mask
    skips = gate.params["branches"][0].jaxpr
    read = {id(v) for e in skips.eqns for v in e.invars}
    assert not read & set(map(id, skips.invars))


def test_a_custom_solver_is_kept_in_evaluation_too():
    config = dataclasses.replace(ANDERSON, eval=EvalConfig(max_steps=30))
    model = example.Regression(config).model
    assert for_phase(model, config, train=False).solver == config.build_eval_solver()
    own = dataclasses.replace(config.build_solver(), memory=2)
    for train in (True, False):
        assert for_phase(model.clone(solver=own), config, train=train).solver == own


def test_warm_up_trains_the_unrolled_network():
    config = dataclasses.replace(CONFIG, train=TrainConfig(warmup_steps=10, warmup_layers=3))
    task, mesh, state, step = build(config, warmup=True, masked=False)

    def loss(params):
        injected = BATCH["x"] @ params["U"] + params["b"][None]
        mask = jnp.ones_like(injected)
        z = jnp.zeros_like(injected)
        for _ in range(3):
            z = example.cell({"W": params["W"]}, z, (injected, mask))
        return ((z @ params["v"] - BATCH["y"]) ** 2).mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(state.params)
    wanted = jax.tree.map(lambda p, g: np.asarray(p - 0.5 * g), state.params, grads)
    state, measured = step(state, place(BATCH, mesh))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.params, wanted)
    got = compute(measured)
    np.testing.assert_allclose(got["loss"], value, rtol=1e-5)
    assert not {"fwd_steps", "unconverged", "bwd_steps", "budget"} & got.keys()


def test_statistics_of_both_solves_are_reported():
    _, mesh, state, step = build(ANDERSON)
    got = compute(step(state, place(BATCH, mesh))[1])
    assert (got["bwd_steps"], got["bwd_unconverged"]) == (2, 1)
    assert got["bwd_residual"] > 1e-9
    assert 2 < got["fwd_steps"] < 20
    assert (got["unconverged"], got["budget"]) == (0, 20)


@pytest.mark.parametrize(
    ("rule", "solver"),
    [
        ({"name": "neumann", "max_steps": 4}, {}),
        ({"name": "unroll", "max_steps": 2, "damping": 0.5}, {}),
        ({"name": "backprop", "segments": 2}, {}),
        (
            {"name": "reversible", "damping": 0.5},
            {"name": "picard", "keep": "last", "max_steps": 8},
        ),
        ({"name": "shine", "max_steps": 0}, {"name": "broyden"}),
        ({"name": "shine", "max_steps": 2}, {"name": "broyden"}),
    ],
    ids=str,
)
def test_every_rule_learns_with_the_penalty(rule, solver):
    config = with_jac(gamma=0.1, prob=1.0)
    config = dataclasses.replace(
        config,
        solver=dataclasses.replace(config.solver, **solver),
        backward=BackwardConfig(**rule),
    )
    _, mesh, state, step = build(config)
    losses = []
    for _ in range(8):
        state, measured = step(state, place(BATCH, mesh))
        got = compute(measured)
        losses.append(got["loss"])
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    assert "fwd_steps" in got
    assert "bwd_steps" not in got or rule["name"] != "unroll"


def test_rules_that_do_not_go_with_the_solver_are_refused_with_the_configuration():
    with pytest.raises(ValueError, match="wanted Picard"):
        dataclasses.replace(ANDERSON, backward=BackwardConfig(name="reversible", damping=0.5))
    with pytest.raises(ValueError, match="name must be one of implicit, neumann"):
        BackwardConfig(name="broyden")


def test_padding_counts_for_nothing():
    padded = example.make_batch(0, 16, padding=8)
    short = {name: array[:8] for name, array in padded.items()}
    results = []
    for batch in (padded, short):
        task, mesh, state, _ = build(CONFIG)

        @jax.jit
        def measure(state, batch, task=task):
            output = forward(task, CONFIG, state.params, state.extra, None, batch, max_steps=20)
            return forward_metrics(output, batch)

        results.append(compute(measure(state, batch)))
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_the_state_is_donated_and_chance_depends_on_the_step_only():
    _, mesh, state, step = build(with_jac(gamma=1.0, prob=0.3, budget_low=-5, budget_high=2))
    copies = [jax.tree.map(jnp.copy, state) for _ in range(3)]
    first, _ = step(state, place(BATCH, mesh))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    again, _ = step(copies[0], place(BATCH, mesh))
    other, _ = step(at(copies[1], 5), place(BATCH, mesh))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first.params["W"], other.params["W"])


def test_one_and_eight_devices_learn_the_same():
    """By the one solve of the whole batch, and by a solve on each device."""
    # Every solve takes its whole budget, far above rounding, which could end it a step later.
    few = {"max_steps": 3, "tol": 1e-12}
    config = dataclasses.replace(
        with_jac(gamma=1.0, prob=0.5),
        solver=SolverConfig(name="picard", **few),
        backward=BackwardConfig(solver="picard", **few),
    )
    outcomes = []
    for devices, sharded in ((1, False), (8, False), (8, True)):
        task, mesh, state, step = build(config, devices, sharded=sharded)
        totals = {}
        for index in range(4):
            state, measured = step(state, place(example.make_batch(index, 16), mesh))
            totals = metrics.merge(totals, jax.device_get(measured))
        outcomes.append((jax.device_get(state.params), metrics.compute(totals)))
    (params, measured), *others = outcomes
    for own, found in others:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), params, own
        )
        assert measured == pytest.approx(found, rel=1e-3, abs=1e-6)
    assert measured["fwd_steps"] == measured["bwd_steps"] == 3


def test_a_penalty_without_a_solution_is_refused():
    config = with_jac(gamma=1.0)
    task, mesh, _, _ = build(config)

    class Explicit(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            return nn.Dense(1)(x)[:, 0]

    task = dataclasses.replace(task, model=Explicit(), inputs=lambda batch, carry: (batch["x"],))
    optimizer = make_optimizer(config.optim, config.train.steps)
    state = create_state(task, optimizer, 0, mesh)
    step = make_train_step(task, config, optimizer, mesh)
    with pytest.raises(ValueError, match=r"without a DEQ layer; wanted .*or jac\.gamma"):
        step(state, place(BATCH, mesh))


def test_budgets_of_evaluation_do_not_change_training():
    """Broyden's history is as long as its budget: that of training, not of evaluation."""
    config = dataclasses.replace(
        CONFIG,
        solver=SolverConfig(name="broyden", max_steps=6),
        jac=JacConfig(gamma=1.0, budget_high=1),
    )
    texts = []
    for evaluation in (EvalConfig(), EvalConfig(max_steps=9, budgets=(3, 25))):
        own = dataclasses.replace(config, eval=evaluation)
        assert own.build_solver().max_steps == 7
        task, mesh, state, step = build(own)
        texts.append(step.lower(state, place(BATCH, mesh)).as_text())
    assert texts[0] == texts[1]
    evaluator = Evaluator(task, own, example.eval_batches, mesh=mesh)
    found = evaluator(state)
    assert found.keys() == {3, 9, 25}
    assert [found[b]["fwd_steps"] for b in (3, 9)] == [3, pytest.approx(7, abs=2)]
    output = forward(task, own, state.params, state.extra, None, BATCH, max_steps=3)
    assert output.solution.stats.trace.shape == (25, 16)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_rate_shown_is_the_rate_applied_after_skipped_updates(name):
    optim = OptimConfig(name=name, lr=0.5, schedule="cosine", end_lr=0.1, momentum=0.0)
    config = dataclasses.replace(
        CONFIG, optim=optim, train=dataclasses.replace(CONFIG.train, steps=8)
    )
    _, mesh, state, step = build(config)
    bad = {**BATCH, "y": np.full_like(BATCH["y"], np.nan)}
    for _ in range(7):
        state, measured = step(state, place(bad, mesh))
        assert measured["skipped"].total == 1
    before = jax.device_get(state.params)
    state, measured = step(state, place(BATCH, mesh))
    got = compute(measured)
    applied = optax.tree.norm(jax.tree.map(jnp.subtract, jax.device_get(state.params), before))
    # The direction of adamw's first step has a length of 1 in every number whose gradient is not 0.
    count = sum(leaf.size for leaf in jax.tree.leaves(before))
    length = got["grad_norm"] if name == "sgd" else np.sqrt(count)
    assert applied / length == pytest.approx(got["lr"], rel=1e-3)
    assert got["lr"] == pytest.approx(0.1 + 0.4 * (1 + np.cos(np.pi * 7 / 8)) / 2, rel=1e-5)


def test_an_optimizer_with_a_clock_of_its_own_is_used_as_it_is():
    task = example.Regression(CONFIG)
    states = []
    for optimizer in (optax.sgd(0.5), make_optimizer(CONFIG.optim, 100)):
        update = jax.jit(make_update(task, CONFIG, optimizer))
        mesh = parallel.make_mesh(jax.devices()[:1])
        states.append(update(create_state(task, optimizer, 0, mesh), BATCH)[0])
    for a, b in zip(*(jax.tree.leaves(state.params) for state in states), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
