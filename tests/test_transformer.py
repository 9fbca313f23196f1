"""The DEQ-Transformer: positions, memory, causality, masks, gradients, its explicit rivals."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deq_jax as deq
from deq_jax import linen
from deq_jax.models.embeddings import AdaptiveEmbedding
from deq_jax.models.transformer import DEQTransformer, ExplicitTransformer
from deq_jax.models.transformer_cell import (
    Injection,
    Memory,
    TransformerCell,
    positions,
    relative_shift,
    visible,
)

VOCAB, C, H, M = 30, 8, 2, 4
TIGHT = deq.Picard(tol=1e-14, max_steps=400)  # the weights make f contract


def build(kind=DEQTransformer, memory=M, cell=None, dropout=0.0, **how):
    options = {"features": C, "heads": H, "hidden": 12} | (cell or {})
    if kind is DEQTransformer:
        how = {"solver": TIGHT} | how
    return kind(
        vocab=AdaptiveEmbedding(
            vocab=VOCAB, features=C, cutoffs=(10,), div_val=2,
            init_weights=jax.nn.initializers.normal(0.5),
        ),
        cell=TransformerCell(**options),
        memory=memory,
        dropout=dropout,
        init_weights=jax.nn.initializers.normal(0.3),
        **how,
    )  # fmt: skip


def wide(tree):
    return jax.tree.map(
        lambda a: jnp.asarray(a, jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree
    )


@functools.cache
def weights(tied=None, layers=3):
    """Float32 weights of a contractive cell, the same for every model of a kind.

    Not drawn by the model's own initialisers, which would have to be compiled.
    """
    kind = {} if tied is None else {"tied": tied, "layers": layers}
    model = build(DEQTransformer if tied is None else ExplicitTransformer, **kind)
    text = jnp.zeros((1, 2), jnp.int32)
    how = {"max_steps": 0} if tied is None else {}
    init = functools.partial(model.init, train=False, **how)
    shapes = jax.eval_shape(init, jax.random.key(0), text, text, model.empty_memory(1))
    rng = np.random.default_rng(0)  # of twelve seeds tried, with which f contracts most

    def draw(path, leaf):
        _, module, *_, name = (entry.key for entry in path)
        if name == "g":  # the length of a column of v, as below
            return np.full(leaf.shape, 3**-0.5, np.float32)
        # The stronger the injection, the less the normalised state is left to itself.
        size = {"vocab": 0.5, "inject": 1.2}.get(module, 0.1)
        size = (3 * leaf.shape[-2]) ** -0.5 if name == "v" else 0.1 if "bias" in name else size
        return (size * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def text(batch=2, length=8, seed=0):
    words = np.random.default_rng(seed).integers(0, VOCAB, (batch, length + 1))
    return jnp.asarray(words[:, :-1], jnp.int32), jnp.asarray(words[:, 1:], jnp.int32)


def reader(model, variables=None, **how):
    """Reads (words, targets, memory): likelihoods, next memory, and the solution of a DEQ."""
    variables = wide(weights()) if variables is None else variables
    run = jax.jit(functools.partial(model.apply, train=False, **how))

    def read(words, targets, memory):
        output = run(variables, words, targets, wide(memory))
        if isinstance(model, ExplicitTransformer):
            return (*output, None)
        return (*output[0], output[1])

    return read


@functools.cache
def whole_text(pre_norm=False, window=None):
    """Likelihoods and equilibria of a text of twelve words, read at once."""
    words, targets = text(length=12)
    model = build(memory=0, cell={"pre_norm": pre_norm, "window": window})
    nll, _, solution = reader(model)(words, targets, model.empty_memory(2))
    return jax.device_get((nll, solution.value))


def test_positions_are_those_of_the_formula(x64):
    table = np.asarray(positions(5, 6, jnp.float64))[0]
    for row, distance in enumerate([4, 3, 2, 1, 0]):
        for i in range(3):
            angle = distance / 10_000 ** (2 * i / 6)
            assert table[row, i] == pytest.approx(np.sin(angle), abs=1e-15)
            assert table[row, 3 + i] == pytest.approx(np.cos(angle), abs=1e-15)


@pytest.mark.parametrize(("queries", "keys"), [(3, 3), (3, 7), (1, 4)])
def test_relative_shift_against_a_loop(queries, keys):
    scores = np.random.default_rng(0).normal(size=(2, 3, queries, keys)).astype(np.float32)
    shifted = np.asarray(relative_shift(jnp.asarray(scores)))
    for i in range(queries):
        for j in range(keys - queries + i + 1):  # those that the query may see
            distance = keys - queries + i - j
            np.testing.assert_array_equal(shifted[..., i, j], scores[..., i, keys - 1 - distance])


@pytest.mark.parametrize("window", [None, 1, 3])
def test_visible_against_a_loop(window):
    filled = jnp.array([0, 2, 4])
    seen = np.asarray(visible(3, 7, filled, window))
    for b, held in enumerate([0, 2, 4]):
        for i in range(3):
            for j in range(7):
                distance = 4 + i - j
                wanted = distance >= 0 and j >= 4 - held
                wanted = wanted and (window is None or distance < window)
                assert seen[b, 0, i, j] == wanted


@pytest.mark.parametrize("pre_norm", [False, True])
def test_a_word_does_not_see_what_follows_nor_other_streams_nor_an_empty_memory(pre_norm, x64):
    model = build(cell={"pre_norm": pre_norm})
    read, (words, targets) = reader(model), text()
    rng = np.random.default_rng(1)
    z, u = (rng.normal(size=a.shape) for a in (model.empty_memory(2).z, model.empty_memory(2).u))
    memory = dataclasses.replace(model.empty_memory(2), z=z, u=u, filled=np.array([0, M]))
    before = np.asarray(read(words, targets, memory)[0])

    after = read(words.at[:, 5].set((words[:, 5] + 1) % VOCAB), targets, memory)[0]
    np.testing.assert_allclose(before[:, :5], after[:, :5], atol=1e-10)
    assert (np.abs(before - after)[:, 5:] > 1e-6).any(axis=1).all()

    other = dataclasses.replace(memory, z=z * [[[1.0]], [[-1.0]]])
    after = read(words.at[1].set((words[1] + 1) % VOCAB), targets, other)[0]
    np.testing.assert_allclose(before[0], after[0], atol=1e-10)
    assert (np.abs(before - after)[1] > 1e-6).any()

    junk = dataclasses.replace(memory, z=z + [[[7.0]], [[0.0]]], u=u - [[[3.0]], [[0.0]]])
    np.testing.assert_allclose(before, read(words, targets, junk)[0], atol=1e-10)


@pytest.mark.parametrize(("pre_norm", "window"), [(False, None), (True, 3)])
def test_segments_with_memory_are_one_long_text(pre_norm, window, x64):
    """The equilibria of a text do not depend on how it is cut, as far as the memory reaches."""
    words, targets = text(length=12)
    whole, value = whole_text(pre_norm, window)
    model = build(memory=12, cell={"pre_norm": pre_norm, "window": window})
    read, memory, parts = reader(model), model.empty_memory(2), []
    for begin in range(0, 12, 4):
        part = slice(begin, begin + 4)
        nll, memory, _ = read(words[:, part], targets[:, part], memory)
        parts.append(nll)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-9)
    np.testing.assert_allclose(memory.z, value, atol=1e-9)
    assert memory.filled.tolist() == [12, 12]


def test_no_gradient_reaches_the_memory():
    model, (words, targets) = build(solver=deq.Anderson(max_steps=5)), text()
    memory = model.empty_memory(2)
    memory = dataclasses.replace(memory, filled=jnp.array([M, M]))
    variables = jax.tree.map(jnp.asarray, weights())
    gradient = jax.grad(
        lambda m: model.apply(variables, words, targets, m, train=False)[0][0].sum(), allow_int=True
    )
    grads = jax.jit(gradient)(memory)
    assert not np.any(grads.z) and not np.any(grads.u)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_implicit_gradients_are_quotients_of_differences(pre_norm, x64):
    """Along one direction for each of the weights."""
    words, targets = text(length=5)
    memory = wide(build().empty_memory(2))
    rng = np.random.default_rng(1)
    memory = dataclasses.replace(
        memory,
        z=jnp.asarray(rng.normal(size=memory.z.shape)),
        u=jnp.asarray(rng.normal(size=memory.u.shape)),
        filled=jnp.array([M, 2]),
    )
    model = build(cell={"pre_norm": pre_norm})

    @jax.jit
    @jax.value_and_grad
    def loss(variables):
        return model.apply(variables, words, targets, memory, train=False)[0][0].mean()

    leaves, treedef = jax.tree.flatten(wide(weights()))
    gradient = treedef.flatten_up_to(loss(treedef.unflatten(leaves))[1])
    for i, leaf in enumerate(leaves):
        along = rng.normal(size=leaf.shape)
        ends = [
            loss(treedef.unflatten([*leaves[:i], leaf + step * along, *leaves[i + 1 :]]))[0]
            for step in (1e-5, -1e-5)
        ]
        slope = np.vdot(gradient[i], along)
        limit = 1e-6 * max(1, np.abs(gradient[i]).max())
        np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-5, atol=limit)
        assert slope != 0


def test_explicit_layers_are_applications_of_the_cell(x64):
    """Tied layers without memory are the warm-up network, and equal untied ones the same."""
    words, targets = text(length=5)
    params = wide(weights(True))["params"]
    thrice = jax.tree.map(lambda a: jnp.stack([a] * 3), params["stack"])
    stacks = weights(False)["params"]["stack"]
    assert jax.tree.map(jnp.shape, thrice) == jax.tree.map(jnp.shape, stacks)

    def nll(model, params, **how):
        return reader(model, {"params": params}, **how)(words, targets, model.empty_memory(2))[0]

    tied, untied = (
        build(ExplicitTransformer, memory=0, tied=same, layers=3) for same in (True, False)
    )
    wanted = nll(tied, params)
    np.testing.assert_allclose(nll(untied, params | {"stack": thrice}), wanted, atol=1e-12)
    others = {name: params[name] for name in ("vocab", "inject")}
    unrolled = build(memory=0, adjoint=deq.Unroll(3))
    found = nll(unrolled, others | {"equilibrium": {"f": params["stack"]}}, max_steps=0)
    np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_explicit_layers_remember_what_each_of_them_was_given(x64):
    """Segments with memory are one long text here too: layer by layer."""
    words, targets = text(length=8)
    model, whole = build(ExplicitTransformer, memory=8, layers=3), build(
        ExplicitTransformer, memory=0, layers=3
    )  # fmt: skip
    variables = wide(weights(False))
    wanted = reader(whole, variables)(words, targets, whole.empty_memory(2))[0]
    read = reader(model, variables)
    first, memory, _ = read(words[:, :4], targets[:, :4], model.empty_memory(2))
    second, *_ = read(words[:, 4:], targets[:, 4:], memory)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), wanted, atol=1e-11)
    assert memory.z.shape == (2, 3, 8, C)


def test_dropout_is_one_mask_for_all_positions():
    cell = TransformerCell(features=C, heads=H, hidden=12, dropout=0.5, attention_dropout=0.25)
    model = build(cell={"dropout": 0.5, "attention_dropout": 0.25}, dropout=0.5)
    z = jnp.zeros((2, 5, C))
    x = type("X", (), {"memory": model.empty_memory(2)})()
    masks = cell.masks(jax.random.key(0), z, x)
    shapes = {name: mask.shape for name, mask in masks.items()}
    assert shapes == {
        "attention": (2, H, 5, 5 + M),
        "attention_out": (2, 1, C),
        "hidden": (2, 1, 12),
        "out": (2, 1, C),
    }
    assert set(np.unique(masks["hidden"])) <= {0.0, 2.0}
    assert TransformerCell(features=C, heads=H, hidden=12).masks(jax.random.key(0), z, x) == {}

    words, targets = text()
    solver = deq.Anderson(tol=1e-3, max_steps=60)
    how = {"dropout": 0.1, "attention_dropout": 0.05}
    small = build(cell=how, dropout=0.1, solver=solver)
    run = jax.jit(functools.partial(small.apply, train=True))
    memory = small.empty_memory(2)
    outputs = [
        run(weights(), words, targets, memory, rngs={"dropout": jax.random.key(k)})
        for k in (0, 0, 1)
    ]
    nll = [np.asarray(output[0]) for output, _ in outputs]
    np.testing.assert_array_equal(nll[0], nll[1])
    assert np.abs(nll[0] - nll[2]).max() > 1e-3
    # A solve with masks converges: f is the same function at every step.
    assert all(solution.stats.converged.all() for _, solution in outputs)


def test_a_word_at_a_time_is_the_whole_text(x64):
    """What generation relies on."""
    words, _ = text(length=12)
    model, variables = build(memory=8), wide(weights())
    memory = wide(model.empty_memory(2))
    step = jax.jit(lambda w, m: model.apply(variables, w, m, method="next_word"))
    for i in range(5):
        log_probs, memory = step(words[:, i : i + 1], memory)
    np.testing.assert_allclose(memory.z[:, -5:], whole_text()[1][:, :5], atol=1e-9)
    assert np.exp(log_probs).sum(axis=-1) == pytest.approx(np.ones(2))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_parts_of_the_feed_forward_layer_are_the_whole_in_less_memory(dropout):
    """The value, and the penalty's gradient, which is one of second order."""
    cell = TransformerCell(features=C, heads=H, hidden=1024, dropout=dropout)
    rng = np.random.default_rng(0)
    z, u, memory = (jnp.asarray(rng.normal(size=(2, 32, c)), jnp.float32) for c in (C, 3 * C, C))
    held = Memory(z=memory, u=u[..., C:], filled=jnp.array([32, 5]))
    x = Injection(u=u, memory=held, positions=positions(64, C))
    init = jax.eval_shape(lambda key: cell.init(key, z, x, method=linen.once), jax.random.key(0))
    params = jax.tree.map(lambda a: jnp.asarray(0.3 * rng.normal(size=a.shape), a.dtype), init)
    masks = cell.masks(jax.random.key(1), z, x)

    def measured(parts):
        own = cell.clone(hidden_parts=parts)

        def f(params, z, x):
            return own.apply(params, z, x, masks, method=linen.once)

        def penalty(params):
            return deq.frobenius_penalty(f, params, z, x, key=jax.random.key(2)), f(params, z, x)

        step = jax.jit(jax.grad(penalty, has_aux=True)).lower(params).compile()
        return step(params), step.memory_analysis().temp_size_in_bytes

    (wanted, most), (got, less) = measured(1), measured(16)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))
    assert less < most / 2
    parts = functools.partial(cell.clone(hidden_parts=16).init, method=linen.once)
    assert jax.tree.structure(jax.eval_shape(parts, jax.random.key(0), z, x)) == jax.tree.structure(
        params
    )


