"""A batch in parts, on devices, in bfloat16, with split tables: all equal to the plain step."""

import dataclasses
import functools
import inspect
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_example as example
from test_cost import bodies

import deq_jax as deq
from benchmarks.programs import LOOPS, collectives
from deq_jax.models import AdaptiveEmbedding, DEQTransformer, TransformerCell
from deq_jax.training import (
    BackwardConfig,
    EvalConfig,
    JacConfig,
    Mean,
    OptimConfig,
    SolverConfig,
    Task,
    TrainConfig,
    UsageError,
    make_train_step,
    metrics,
    parallel,
    train,
)
from deq_jax.training.evaluation import Evaluator
from deq_jax.training.optim import make_optimizer
from deq_jax.training.parallel import pad, place
from deq_jax.training.solving import InBfloat16, in_bfloat16, make_fixed_point
from deq_jax.training.state import TrainState, abstract_state, create_state
from deq_jax.training.step import make_update

# Programs of plain iteration compile in a third of Anderson's time.
CONFIG = example.ExampleConfig(
    solver=SolverConfig(name="picard", max_steps=20, tol=1e-6),
    backward=BackwardConfig(solver="picard"),
    optim=OptimConfig(name="sgd", lr=0.5, schedule="constant", momentum=0.0),
    train=TrainConfig(steps=100, batch_size=16),
)
BATCH = example.make_batch(0, 16, padding=3)


def Regression(config, fixed_point=deq.fixed_point, **changes):
    """Without masks, which every part of a batch would draw for itself."""
    return example.Regression(config, fixed_point, masked=False, **changes)


def Remembering(config, fixed_point=deq.fixed_point):
    """Predicts from what the batch before has left, too."""
    return Regression(
        config,
        fixed_point,
        carry=lambda train: {"last": jnp.zeros((16, 1))},
        inputs=lambda batch, carry: (batch["x"] + carry["last"], batch["mask"]),
        leave=lambda predicted: {"last": jnp.tanh(predicted)[:, None]},
    )


def Weighted(config, fixed_point=deq.fixed_point):
    """A mean in which examples count for as much as they say."""

    def loss(predicted, batch):
        weight = batch["mask"] * (0.1 + batch["x"][:, 0] ** 2)
        return {"loss": Mean(((predicted - batch["y"]) ** 2 * weight).sum(), weight.sum())}

    return Regression(config, fixed_point, loss=loss)


def run(task, config, devices=1, steps=2):
    """State and metrics after some steps."""
    mesh = parallel.make_mesh(jax.devices()[:devices])
    task = task(config, make_fixed_point(config, mesh))
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


@functools.cache
def plain(task):
    """State and metrics after the plain steps of one device."""
    return run(task, CONFIG)


@pytest.mark.parametrize(("task", "devices"), [(Regression, 1), (Remembering, 4), (Weighted, 4)])
def test_parts_of_a_batch_give_the_step_of_the_whole(task, devices):
    whole, expected = plain(task)
    parts, got = run(task, dataclasses.replace(CONFIG, accumulate=4), devices)
    assert_close(parts, whole)
    assert_measured(got, expected)
    assert parts.extra["seen"]["total"] == 16 + 13


def test_parts_have_masks_and_probes_of_their_own():
    config = dataclasses.replace(CONFIG, jac=JacConfig(gamma=0.5), accumulate=2)
    seen = []

    def task(config, fixed_point):
        def solve(f, params, z0, x, **options):
            if options["probe"] is not None:
                jax.debug.callback(lambda mask: seen.append(mask.tobytes()), x[1])
            return fixed_point(f, params, z0, x, **options)

        return example.Regression(config, solve)

    _, measured = run(task, config, steps=1)
    jax.effects_barrier()
    assert len(set(seen)) == 2
    assert measured["penalty"] > 0


def test_parts_that_do_not_divide_are_refused():
    config = dataclasses.replace(CONFIG, accumulate=3)
    with pytest.raises(
        UsageError, match=r"16 examples for 3 parts .* on 4 devices.* multiple of 12"
    ):
        run(Regression, config, devices=4)


