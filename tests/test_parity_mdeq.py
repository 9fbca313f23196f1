"""The multiscale DEQ against arrays recorded from the published PyTorch code.

Weights come in through `deq_jax.convert.mdeq`, and so do recorded gradients: a gradient is laid out
as its weight is.
"""

import functools
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deq_jax as deq
from deq_jax.convert.mdeq import convert_state
from deq_jax.models.heads import ClassificationHead
from deq_jax.models.mdeq import MDEQ, Stem
from deq_jax.models.mdeq_cell import WEIGHT_NORM, MDEQCell

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not REFERENCE.exists(), reason="no recorded arrays beside the project"),
]

PARTS = {
    "tiny": (
        MDEQCell(channels=(24, 24)),
        ClassificationHead(classes=10, widths=(8, 16), final=200),
    ),
    "largeq": (
        MDEQCell(channels=(8, 16, 32, 64)),
        ClassificationHead(classes=10, widths=(4, 7, 14, 28), final=210),
    ),
}
ROUNDING = 1e-12
STORED_IN_FLOAT32 = 1e-7  # the larger arrays


@functools.cache
def recorded(name):
    with np.load(REFERENCE / f"mdeq_{name}.npz") as arrays:
        return dict(arrays)


def weights(name, dtype=np.float64):
    params, stats = convert_state(recorded(f"{name}_weights"))[:2]
    cast = functools.partial(jax.tree.map, lambda a: jnp.asarray(a, dtype))
    return cast(params), cast(stats)


def images(array, dtype=np.float64):
    """NCHW to NHWC."""
    return jnp.asarray(np.asarray(array, dtype).transpose(0, 2, 3, 1))


def state(flat, dtype=np.float64):
    """[N, D, 1] of TINY, branches one after the other, C, H, W-major, to a state."""
    fine = 24 * 32 * 32
    parts = flat[:, :fine, 0].reshape(-1, 24, 32, 32), flat[:, fine:, 0].reshape(-1, 24, 16, 16)
    return tuple(images(part, dtype) for part in parts)


def close(ours, theirs, tolerance):
    """To a share of the largest element."""
    theirs = np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def exactness(array):
    return ROUNDING if array.dtype == np.float64 else STORED_IN_FLOAT32


def close_trees(ours, theirs, tolerance, floor):
    """Leaf by leaf, to a share of its largest element, or of `floor` times that of all leaves.

    Lengths and biases before a normalisation have gradients that are cancellation and rounding.
    """
    ours = {jax.tree_util.keystr(p): a for p, a in jax.tree_util.tree_leaves_with_path(ours)}
    theirs = jax.tree_util.tree_leaves_with_path(theirs)
    largest = max(np.abs(a).max() for _, a in theirs)
    assert len(ours) == len(theirs)
    for path, a in theirs:
        name = jax.tree_util.keystr(path)
        scale = max(np.abs(a).max(), floor * largest)
        np.testing.assert_allclose(ours[name], a, rtol=0, atol=tolerance * scale, err_msg=name)


@pytest.mark.parametrize("name", PARTS)
def test_the_converted_tree_is_that_of_the_model(name):
    cell, head = PARTS[name]
    model = MDEQ(cell=cell, head=head, solver=deq.Broyden())
    wanted = jax.eval_shape(
        lambda key: model.init(key, jnp.zeros((1, 32, 32, 3)), train=False), jax.random.key(0)
    )
    params, stats = convert_state(recorded(f"{name}_weights"))[:2]
    shapes = jax.tree.map(np.shape, {"params": params, "batch_stats": stats})
    assert shapes == jax.tree.map(lambda a: a.shape, wanted)


@pytest.mark.parametrize("name", PARTS)
def test_stem_and_head(name, x64):
    cell, head = PARTS[name]
    params, stats = weights(name)
    arrays = recorded(f"{name}_parts")
    x = images(arrays["x"])
    small = len(cell.channels) == 2
    stem = Stem(cell.channels[0], inject=not small)
    variables = {"params": params["stem"], "batch_stats": stats["stem"]}
    for train in (False, True):
        wanted = arrays[f"{'train' if train else 'eval'}/{'stem' if small else 'inject0'}"] if (
            small or not train
        ) else None  # fmt: skip
        apply = jax.jit(
            lambda v, x, train=train: stem.apply(v, x, train=train, mutable=["batch_stats"])
        )
        out, new = apply(variables, x)
        if wanted is not None:
            close(out.transpose(0, 3, 1, 2), wanted, exactness(wanted))
    for ours, theirs in (("mean", "running_mean"), ("var", "running_var")):
        close(new["batch_stats"]["norm1"][ours], arrays[f"train/stem_bn1_{theirs}"], ROUNDING)

    variables = {"params": params["head"], "batch_stats": stats["head"]}
    z = tuple(images(arrays[f"f/z{i}"]) for i in range(len(cell.channels)))
    for train in (False, True):
        apply = jax.jit(
            lambda v, z, train=train: head.apply(v, z, train=train, mutable=["batch_stats"])
        )
        logits, _ = apply(variables, z)
        close(logits, arrays["head/train" if train else "head/eval"], ROUNDING)