def test_settings_that_do_not_fit_are_refused():
    for change, message in (
        ({"features": 9}, "features must be even and divide by the heads"),
        ({"heads": 3}, "features must be even and divide by the heads"),
        ({"hidden": 0}, "hidden must be at least 1"),
        ({"window": 0}, "window must be at least 1, or None"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"hidden_parts": 5}, "hidden_parts must divide hidden=12, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            build(cell=change)
    words = jnp.zeros((1, 2), jnp.int32)
    for model, message in (
        (build(memory=-1), "memory must be at least 0"),
        (build(ExplicitTransformer, layers=0), "layers must be at least 1"),
        (build(cell={"features": 16}), "got an embedding of 8 features for a cell of 16"),
    ):
        with pytest.raises(ValueError, match=message):
            memory = build().empty_memory(1)
            model.init(jax.random.key(0), words, words, memory, train=False)


def test_positions_in_bfloat16_are_those_of_float32_rounded():
    low, exact = positions(600, 64, jnp.bfloat16), positions(600, 64)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_array_equal(low, exact.astype(jnp.bfloat16))
    assert len(np.unique(np.asarray(low[0], np.float32), axis=0)) == 600


def test_attention_in_bfloat16_is_normalised_in_float32():
    cell = TransformerCell(features=C, heads=H, hidden=12)
    text = jnp.zeros((1, 3), jnp.int32)
    model = build(cell={"hidden": 12})
    memory = model.empty_memory(1)
    x = Injection(u=jnp.ones((1, 3, 3 * C)), memory=memory, positions=positions(3 + M, C))
    z = jnp.ones((*text.shape, C))
    init = functools.partial(cell.init, method=linen.once)
    params = jax.eval_shape(init, jax.random.key(0), z, x)

    def low(tree):
        half = lambda a: a.update(dtype=jnp.bfloat16) if a.dtype == jnp.float32 else a  # noqa: E731
        return jax.tree.map(half, jax.tree.map(jax.typeof, tree))

    run = functools.partial(cell.apply, method=linen.once)
    program = jax.make_jaxpr(run)(low(params), low(z), low(x))
    exps = re.findall(r":(\w+)\[[\d,]*\] = exp ", str(program))
    assert exps == ["f32"]
    assert [a.dtype for a in program.out_avals] == [jnp.bfloat16]
