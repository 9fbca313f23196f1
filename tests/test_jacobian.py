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


def exact_penalty(f, params, z, x):
    """The same quantity from the explicit Jacobian of the whole batch."""
    flat, unravel = ravel_pytree(z)

    def whole(v):
        return ravel_pytree(f(params, unravel(v), x))[0]

    return (jax.jacrev(whole)(flat) ** 2).sum() / flat.size


def linear(matrices):
    """The map z -> z with one matrix per sample, [B, N, N], and a state for it."""
    matrices = jnp.asarray(matrices, jnp.float32)
    z = jnp.zeros(matrices.shape[:2], jnp.float32)
    return lambda params, z, x: jnp.einsum("bij,bj->bi", params, z) + x, matrices, z, z


# --- the penalty -----------------------------------------------------------------------------


def test_penalty_is_within_five_percent_of_the_exact_norm():
    params, z, x = cell_operands()
    exact = float(exact_penalty(cell, params, z, x))
    got = float(frobenius_penalty(cell, params, z, x, key=KEY, probes=2000))
    assert got == pytest.approx(exact, rel=0.05)


def test_penalty_on_a_tree_of_several_resolutions():
    problem = testing.multiscale(2)
    exact = float(exact_penalty(problem.f, problem.params, problem.solution, problem.x))
    got = frobenius_penalty(
        problem.f, problem.params, problem.solution, problem.x, key=KEY, probes=2000
    )
    assert float(got) == pytest.approx(exact, rel=0.05)


def test_penalty_of_a_known_map():
    problem = testing.nonnormal(4, strength=10.0)
    got = frobenius_penalty(problem.f, problem.params, problem.z0, problem.x, key=KEY, probes=2000)
    assert float(got) == pytest.approx(100 / 2, rel=0.05)  # norm^2 over elements of a sample


def test_probes_are_a_mean_of_single_probes():
    params, z, x = cell_operands()
    keys = jax.random.split(KEY, 3)
    single = [frobenius_penalty(cell, params, z, x, key=k) for k in keys]
    many = frobenius_penalty(cell, params, z, x, key=KEY, probes=3)
    np.testing.assert_allclose(many, np.mean(single), rtol=1e-6)
    assert len({float(s) for s in single}) == 3


@pytest.mark.parametrize("probes", [1, 4])
def test_penalty_gradient_against_explicit_jacobian_and_differences(x64, probes):
    params, z, x = cell_operands(dtype=jnp.float64)

    def estimate(params, x):
        return frobenius_penalty(cell, params, z, x, key=KEY, probes=probes)

    def explicit(params, x):
        """eps^T J with the explicit J and the very same eps."""
        jac = jax.jacrev(lambda v: cell(params, v, x))(z)  # [B, N, B, N]
        keys = [KEY] if probes == 1 else jax.random.split(KEY, probes)
        rows = [jnp.einsum("bi,bicj->cj", jax.random.normal(k, z.shape), jac) for k in keys]
        return jnp.stack([(row**2).sum() for row in rows]).mean() / z.size

    np.testing.assert_allclose(estimate(params, x), explicit(params, x), rtol=1e-12)
    got = jax.grad(estimate, (0, 1))(params, x)
    want = jax.grad(explicit, (0, 1))(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), got, want)

    _, direction = cell_operands(dtype=jnp.float64, seed=1)[0], jax.random.normal(KEY, x.shape)
    step = 1e-6 * direction
    difference = (estimate(params, x + step) - estimate(params, x - step)) / 2e-6
    np.testing.assert_allclose(jnp.vdot(got[1], direction), difference, rtol=1e-6)
    moved = cell_operands(dtype=jnp.float64, seed=1)[0]
    plus, minus = (jax.tree.map(lambda a, b, s=s: a + s * b, params, moved) for s in (1e-6, -1e-6))
    slope = sum(jnp.vdot(got[0][k], moved[k]) for k in params)
    difference = (estimate(plus, x) - estimate(minus, x)) / 2e-6
    np.testing.assert_allclose(slope, difference, rtol=1e-6)


def test_z_is_held_constant():
    params, z, x = cell_operands()
    grad = jax.grad(lambda z: frobenius_penalty(cell, params, z, x, key=KEY))(z)
    np.testing.assert_array_equal(grad, np.zeros_like(z))


def test_penalty_in_bfloat16_is_summed_in_float32():
    params, z, x = cell_operands(batch=64, size=64)
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, z, x))
    got = frobenius_penalty(cell, *low, key=KEY)
    want = frobenius_penalty(cell, params, z, x, key=KEY)
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
    got = spectral_radius(*linear(matrices), key=KEY, iters=200)
    assert got.dtype == jnp.float32
    error = np.abs(np.asarray(got) / want - 1)
    assert np.median(error) < 0.001
    assert error.max() < 0.03


def test_radius_of_rotation_scaled_matrices():
    """A complex pair on its own, turned by many angles, also far from normal."""
    angles = np.linspace(0.05, 3.1, 30)
    c, s = np.cos(angles), np.sin(angles)
    turns = 0.8 * np.stack([np.stack([c, -s], -1), np.stack([s, c], -1)], -2)
    got = spectral_radius(*linear(turns), key=KEY)
    np.testing.assert_allclose(got, 0.8, rtol=1e-4)
    skew = np.diag([1.0, 4.0])
    got = spectral_radius(*linear(skew @ turns @ np.linalg.inv(skew)), key=KEY)
    np.testing.assert_allclose(got, 0.8, rtol=1e-4)
    rotation = testing.rotation(3)
    got = spectral_radius(rotation.f, rotation.params, rotation.z0, rotation.x, key=KEY)
    np.testing.assert_allclose(got, 1.0, rtol=1e-4)


