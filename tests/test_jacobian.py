import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec as P

from deq_jax import testing
from deq_jax.jacobian import frobenius_penalty, spectral_radius

KEY = jax.random.key(0)


def cell(params, z, x):
    return jnp.tanh(z @ params["W"] + x @ params["U"])


def cell_operands(batch=3, size=5, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "W": jax.random.normal(keys[0], (size, size), dtype) / np.sqrt(size),
        "U": jax.random.normal(keys[1], (size, size), dtype) / np.sqrt(size),
    }
    z = jax.random.normal(keys[2], (batch, size), dtype)
    return params, z, jax.random.normal(keys[3], (batch, size), dtype)


def explicit(params, z, x, eps):
    """mean over k of norm(eps_k^T J)^2 / size(z) for `cell`, and gradients in params and x."""
    w, u, z, x = (np.asarray(a, np.float64) for a in (params["W"], params["U"], z, x))
    t = np.tanh(z @ w + x @ u)
    s, eps = 1 - t**2, np.asarray(eps, np.float64)
    rows = (eps * s) @ w.T  # [K, B, N]
    d_s = 2 * (rows @ w * eps).sum(axis=0)
    d_inner = -2 * t * s * d_s
    d_w = 2 * np.einsum("kbi,kbj->ij", rows, eps * s) + z.T @ d_inner
    count = len(eps) * z.size
    grads = {"W": d_w, "U": x.T @ d_inner}, d_inner @ u.T
    return (rows**2).sum() / count, jax.tree.map(lambda a: a / count, grads)


def exact_penalty(params, z, x):
    """What the penalty of `cell` estimates."""
    t = np.tanh(np.asarray(z @ params["W"] + x @ params["U"], np.float64))
    jacobian = np.asarray(params["W"])[None] * (1 - t**2)[:, None]
    return (jacobian**2).sum() / z.size


@functools.partial(jax.jit, static_argnames="f")
def jacobians(f, params, z, x):
    """The Jacobian of every sample, [B, D, D]."""
    flat, unravel = ravel_pytree(jax.tree.map(lambda a: a[:1], z))

    def one(z, x):
        z, x = jax.tree.map(lambda a: a[None], (z, x))
        return jax.jacrev(lambda v: ravel_pytree(f(params, unravel(v), x))[0])(ravel_pytree(z)[0])

    return jax.vmap(one)(z, x)


penalty = jax.jit(frobenius_penalty, static_argnames=("f", "probes"))
radius = jax.jit(spectral_radius, static_argnames=("f", "iters"))


def products(params, z, x):
    return jnp.einsum("bij,bj->bi", params, z) + x


def linear(matrices):
    """The map z -> z with one matrix per sample, [B, N, N], and a state for it."""
    matrices = jnp.asarray(matrices, jnp.float32)
    z = jnp.zeros(matrices.shape[:2], jnp.float32)
    return products, matrices, z, z


# --- the penalty -----------------------------------------------------------------------------


def test_penalty_is_within_five_percent_of_the_exact_norm():
    params, z, x = cell_operands()
    got = float(frobenius_penalty(cell, params, z, x, key=KEY, probes=2000))
    assert got == pytest.approx(exact_penalty(params, z, x), rel=0.05)


def test_penalty_on_a_tree_of_several_resolutions():
    problem = testing.multiscale(2)
    at = problem.f, problem.params, problem.solution, problem.x
    matrices = np.asarray(jacobians(*at))
    exact = (matrices**2).sum() / (len(matrices) * matrices.shape[1])
    assert float(penalty(*at, key=KEY, probes=2000)) == pytest.approx(exact, rel=0.05)


def test_penalty_of_a_known_map():
    problem = testing.nonnormal(4, strength=10.0)
    got = penalty(problem.f, problem.params, problem.z0, problem.x, key=KEY, probes=2000)
    assert float(got) == pytest.approx(100 / 2, rel=0.05)  # norm^2 over elements of a sample


