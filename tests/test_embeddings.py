"""Adaptive embedding and softmax: probabilities, gradients, cost; the chunked cross-entropy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax.models import embeddings
from deq_jax.models.embeddings import AdaptiveEmbedding
from deq_jax.models.softmax import linear_nll
from deq_jax.training.parallel import ShardedMap, batch_sharding, make_mesh

KINDS = {
    "tails": {"cutoffs": (5, 12), "div_val": 2},
    "one length": {"cutoffs": (5, 12), "embed": 6},
    "dense": {},
    "dense, projected": {"embed": 4},
    "untied": {
        "cutoffs": (5,), "div_val": 2, "tie_weights": False, "tie_projections": (True, False),
    },
}  # fmt: skip


def vocab(kind="tails", **how):
    return AdaptiveEmbedding(vocab=40, features=8, **KINDS[kind], **how)


def drawn(net, dtype=np.float32):
    rng = np.random.default_rng(0)
    words, hidden = rng.integers(0, 40, (8, 6)), rng.normal(size=(8, 6, 8)).astype(dtype)
    init = functools.partial(net.init, method="everything")
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.asarray(words, jnp.int32))
    # Biases start at zero, where a forgotten one would not show.
    params = jax.tree.map(lambda a: 0.5 * rng.normal(size=a.shape).astype(dtype), shapes)
    return params, hidden, words.astype(np.int32)


def log_probs_by_hand(net, params, hidden):
    """All of them, by the formula, in complex numbers too."""
    params, out = params["params"], "table" if net.tie_weights else "out_table"
    table, bias = params[f"{out}0"], params["bias0"]

    def scored(i, table, bias):
        shared = f"projection{i if net.div_val > 1 else 0}"
        own = params.get(f"out_projection{i}", params.get(shared))
        scores = (hidden if own is None else hidden @ own.T) @ table.T + bias
        return scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))

    if len(net.sizes) > 1:
        table = np.concatenate([table, params["tails"]])
        bias = np.concatenate([bias, params["tails_bias"]])
    head = scored(0, table, bias)
    parts = [head[..., : net.sizes[0]]]
    for i in range(1, len(net.sizes)):
        parts.append(scored(i, params[f"{out}{i}"], params[f"bias{i}"]) + head[..., -i][..., None])
    return np.concatenate(parts, axis=-1)


def gradients_by_hand(net, params, hidden, words, weight):
    """Of the weighted sum of -log p, element by element: f(x + ih) = f(x) + ih f'(x)."""
    operands = jax.tree.map(lambda a: a.astype(np.complex128), (params, hidden))

    def loss():
        log_probs = log_probs_by_hand(net, *operands)
        return -(weight * np.take_along_axis(log_probs, words[..., None], axis=-1)[..., 0]).sum()

    def gradient(leaf):
        slopes = np.zeros(leaf.shape)
        for place in np.ndindex(leaf.shape):
            leaf[place] += 1e-30j
            slopes[place] = loss().imag / 1e-30
            leaf[place] -= 1e-30j
        return slopes

    return jax.tree.map(gradient, operands)


@pytest.mark.parametrize("kind", KINDS)
def test_likelihoods_and_gradients_are_those_of_the_whole_matrix(kind, x64):
    """Also of texts without a word of some cluster."""
    net = vocab(kind)
    params, hidden, words = drawn(net, np.float64)
    weight = np.cos(np.arange(48.0)).reshape(8, 6)

    @jax.jit
    def run(params, hidden, words):
        def loss(params, hidden):
            nll = net.apply(params, hidden, words, method="nll")
            return (weight * nll).sum(), nll

        (_, nll), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, hidden)
        return net.apply(params, hidden, method="log_probs"), nll, grads

    wanted = log_probs_by_hand(net, params, hidden)
    for low, high in ((0, 40), (0, 5), (12, 40)):  # all, the shortlist, the last tail
        seen = low + words % (high - low)
        log_probs, nll, grads = run(params, hidden, seen)
        np.testing.assert_allclose(np.exp(log_probs).sum(axis=-1), 1, rtol=1e-5)
        np.testing.assert_allclose(log_probs, wanted, atol=1e-10)
        picked = -np.take_along_axis(wanted, seen[..., None], axis=-1)[..., 0]
        np.testing.assert_allclose(nll, picked, atol=1e-10)
        exact = gradients_by_hand(net, params, hidden, seen, weight)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(exact), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-10)