def by_hand(kind, task, config, devices=4, steps=2):
    """The update of `make_update(axis=...)`, each device with its own part of the batch."""
    chosen = jax.devices()[:devices]
    task = task(config)
    optimizer = make_optimizer(config.optim, config.train.steps)
    update = make_update(task, config, optimizer, axis="data")
    state = create_state(task, optimizer, 0, parallel.make_mesh(chosen[:1]))
    state, split = jax.device_get(state), jax.P("data")
    if kind == "pmap":
        axes = dataclasses.replace(
            jax.tree.map(lambda _: None, state), carry=jax.tree.map(lambda _: 0, state.carry)
        )
        step = jax.pmap(
            update, axis_name="data", devices=chosen, in_axes=(axes, 0), out_axes=(axes, None)
        )
        cut = lambda a: np.reshape(a, (devices, -1, *np.shape(a)[1:]))  # noqa: E731
        join = lambda a: np.reshape(a, (-1, *np.shape(a)[2:]))  # noqa: E731
    else:
        specs = TrainState(step=jax.P(), params=jax.P(), opt_state=jax.P(), extra=jax.P())
        specs = dataclasses.replace(specs, carry=split)
        step = jax.jit(
            jax.shard_map(
                update,
                mesh=parallel.make_mesh(chosen),
                in_specs=(specs, split),
                out_specs=(specs, jax.P()),
                check_vma=kind == "checked",
            )
        )
        cut = join = np.asarray
    state = dataclasses.replace(state, carry=jax.tree.map(cut, state.carry))
    totals = {}
    for index in range(steps):
        batch = example.make_batch(index, 16, padding=3 * index)
        state, measured = step(state, jax.tree.map(cut, batch))
        totals = metrics.merge(totals, jax.device_get(measured))
    state = jax.device_get(state)
    state = dataclasses.replace(state, carry=jax.tree.map(join, state.carry))
    return state, metrics.compute(totals)


BY_HAND = ["checked", "unchecked", "pmap"]


@pytest.mark.parametrize(
    ("kind", "task", "parts"),
    [
        *zip(BY_HAND, (Regression, Remembering, Remembering), (1, 1, 1), strict=True),
        *zip(BY_HAND, (Remembering, Regression, Regression), (2, 2, 2), strict=True),
    ],
)
def test_the_update_by_shard_map_and_pmap_is_that_of_one_device(kind, task, parts):
    wanted, expected = plain(task)
    got, measured = by_hand(kind, task, dataclasses.replace(CONFIG, accumulate=parts))
    assert_close(got.params, wanted.params)
    assert_close(got.carry, wanted.carry)
    assert_measured(measured, expected)


def test_masks_and_probes_are_the_same_by_shard_map_and_pmap():
    config = dataclasses.replace(CONFIG, jac=JacConfig(gamma=0.5))
    results = [by_hand(kind, example.Regression, config, steps=1) for kind in BY_HAND]
    for state, measured in results[1:]:
        assert_close(state.params, results[0][0].params)
        assert_measured(measured, results[0][1])


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
    key, solver = jax.random.key(2), deq.Picard(tol=4e-3, max_steps=60)

    def loss(params, x):
        sol = in_bfloat16(deq.fixed_point)(cell, params, jnp.zeros_like(x), x, solver=solver)
        at = sol.equation.f, sol.equation.params, sol.value, x
        return (sol.value**2).sum(), (sol, deq.frobenius_penalty(*at, key=key, probes=200))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (got, d_x), (sol, penalty) = gradient(params, x)
    assert isinstance(sol.equation.f, InBfloat16)
    assert sol.equation.params["W"].dtype == sol.value.dtype == jnp.float32
    assert bool(sol.stats.converged.all())

    w, u = np.asarray(params["W"], np.float64), np.asarray(x, np.float64)
    z = np.zeros_like(u)
    for _ in range(200):
        z = np.tanh(z @ w + u)
    slope, v = 1 - z**2, 2 * z
    for _ in range(200):
        v = 2 * z + (v * slope) @ w.T
    error = np.linalg.norm(sol.value - z) / np.linalg.norm(z)
    assert 1e-5 < error < 0.02  # f really is coarse, and no coarser than it should be
    for a, b in ((got["W"], z.T @ (v * slope)), (d_x, v * slope)):
        assert a.dtype == jnp.float32
        assert np.linalg.norm(a - b) < 0.03 * np.linalg.norm(b)
    draw = jax.jit(jax.vmap(lambda key: jax.random.normal(key, x.shape)))
    rows = (np.asarray(draw(jax.random.split(key, 200))) * slope) @ w.T
    assert float(penalty) == pytest.approx((rows**2).sum() / (200 * x.size), rel=0.02)


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


