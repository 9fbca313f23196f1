"""The explicit networks: published sizes, one block by hand, batch statistics."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from deq_jax.models.resnet import ResidualBlock, ResNet


@pytest.mark.parametrize(
    ("depth", "published"), [(18, 11_689_512), (50, 25_557_032), (101, 44_549_160)]
)
def test_parameters_are_as_many_as_published(depth, published):
    model = ResNet(classes=1000, depth=depth)
    shapes = jax.eval_shape(
        lambda key: model.init(key, jnp.zeros((1, 64, 64, 3)), train=False), jax.random.key(0)
    )
    assert sum(math.prod(a.shape) for a in jax.tree.leaves(shapes["params"])) == published


@pytest.mark.parametrize(("stem", "sizes"), [("cifar", (16, 2)), ("imagenet", (4, 1))])
def test_stems_halve_or_not(stem, sizes):
    model = ResNet(classes=7, depth=18, stem=stem, width=4)
    _, kept = jax.eval_shape(
        lambda key: model.init_with_output(
            key, jnp.zeros((2, 16, 16, 3)), train=False, capture_intermediates=True
        ),
        jax.random.key(0),
    )
    seen = kept["intermediates"]
    assert seen["stage0_block0"]["__call__"][0].shape == (2, sizes[0], sizes[0], 4)
    assert seen["stage3_block1"]["__call__"][0].shape == (2, sizes[1], sizes[1], 32)
    assert seen["classifier"]["__call__"][0].shape == (2, 7)


@pytest.mark.parametrize("bottleneck", [False, True])
def test_a_block_by_hand(bottleneck):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 6, 6, 4)), jnp.float32)
    block = ResidualBlock(5, 2, bottleneck)
    variables = jax.jit(lambda key: block.init(key, x, train=False))(jax.random.key(0))
    params = jax.tree.map(lambda a: a + 0.1 * rng.normal(size=a.shape), variables["params"])
    variables = {**variables, "params": params}
    out, new = jax.jit(lambda v: block.apply(v, x, train=True, mutable=["batch_stats"]))(variables)

    def layer(y, name, norm, strides):
        kernel = params[name]["kernel"]
        pad = kernel.shape[0] // 2
        y = lax.conv_general_dilated(
            y, kernel, (strides,) * 2, [(pad, pad)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        y = np.asarray(y, np.float64)
        y = (y - y.mean((0, 1, 2))) / np.sqrt(y.var((0, 1, 2)) + 1e-5)
        scale, bias = (np.asarray(params[norm][k]) for k in ("scale", "bias"))
        return np.float32(y * scale + bias)

    strides = (1, 2, 1) if bottleneck else (2, 1)
    y = x
    for i, stride in enumerate(strides, 1):
        y = layer(np.maximum(y, 0) if i > 1 else y, f"conv{i}", f"norm{i}", stride)
    wanted = np.maximum(y + layer(x, "project", "project_norm", 2), 0)
    np.testing.assert_allclose(out, wanted, atol=2e-5)
    assert not np.allclose(new["batch_stats"]["norm1"]["mean"], 0)


def test_a_step_moves_the_statistics_and_evaluation_uses_them():
    x = jax.random.normal(jax.random.key(1), (4, 6, 6, 8))
    block = ResidualBlock(2, 1, True, momentum=0.3)
    variables = block.init(jax.random.key(0), x, train=False)
    stats = variables["batch_stats"]

    @jax.jit
    def step(params):
        def loss(params):
            variables = {"params": params, "batch_stats": stats}
            y, new = block.apply(variables, x, train=True, mutable=["batch_stats"])
            return (y**2).mean(), new["batch_stats"]

        return jax.grad(loss, has_aux=True)(params)

    grads, new = step(variables["params"])
    assert all(np.isfinite(g).all() and g.any() for g in jax.tree.leaves(grads))
    h = lax.dot_general(x, variables["params"]["conv1"]["kernel"][0, 0], (((3,), (0,)), ((), ())))
    rows = np.asarray(h).reshape(-1, 2)
    np.testing.assert_allclose(new["norm1"]["mean"], 0.3 * rows.mean(0), atol=1e-6)
    np.testing.assert_allclose(new["norm1"]["var"], 0.7 + 0.3 * rows.var(0, ddof=1), rtol=1e-5)
    assert "project" not in variables["params"]  # as many channels leave as enter

    @jax.jit
    def evaluate(stats, x):
        return block.apply({**variables, "batch_stats": stats}, x, train=False)

    # A sample alone and in a batch are the same, and the statistics matter.
    np.testing.assert_allclose(evaluate(new, x)[:1], evaluate(new, x[:1]), atol=1e-6)
    assert not np.allclose(evaluate(new, x), evaluate(stats, x))


def test_what_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"depth must be one of \[18, 50, 101\], got 34"):
        ResNet(classes=10, depth=34)
    with pytest.raises(ValueError, match='stem must be "cifar" or "imagenet"'):
        ResNet(classes=10, depth=18, stem="mnist")
