"""A batch in parts, on devices, in bfloat16, with split tables: all equal to the plain step."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_example as example
from test_cost import bodies

import deq_jax as deq
from benchmarks._scaling_program import LOOPS, collectives
from deq_jax.training import (
    JacConfig,
    OptimConfig,
    SolverConfig,
    TrainConfig,
    UsageError,
    make_train_step,
    metrics,
    parallel,
    train,
)
from deq_jax.training.evaluation import Evaluator
from deq_jax.training.optim import make_optimizer
from deq_jax.training.placement import pad, place
from deq_jax.training.precision import InBfloat16, in_bfloat16
from deq_jax.training.state import TrainState, abstract_state, create_state
from deq_jax.training.step import make_update
from deq_jax.training.task import CARRY

CONFIG = example.ExampleConfig(
    solver=SolverConfig(max_steps=20, tol=1e-6),
    optim=OptimConfig(name="sgd", lr=0.5, schedule="constant", momentum=0.0),
    train=TrainConfig(steps=100, batch_size=16),
)
BATCH = example.make_batch(0, 16, padding=3)


class Regression(example.Regression):
    """Without masks, which every part of a batch would draw for itself."""

    def forward(self, params, extra, batch, *, train, **rest):
        output = super().forward(params, extra, batch, train=False, **rest)
        return dataclasses.replace(output, extra={"seen": extra["seen"] + batch["mask"].sum()})


class Remembering(Regression):
    """Predicts from what the batch before has left, too."""

    def carry(self, *, train):
        return {"last": jnp.zeros((16, 1))}

    def forward(self, params, extra, batch, **rest):
        last = extra[CARRY]["last"]
        output = super().forward(params, extra, {**batch, "x": batch["x"] + last}, **rest)
        return dataclasses.replace(
            output, extra={**output.extra, CARRY: {"last": last + batch["x"][:, :1]}}
        )


class Weighted(Regression):
    """A mean in which examples count for as much as they say."""

    def forward(self, params, extra, batch, **rest):
        output = super().forward(params, extra, batch, **rest)
        weight = batch["mask"] * (0.1 + batch["x"][:, 0] ** 2)
        prediction = output.solution.value @ params["v"]
        total = ((prediction - batch["y"]) ** 2 * weight).sum()
        return dataclasses.replace(output, loss=total / weight.sum(), weight=weight.sum())


def run(task, config, devices=1, steps=2):
    """State and metrics after some steps."""
    mesh = parallel.make_mesh(jax.devices()[:devices])
    task = task(config, parallel.make_fixed_point(config, mesh))
    optimizer = make_optimizer(config.optim, config.train.steps)
    state = create_state(task, optimizer, 0, mesh, shard_above=config.shard_above)
    step = make_train_step(task, config, optimizer, mesh)
    totals = {}
    for index in range(steps):
        batch = example.make_batch(index, 16, padding=3 * index)
        state, measured = step(state, place(batch, mesh))
        totals = metrics.merge(totals, jax.device_get(measured))
    return jax.device_get(state), metrics.compute(totals)


def assert_close(got, wanted, rtol=1e-4, atol=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def assert_measured(got, wanted):
    assert got.keys() == wanted.keys()
    for name in got:  # where a solve stops is a matter of rounding
        solve = name.endswith(("residual", "steps"))
        close = pytest.approx(wanted[name], rel=0.02 if solve else 1e-4, abs=1e-5 * solve)
        assert got[name] == close, name


@pytest.mark.parametrize("task", [Regression, Remembering, Weighted])
@pytest.mark.parametrize("devices", [1, 4])
def test_parts_of_a_batch_give_the_step_of_the_whole(task, devices):
    whole, expected = run(task, CONFIG)
    parts, got = run(task, dataclasses.replace(CONFIG, accumulate=4), devices)
    assert_close(parts, whole)
    assert_measured(got, expected)
    assert parts.extra["seen"] == 16 + 13


def test_parts_have_masks_and_probes_of_their_own():
    config = dataclasses.replace(CONFIG, jac=JacConfig(gamma=0.5), accumulate=2)
    seen = []

    class Task(example.Regression):
        def forward(self, params, extra, batch, *, key, **rest):
            jax.debug.callback(lambda k: seen.append(k.tolist()), jax.random.key_data(key))
            return super().forward(params, extra, batch, key=key, **rest)

    _, measured = run(Task, config, steps=1)
    jax.effects_barrier()
    assert len({tuple(key) for key in seen}) == 2
    assert measured["penalty"] > 0


def test_parts_that_do_not_divide_are_refused():
    config = dataclasses.replace(CONFIG, accumulate=3)
    with pytest.raises(
        UsageError, match=r"16 examples for 3 parts .* on 4 devices.* multiple of 12"
    ):
        run(Regression, config, devices=4)


def test_the_update_runs_under_pmap():
    task = Regression(CONFIG)
    optimizer = make_optimizer(CONFIG.optim, CONFIG.train.steps)
    devices = jax.devices()[:4]
    state = create_state(task, optimizer, 0, parallel.make_mesh(devices[:1]))
    state = jax.device_get(state)
    step = jax.pmap(
        make_update(task, CONFIG, optimizer, axis="data"), axis_name="data", devices=devices
    )
    many = jax.tree.map(lambda a: np.stack([a] * 4), state)
    totals = {}
    for index in range(2):
        batch = example.make_batch(index, 16, padding=3 * index)
        split = {name: array.reshape(4, 4, *array.shape[1:]) for name, array in batch.items()}
        many, measured = step(many, split)
        first = jax.tree.map(lambda a: np.asarray(a)[0], measured)
        totals = metrics.merge(totals, first)
    wanted, expected = run(Regression, CONFIG)
    for copy in range(4):
        own = jax.tree.map(lambda a, copy=copy: np.asarray(a)[copy], many)
        assert_close(own.params, wanted.params)
    assert_measured(metrics.compute(totals), expected)


def test_devices_under_pmap_draw_masks_and_probes_of_their_own():
    config = dataclasses.replace(CONFIG, jac=JacConfig(gamma=0.5))
    task = example.Regression(config)
    optimizer = make_optimizer(config.optim, config.train.steps)
    update = make_update(task, config, optimizer, axis="data")
    state = create_state(task, optimizer, 0, parallel.make_mesh(jax.devices()[:1]))
    step = jax.jit(jax.vmap(update, axis_name="data", in_axes=(None, 0)))  # an axis is an axis
    after, measured = step(state, {name: np.stack([a] * 2) for name, a in BATCH.items()})
    assert_close(
        jax.tree.map(lambda a: a[0], after.params), jax.tree.map(lambda a: a[1], after.params)
    )
    assert (np.asarray(measured["penalty"].count) == 2).all()


def cell(params, z, x):
    return jnp.tanh(z @ params["W"] + x)


def operands(width=64):
    key = jax.random.key(0)
    weights = {"W": deq.init.gaussian(0.6)(key, (width, width), jnp.float32)}
    return weights, jax.random.normal(jax.random.key(1), (8, width))


def test_bfloat16_is_for_f_alone():
    params, x = operands()
    low, solver = in_bfloat16(deq.fixed_point), deq.Anderson(tol=4e-3, max_steps=40)

    def loss(fixed_point, params, x, tol):
        solver = deq.Anderson(tol=tol, max_steps=40)
        return (fixed_point(cell, params, jnp.zeros_like(x), x, solver=solver).value ** 2).sum()

    @functools.partial(jax.jit, static_argnums=(0, 3))
    def gradient(fixed_point, params, x, tol):
        return jax.grad(functools.partial(loss, fixed_point), argnums=(0, 1))(params, x, tol)

    sol = low(cell, params, jnp.zeros_like(x), x, solver=solver)
    exact = deq.fixed_point(cell, params, jnp.zeros_like(x), x, solver=deq.Anderson(tol=1e-6))
    assert sol.value.dtype == jnp.float32 and bool(sol.stats.converged.all())
    error = jnp.linalg.norm(sol.value - exact.value) / jnp.linalg.norm(exact.value)
    assert 1e-5 < error < 0.02  # f really is coarse, and no coarser than it should be
    got = gradient(low, params, x, 4e-3)
    wanted = gradient(deq.fixed_point, params, x, 1e-6)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == jnp.float32
        assert jnp.linalg.norm(a - b) < 0.03 * jnp.linalg.norm(b)
    f, at = sol.equation.f, sol.equation.params
    assert isinstance(f, InBfloat16) and at["W"].dtype == jnp.float32
    penalty = deq.frobenius_penalty(f, at, sol.value, x, key=jax.random.key(2), probes=200)
    plain = deq.frobenius_penalty(cell, at, exact.value, x, key=jax.random.key(2), probes=200)
    assert float(penalty) == pytest.approx(float(plain), rel=0.02)


def test_weights_are_cast_once_and_not_in_the_loops():
    params, x = operands(96)

    def loss(params):
        solve = in_bfloat16(deq.fixed_point)
        solver = deq.Picard(tol=1e-9, max_steps=20)
        return solve(cell, params, jnp.zeros((8, 96)), x, solver=solver).value.sum()

    text = jax.jit(jax.grad(loss)).lower(params).compile().as_text()
    cast = r"bf16\[96,96\]\S* convert\("
    assert re.search(cast, text)
    assert not any(re.search(cast, body) for body in bodies(text))


def test_a_step_in_bfloat16_is_close_to_one_in_float32():
    config = dataclasses.replace(CONFIG, jac=JacConfig(gamma=0.1))
    low = dataclasses.replace(config, precision="bf16")
    wanted, expected = run(Regression, config, devices=2)
    got, measured = run(Regression, low, devices=2)
    assert all(a.dtype != jnp.bfloat16 for a in jax.tree.leaves(got))
    assert measured["loss"] == pytest.approx(expected["loss"], rel=0.02)
    assert measured["loss"] != expected["loss"]
    assert_close(got.params, wanted.params, rtol=0.05, atol=0.05)


def test_large_tables_are_split_and_learn_the_same(tmp_path):
    adam = dataclasses.replace(CONFIG, optim=OptimConfig(lr=0.1))
    config = dataclasses.replace(adam, shard_above=20)
    optimizer = make_optimizer(config.optim, 10)
    mesh = parallel.make_mesh(jax.devices()[:2])
    shapes = abstract_state(Regression(config), optimizer, mesh, shard_above=20)
    spec = {name: leaf.sharding.spec for name, leaf in shapes.params.items()}
    assert spec["W"] == jax.P("data") and spec["U"] == jax.P(None, "data")
    assert spec["b"] == spec["v"] == jax.P()  # small
    assert {leaf.sharding.spec for leaf in jax.tree.leaves(shapes.opt_state) if leaf.ndim > 1} == {
        spec["W"],
        spec["U"],
    }
    state = create_state(Regression(config), optimizer, 0, mesh, shard_above=20)
    assert state.params["W"].addressable_shards[0].data.shape == (3, 6)
    assert_close(run(Regression, config, devices=2)[0], run(Regression, adam, devices=2)[0])


def test_a_run_with_split_tables_is_saved_and_resumed(tmp_path):
    mesh = parallel.make_mesh(jax.devices()[:2])
    tiny = dataclasses.replace(example.PRESETS["tiny"], shard_above=20)

    def go(name, steps, mesh=mesh, **changes):
        part = dataclasses.replace(tiny.train, steps=30, checkpoint_every=steps)
        config = dataclasses.replace(tiny, workdir=str(tmp_path / name), train=part, **changes)
        task = example.Regression(config, parallel.sharded_fixed_point(mesh))
        return train(task, config, example.Batches(16), example.eval_batches, mesh=mesh)

    first = go("a", 30)
    assert first.state.params["W"].sharding.spec == jax.P("data")
    again = go("a", 30)  # from its last checkpoint
    assert_close(again.state, first.state, rtol=0, atol=0)
    whole = go("a", 30, mesh=parallel.make_mesh(jax.devices()[:1]), shard_above=None)
    assert_close(whole.state.params, first.state.params, rtol=0, atol=0)
    assert whole.evaluation[8] == pytest.approx(first.evaluation[8], rel=1e-4)


def test_every_example_is_evaluated_once_on_any_number_of_devices():
    config = dataclasses.replace(example.PRESETS["tiny"])
    results = []
    for devices in (1, 3, 7):
        mesh = parallel.make_mesh(jax.devices()[:devices])
        task = example.Regression(config, parallel.sharded_fixed_point(mesh))
        state = create_state(task, make_optimizer(config.optim, 10), 0, mesh)
        results.append(Evaluator(task, config, example.eval_batches, mesh=mesh)(state)[8])
    keys = [name for name in results[0] if name != "penalty"]  # a mean over padding too
    for other in results[1:]:
        for name in keys:
            assert other[name] == pytest.approx(results[0][name], rel=1e-4), name
    padded = pad({"x": np.arange(3), "mask": np.ones(3), "corrupt": np.ones(3)}, 4)
    assert padded["mask"].tolist() == padded["corrupt"].tolist() == [1, 1, 1, 0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "prose"])
def test_no_collective_stands_in_a_loop_of_a_real_training_step(name, tmp_path):
    """Forward and backward solve, penalty, stem, head, softmax: the whole compiled step."""
    mesh = parallel.make_mesh()
    if name == "digits":
        from test_experiments import digits

        from experiments.image_classification.task import ImageTask

        config = digits(tmp_path)
        config = dataclasses.replace(config, jac=JacConfig(gamma=0.5, prob=0.5))
        task = ImageTask(config, mesh)
        rng = np.random.default_rng(0)
        batch = {
            "image": rng.normal(size=(16, 8, 8, 1)).astype(np.float32),
            "label": np.zeros(16, np.int32),
            "mask": np.ones(16, np.float32),
        }
    else:
        from test_language import prose

        from experiments.language_modeling.task import LanguageTask

        config = prose(tmp_path)
        part = dataclasses.replace(config.train, batch_size=8)
        config = dataclasses.replace(config, jac=JacConfig(gamma=0.5, prob=0.5), train=part)
        task = LanguageTask(config, mesh, 40)
        words = np.zeros((8, 4), np.int32)
        ones = np.ones(8, np.float32)
        batch = {"words": words, "targets": words, "weight": np.ones((8, 4), np.float32)}
        batch |= {"fresh": ones, "mask": ones}
    optimizer = make_optimizer(config.optim, 10)
    state = create_state(task, optimizer, 0, mesh)
    step = make_train_step(task, config, optimizer, mesh)
    text = step.lower(state, place(batch, mesh)).compile().as_text()
    places = {found.place for found in collectives(text)}
    assert "once" in places  # gradients are summed
    assert not places & set(LOOPS)


def test_a_state_is_a_tree_of_the_same_kind_everywhere():
    """What `create_state` makes is what `abstract_state` promises, carry and all."""
    mesh = parallel.make_mesh()
    task = Remembering(CONFIG)
    optimizer = make_optimizer(CONFIG.optim, 10)
    state = create_state(task, optimizer, 0, mesh)
    shapes = abstract_state(task, optimizer, mesh)
    assert isinstance(state, TrainState)
    for leaf, shape in zip(jax.tree.leaves(state), jax.tree.leaves(shapes), strict=True):
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)
        assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)
    assert state.carry["last"].sharding.spec == jax.P("data")