@pytest.mark.parametrize("devices", [2, 4])  # by 4 no side of W divides: two halves, two copies
def test_large_tables_are_split_and_learn_the_same(devices):
    adam = dataclasses.replace(CONFIG, optim=OptimConfig(lr=0.1))
    config = dataclasses.replace(adam, shard_above=20)
    optimizer = make_optimizer(config.optim, 10)
    mesh = parallel.make_mesh(jax.devices()[:devices])
    shapes = abstract_state(Regression(config), optimizer, mesh, shard_above=20)
    spec = {name: leaf.sharding.spec for name, leaf in shapes.params.items()}
    assert spec["W"] == jax.P("data")  # [6, 6]
    assert spec["U"] == (jax.P("data") if devices == 4 else jax.P(None, "data"))  # [4, 6]
    assert spec["b"] == spec["v"] == jax.P()  # small
    assert {leaf.sharding.spec for leaf in jax.tree.leaves(shapes.opt_state) if leaf.ndim > 1} == {
        spec["W"],
        spec["U"],
    }
    state = create_state(Regression(config), optimizer, 0, mesh, shard_above=20)
    assert state.params["W"].addressable_shards[0].data.shape == (3, 6)
    assert_close(*(run(Regression, part, devices=devices)[0] for part in (config, adam)))


@pytest.mark.parametrize("devices", [2, 4])
def test_a_run_with_split_tables_is_saved_and_resumed(tmp_path, devices):
    mesh = parallel.make_mesh(jax.devices()[:devices])
    tiny = dataclasses.replace(
        example.PRESETS["tiny"], shard_above=20, jac=JacConfig(), eval=EvalConfig()
    )

    def go(name, steps, mesh=mesh, **changes):
        part = dataclasses.replace(tiny.train, steps=30, warmup_steps=0, checkpoint_every=steps)
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
    for devices in (1, 7):
        mesh = parallel.make_mesh(jax.devices()[:devices])
        task = example.Regression(config, parallel.sharded_fixed_point(mesh))
        state = create_state(task, make_optimizer(config.optim, 10), 0, mesh)
        results.append(Evaluator(task, config, example.eval_batches, mesh=mesh)(state)[8])
    one, other = results
    for name in one.keys() - {"penalty"}:  # each number of devices has its own probes
        assert other[name] == pytest.approx(one[name], rel=1e-4), name
    padded = pad({"x": np.arange(3), "mask": np.ones(3), "corrupt": np.ones(3)}, 4)
    assert padded["mask"].tolist() == padded["corrupt"].tolist() == [1, 1, 1, 0]


def test_padding_and_broken_examples_count_for_nothing_in_the_jacobian_s_numbers():
    """A linear f, all of whose Jacobians are known: 0.5 I for real examples, 9 I for padding."""
    config = dataclasses.replace(
        CONFIG, eval=EvalConfig(spectral_batches=1, spectral_iters=30, max_steps=1)
    )
    scale = np.full((16, 1), 0.5, np.float32)
    scale[3], scale[10:] = np.nan, 9
    mask = np.ones(16, np.float32)
    mask[10:] = 0
    batch = {"scale": scale, "mask": mask}

    class Linear(nn.Module):
        solver: deq.Anderson
        adjoint: None = None

        def __call__(self, scale, *, train, max_steps=None, probe=None):
            f = lambda params, z, x: x * z  # noqa: E731
            solution = deq.fixed_point(
                f, None, jnp.zeros((16, 400)), scale, solver=self.solver, max_steps=max_steps
            )
            return (), dataclasses.replace(solution, equation=deq.Equation(f, None, scale))

    mesh = parallel.make_mesh(jax.devices()[:1])
    task = Task(
        model=Linear(config.build_solver()),
        inputs=lambda batch, carry: (batch["scale"],),
        loss=lambda output, batch: {"loss": Mean(jnp.float32(0), batch["mask"].sum())},
        sample={"scale": jax.ShapeDtypeStruct((16, 1), jnp.float32)},
    )
    state = TrainState(step=jnp.int32(0), params={}, opt_state=None, extra={})
    found = Evaluator(task, config, lambda: [batch], mesh=mesh)(state)[1]
    assert found["spectral_radius"] == pytest.approx(0.5, rel=1e-3)
    assert found["penalty"] == pytest.approx(0.25, rel=0.1)


