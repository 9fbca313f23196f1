"""Layers and models: values and gradients against plain operations, shapes, gradients."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import deq_jax as deq
from deq_jax import data, models
from deq_jax.models import layers, mlp


def plain_conv(x, kernel, strides):
    """What conv2d must equal, with every gradient by JAX's own rules."""
    pads = [((k - 1) // 2, k // 2) for k in kernel.shape[:2]]
    return lax.conv_general_dilated(
        x, kernel, (strides, strides), pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


CASES = [
    # size, window, strides
    ((8, 8), 3, 1),
    ((7, 9), 3, 1),
    ((8, 8), 3, 2),
    ((7, 9), 3, 2),
    ((7, 5), 5, 2),
    ((6, 6), 1, 1),
    ((7, 8), 1, 2),
    ((5, 5), 2, 1),
    ((7, 7), 3, 3),
]


@pytest.fixture(params=CASES, ids=lambda c: f"{c[0][0]}x{c[0][1]}-k{c[1]}-s{c[2]}")
def conv_case(request):
    size, window, strides = request.param
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(size=(2, *size, 3)))
        kernel = jnp.asarray(rng.normal(size=(window, window, 3, 4)))
        yield x, kernel, strides


def test_conv_value_and_first_gradients(conv_case):
    x, kernel, strides = conv_case
    ours, pull = jax.vjp(lambda x, k: layers.conv2d(x, k, strides=strides), x, kernel)
    theirs, plain_pull = jax.vjp(lambda x, k: plain_conv(x, k, strides), x, kernel)
    assert ours.dtype == jnp.float64
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=ours.shape))
    for a, b in zip(pull(cotangent), plain_pull(cotangent), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_conv_second_order(conv_case):
    """The gradient of a squared vjp, which is what the Jacobian penalty asks for."""
    x, kernel, strides = conv_case
    probe = jnp.asarray(np.random.default_rng(2).normal(size=plain_conv(x, kernel, strides).shape))

    def penalty(conv, x, kernel):
        def two_layers(x):
            return jnp.tanh(conv(jnp.sin(x), kernel, strides))

        return jnp.sum(jax.vjp(two_layers, x)[1](probe)[0] ** 2)

    def our_conv(x, kernel, strides):
        return layers.conv2d(x, kernel, strides=strides)

    ours = jax.grad(lambda x, k: penalty(our_conv, x, k), (0, 1))
    theirs = jax.grad(lambda x, k: penalty(plain_conv, x, k), (0, 1))
    for a, b in zip(ours(x, kernel), theirs(x, kernel), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


def test_conv_third_order():
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(size=(1, 5, 5, 2)))
        kernel = jnp.asarray(rng.normal(size=(3, 3, 2, 2)))

        def nested(conv):
            first = jax.grad(lambda x: jnp.sum(jnp.sin(conv(x, kernel, 2))))
            second = jax.grad(lambda x: jnp.sum(first(x) ** 2))
            return jax.grad(lambda x: jnp.sum(second(x) ** 2))(x)

        ours = nested(lambda x, k, s: layers.conv2d(x, k, strides=s))
        np.testing.assert_allclose(ours, nested(plain_conv), rtol=1e-10, atol=1e-10)


def test_conv_and_group_norm_in_forward_mode(conv_case):
    """They refused: a custom_vjp has no jvp."""
    x, kernel, strides = conv_case
    rng = np.random.default_rng(4)
    d_x, d_kernel = (jnp.asarray(rng.normal(size=a.shape)) for a in (x, kernel))

    def by_hand(x):
        mean, var = (m(x, axis=(1, 2), keepdims=True) for m in (jnp.mean, jnp.var))
        return (x - mean) / jnp.sqrt(var + 1e-5)

    def net(conv, norm):
        return lambda x, k: norm(jnp.tanh(conv(jnp.sin(x), k, strides)))

    ours = net(lambda x, k, s: layers.conv2d(x, k, strides=s), lambda y: layers.group_norm(y, 4))
    theirs = net(plain_conv, by_hand)

    def orders(f):
        loss = lambda x, k: jnp.sum(jnp.sin(3 * f(x, k)))  # noqa: E731
        forward = jax.jvp(f, (x, kernel), (d_x, d_kernel))
        mixed = jax.jvp(jax.grad(loss, (0, 1)), (x, kernel), (d_x, d_kernel))
        back = jax.grad(lambda *a: jnp.sum(jax.jvp(loss, a, (d_x, d_kernel))[1]), (0, 1))(x, kernel)
        many = jax.vmap(lambda d: jax.jvp(f, (x, kernel), (d, d_kernel))[1])(jnp.stack([d_x, x]))
        each = jax.vmap(lambda x, k: f(x, k))(jnp.stack([x, d_x]), jnp.stack([kernel, d_kernel]))
        return forward, mixed, back, many, each

    for a, b in zip(jax.tree.leaves(orders(ours)), jax.tree.leaves(orders(theirs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_conv_in_shard_map_and_on_a_mesh(kind):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.normal(size=(8, 6, 6, 2)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 2, 3)), jnp.float32)
    whole, split = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("data")

    def net(x, kernel):
        return jnp.tanh(layers.conv2d(x, kernel))

    gradient = jax.grad(lambda net, *a: jnp.sum(net(*a) ** 2), (1, 2))
    wanted = gradient(net, x, kernel)
    mapped = jax.shard_map(net, mesh=mesh, in_specs=(split, whole), out_specs=split)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, split))
        # Over Explicit axes XLA's own kernel gradient wants an out_sharding: shard_map alone.
        nets = (net, mapped) if kind == jax.sharding.AxisType.Auto else (mapped,)
        results = [jax.jit(lambda *a, f=f: gradient(f, *a))(placed, kernel) for f in nets]
    for result in results:
        for a, b in zip(result, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_conv_gradients_keep_the_layout():
    """No convolution of a second-order gradient leaves NHWC / HWIO, the layout fast in loops."""
    x, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 4))

    def penalty(x, kernel):
        out, pull = jax.vjp(lambda x: layers.conv2d(jnp.sin(x), kernel, strides=2), x)
        return jnp.sum(pull(out)[0] ** 2)

    text = jax.jit(jax.grad(penalty, (0, 1))).lower(x, kernel).as_text()
    found = re.findall(r"dim_numbers = (.*?->\[.*?\])", text)
    assert len(found) >= 5 and set(found) == {"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"}


