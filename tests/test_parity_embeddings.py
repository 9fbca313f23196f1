"""Adaptive embedding and softmax against arrays recorded from the published PyTorch code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorded import recorded

from deq_jax.models.embeddings import AdaptiveEmbedding


def build(arrays):
    cutoffs = tuple(int(cut) for cut in arrays["cutoffs"])
    return AdaptiveEmbedding(
        vocab=int(arrays["n_token"]),
        features=int(arrays["d_proj"]),
        embed=int(arrays["d_embed"]),
        cutoffs=cutoffs,
        div_val=int(arrays["div_val"]),
        tie_weights=False,  # embedding and softmax were recorded apart
        tie_projections=(False,) * (len(cutoffs) + 1),
    )


def tree(net, arrays, embedding, softmax, dtype):
    """Recorded weights or gradients under our names; one table for all clusters is cut."""
    edges, params = (0, *net.cutoffs, net.vocab), {}

    def part(name, i):
        if f"{name}.{i}.weight" not in arrays and i > 0 and net.div_val == 1:
            return None
        return arrays.get(f"{name}.{i}.weight")

    for i, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
        for prefix, name, ours in (
            (embedding, "emb_layers", "table"),
            (softmax, "out_layers", "out_table"),
        ):
            whole = arrays[f"{prefix}/{name}.0.weight"]
            own = part(f"{prefix}/{name}", i)
            params[f"{ours}{i}"] = whole[low:high] if net.div_val == 1 else own
        bias = arrays.get(f"{softmax}/out_layers.{i}.bias")
        if net.div_val == 1:
            bias = arrays[f"{softmax}/out_layers.0.bias"][low:high]
        params[f"bias{i}"] = bias
        for prefix, name, ours in (
            (embedding, "emb_projs", "projection"),
            (softmax, "out_projs", "out_projection"),
        ):
            projection = part(f"{prefix}/{name}", i)
            if projection is not None:
                params[f"{ours}{i}"] = projection.T
    if net.cutoffs:
        params["tails"] = arrays[f"{softmax}/cluster_weight"]
        params["tails_bias"] = arrays[f"{softmax}/cluster_bias"]
    return {name: jnp.asarray(array, dtype) for name, array in params.items()}


def check(case, dtype, tolerance):
    arrays = recorded(f"adaptive_{case}")
    net = build(arrays)
    params = tree(net, arrays, "emb", "crit", dtype)
    words, targets = (jnp.asarray(arrays[name], jnp.int32) for name in ("tokens", "target"))
    shapes = jax.eval_shape(lambda k: net.init(k, words, method="everything"), jax.random.key(0))
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes["params"])

    def close(ours, theirs, name=""):
        theirs = np.asarray(theirs)
        atol = tolerance * max(np.abs(theirs).max(), 1)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol, err_msg=name)

    hidden = jnp.asarray(arrays["hidden"], dtype)

    @jax.jit
    def run(params, hidden):
        embedded, pull = jax.vjp(lambda p: net.apply({"params": p}, words), params)
        (first,) = pull(jnp.asarray(arrays["embed_gout"], dtype))
        nll, pull = jax.vjp(
            lambda p, h: net.apply({"params": p}, h, targets, method="nll"), params, hidden
        )
        second, d_hidden = pull(jnp.asarray(arrays["nll_gout"], dtype))
        log_probs = net.apply({"params": params}, hidden[:5], method="log_probs")
        return embedded, nll, log_probs, d_hidden, jax.tree.map(jnp.add, first, second)

    embedded, nll, log_probs, d_hidden, grads = run(params, hidden)
    close(embedded, arrays["embed"])
    close(nll, arrays["nll"])
    close(log_probs, arrays["logprob_first5"])
    close(d_hidden, arrays["nll_grad_hidden"])
    # With div_val 1 the recorded gradient of the one table is cut as the table is.
    wanted = tree(net, arrays, "emb_grad", "crit_grad", dtype)
    for name, theirs in wanted.items():
        close(grads[name], theirs, name)


@pytest.mark.parametrize("case", ["div2", "div1_proj", "nocut"])
def test_embedding_softmax_and_their_gradients(case, x64):
    check(case, np.float64, 1e-13)


@pytest.mark.parametrize("case", ["div2", "div1_proj", "nocut"])
def test_in_float32(case):
    check(case, np.float32, 1e-5)