def solve_both(solve, x, solver=deq.Picard(tol=1e-6, max_steps=60)):  # noqa: B008
    """Value and gradients, by params and x."""
    params, _ = operands(x.shape[1])

    def loss(params, x):
        sol = solve(cell, params, jnp.zeros_like(x), x, solver=solver)
        return (sol.value**2).sum(), sol.stats.num_steps

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)


@pytest.mark.parametrize(
    ("kind", "shape"), [("Auto", (2, 2)), ("Explicit", (8,)), ("Explicit", (2, 2))]
)
def test_a_mesh_of_jax_make_mesh_splits_a_solve(kind, shape):
    names = ("batch", "model")[: len(shape)]
    kinds = (getattr(jax.sharding.AxisType, kind),) * len(shape)
    count = int(np.prod(shape))
    mesh = jax.make_mesh(shape, names, kinds, devices=jax.devices()[:count])
    solve = parallel.sharded_fixed_point(mesh, axis="batch")
    params, x = operands(16)
    (value, _), grads = jax.jit(functools.partial(solve_both, deq.fixed_point))(x)
    ours = jax.jit(functools.partial(solve_both, solve))
    for spec in (None, jax.P(), jax.P("batch")):
        own = x if spec is None else jax.device_put(x, jax.NamedSharding(mesh, spec))
        (got, steps), got_grads = ours(own)
        assert float(got) == pytest.approx(float(value), rel=1e-4)
        assert_close(got_grads, grads)
        assert len({str(shard.index) for shard in steps.addressable_shards}) == shape[0]
    for given in (x, own):
        sol = solve(cell, params, 0 * given, given, solver=deq.Picard(tol=1e-6, max_steps=60))
        assert sol.value.sharding.spec[0] == "batch"  # without jit
    with jax.set_mesh(mesh):
        assert_close(ours(own)[1], grads)
    collected = {c.place for c in collectives(ours.lower(x).compile().as_text())}
    assert collected == {"once"}


def test_axes_of_make_mesh_are_explicit():
    """What the test above is for."""
    assert jax.make_mesh((8,), ("data",)).axis_types == (jax.sharding.AxisType.Explicit,)


def test_what_of_x_is_split_is_said_and_not_guessed():
    """A vector for the features is as long as the batch: 8, on 4 devices."""
    mesh = parallel.make_mesh(jax.devices()[:4])
    params, u = operands(8)
    x = {"u": u, "scale": jnp.linspace(0.1, 1, 8), "masks": {"a": jnp.ones((8, 1))}, "none": None}

    def f(params, z, x):
        return cell(params, z, x["u"]) * x["scale"] * x["masks"]["a"]

    def gradients(solve):
        def loss(params, x):
            sol = solve(f, params, jnp.zeros_like(u), x, solver=deq.Picard(tol=1e-6))
            return (sol.value**2).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)

    jax.config.update("jax_numpy_rank_promotion", "allow")
    try:
        axes = {"u": 0, "scale": None, "masks": 0, "none": 0}
        assert_close(
            gradients(parallel.sharded_fixed_point(mesh, axes)), gradients(deq.fixed_point)
        )
    finally:
        jax.config.update("jax_numpy_rank_promotion", "raise")