def test_probes_are_a_mean_of_single_probes():
    params, z, x = cell_operands()
    keys = jax.random.split(KEY, 3)
    single = [frobenius_penalty(cell, params, z, x, key=k) for k in keys]
    many = frobenius_penalty(cell, params, z, x, key=KEY, probes=3)
    np.testing.assert_allclose(many, np.mean(single), rtol=1e-6)
    assert len({float(s) for s in single}) == 3


@pytest.mark.parametrize("probes", [1, 4])
def test_penalty_and_gradient_are_those_of_the_explicit_jacobian(x64, probes):
    """With the very same probes."""
    params, z, x = cell_operands(dtype=jnp.float64)

    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def estimate(params, x):
        return frobenius_penalty(cell, params, z, x, key=KEY, probes=probes)

    keys = [KEY] if probes == 1 else jax.random.split(KEY, probes)
    eps = np.stack([jax.random.normal(key, z.shape) for key in keys])
    got, grads = jax.jit(estimate)(params, x)
    wanted, exact = explicit(params, z, x, eps)
    np.testing.assert_allclose(got, wanted, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), grads, exact)


def spectral_cell(params, z, x):
    """A cell with complex numbers in it."""
    return cell(params, jnp.fft.irfft(jnp.fft.rfft(jnp.sin(x * z)) ** 2, z.shape[-1]), x)


@pytest.mark.parametrize("f", [cell, spectral_cell])
def test_many_probes_have_forward_and_second_derivatives(f, x64):
    params, z, x = cell_operands(dtype=jnp.float64)

    def estimate(operands):
        params, x = operands
        return frobenius_penalty(f, params, z, x, key=KEY, probes=3)

    def one_by_one(operands):
        params, x = operands
        keys = jax.random.split(KEY, 3)
        return sum(frobenius_penalty(f, params, z, x, key=key) for key in keys) / 3

    def derivatives(function):
        forward = jax.jvp(function, ((params, x),), ((params, x),))
        gradient = jax.grad(lambda a: jax.jvp(function, (a,), ((params, x),))[1])
        return *forward, jax.grad(function)((params, x)), gradient((params, x))

    got, wanted = derivatives(estimate), derivatives(one_by_one)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), got, wanted)


def test_gradient_takes_one_pass_over_the_probes():
    params, z, x = cell_operands()
    gradient = jax.grad(lambda p: frobenius_penalty(cell, p, z, x, key=KEY, probes=2))
    assert str(jax.make_jaxpr(gradient)(params)).count(" scan[") == 1


def test_z_is_held_constant():
    params, z, x = cell_operands()
    grad = jax.grad(lambda z: frobenius_penalty(cell, params, z, x, key=KEY))(z)
    np.testing.assert_array_equal(grad, np.zeros_like(z))


def test_penalty_in_bfloat16_is_summed_in_float32():
    params, z, x = cell_operands(batch=64, size=64)
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, z, x))
    got = penalty(cell, *low, key=KEY)
    want = penalty(cell, params, z, x, key=KEY)
    assert got.dtype == jnp.float32
    # A bfloat16 sum of 4,096 squares would stall far below.
    np.testing.assert_allclose(got, want, rtol=0.02)


def test_memory_does_not_grow_with_probes():
    params, z, x = cell_operands(batch=16, size=64)

    def peak(probes):
        def loss(params):
            return frobenius_penalty(cell, params, z, x, key=KEY, probes=probes)

        analysis = jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert peak(64) < 1.05 * peak(8)


@pytest.mark.parametrize("function", [frobenius_penalty, spectral_radius])
def test_refuses_bad_calls(function):
    params, z, x = cell_operands()
    count = {frobenius_penalty: "probes", spectral_radius: "iters"}[function]
    with pytest.raises(ValueError, match=f"{count}=0"):
        function(cell, params, z, x, key=KEY, **{count: 0})
    with pytest.raises(ValueError, match="f returned"):
        function(lambda params, z, x: z[:, :2], params, z, x, key=KEY)
    with pytest.raises(ValueError, match="f returned"):
        function(lambda params, z, x: {"z": z}, params, z, x, key=KEY)
    with pytest.raises(ValueError, match="empty batch"):
        function(cell, params, z[:0], x[:0], key=KEY)


