"""The multiscale DEQ: its equation, gradients, masks, batch statistics, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors
from flax import linen as nn

import deq_jax as deq
from deq_jax.models import layers
from deq_jax.models.heads import ClassificationHead, SegmentationHead
from deq_jax.models.mdeq import MDEQ, Stem
from deq_jax.models.mdeq_cell import WEIGHT_NORM, MDEQCell
from deq_jax.training.parallel import batch_sharding, make_mesh, sharded_fixed_point

IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 3)), jnp.float32)
SMALL = nn.initializers.normal(0.02)  # contracts


def classifier(channels=(4, 8), solver=None, adjoint=None, fixed_point=deq.fixed_point, **cell):
    settings = {"expansion": 2, "groups": 2, "kernel_init": SMALL} | cell
    return MDEQ(
        cell=MDEQCell(channels=channels, **settings),
        head=ClassificationHead(classes=5, widths=(2,) * len(channels), final=6),
        solver=solver or deq.Picard(tol=1e-5, max_steps=200),
        adjoint=adjoint,
        fixed_point=fixed_point,
        reparam=None,
    )


def start(model, images=IMAGES):
    """Weights under which f contracts: the injection outweighs the state, fine outweighs coarse.

    Not drawn by the model's own initialisers, which would have to be compiled.
    """
    shapes = jax.eval_shape(lambda key: model.init(key, images, train=False), jax.random.key(0))
    rng = np.random.default_rng(0)

    sizes = {"stem": 0.01, "equilibrium": 0.02, "head": 0.3}

    def draw(path, leaf):
        _, module, *_, name = (entry.key for entry in path)
        if name == "kernel":
            return sizes[module] * rng.normal(size=leaf.shape)
        return np.full(leaf.shape, 1.0 if name in ("scale", "var") else 0.0)

    variables = jax.tree_util.tree_map_with_path(draw, shapes)
    scales = {"branch0_block0": 4.0, "branch1_block0": 0.1, "fuse_1_0": 4.0, "fuse_0_1": 0.3}
    f = variables["params"]["equilibrium"]["f"]
    for module, scale in scales.items():
        name = (
            "norm2" if module.startswith("branch") else "norm0" if module == "fuse_1_0" else "norm"
        )
        f[module][name]["scale"] = scale * f[module][name]["scale"]
    # The stem's kernels start small, and the running statistics do not make up for it yet.
    variables["params"]["stem"]["norm2"]["scale"] *= 1000.0
    return jax.tree.map(lambda a: jnp.asarray(a, images.dtype), variables)


def test_the_solution_solves_the_equation_of_every_branch():
    model = classifier()
    variables = start(model)

    @jax.jit
    def apply(variables, images, budget):
        logits, solution = model.apply(variables, images, train=False, max_steps=budget)
        f, *operands = solution.at
        return logits, solution.value, solution.stats, f(*operands)

    logits, value, stats, images = apply(variables, IMAGES, 200)
    assert logits.shape == (4, 5)
    assert [z.shape for z in value] == [(4, 8, 8, 4), (4, 4, 4, 8)]
    assert bool(stats.converged.all())
    for image, branch in zip(images, value, strict=True):
        np.testing.assert_allclose(image, branch, atol=1e-3)
    assert apply(variables, IMAGES, 2)[2].num_steps.tolist() == [2] * 4
    # In evaluation an image does not see its neighbours.
    others, *_ = apply(variables, -2 * IMAGES.at[1].multiply(-0.5), 200)
    np.testing.assert_allclose(logits[1], others[1], atol=1e-3)
    assert (np.abs(logits - others).max(axis=1) > 1e-3).tolist() == [True, False, True, True]


def test_implicit_gradient_on_four_devices_is_the_unrolled_one_of_the_whole_batch():
    """Batch statistics too: batch norm stands outside the per-device solve."""
    with jax.enable_x64(True):
        images = jnp.asarray(IMAGES[:, :4, :4], jnp.float64)
        options = {"channels": (2, 4), "expansion": 1}
        options["solver"] = deq.Picard(tol=1e-12, max_steps=400)
        mesh = make_mesh(jax.devices()[:4])
        variables = start(classifier(**options), images)

        def gradient(images, max_steps, **how):
            model = classifier(**options, **how)

            def loss(params):
                (logits, _), new = model.apply(
                    {**variables, "params": params},
                    images,
                    train=True,
                    max_steps=max_steps,
                    mutable=["batch_stats"],
                    rngs={"dropout": jax.random.key(0)},
                )
                return jnp.sum(jnp.sin(logits)), new["batch_stats"]

            return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])

        split = jax.device_put(images, batch_sharding(mesh))
        ours = gradient(split, None, fixed_point=sharded_fixed_point(mesh))
        unrolled = gradient(images, 0, adjoint=deq.Unroll(400))
        largest = max(float(jnp.abs(a).max()) for a in jax.tree.leaves(ours[0]))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(unrolled), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9 * largest)
        assert jnp.abs(ours[0]["stem"]["conv1"]["kernel"]).max() > 1e-6 * largest


def test_dropout_is_drawn_in_training_only_and_for_every_block():
    cell = MDEQCell(channels=(4, 8), blocks=2, groups=2, dropout=0.5)
    z = (jnp.ones((2, 4, 4, 4)), jnp.ones((2, 2, 2, 8)))
    masks = cell.masks(jax.random.key(0), z, z[0])
    assert [[m.shape for m in row] for row in masks] == [[y.shape] * 2 for y in z]
    assert set(np.unique(masks[0][0])) == {0.0, 2.0}
    assert not np.array_equal(masks[0][0], masks[0][1])
    assert cell.clone(dropout=0.0).masks(jax.random.key(0), z, z[0]) is None

    model = classifier(dropout=0.5, solver=deq.Picard(tol=1e-6, max_steps=3))
    variables = start(model)

    @jax.jit
    def state(key):
        out = model.apply(
            variables, IMAGES, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
        )
        return out[0][1].value[1]

    one, two = jax.random.key(0), jax.random.key(1)
    assert jnp.array_equal(state(one), state(one))
    assert not jnp.allclose(state(one), state(two))
    jax.eval_shape(lambda: model.apply(variables, IMAGES, train=False))  # asks for no key


def test_a_model_that_drops_nothing_needs_no_key_for_it():
    def train(model):
        def scores(key):
            variables = model.init(key, IMAGES, train=False)
            return model.apply(variables, IMAGES, train=True, mutable=["batch_stats"])[0][0]

        return jax.eval_shape(scores, jax.random.key(0))

    assert train(classifier()).shape == (4, 5)
    with pytest.raises(errors.InvalidRngError, match="dropout"):
        train(classifier(dropout=0.5))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (layers.NORMAL, nn.initializers.normal(0.01)),
        (layers.UNIFORM, nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")),
        (layers.Conv(1).kernel_init, nn.initializers.he_normal()),
    ],
)
def test_kernels_drawn_as_matrices_are_those_of_flax(ours, theirs):
    key = jax.random.key(5)
    for shape in ((6, 5), (3, 3, 4, 6)):
        np.testing.assert_array_equal(ours(key, shape), theirs(key, shape))
    np.testing.assert_array_equal(layers.NORMAL(key, (7,)), nn.initializers.normal(0.01)(key, (7,)))


@pytest.mark.parametrize("channels", [(8,), (4, 8, 8)])
def test_any_number_of_branches(channels):
    big = (2,) + (1,) * (len(channels) - 1)
    cell = MDEQCell(channels=channels, big_kernels=big, groups=2, post_affine=True, blocks=2)
    z = tuple(jnp.ones((1, 8 >> i, 8 >> i, c)) for i, c in enumerate(channels))
    shapes = jax.eval_shape(cell.init, jax.random.key(0), z, z[0])["params"]
    assert shapes["branch0_block0"]["conv2"]["kernel"].shape[:2] == (5, 5)
    assert shapes["post0"]["norm"]["scale"].shape == (channels[0],)
    if len(channels) > 1:
        assert shapes["branch1_block1"]["conv1"]["kernel"].shape[:2] == (5, 5)
        assert shapes["branch1_block1"]["conv2"]["kernel"].shape[:2] == (3, 3)
        assert set(shapes["fuse_2_0"]) == {"conv0", "norm0", "conv1", "norm1"}
    out = jax.eval_shape(lambda p: cell.apply({"params": p}, z, z[0]), shapes)
    assert [y.shape for y in out] == [y.shape for y in z]


def test_blocks_computed_again_give_the_same_in_less_memory():
    """The penalty's gradient, which is one of second order."""
    cell = MDEQCell(channels=(8, 16), dropout=0.2)
    rng = np.random.default_rng(0)
    z = tuple(
        jnp.asarray(rng.normal(size=(4, 16 >> i, 16 >> i, 8 << i)), jnp.float32) for i in range(2)
    )
    init = jax.eval_shape(lambda key: cell.init(key, z, z[0]), jax.random.key(0))
    params = jax.tree.map(lambda a: jnp.asarray(0.3 * rng.normal(size=a.shape), a.dtype), init)
    masks = cell.masks(jax.random.key(1), z, z[0])

    def measured(remat):
        own = cell.clone(remat=remat)

        def penalty(params):
            def f(params, z, x):
                return own.apply(params, z, x, masks)

            return deq.frobenius_penalty(f, params, z, z[0], key=jax.random.key(2))

        step = jax.jit(jax.value_and_grad(penalty)).lower(params).compile()
        return step(params), step.memory_analysis().temp_size_in_bytes

    (wanted, most), (got, less) = measured(False), measured(True)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(b).max()))
    assert less < 0.9 * most