def test_leaves_of_every_kind_are_replicated():
    """Integers, bools, keys, None and Python numbers, in params and in x."""
    mesh = parallel.make_mesh(jax.devices()[:4])
    shared = {"count": jnp.int32(2), "key": jax.random.key(3), "on": jnp.bool_(True), "half": 0.5}
    x = {"u": jnp.ones((8, 2)), "shared": shared, "no": None}

    def f(params, z, x):
        total = 0
        for part in (params["shared"], x["shared"]):
            noise = jax.random.uniform(part["key"], (1, 2))
            total += jnp.where(part["on"], part["half"] * noise / part["count"], 0)
        return jnp.tanh(params["w"] * z + x["u"]) * total

    def gradients(solve):
        def loss(w, u):
            params = {"w": w, "shared": shared, "no": None}
            solver = deq.Picard(tol=1e-6)
            sol = solve(f, params, jnp.zeros((8, 2)), x | {"u": u}, solver=solver)
            return (sol.value**2).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.full((1, 2), 0.3), x["u"])

    axes = {"u": 0, "shared": None, "no": None}
    ours = gradients(parallel.sharded_fixed_point(mesh, axes))
    assert_close(ours, gradients(deq.fixed_point))


def test_a_leaf_that_cannot_be_split_is_named():
    mesh = parallel.make_mesh(jax.devices()[:4])
    x = {"u": jnp.ones((8, 3)), "cells": [{"r": jnp.ones((1, 3))}]}

    def solve(x_axes=0):
        f = lambda params, z, x: 0.5 * z + x["u"] + x["cells"][0]["r"]  # noqa: E731
        solver = deq.Picard(tol=1e-5)
        return parallel.sharded_fixed_point(mesh, x_axes)(f, None, x["u"], x, solver=solver)

    with pytest.raises(ValueError, match=r"x\['cells'\]\[0\]\['r'\] of shape \(1, 3\) .*None"):
        solve()
    assert solve({"u": 0, "cells": None}).stats.converged.all()
    assert solve({"u": 0, "cells": [None]}).stats.converged.all()
    with pytest.raises(ValueError, match=r"x_axes\['u'\] = 1; wanted 0"):
        solve({"u": 1, "cells": None})
    with pytest.raises(ValueError, match=r"got x_axes = .* wanted a tree prefix"):
        solve({"u": 0})
    with pytest.raises(ValueError, match=r"axis='data' for a mesh with the axes \('batch',\)"):
        parallel.sharded_fixed_point(jax.make_mesh((8,), ("batch",)))


def test_a_sharded_solve_has_the_signature_of_the_plain_one():
    solve = parallel.sharded_fixed_point(parallel.make_mesh(jax.devices()[:4]))
    assert inspect.signature(solve) == inspect.signature(deq.fixed_point)
    params, x = operands(16)
    z0, solver = jnp.zeros_like(x), deq.Picard(tol=1e-6, max_steps=3)
    for how in (
        {"keep": "last"},
        {"batched": True},
        {"trace": False},
        {"max_steps": jnp.int32(2)},
        {"max_steps": np.arange(len(x)) % 4},
    ):
        got = solve(cell, params, z0, x, solver=solver, **how)
        wanted = deq.fixed_point(cell, params, z0, x, solver=solver, **how)
        assert (got.stats.trace is None) == ("trace" in how)
        assert_close((got.value, got.stats), (wanted.value, wanted.stats))
    with pytest.raises(ValueError, match=r"batched=False; wanted a z0 with a batch axis"):
        solve(cell, params, z0[0], x[0], solver=solver, batched=False)
    half = lambda params, z, x: 0.5 * z + x  # noqa: E731
    with pytest.raises(ValueError, match="batched"):
        solve(half, None, jnp.zeros(8), jnp.ones(8), solver=solver)
    numbers = solve(half, None, jnp.zeros(8), jnp.ones(8), solver=solver, batched=True)
    assert numbers.stats.num_steps.shape == (8,)