@pytest.mark.parametrize("name", PARTS)
def test_f_and_its_vector_jacobian_products(name, x64):
    cell, _ = PARTS[name]
    arrays, torch_weights = recorded(f"{name}_parts"), recorded(f"{name}_weights")
    params = weights(name)[0]["equilibrium"]["f"]
    branches = range(len(cell.channels))
    z, v = (tuple(images(arrays[f"f/{k}{i}"]) for i in branches) for k in ("z", "v"))
    x = images(arrays["f/inj0"])

    @jax.jit
    def run(params, z, x, v):
        f = lambda p, z, x: cell.apply({"params": WEIGHT_NORM.merge(p)}, z, x)  # noqa: E731
        out, pull = jax.vjp(f, params, z, x)
        return out, pull(v)

    out, (d_params, d_z, d_x) = run(params, z, x, v)
    for i in branches:
        wanted = arrays[f"f/out{i}"]
        close(out[i].transpose(0, 3, 1, 2), wanted, exactness(wanted))
        wanted = arrays[f"f/vjp_z{i}"]
        close(d_z[i].transpose(0, 3, 1, 2), wanted, exactness(wanted))
    close(d_x.transpose(0, 3, 1, 2), arrays["f/vjp_inj0"], exactness(arrays["f/vjp_inj0"]))

    names = [k.removeprefix("f/vjp_dot/") for k in arrays if k.startswith("f/vjp_dot/")]
    assert len(names) == len(jax.tree.leaves(params))
    for k in names:
        full = k if k in torch_weights else f"fullstage.{k}"
        rng = np.random.default_rng([99, zlib.crc32(k.encode())])
        direction = rng.standard_normal(torch_weights[full].shape)
        converted = convert_state({full: direction}, partial=True).params
        ours = sum(
            float(np.vdot(a, _at(d_params, path)))
            for path, a in jax.tree_util.tree_leaves_with_path(converted["equilibrium"]["f"])
        )
        scale = float(arrays[f"f/vjp_norm/{k}"]) * np.sqrt(direction.size)
        assert abs(ours - arrays[f"f/vjp_dot/{k}"]) <= ROUNDING * scale, k


def _at(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree


def tiny(tol, adjoint=None):
    cell, head = PARTS["tiny"]
    solver = deq.Broyden(tol=tol, max_steps=60, memory=60)
    return MDEQ(cell=cell, head=head, solver=solver, adjoint=adjoint)


def test_evaluation(x64):
    arrays = recorded("tiny_eval")
    params, stats = weights("tiny")
    variables = {"params": params, "batch_stats": stats}
    x = images(arrays["x"])
    model = tiny(1e-13)
    logits, solution = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, x)
    assert solution.stats.converged.all()
    close(logits, arrays["logits"], 1e-11)
    for ours, theirs in zip(solution.value, state(arrays["zstar"]), strict=True):
        close(ours, theirs, 1e-10)
    network = model.clone(adjoint=deq.Unroll(int(arrays["num_layers"])))
    apply = jax.jit(lambda v, x: network.apply(v, x, train=False, max_steps=0))
    close(apply(variables, x)[0], arrays["unrolled_logits"], ROUNDING)
    # The published estimate is right for the first two images, whose dominant pair is real.
    radius = jax.jit(lambda s: deq.spectral_radius(*s.at, key=jax.random.key(0), iters=150))
    np.testing.assert_allclose(radius(solution)[:2], arrays["rho"].ravel()[:2], rtol=1e-3)