def test_weight_norm_is_where_the_published_model_has_it():
    cell = MDEQCell(channels=(4, 8), groups=2)
    z = (jnp.ones((1, 4, 4, 4)), jnp.ones((1, 2, 2, 8)))
    split = jax.eval_shape(
        lambda key: WEIGHT_NORM.split(cell.init(key, z, z[0])["params"]), jax.random.key(0)
    )
    pairs = {
        f"{module}/{layer}"
        for module, parts in split.items()
        for layer, part in parts.items()
        if isinstance(part.get("kernel"), dict)
    }
    blocks = {f"branch{i}_block0/conv{k}" for i in (0, 1) for k in (1, 2)}
    assert pairs == blocks | {"post0/conv", "post1/conv"}


def test_stem_halves_and_injects():
    for downsample, size in ((0, 8), (1, 4), (2, 2)):
        stem = Stem(4, downsample, inject=downsample > 0)
        shape = jax.eval_shape(
            lambda k, stem=stem: stem.init_with_output(k, IMAGES, train=False), jax.random.key(0)
        )
        assert shape[0].shape == (4, size, size, 4)
        assert ("inject" in shape[1]["params"]) == (downsample > 0)


def test_segmentation_head_scores_every_pixel():
    z = (jnp.ones((2, 8, 4, 4)), jnp.ones((2, 4, 2, 8)))
    shape = jax.eval_shape(
        lambda k: SegmentationHead(11).init_with_output(k, z, train=True), jax.random.key(0)
    )
    assert shape[0].shape == (2, 8, 4, 11)
    assert shape[1]["params"]["merge"]["kernel"].shape == (1, 1, 12, 12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": ()}, "channels must be one number"),
        ({"channels": (8, 12)}, "groups must divide"),
        ({"channels": (8, 8), "big_kernels": (1,)}, "each of the 2 branches"),
        ({"channels": (8,), "big_kernels": (3,)}, "big_kernels must be 0, 1 or 2"),
        ({"channels": (8,), "dropout": 1.0}, "dropout must be in"),
        ({"channels": (8,), "expansion": 0}, "expansion and blocks"),
    ],
)
def test_cells_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MDEQCell(**settings)