@pytest.mark.parametrize("probes", [1, 2])
def test_solve_and_penalty_sum_the_gradient_over_the_devices_once(probes):
    """Of parameters and of what all samples share, though the penalty stands in a conditional."""
    mesh = parallel.make_mesh(jax.devices()[:4])
    solver = deq.Picard(tol=1e-6, max_steps=30)
    rng = np.random.default_rng(0)
    w, bias = (jnp.asarray(0.1 * rng.normal(size=s), jnp.float32) for s in ((6, 6), (1, 6)))
    x = jnp.asarray(rng.normal(size=(8, 6)), jnp.float32)

    def f(w, z, x):
        return jnp.tanh(z @ w + x["own"] + x["all"])

    def loss(shared, x, penalise, solve):
        w, bias = shared
        z0, operands = jnp.zeros_like(x), {"own": x, "all": bias}
        sol = solve(f, w, z0, operands, solver=solver)
        at = sol.at if sol.equation else (f, w, sol.value, operands)
        key = jax.random.key(3)
        penalty = jax.lax.cond(
            penalise,
            lambda: deq.frobenius_penalty(*at, key=key, probes=probes),
            lambda: jnp.float32(0),
        )
        return (sol.value**2).mean() + penalty

    solve = parallel.sharded_fixed_point(mesh, {"own": 0, "all": None})
    placed = jax.device_put(x, parallel.batch_sharding(mesh))
    step = jax.jit(functools.partial(jax.value_and_grad(loss), solve=solve))
    for penalise in (True, False):
        got = step((w, bias), placed, penalise)
        wanted = jax.value_and_grad(loss)((w, bias), x, penalise, deq.fixed_point)
        assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    program = step.lower((w, bias), placed, True)
    assert program.as_text().count("all_reduce") == 2
    assert not {c.place for c in collectives(program.compile().as_text())} & set(LOOPS)


def test_a_transformer_says_what_of_its_operands_is_split():
    """Of a single stream on each device, with masks and without: positions are shared."""
    mesh = parallel.make_mesh(jax.devices()[:2])
    solver = deq.Picard(tol=1e-12, max_steps=3)

    def build(solve):
        return DEQTransformer(
            vocab=AdaptiveEmbedding(vocab=20, features=8),
            cell=TransformerCell(features=8, heads=2, hidden=8, dropout=0.2),
            memory=3,
            solver=solver,
            adjoint=deq.Unroll(4),
            fixed_point=solve,
        )

    sharded = build(parallel.sharded_fixed_point(mesh, TransformerCell.x_axes))
    words = jnp.arange(8).reshape(2, 4)
    memory = sharded.empty_memory(2)
    init = functools.partial(sharded.init, train=False, max_steps=0)
    shapes = jax.eval_shape(init, jax.random.key(0), words, words, memory)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: jnp.asarray(0.3 * rng.normal(size=a.shape), a.dtype), shapes)

    def gradient(model, train=True):
        def loss(params):
            rngs = {"dropout": jax.random.key(1)}
            return model.apply(params, words, words, memory, train=train, rngs=rngs)[0][0].mean()

        return jax.jit(jax.grad(loss))

    assert_close(gradient(sharded)(params), gradient(build(deq.fixed_point))(params))
    jax.eval_shape(gradient(sharded, train=False), params)  # without masks it is split, too
    with pytest.raises(ValueError, match=r"x\[0\]\.r of shape"):
        jax.eval_shape(gradient(build(parallel.sharded_fixed_point(mesh))), params)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "prose"])
def test_no_collective_stands_in_a_loop_of_a_real_training_step(name, tmp_path):
    """Forward and backward solve, penalty, stem, head, softmax: the whole compiled step."""
    mesh = parallel.make_mesh()
    if name == "digits":
        from test_experiments import digits

        from experiments.image_classification.task import build_task

        config = digits(tmp_path)
        model = dataclasses.replace(config.model, channels=(4,), head=(2,))
        config = dataclasses.replace(config, model=model, jac=JacConfig(gamma=0.5, prob=0.5))
        task = build_task(config, mesh)
        rng = np.random.default_rng(0)
        batch = {
            "image": rng.normal(size=(16, 8, 8, 1)).astype(np.float32),
            "label": np.zeros(16, np.int32),
            "mask": np.ones(16, np.float32),
        }
    else:
        from test_language import prose

        from experiments.language_modeling.task import build_task

        config = prose(tmp_path, **{"train.batch_size": 8, "data.eval_batch_size": 8})
        config = dataclasses.replace(config, jac=JacConfig(gamma=0.5, prob=0.5))
        task = build_task(config, mesh)
        words = np.zeros((8, 4), np.int32)
        ones = np.ones(8, np.float32)
        batch = {"words": words, "targets": words, "weight": np.ones((8, 4), np.float32)}
        batch |= {"fresh": ones, "mask": ones}
    optimizer = make_optimizer(config.optim, 10)
    state = abstract_state(task, optimizer, mesh)
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