# --- the spectral radius ---------------------------------------------------------------------


def random_matrices(family, count, n, rng):
    g = rng.normal(size=(count, n, n)) / np.sqrt(n)
    if family == "symmetric":
        return (g + g.transpose(0, 2, 1)) / 2
    if family == "orthogonal":
        return 0.9 * np.linalg.qr(g)[0]
    if family == "relu":
        return g * (rng.random((count, n, 1)) < 0.7)
    return g


@pytest.mark.parametrize("n", [6, 60])
@pytest.mark.parametrize("family", ["gaussian", "symmetric", "orthogonal", "relu"])
def test_radius_of_random_matrices(family, n):
    """The accuracy that the docstring states, 200 iterations."""
    matrices = random_matrices(family, 40, n, np.random.default_rng(0))
    want = np.abs(np.linalg.eigvals(matrices)).max(axis=1)
    got = radius(*linear(matrices), key=KEY, iters=200)
    assert got.dtype == jnp.float32
    error = np.abs(np.asarray(got) / want - 1)
    assert np.median(error) < 0.001
    assert error.max() < 0.03


def test_radius_of_rotation_scaled_matrices():
    """A complex pair on its own, turned by many angles, also far from normal."""
    angles = np.linspace(0.05, 3.1, 30)
    c, s = np.cos(angles), np.sin(angles)
    turns = 0.8 * np.stack([np.stack([c, -s], -1), np.stack([s, c], -1)], -2)
    got = radius(*linear(turns), key=KEY)
    np.testing.assert_allclose(got, 0.8, rtol=1e-4)
    skew = np.diag([1.0, 4.0])
    got = radius(*linear(skew @ turns @ np.linalg.inv(skew)), key=KEY)
    np.testing.assert_allclose(got, 0.8, rtol=1e-4)
    rotation = testing.rotation(3)
    got = radius(rotation.f, rotation.params, rotation.z0, rotation.x, key=KEY)
    np.testing.assert_allclose(got, 1.0, rtol=1e-4)


def test_radius_with_opposite_and_with_negative_dominant_eigenvalues():
    rng = np.random.default_rng(1)
    q = np.linalg.qr(rng.normal(size=(20, 6, 6)))[0]
    for spectrum in ([0.9, -0.9, 0.3, 0.2, 0.1, 0.0], [-0.7, 0.5, 0.3, 0.2, 0.1, 0.0]):
        matrices = q @ np.diag(spectrum) @ q.transpose(0, 2, 1)
        got = radius(*linear(matrices), key=KEY)
        np.testing.assert_allclose(got, np.abs(spectrum).max(), rtol=1e-3)


def test_radius_of_nilpotent_and_zero_maps_is_zero():
    chain = np.diag(np.ones(5), 1)
    matrices = np.stack([np.zeros((6, 6)), 10 * chain, chain.T, 0.5 * np.eye(6)])
    got = radius(*linear(matrices), key=KEY)
    np.testing.assert_allclose(got, [0, 0, 0, 0.5], rtol=1e-5)
    problem = testing.nonnormal(4, strength=100.0)
    got = radius(problem.f, problem.params, problem.z0, problem.x, key=KEY)
    np.testing.assert_array_equal(got, np.zeros(4))


def test_radius_of_each_sample_of_a_nonlinear_tree():
    problem = testing.multiscale(3)
    at = problem.f, problem.params, problem.solution, problem.x
    want = np.abs(np.linalg.eigvals(jacobians(*at))).max(axis=1)
    np.testing.assert_allclose(radius(*at, key=KEY, iters=200), want, rtol=0.01)