def linear_by_hand(hidden, table, bias, labels, weight=1.0):
    """Likelihoods, and gradients of their weighted sum."""
    hidden, table, bias = (np.asarray(a).astype(np.float64) for a in (hidden, table, bias))
    shares = np.exp(hidden @ table.T + bias)
    shares /= shares.sum(axis=1, keepdims=True)
    hit = np.clip(labels, 0, None)[:, None] == np.arange(len(table))
    scores = (shares - hit) * np.broadcast_to(weight, len(hidden))[:, None]
    return -np.log(shares[hit]), (scores @ table, scores.T @ hidden, scores.sum(axis=0))


@functools.partial(jax.jit, static_argnames="chunk")
def linear(hidden, table, bias, labels, weight, *ends, chunk):
    def loss(*operands):
        nll = linear_nll(*operands, labels, *ends, chunk=chunk)
        return (weight * nll).sum(), nll

    (_, nll), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(hidden, table, bias)
    return nll, grads


@pytest.mark.parametrize("chunk", [7, 64])
def test_chunks_are_the_whole(chunk, x64):
    rng = np.random.default_rng(0)
    operands = rng.normal(size=(50, 6)), rng.normal(size=(30, 6)), rng.normal(size=30)
    labels, weight, row = rng.integers(0, 30, 50), rng.normal(size=50), np.arange(50)
    for start, stop in ((0, 50), (3, 20), (10, 10)):
        inside = (row >= start) & (row < stop)
        given, ends = np.where(inside, labels, -9), (np.int32(start), np.int32(stop))
        nll, grads = linear(*operands, given, weight, *ends, chunk=chunk)
        wanted, exact = linear_by_hand(*operands, given, weight * inside)
        np.testing.assert_allclose(nll, np.where(inside, wanted, 0), atol=1e-11)
        for a, b in zip(grads, exact, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-11)


def test_bfloat16_is_summed_in_float32():
    rng = np.random.default_rng(0)
    operands = [jnp.asarray(rng.normal(size=(20, 64)), jnp.bfloat16) for _ in range(2)]
    operands += [jnp.zeros(20, jnp.bfloat16), jnp.arange(20)]
    nll, grads = linear(*operands, 1.0, chunk=8)
    assert nll.dtype == jnp.float32
    np.testing.assert_allclose(nll, linear_by_hand(*operands)[0], rtol=1e-5)
    assert [g.dtype for g in grads] == [jnp.bfloat16] * 3


@pytest.mark.parametrize(
    ("dtypes", "chunk"),
    [(("float32", "bfloat16"), 8), (("bfloat16", "float32"), 8), (("bfloat16", "float32"), 64)],
)
def test_hidden_and_table_may_have_different_dtypes(dtypes, chunk):
    rng = np.random.default_rng(0)
    hidden, table = (jnp.asarray(rng.normal(size=(20, 8)), dtype) for dtype in dtypes)
    operands = hidden, table, jnp.zeros(20, table.dtype)
    nll, grads = linear(*operands, jnp.arange(20), 1.0, chunk=chunk)
    wanted, exact = linear_by_hand(*operands, np.arange(20))
    assert float(nll.sum()) == pytest.approx(wanted.sum(), rel=1e-5)
    for got, near, operand in zip(grads, exact, operands, strict=True):
        assert got.dtype == operand.dtype
        np.testing.assert_allclose(got.astype(jnp.float32), near, rtol=0.01, atol=0.01)


