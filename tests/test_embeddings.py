"""Adaptive embedding and softmax: probabilities, gradients, cost; the chunked cross-entropy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax.models import embeddings
from deq_jax.models.embeddings import AdaptiveEmbedding
from deq_jax.models.softmax import linear_nll
from deq_jax.training.parallel import batch_sharding, make_mesh, sharded_map

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
    wide = jax.nn.initializers.normal(0.5)
    return AdaptiveEmbedding(vocab=40, features=8, init_weights=wide, **KINDS[kind], **how)


def drawn(net, seed=0):
    words = jax.random.randint(jax.random.key(seed), (8, 6), 0, 40)
    hidden = jax.random.normal(jax.random.key(seed + 1), (8, 6, 8))
    params = jax.jit(lambda key: net.init(key, words, method="everything"))(jax.random.key(2))
    # Biases start at zero, where a forgotten one would not show.
    params = jax.tree.map(lambda a: a + 0.1 * jnp.sin(jnp.arange(a.size)).reshape(a.shape), params)
    return params, hidden, words


@pytest.mark.parametrize("kind", KINDS)
def test_likelihoods_are_those_of_a_distribution(kind):
    net = vocab(kind)
    params, hidden, words = drawn(net)
    log_probs = jax.jit(lambda p, h: net.apply(p, h, method="log_probs"))(params, hidden)
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=-1), 1, rtol=1e-5)
    wanted = -np.take_along_axis(np.asarray(log_probs), np.asarray(words)[..., None], axis=-1)
    nll = jax.jit(lambda p, h: net.apply(p, h, words, method="nll"))(params, hidden)
    np.testing.assert_allclose(nll, wanted[..., 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "seen"),
    [*((kind, "all") for kind in KINDS), ("tails", "shortlist"), ("tails", "last tail")],
)
def test_gradients_are_those_of_the_whole_matrix(kind, seen, x64):
    """Also of texts without a word of some cluster."""
    net = vocab(kind)
    params, hidden, words = drawn(net)
    low, high = {"all": (0, 40), "shortlist": (0, 5), "last tail": (12, 40)}[seen]
    words = low + words % (high - low)
    weight = jnp.cos(jnp.arange(48.0)).reshape(8, 6)

    def sparse(params, hidden):
        return (weight * net.apply(params, hidden, words, method="nll")).sum()

    def dense(params, hidden):
        log_probs = net.apply(params, hidden, method="log_probs")
        return -(weight * jnp.take_along_axis(log_probs, words[..., None], axis=-1)[..., 0]).sum()

    ours = jax.jit(jax.value_and_grad(sparse, argnums=(0, 1)))(params, hidden)
    theirs = jax.jit(jax.value_and_grad(dense, argnums=(0, 1)))(params, hidden)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-10)


@pytest.mark.parametrize(
    ("start", "stop", "chunk"), [(0, 50, 7), (3, 20, 4), (10, 10, 8), (0, 50, 64)]
)
def test_chunks_are_the_whole(start, stop, chunk, x64):
    rng = np.random.default_rng(0)
    hidden, table = jnp.asarray(rng.normal(size=(50, 6))), jnp.asarray(rng.normal(size=(30, 6)))
    bias, labels = jnp.asarray(rng.normal(size=30)), jnp.asarray(rng.integers(0, 30, 50))
    labels = jnp.where((jnp.arange(50) >= start) & (jnp.arange(50) < stop), labels, -9)
    weight = jnp.asarray(rng.normal(size=50))

    def chunked(hidden, table, bias):
        ends = jnp.int32(start), jnp.int32(stop)
        return (weight * linear_nll(hidden, table, bias, labels, *ends, chunk=chunk)).sum()

    def plain(hidden, table, bias):
        log_probs = jax.nn.log_softmax(hidden @ table.T + bias[None])[start:stop]
        picked = jnp.take_along_axis(log_probs, labels[start:stop, None], axis=1)[:, 0]
        return -(weight[start:stop] * picked).sum()

    operands = hidden, table, bias
    ours = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1, 2)))(*operands)
    theirs = jax.value_and_grad(plain, argnums=(0, 1, 2))(*operands)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-11)


def test_bfloat16_is_summed_in_float32():
    rng = np.random.default_rng(0)
    hidden, table = (jnp.asarray(rng.normal(size=(20, 64)), jnp.bfloat16) for _ in range(2))
    bias, labels = jnp.zeros(20, jnp.bfloat16), jnp.arange(20)

    def loss(hidden, table):
        return linear_nll(hidden, table, bias, labels, chunk=8).sum()

    nll = linear_nll(hidden, table, bias, labels, chunk=8)
    exact = hidden.astype(jnp.float32), table.astype(jnp.float32)
    wanted = linear_nll(*exact, jnp.zeros(20), labels)
    assert nll.dtype == jnp.float32
    np.testing.assert_allclose(nll, wanted, rtol=1e-5)
    assert [g.dtype for g in jax.grad(loss, argnums=(0, 1))(hidden, table)] == [jnp.bfloat16] * 2


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("chunk", [8, 64])
def test_hidden_and_table_may_have_different_dtypes(dtypes, chunk):
    rng = np.random.default_rng(0)
    hidden, table = (jnp.asarray(rng.normal(size=(20, 8)), dtype) for dtype in dtypes)
    bias, labels = jnp.zeros(20, table.dtype), jnp.arange(20)

    def gradients(*operands):
        nll = lambda *operands: linear_nll(*operands, labels, chunk=chunk).sum()  # noqa: E731
        return jax.jit(jax.value_and_grad(nll, argnums=(0, 1, 2)))(*operands)

    value, grads = gradients(hidden, table, bias)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), (hidden, table, bias))
    wanted, exact = gradients(*wide)
    assert float(value) == pytest.approx(float(wanted), rel=1e-5)
    for got, near, operand in zip(grads, exact, (hidden, table, bias), strict=True):
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
    alone, split = vocab(), vocab(per_device=sharded_map(mesh))
    params, hidden, words = drawn(alone)

    def loss(net, params, hidden, words):
        return net.apply(params, hidden, words, method="nll").mean()

    wanted = jax.value_and_grad(functools.partial(loss, alone), argnums=(0, 1))(
        params, hidden, words
    )
    step = jax.jit(jax.value_and_grad(functools.partial(loss, split), argnums=(0, 1)))
    placed = [jax.device_put(a, batch_sharding(mesh)) for a in (hidden, words)]
    ours = step(params, *placed)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    text = step.lower(params, *placed).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text


def test_sharded_map_sums_gradients_of_shared_operands():
    mesh = make_mesh()
    x = jnp.arange(16.0)
    double = sharded_map(mesh)(lambda w, x: w["a"] * x)
    value, grad = jax.value_and_grad(lambda w: double(w, x).sum())({"a": jnp.float32(2)})
    assert value == 240 and grad["a"] == 120


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