@pytest.mark.parametrize(
    ("x", "kernel", "strides", "words"),
    [
        ((2, 3, 8, 8), (3, 3, 3, 4), 1, "NHWC|NCHW"),
        ((8, 8, 3), (3, 3, 3, 4), 1, "wanted"),
        ((2, 8, 8, 3), (3, 3, 3, 4), 0, "strides=0"),
    ],
)
def test_conv_refuses(x, kernel, strides, words):
    with pytest.raises(ValueError, match=words):
        layers.conv2d(jnp.ones(x), jnp.ones(kernel), strides=strides)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_group_norm_by_hand(groups):
    rng = np.random.default_rng(0)
    x = rng.normal(3.0, 2.0, size=(3, 4, 5, 6))
    scale, bias = rng.normal(size=6), rng.normal(size=6)
    with jax.enable_x64(True):
        ours = layers.group_norm(
            jnp.asarray(x), groups, jnp.asarray(scale), jnp.asarray(bias), eps=1e-5
        )
        assert ours.dtype == jnp.float64
    wanted = np.empty_like(x)
    width = 6 // groups
    for b in range(3):
        for g in range(groups):
            part = x[b, :, :, g * width : (g + 1) * width]
            wanted[b, :, :, g * width : (g + 1) * width] = (part - part.mean()) / np.sqrt(
                part.var() + 1e-5
            )
    np.testing.assert_allclose(ours, wanted * scale + bias, rtol=1e-10, atol=1e-10)


def test_group_norm_large_mean_and_low_precision():
    """A mean of 1000 standard deviations does not eat the variance; bfloat16 stays bfloat16."""
    x = 1000.0 + jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    assert abs(float(jnp.std(layers.group_norm(x, 2))) - 1) < 0.01
    low = layers.group_norm(jnp.ones((2, 4, 4, 4), jnp.bfloat16), 2)
    assert low.dtype == jnp.bfloat16 and bool(jnp.isfinite(low).all())


def test_group_norm_refuses():
    with pytest.raises(ValueError, match="groups=3 for 8 channels"):
        layers.group_norm(jnp.ones((1, 2, 2, 8)), 3)


def test_batch_norm_is_flax_s_but_for_the_unbiased_running_variance():
    x = jnp.asarray(np.random.default_rng(0).normal(2, 3, size=(3, 4, 5, 6)), jnp.float32)
    ours = layers.BatchNorm(momentum=0.3)
    theirs = nn.BatchNorm(use_running_average=False, momentum=0.7, epsilon=1e-5)
    variables = ours.init(jax.random.key(0), x, train=True)
    y, new = ours.apply(variables, x, train=True, mutable=["batch_stats"])
    wanted, stats = theirs.apply(variables, x, mutable=["batch_stats"])
    np.testing.assert_allclose(y, wanted, atol=2e-5)
    np.testing.assert_allclose(new["batch_stats"]["mean"], stats["batch_stats"]["mean"], rtol=1e-5)
    unbiased = 0.7 + 0.3 * np.var(x, axis=(0, 1, 2), ddof=1)
    np.testing.assert_allclose(new["batch_stats"]["var"], unbiased, rtol=1e-5)
    still = ours.apply({**variables, **new}, x, train=False)
    row = (1, 1, 1, 6)
    mean, var = (new["batch_stats"][k].reshape(row) for k in ("mean", "var"))
    np.testing.assert_allclose(still, (x - mean) / jnp.sqrt(var + 1e-5), rtol=1e-4, atol=1e-5)