def test_radius_does_not_need_forward_mode_and_isolates_nan():
    @jax.custom_vjp
    def double(z):
        return 2 * z

    double.defvjp(lambda z: (2 * z, None), lambda _, c: (2 * c,))
    z = jnp.ones((3, 4))
    x = z.at[1].set(jnp.nan)
    got = radius(lambda p, z, x: double(z) * x, None, z, x, key=KEY)
    np.testing.assert_allclose(got, [2, np.nan, 2], rtol=1e-5)


def test_radius_in_bfloat16():
    matrices = random_matrices("gaussian", 8, 40, np.random.default_rng(2))
    want = np.abs(np.linalg.eigvals(matrices)).max(axis=1)
    f, *operands = linear(matrices)
    low = [a.astype(jnp.bfloat16) for a in operands]
    got = radius(f, *low, key=KEY, iters=200)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=0.05)


def test_radius_carries_no_gradient():
    params, z, x = cell_operands()
    grads = jax.grad(lambda p: spectral_radius(cell, p, z, x, key=KEY).sum())(params)
    assert all(not np.asarray(g).any() for g in jax.tree.leaves(grads))


# --- both, under transformations -------------------------------------------------------------


@pytest.mark.parametrize("function", [frobenius_penalty, spectral_radius])
def test_jit_vmap_scan_and_checkpoint(function):
    params, z, x = cell_operands()
    keys = jax.random.split(KEY, 2)
    zs = jnp.stack([z, 2 * z])

    def one(z, key):
        return function(cell, params, z, x, key=key)

    @jax.jit
    def transformed(zs, keys):
        _, scanned = jax.lax.scan(lambda c, a: (c, one(*a)), 0, (zs, keys))
        return (
            one(zs[0], keys[0]),
            jax.checkpoint(one)(zs[1], keys[1]),
            jax.vmap(one)(zs, keys),
            scanned,
        )

    plain = jnp.stack([one(a, k) for a, k in zip(zs, keys, strict=True)])
    jitted, recomputed, mapped, scanned = transformed(zs, keys)
    np.testing.assert_allclose(jitted, plain[0], rtol=1e-4)
    np.testing.assert_allclose(recomputed, plain[1], rtol=1e-4)
    np.testing.assert_allclose(mapped, plain, rtol=1e-4)
    np.testing.assert_allclose(scanned, plain, rtol=1e-4)


def test_penalty_gradient_under_transformations():
    params, z, x = cell_operands()
    keys = jax.random.split(KEY, 2)

    def loss(params, key):
        return frobenius_penalty(cell, params, z, x, key=key, probes=3)

    def close(a, b):
        jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-4, atol=1e-6), a, b)

    def scanned(p):
        return jax.lax.scan(lambda c, k: (c + loss(p, k), None), 0.0, keys)[0]

    @jax.jit
    def transformed(params):
        of_one = (loss, jax.jit(loss), jax.checkpoint(loss))
        of_all = (lambda p: jax.vmap(loss, (None, 0))(p, keys).sum(), scanned)
        return [jax.grad(f)(params, keys[0]) for f in of_one], [jax.grad(f)(params) for f in of_all]

    plain = [jax.grad(loss)(params, k) for k in keys]
    of_one, of_all = transformed(params)
    for grads in of_one:
        close(grads, plain[0])
    for grads in of_all:
        close(grads, jax.tree.map(jnp.add, *plain))


def test_both_inside_shard_map():
    params, z, x = cell_operands(batch=16)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(params, z, x):
        size = spectral_radius(cell, params, z, x, key=KEY)
        estimate = frobenius_penalty(cell, params, z, x, key=KEY, probes=2)
        return size, jax.lax.pmean(estimate, "data")

    split, whole = P("data"), P()
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(whole, split, split), out_specs=(split, whole)
    )
    size, estimate = jax.jit(mapped)(params, z, x)
    # The start vectors differ from those of one device, the radius does not.
    want = radius(cell, params, z, x, key=KEY, iters=300)
    np.testing.assert_allclose(size, want, rtol=0.05)
    assert 0.2 < float(estimate / exact_penalty(params, z, x)) < 5
