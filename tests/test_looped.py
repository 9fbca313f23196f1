"""The looped transformer: one block, as a network of loops and as a DEQ."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deq_jax as deq
from deq_jax.models import LoopedCell, LoopedTransformer

LOOPS = {
    "solver": deq.Picard(tol=1e-30, max_steps=6),
    "adjoint": deq.Backprop(),
    "keep": "last",
}
KINDS = {
    "sandwich": {},
    "post": {"norm": "post", "causal": True},
    "pre": {"norm": "pre", "recall": False},
    "window": {"window": 3},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def build(kind="sandwich", length=7, start="input", **how):
    cell = LoopedCell(8, heads=2, hidden=16, parent=None, **KINDS[kind])
    return LoopedTransformer(
        cell=cell, words=5, outputs=3, length=length, start=start, **(how or LOOPS)
    )


def words(batch=3, length=7, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 5, (batch, length)))


def draw(model, dtype=jnp.float64):
    drawn = jax.jit(lambda key: model.init(key, words(), train=False))(jax.random.key(0))
    return jax.tree.map(lambda a: a.astype(dtype), drawn["params"])


def norm(p, y):
    y = y - y.mean(-1, keepdims=True)
    return y / np.sqrt((y * y).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def block(p, z, x, kind):
    """The block once more, in NumPy, one position and one head at a time."""
    how = {"norm": "sandwich"} | KINDS[kind]
    y = z + x if how.get("recall", True) else z

    def attend(y):
        heads, size = 2, y.shape[-1] // 2
        q, k, v = np.split(y @ p["qkv"]["kernel"], 3, axis=-1)
        rows = []
        for t in range(y.shape[1]):
            first, last = 0, y.shape[1]
            if how.get("causal") or how.get("window"):
                last = t + 1
            if how.get("window"):
                first = t + 1 - how["window"]
            outputs = []
            for h in range(heads):
                part = slice(h * size, (h + 1) * size)
                zero = np.zeros_like(q[:, 0, part])
                keys = [k[:, s, part] if s >= 0 else zero for s in range(first, last)]
                values = [v[:, s, part] if s >= 0 else zero for s in range(first, last)]
                scores = np.stack([(q[:, t, part] * key).sum(-1) for key in keys]) / size**0.5
                weights = np.exp(scores - scores.max(0))
                weights = weights / weights.sum(0)
                outputs.append(sum(w[:, None] * u for w, u in zip(weights, values, strict=True)))
            rows.append(np.concatenate(outputs, -1))
        return np.stack(rows, 1) @ p["attend_out"]["kernel"]

    def mlp(y):
        hidden = y @ p["mlp_in"]["kernel"] + p["mlp_in"]["bias"]
        return np.maximum(hidden, 0) @ p["mlp_out"]["kernel"] + p["mlp_out"]["bias"]

    inside = {n: p.get(n) for n in ("norm_attend_in", "norm_mlp_in")}
    outside = {n: p.get(n) for n in ("norm_attend", "norm_mlp")}
    for name, part in (("attend", attend), ("mlp", mlp)):
        before, after = inside[f"norm_{name}_in"], outside[f"norm_{name}"]
        assert (before is None, after is None) == (how["norm"] == "post", how["norm"] == "pre")
        y = y + part(y if before is None else norm(before, y))
        y = y if after is None else norm(after, y)
    return y


@every_kind
def test_scores_and_gradients_are_those_of_a_loop_written_by_hand(x64, kind):
    model, read = build(kind), words(length=4)
    params = draw(model)

    def by_hand(params):
        x = params["embed"]["embedding"][read] + params["positions"][:4]
        z = x
        for _ in range(2):
            z = block(params["equilibrium"]["f"], z, x, kind)
        z = norm(params["norm_out"], z) if kind == "pre" else z
        return z @ params["readout"]["kernel"] + params["readout"]["bias"]

    def ours(params):
        scores = model.apply({"params": params}, read, train=True, max_steps=2)[0]
        return (
            scores * jnp.cos(jnp.arange(float(scores.size))).reshape(scores.shape)
        ).sum(), scores

    gradient, scores = jax.jit(jax.grad(ours, has_aux=True))(params)
    fixed = jax.tree.map(np.asarray, params)
    np.testing.assert_allclose(scores, by_hand(fixed), atol=1e-9)

    # Slopes along the direction of one leaf each, by central differences.
    leaves, tree = jax.tree.flatten(fixed)
    weights = np.cos(np.arange(scores.size)).reshape(scores.shape)
    draws = np.random.default_rng(0)
    for i, slope in enumerate(jax.tree.leaves(gradient)):
        direction = draws.standard_normal(slope.shape)

        def moved(step, i=i, direction=direction):
            there = [*leaves[:i], leaves[i] + step * direction, *leaves[i + 1 :]]
            return (by_hand(jax.tree.unflatten(tree, there)) * weights).sum()

        wanted = (moved(1e-5) - moved(-1e-5)) / 2e-5
        np.testing.assert_allclose((slope * direction).sum(), wanted, rtol=1e-6, atol=1e-7)


def test_every_sequence_may_run_its_own_number_of_loops(x64):
    model = build()
    params = draw(model)
    run = jax.jit(
        lambda loops: model.apply({"params": params}, words(), train=False, max_steps=loops)[0]
    )
    counts = jnp.array([1, 6, 3], jnp.int32)
    for i, count in enumerate(counts):
        np.testing.assert_allclose(run(counts)[i], run(count)[i], atol=1e-12)


def test_the_same_weights_are_a_looped_network_and_a_deq(x64):
    looped = build(solver=deq.Picard(tol=1e-30, max_steps=120), adjoint=deq.Backprop(), keep="last")
    params = draw(looped)
    f = params["equilibrium"]["f"]
    for layer in ("attend_out", "mlp_out"):  # a contraction
        f[layer]["kernel"] = 0.3 * f[layer]["kernel"]
    weights = jnp.cos(jnp.arange(63.0)).reshape(3, 7, 3)

    def gradient(model):
        def loss(params):
            scores, solution = model.apply({"params": params}, words(), train=True)
            return (scores * weights).sum(), solution

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    (wanted, _), by_loops = gradient(looped)
    method = deq.Anderson(tol=1e-11, max_steps=100)
    (got, solution), by_rule = gradient(build(solver=method))
    assert solution.stats.converged.all() and solution.stats.num_steps.max() < 60
    np.testing.assert_allclose(got, wanted, rtol=1e-8)
    for a, b in zip(jax.tree.leaves(by_rule), jax.tree.leaves(by_loops), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)


@pytest.mark.parametrize("kind", ["post", "window"])
def test_no_position_sees_a_later_one(kind):
    model = build(kind)
    params = draw(model, jnp.float32)
    run = jax.jit(lambda w: model.apply({"params": params}, w, train=False)[0])
    changed = words().at[:, 4].add(1) % 5
    before, after = run(words()), run(changed)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.abs(before[:, 4:] - after[:, 4:]).max(axis=(0, 2)).min() > 1e-4


def test_a_window_carries_so_many_positions_a_loop():
    model = build("window", length=0)
    params = draw(model, jnp.float32)
    long = words(length=30)
    run = jax.jit(
        lambda w, loops: model.apply({"params": params}, w, train=False, max_steps=loops)[0]
    )
    for loops in (1, 4):
        moved = np.abs(run(long, loops) - run(long.at[:, 5].add(1) % 5, loops)).max(axis=(0, 2)) > 0
        assert np.flatnonzero(moved).tolist() == list(range(5, 5 + 2 * loops + 1))
    same = run(jnp.ones((1, 30), int), 1)
    assert np.abs(same[0, 0] - same[0, 5]).max() > 1e-3  # the beginning can be told


def test_the_state_of_a_pre_norm_block_grows_with_the_loops_and_others_do_not():
    for kind, grows in (("pre", True), ("post", False), ("sandwich", False)):
        model = build(kind, solver=deq.Picard(tol=1e-30, max_steps=64), keep="last")
        params = draw(model, jnp.float32)
        few, many = (jnp.sqrt(jnp.square(reach(model, params, n)).mean()) for n in (8, 64))
        assert (many > 4 * few) == grows
        assert grows or max(few, many) < 2


def reach(model, params, loops=0, **how):
    """The state after so many loops."""
    run = jax.jit(lambda n, z0, key: model.apply(
        {"params": params}, words(), train=how.get("train", False), max_steps=n, z0=z0,
        rngs={"dropout": key},
    )[1].value)  # fmt: skip
    return np.asarray(run(jnp.int32(loops), how.get("z0"), jax.random.key(how.get("seed", 0))))


def test_starts():
    params = draw(build(start="learned"), jnp.float32)
    learned = reach(build(start="learned"), params)
    np.testing.assert_array_equal(learned, np.broadcast_to(params["start"], learned.shape))
    assert not reach(build(start="zero"), params).any()
    noisy = build(start="noise")
    np.testing.assert_array_equal(reach(noisy, params), reach(noisy, params, seed=1))
    one, other = (reach(noisy, params, seed=seed, train=True) for seed in (1, 2))
    assert np.abs(one - other).max() > 0.1
    x = params["embed"]["embedding"][words()] + params["positions"][None]
    np.testing.assert_allclose(reach(build(), params), x, atol=1e-6)
    given = jnp.full_like(x, 0.5)
    np.testing.assert_array_equal(reach(build(), params, z0=given), given)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 3}, "got 3 heads for 8 features; wanted a divisor"),
        ({"norm": "inside"}, "got norm='inside'; wanted one of sandwich, post, pre"),
        ({"window": 0}, "got window=0; wanted at least 1 position"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    cell = dataclasses.replace(LoopedCell(8, heads=2, hidden=16), **settings)
    with pytest.raises(ValueError, match=message):
        cell.init(jax.random.key(0), jnp.ones((1, 2, 8)), jnp.ones((1, 2, 8)))


def test_inputs_that_do_not_fit():
    with pytest.raises(ValueError, match="got an input of 7 words; wanted at most length=4"):
        build(length=4).init(jax.random.key(0), words(), train=False)
    with pytest.raises(ValueError, match="got start='far'; wanted one of input, zero"):
        build(start="far").init(jax.random.key(0), words(), train=False)