def test_models_that_do_not_fit_are_refused():
    model = classifier(channels=(4, 4, 4, 4, 4))
    with pytest.raises(ValueError, match="got images of 8 x 8; wanted both sides to divide by 16"):
        jax.eval_shape(lambda k: model.init(k, IMAGES, train=False), jax.random.key(0))
    model = classifier().clone(head=ClassificationHead(classes=5, widths=(2,), final=6))
    with pytest.raises(ValueError, match="one number for each of the 2 branches"):
        jax.eval_shape(lambda k: model.init(k, IMAGES, train=False), jax.random.key(0))
    model = classifier().clone(downsample=3)
    with pytest.raises(ValueError, match="downsample must be 0, 1 or 2, got 3"):
        jax.eval_shape(lambda k: model.init(k, IMAGES, train=False), jax.random.key(0))


@pytest.fixture(params=["cpu", "cuda", "default"])
def platform(request, monkeypatch):
    """Takes the branches of a CPU, of a GPU, or of platforms without their own, on this one."""

    def choose(*operands, default, **branches):
        return branches.get(request.param, default)(*operands)

    monkeypatch.setattr(jax.lax, "platform_dependent", choose)
    return request.param


@pytest.mark.parametrize(("size", "window", "strides"), [((7, 9), 3, 1), ((7, 8), 2, 3)])
def test_convolutions_have_one_gradient_on_all_platforms(platform, x64, size, window, strides):
    """The second derivatives, too: of a squared gradient, as in the Jacobian penalty."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, *size, 3), jnp.float64)
    kernel = jax.random.normal(keys[1], (window, window, 3, 4), jnp.float64)
    pads = [((window - 1) // 2, window // 2)] * 2

    def plain(x, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (strides,) * 2, pads, dimension_numbers=layout
        )

    def derivatives(conv, x, kernel):
        out, pull = jax.vjp(lambda *both: jnp.sin(conv(*both)), x, kernel)
        probe = jax.random.normal(keys[2], out.shape, out.dtype)

        def penalty(x, kernel):
            return jnp.sum(jax.vjp(lambda x: jnp.sin(conv(x, kernel)), x)[1](probe)[0] ** 2)

        return pull(probe), jax.grad(penalty, (0, 1))(x, kernel)

    def conv(x, kernel):
        return layers.conv2d(x, kernel, strides=strides)

    ours, wanted = (
        jax.jit(functools.partial(derivatives, which))(x, kernel) for which in (conv, plain)
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


HARD = {
    "normal": lambda x: x,
    "mean of 1000 deviations": lambda x: x + 1000,
    "sparse": lambda x: np.maximum(x - 1.5, 0),
    "channels apart": lambda x: 0.1 * x + 10 * x[:1, :1, :1],
    "constant": lambda x: np.full_like(x, 3.3),
    "an outlier in the middle": lambda x: x + 10 * (np.indices(x.shape)[1:3] == 8).all(axis=0),
}


def test_group_norm_keeps_its_digits_in_float32(platform):
    norm = jax.jit(lambda x: layers.group_norm(x, 4))
    for case, change in HARD.items():
        x = change(np.random.default_rng(0).normal(size=(3, 16, 16, 32))).astype(np.float32)
        # Rounding of x itself, seen after the division by the deviation.
        spread = float(np.std(x, (1, 2)).mean()) or 1.0
        wide = np.asarray(x, np.float64).reshape(3, 256, 4, 8)
        wanted = wide - wide.mean((1, 3), keepdims=True)
        wanted /= np.sqrt(wide.var((1, 3), keepdims=True) + 1e-5)
        ours = norm(x)
        assert ours.dtype == jnp.float32
        limit = 1e-5 + 2e-7 * float(np.abs(x).max()) / spread
        np.testing.assert_allclose(
            ours, wanted.reshape(x.shape), atol=limit, rtol=limit, err_msg=case
        )


def test_group_norm_in_both_modes_to_second_order(platform, x64):
    """Forward mode against a quotient of differences, reverse mode against forward mode."""
    x, u, v = np.random.default_rng(0).normal(size=(3, 2, 3, 3, 8))

    def f(x):
        return jnp.sin(layers.group_norm(x, 2))

    def along(x):
        return jax.jvp(f, (x,), (u,))[1]

    @jax.jit
    def derivatives(x):
        backward = jax.grad(lambda x: jnp.vdot(v, along(x)))(x)
        return f(x), along(x), jax.vjp(f, x)[1](v)[0], jax.jvp(along, (x,), (v,))[1], backward

    step = 1e-6
    _, first, pulled, second, backward = map(np.asarray, derivatives(x))
    differences = (derivatives(x + step * u)[0] - derivatives(x - step * u)[0]) / (2 * step)
    np.testing.assert_allclose(first, differences, rtol=1e-6, atol=1e-8)
    assert np.isclose(np.vdot(v, first), np.vdot(pulled, u), rtol=1e-12)
    differences = (derivatives(x + step * v)[1] - derivatives(x - step * v)[1]) / (2 * step)
    np.testing.assert_allclose(second, differences, rtol=1e-6, atol=1e-7)
    assert np.isclose(np.vdot(v, differences), np.vdot(backward, v), rtol=1e-6)


def test_group_norm_spreads_its_means_without_a_gather():
    def norm(x):
        return layers.group_norm(x, 4)

    text = jax.jit(jax.grad(lambda x: norm(x).sum())).lower(jnp.ones((2, 4, 4, 8))).as_text()
    assert "reduce" in text and not any(word in text for word in ("gather", "scatter", "cumsum"))