def test_the_first_steps_of_the_published_solver(x64):
    """Also from the published initial weights, with which it does not converge."""
    arrays = recorded("tiny_reference_settings")
    x = images(arrays["x"])
    model = tiny(1e-30).clone(solver=deq.Broyden(tol=1e-30, max_steps=9, memory=9, stop="abs"))
    options = {"mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(0)}}
    run = jax.jit(lambda v, x: model.apply(v, x, train=True, **options)[0][1].stats.trace)
    for case, name in (("contractive", "tiny"), ("default_init", "tiny_default_init")):
        params, stats = weights(name)
        # Ours begins with the residual of the start, theirs after the first step; theirs is that of
        # the whole batch.
        ours = jnp.linalg.norm(run({"params": params, "batch_stats": stats}, x), axis=1)[1:8]
        theirs = arrays[f"{case}/f64/broyden/fwd/abs_trace"][:7]
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def gradients(model, params, stats, arrays, max_steps, dtype):
    """Loss, logits, z*, penalty, new statistics and the gradient, as functions of alpha."""
    x, labels = images(arrays["x"], dtype), jnp.asarray(arrays["label"])
    probes = [state(v, dtype) for v in arrays["v"]]

    def objective(params, alpha):
        (logits, solution), new = model.apply(
            {"params": params, "batch_stats": stats},
            x,
            train=True,
            max_steps=max_steps,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(0)},
        )
        log_p = jax.nn.log_softmax(logits)
        loss = -jnp.mean(jnp.take_along_axis(log_p, labels[:, None], axis=1))
        f, weights, z, injected = solution.at
        z = jax.lax.stop_gradient(z)
        pull = jax.vjp(lambda z: f(weights, z, injected), z)[1]
        # frobenius_penalty's formula with the recorded probes in place of random ones.
        squares = [sum(jnp.sum(a**2) for a in pull(v)[0]) for v in probes]
        penalty = sum(squares) / len(squares) / sum(a.size for a in z)
        return loss + alpha * penalty, (loss, penalty, logits, solution, new["batch_stats"])

    run = jax.jit(jax.value_and_grad(objective, has_aux=True))
    return lambda alpha: run(params, jnp.asarray(alpha, dtype))


CASES = [
    # dtype, tolerance of solvers (in float32 as near as they get), of logits, of gradients, floor
    pytest.param(np.float64, 1e-13, 1e-11, 1e-7, 1e-2, id="float64"),
    pytest.param(np.float32, 1e-8, 1e-5, 1e-4, 1e-1, id="float32"),
]


@pytest.mark.parametrize(("dtype", "tol", "near", "gradient", "floor"), CASES)
def test_training_through_the_equilibrium(dtype, tol, near, gradient, floor):
    with jax.enable_x64(dtype == np.float64):
        params, stats = weights("tiny", dtype)
        with_penalty = recorded("tiny_train_ift_jac")
        run = gradients(tiny(tol), params, stats, with_penalty, None, dtype)
        for arrays, alpha in (
            (recorded("tiny_train_ift"), 0.0),
            (with_penalty, float(with_penalty["alpha"])),
        ):
            (_, (loss, penalty, logits, solution, new)), grads = run(alpha)
            np.testing.assert_allclose(loss, arrays["loss"], rtol=near)
            close(logits, arrays["logits"], near)
            wanted = convert_state(_under(arrays, "grad/"), partial=True).params
            close_trees(grads, wanted, gradient, floor)
            wanted = convert_state(_under(arrays, "buffer_after/"), partial=True).batch_stats
            for path, a in jax.tree_util.tree_leaves_with_path(wanted):
                close(_at(new, path), a, near)
        for ours, theirs in zip(
            solution.value, state(recorded("tiny_train_ift")["zstar"], dtype), strict=True
        ):
            close(ours, theirs, 10 * near)
        np.testing.assert_allclose(penalty, with_penalty["jac_loss"].item(), rtol=10 * near)


def test_training_through_the_unrolled_network(x64):
    arrays = recorded("tiny_train_unrolled")
    layers = int(recorded("tiny_eval")["num_layers"])
    params, stats = weights("tiny")
    run = gradients(tiny(1e-3, deq.Unroll(layers)), params, stats, arrays, 0, np.float64)
    (_, (loss, penalty, logits, _, _)), grads = run(float(arrays["alpha"]))
    np.testing.assert_allclose(loss, arrays["loss"], rtol=ROUNDING)
    np.testing.assert_allclose(penalty, arrays["jac_loss"].item(), rtol=1e-11)
    close(logits, arrays["logits"], ROUNDING)
    wanted = convert_state(_under(arrays, "grad/"), partial=True).params
    close_trees(grads, wanted, STORED_IN_FLOAT32, 1e-2)


def _under(arrays, prefix):
    return {k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)}