def test_radius_with_opposite_and_with_negative_dominant_eigenvalues():
    rng = np.random.default_rng(1)
    q = np.linalg.qr(rng.normal(size=(20, 6, 6)))[0]
    for spectrum in ([0.9, -0.9, 0.3, 0.2, 0.1, 0.0], [-0.7, 0.5, 0.3, 0.2, 0.1, 0.0]):
        matrices = q @ np.diag(spectrum) @ q.transpose(0, 2, 1)
        got = spectral_radius(*linear(matrices), key=KEY)
        np.testing.assert_allclose(got, np.abs(spectrum).max(), rtol=1e-3)


def test_radius_of_nilpotent_and_zero_maps_is_zero():
    chain = np.diag(np.ones(5), 1)
    matrices = np.stack([np.zeros((6, 6)), 10 * chain, chain.T, 0.5 * np.eye(6)])
    got = spectral_radius(*linear(matrices), key=KEY)
    np.testing.assert_allclose(got, [0, 0, 0, 0.5], rtol=1e-5)
    problem = testing.nonnormal(4, strength=100.0)
    got = spectral_radius(problem.f, problem.params, problem.z0, problem.x, key=KEY)
    np.testing.assert_array_equal(got, np.zeros(4))


def test_radius_of_each_sample_of_a_nonlinear_tree():
    problem = testing.multiscale(3)
    z = problem.solution
    got = spectral_radius(problem.f, problem.params, z, problem.x, key=KEY, iters=200)
    flat, unravel = ravel_pytree(jax.tree.map(lambda a: a[0], z))
    for i in range(3):
        row = ravel_pytree(jax.tree.map(lambda a, i=i: a[i], z))[0]
        x = jax.tree.map(lambda a, i=i: a[i : i + 1], problem.x)

        def one(v, x=x):
            state = jax.tree.map(lambda a: a[None], unravel(v))
            return ravel_pytree(problem.f(problem.params, state, x))[0]

        want = np.abs(np.linalg.eigvals(jax.jacobian(one)(row))).max()
        np.testing.assert_allclose(got[i], want, rtol=0.01)


def test_radius_does_not_need_forward_mode_and_isolates_nan():
    @jax.custom_vjp
    def double(z):
        return 2 * z

    double.defvjp(lambda z: (2 * z, None), lambda _, c: (2 * c,))
    z = jnp.ones((3, 4))
    x = z.at[1].set(jnp.nan)
    got = spectral_radius(lambda p, z, x: double(z) * x, None, z, x, key=KEY)
    np.testing.assert_allclose(got, [2, np.nan, 2], rtol=1e-5)


def test_radius_in_bfloat16():
    matrices = random_matrices("gaussian", 8, 40, np.random.default_rng(2))
    want = np.abs(np.linalg.eigvals(matrices)).max(axis=1)
    f, *operands = linear(matrices)
    low = [a.astype(jnp.bfloat16) for a in operands]
    got = spectral_radius(f, *low, key=KEY, iters=200)
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

    plain = jnp.stack([one(a, k) for a, k in zip(zs, keys, strict=True)])
    np.testing.assert_allclose(jax.jit(one)(zs[0], keys[0]), plain[0], rtol=1e-4)
    np.testing.assert_allclose(jax.vmap(one)(zs, keys), plain, rtol=1e-4)
    np.testing.assert_allclose(jax.jit(jax.vmap(one))(zs, keys), plain, rtol=1e-4)
    _, scanned = jax.lax.scan(lambda c, a: (c, one(*a)), 0, (zs, keys))
    np.testing.assert_allclose(scanned, plain, rtol=1e-4)
    np.testing.assert_allclose(jax.checkpoint(one)(zs[0], keys[0]), plain[0], rtol=1e-4)


@pytest.mark.parametrize("probes", [1, 3])
def test_penalty_gradient_under_transformations(probes):
    params, z, x = cell_operands()
    keys = jax.random.split(KEY, 2)

    def loss(params, key):
        return frobenius_penalty(cell, params, z, x, key=key, probes=probes)

    def close(a, b):
        jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-4, atol=1e-6), a, b)

    plain = [jax.grad(loss)(params, k) for k in keys]
    close(jax.jit(jax.grad(loss))(params, keys[0]), plain[0])
    close(jax.grad(jax.jit(loss))(params, keys[0]), plain[0])
    close(jax.grad(jax.checkpoint(loss))(params, keys[0]), plain[0])
    total = jax.tree.map(jnp.add, *plain)
    close(jax.grad(lambda p: jax.vmap(loss, (None, 0))(p, keys).sum())(params), total)

    def scanned(p):
        return jax.lax.scan(lambda c, k: (c + loss(p, k), None), 0.0, keys)[0]

    close(jax.grad(scanned)(params), total)


def test_both_inside_shard_map():
    params, z, x = cell_operands(batch=16)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(params, z, x):
        radius = spectral_radius(cell, params, z, x, key=KEY)
        penalty = frobenius_penalty(cell, params, z, x, key=KEY, probes=2)
        return radius, jax.lax.pmean(penalty, "data")

    split, whole = P("data"), P()
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(whole, split, split), out_specs=(split, whole)
    )
    radius, penalty = jax.jit(mapped)(params, z, x)
    # The start vectors differ from those of one device, the radius does not.
    want = spectral_radius(cell, params, z, x, key=KEY, iters=300)
    np.testing.assert_allclose(radius, want, rtol=0.05)
    assert 0.2 < float(penalty / exact_penalty(cell, params, z, x)) < 5