def test_no_matrix_of_positions_by_tail_words(monkeypatch):
    """The memory of a step is that of chunks, with and without tails."""
    monkeypatch.setattr(embeddings, "CHUNK", 2**16)
    rows, words = 2048, 32_768

    def temporary(whole=False, **kind):
        net = AdaptiveEmbedding(vocab=words, features=16, **kind)
        targets = jnp.zeros((1, rows), jnp.int32)
        params = jax.eval_shape(
            lambda key: net.init(key, targets, method="everything"), jax.random.key(0)
        )
        hidden = jax.ShapeDtypeStruct((1, rows, 16), jnp.float32)

        def loss(params, hidden, targets):
            if whole:
                return net.apply(params, hidden, method="log_probs")[..., 0].sum()
            return net.apply(params, hidden, targets, method="nll").sum()

        lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, hidden, targets)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    matrix = temporary(whole=True)
    assert matrix >= 4 * rows * words
    assert temporary(cutoffs=(512, 4096)) < matrix / 16
    assert temporary() < matrix / 2


def test_each_device_sorts_its_own_words():
    """Same numbers on eight devices, and nothing gathered for the sorting."""
    mesh = make_mesh()
    net = vocab(per_device=ShardedMap(mesh))
    params, hidden, words = drawn(net)

    def loss(params, hidden, words):
        return net.apply(params, hidden, words, method="nll").mean()

    placed = [jax.device_put(a, batch_sharding(mesh)) for a in (hidden, words)]
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(params, *placed).compile()
    value, grads = step(params, *placed)
    log_probs = log_probs_by_hand(net, params, hidden)
    wanted = -np.take_along_axis(log_probs, words[..., None], axis=-1).mean()
    np.testing.assert_allclose(value, wanted, atol=1e-5)
    exact = gradients_by_hand(net, params, hidden, words, 1 / words.size)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    text = step.as_text()
    assert "all-gather" not in text and "all-to-all" not in text


def test_the_table_is_summed_over_the_devices_once():
    """Looked up and scored with, it has two gradients."""
    mesh = make_mesh()
    net = vocab(per_device=ShardedMap(mesh))
    params, _, words = drawn(net)

    def loss(params, words):
        return net.apply(params, words, method="everything").mean()

    words = jax.device_put(words, batch_sharding(mesh))
    step = jax.jit(jax.value_and_grad(loss)).lower(params, words)
    value, grads = step.compile()(params, words)
    wanted = jax.value_and_grad(lambda p: vocab().apply(p, words, method="everything").mean())
    for a, b in zip(jax.tree.leaves((value, grads)), jax.tree.leaves(wanted(params)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    # One for each parameter, and one for the loss.
    assert step.as_text().count("all_reduce") == len(jax.tree.leaves(params))


def test_sharded_map_sums_gradients_of_shared_operands():
    devices = ShardedMap(make_mesh())
    x = jnp.arange(16.0)
    double = devices(lambda w, x: w["a"] * x)

    def loss(w):
        copies = devices.copies(w)
        return double(copies, x).sum() + double(copies, 2 * x).sum()

    value, grad = jax.value_and_grad(loss)({"a": jnp.float32(2)})
    assert value == 720 and grad["a"] == 360


def test_settings_that_do_not_fit_are_refused():
    for change, message in (
        ({"cutoffs": (20, 20)}, "cutoffs must rise between 0 and the 40 words"),
        ({"cutoffs": (50,)}, "cutoffs must rise between 0 and the 40 words"),
        ({"cutoffs": (5, 9), "div_val": 4}, "vectors of at least one number in every tail"),
        ({"cutoffs": (5,), "tie_projections": (True,)}, "one flag for each of 2 clusters"),
    ):
        with pytest.raises(ValueError, match=message):
            AdaptiveEmbedding(vocab=40, features=8, **change)
    net = vocab()
    params, hidden, words = drawn(net)
    with pytest.raises(ValueError, match=r"got hidden \(8, 6, 8\) for words \(8, 5\); wanted"):
        net.apply(params, hidden, words[:, :5], method="nll")
    with pytest.raises(ValueError, match=r"wanted \[N, D\], \[V, D\], \[V\], \[N\]"):
        linear_nll(hidden[0], hidden[0], jnp.zeros(3), words[0])
    with pytest.raises(ValueError, match="got chunk=0; wanted at least 1"):
        linear_nll(hidden[0], hidden[0], jnp.zeros(6), words[0], chunk=0)