def test_resizing():
    x = jnp.arange(12.0).reshape(1, 3, 4, 1)
    np.testing.assert_array_equal(
        layers.upsample_nearest(x, 2)[0, :, :, 0],
        np.repeat(np.repeat(np.arange(12.0).reshape(3, 4), 2, 0), 2, 1),
    )
    aligned = layers.resize_bilinear(x, (5, 7), align_corners=True)[0, :, :, 0]
    # x is linear in both directions: so is its interpolation, corner to corner.
    wanted = np.linspace(0, 8, 5)[:, None] + np.linspace(0, 3, 7)[None]
    np.testing.assert_allclose(aligned, wanted, atol=1e-5)
    centred = layers.resize_bilinear(x, (3, 8))[0, 0, :, 0]
    np.testing.assert_allclose(centred, [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3], atol=1e-6)


def start(model, images):
    return jax.jit(lambda key: model.init(key, images, train=False))(jax.random.key(0))


@pytest.mark.parametrize("activation", [jnp.tanh, jax.nn.relu, mlp.hard_tanh, mlp.identity])
def test_mlp_deq(activation):
    model = mlp.MLPDEQ(
        outputs=3, width=16, solver=deq.Anderson(tol=1e-5, max_steps=60), activation=activation
    )
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)
    variables = start(model, x)
    out, solution = jax.jit(lambda v: model.apply(v, x, train=False))(variables)
    assert out.shape == (5, 3) and bool(solution.stats.converged.all())
    kernel = variables["params"]["equilibrium"]["f"]["kernel"]
    injected = x @ variables["params"]["encoder"]["kernel"]
    image = activation(solution.value @ kernel + injected)
    np.testing.assert_allclose(image, solution.value, atol=1e-4)


def test_toy_cell_is_the_formula_of_the_paper():
    cell = mlp.ToyCell(7)
    z, x = jnp.array([[0.3], [-1.0]]), jnp.array([[1.0], [0.5]])
    out, variables = cell.init_with_output(jax.random.key(0), z, x)
    p = jax.tree.map(np.asarray, variables["params"])
    hidden = z @ p["W1"]["kernel"] + x @ p["U"]["kernel"] + p["bias"]
    np.testing.assert_allclose(out, np.maximum(hidden, 0) @ p["W2"]["kernel"], rtol=1e-5)
    assert np.abs(p["W1"]["kernel"]).max() <= 1 and np.abs(p["W2"]["kernel"]).max() <= 7**-0.5


def test_scalar_deq_predicts_its_equilibrium():
    model = mlp.ScalarDEQ(solver=deq.Broyden(tol=1e-5, max_steps=20))
    x = jnp.linspace(-2, 2, 9)[:, None]
    variables = start(model, x)
    out, solution = jax.jit(lambda v: model.apply(v, x, train=False))(variables)
    assert jnp.array_equal(out, solution.value) and out.shape == (9, 1)


def test_every_model_and_cell_is_exported():
    for name in models.__all__:
        assert getattr(models, name).__doc__, name
    own = {"Stem", "Block", "Down", "Up", "After", "Bottleneck", "ResidualBlock"}
    for file in Path(models.__path__[0]).glob("[!_]*.py"):
        module = importlib.import_module(f"deq_jax.models.{file.stem}")
        for name, value in vars(module).items():
            if inspect.isclass(value) and issubclass(value, nn.Module) and name not in own:
                if value.__module__ == module.__name__ != layers.__name__ and name[0] != "_":
                    assert name in models.__all__, f"{module.__name__}.{name}"


def test_sources_are_exported_and_import_light():
    heavy = "grain tensorflow_datasets tensorflow datasets sklearn PIL"
    code = (
        "import sys, deq_jax.data as data\n"
        "assert all(hasattr(data, name) for name in data.__all__)\n"
        f"print([name for name in {heavy.split()} if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr
    assert {"digits", "open_tfds", "Fields", "regression", "prose", "Labelled"} <= set(data.__all__)
