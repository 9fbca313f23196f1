import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

from deq_jax.reparam import WeightNorm, is_weight, spectral_norm, weight_norm

KEY = jax.random.key(0)


def make_params(dtype=jnp.float32):
    keys = jax.random.split(KEY, 4)
    return {
        "dense": {"kernel": jax.random.normal(keys[0], (5, 7), dtype), "bias": jnp.ones(7, dtype)},
        "conv": {"kernel": jax.random.normal(keys[1], (3, 3, 4, 6), dtype)},
        "embed": {"embedding": jax.random.normal(keys[2], (10, 4), dtype)},
        "norm": {"scale": jax.random.normal(keys[3], (4,), dtype)},
    }


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        np.testing.assert_array_equal(np.asarray(x, np.float64), np.asarray(y, np.float64))


# --- weight norm -----------------------------------------------------------------------------


def test_merge_undoes_split_to_the_last_bit():
    params = make_params()
    assert_same(weight_norm.merge(weight_norm.split(params)), params)
    assert_same(jax.jit(lambda p: weight_norm.merge(weight_norm.split(p)))(params), params)


def test_split_takes_kernels_and_nothing_else():
    split = weight_norm.split(make_params())
    assert set(split["dense"]["kernel"]) == {"g", "v"}
    assert split["dense"]["kernel"]["g"].shape == (7,)
    assert split["conv"]["kernel"]["g"].shape == (6,)
    np.testing.assert_allclose(
        split["conv"]["kernel"]["g"],
        np.linalg.norm(np.asarray(split["conv"]["kernel"]["v"]).reshape(-1, 6), axis=0),
        rtol=1e-6,
    )
    assert split["embed"]["embedding"].shape == (10, 4)
    assert split["norm"]["scale"].shape == (4,)


def test_merge_gives_length_g_and_direction_v():
    split = weight_norm.split(make_params())
    kernel = split["conv"]["kernel"]
    kernel["g"] = jnp.arange(1.0, 7.0)
    kernel["v"] = 3 * kernel["v"]
    merged = np.asarray(weight_norm.merge(split)["conv"]["kernel"])
    np.testing.assert_allclose(
        np.linalg.norm(merged.reshape(-1, 6), axis=0), np.arange(1, 7), rtol=1e-6
    )
    np.testing.assert_allclose(merged / np.asarray(kernel["v"]) > 0, True)


def test_merge_leaves_untouched_what_was_not_split():
    plain = make_params()
    assert_same(weight_norm.merge(plain), plain)
    foreign = {"block": {"g": jnp.ones(3), "v": 2 * jnp.ones((4, 3))}, "kernel": {"g": 1.0, "v": 2}}
    assert weight_norm.merge(foreign)["block"]["v"] is foreign["block"]["v"]
    assert weight_norm.merge(foreign)["kernel"] == {"g": 1.0, "v": 2}


def only_dense(path, leaf):
    return path.startswith("dense/") and is_weight(path, leaf)


def test_select_restricts_by_path_and_values_compare():
    params = make_params()
    some = WeightNorm(select=only_dense)
    split = some.split(params)
    assert set(split["dense"]["kernel"]) == {"g", "v"}
    assert split["conv"]["kernel"].shape == (3, 3, 4, 6)
    assert_same(some.merge(split), params)
    assert some == WeightNorm(select=only_dense) != weight_norm
    assert hash(some) == hash(WeightNorm(select=only_dense))


def test_a_zero_column_is_safe():
    params = {"kernel": make_params()["dense"]["kernel"].at[:, 2].set(0)}
    split = weight_norm.split(params)
    assert_same(weight_norm.merge(split), params)
    grads = jax.grad(lambda p: (weight_norm.merge(p)["kernel"] ** 3).sum())(split)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    grads = jax.grad(lambda p: sum(a.sum() for a in jax.tree.leaves(weight_norm.split(p))))(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def check_gradient(function, params, rtol=1e-6):
    """Compares the gradient of a weighted sum of the result with central differences."""
    leaves = jax.tree.leaves(jax.eval_shape(function, params))
    rng = np.random.default_rng(7)
    weights = [rng.normal(size=a.shape) for a in leaves]

    @jax.jit
    @jax.value_and_grad
    def loss(p):
        return sum(
            jnp.vdot(w, a) for w, a in zip(weights, jax.tree.leaves(function(p)), strict=True)
        )

    grads = jax.tree.map(np.asarray, loss(params)[1])
    for seed in range(3):
        rng = np.random.default_rng(seed)
        d = jax.tree.map(lambda a, rng=rng: rng.normal(size=a.shape), params)
        ahead, behind = (
            loss(jax.tree.map(lambda a, b, s=step: np.asarray(a) + s * b, params, d))[0]
            for step in (1e-6, -1e-6)
        )
        slope = sum(jax.tree.leaves(jax.tree.map(np.vdot, grads, d)))
        np.testing.assert_allclose(slope, (ahead - behind) / 2e-6, rtol=rtol)


def test_weight_norm_gradients_against_differences(x64):
    params = make_params(jnp.float64)
    check_gradient(weight_norm.split, params)
    check_gradient(weight_norm.merge, weight_norm.split(params))


def test_gradient_in_v_is_orthogonal_to_v():
    split = weight_norm.split(make_params())
    grads = jax.grad(lambda p: jnp.sin(weight_norm.merge(p)["dense"]["kernel"]).sum())(split)
    inner = (grads["dense"]["kernel"]["v"] * split["dense"]["kernel"]["v"]).sum(axis=0)
    np.testing.assert_allclose(inner, np.zeros(7), atol=1e-5)


def test_bfloat16_keeps_dtypes_and_norms_in_float32():
    params = {"kernel": jnp.full((10_000, 2), 0.01, jnp.bfloat16)}
    split = weight_norm.split(params)
    assert split["kernel"]["g"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(split["kernel"]["g"], np.float32), 1.0, rtol=0.01)
    merged = weight_norm.merge(split)["kernel"]
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(merged, np.float32), 0.01, rtol=0.01)


def test_serves_linen_and_nnx_trees():
    variables = nn.Sequential([nn.Dense(4), nn.Conv(3, (3,))]).init(KEY, jnp.ones((1, 6, 2)))
    for params in (variables["params"], freeze(variables["params"])):
        split = weight_norm.split(params)
        assert len(jax.tree.leaves(split)) == len(jax.tree.leaves(params)) + 2
        assert_same(weight_norm.merge(split), params)
    state = nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Param)
    pure = nnx.to_pure_dict(state)
    assert_same(weight_norm.merge(weight_norm.split(pure)), pure)
    assert len(jax.tree.leaves(weight_norm.split(pure))) == 3
    assert_same(weight_norm.merge(weight_norm.split(state)), state)
    assert len(jax.tree.leaves(weight_norm.split(state))) == 3


def test_is_weight_by_name_and_rank():
    matrix = jnp.ones((2, 2))
    for path in ("kernel", "a/kernel", "a/b/weight", "W", "w", "a/kernel/value"):
        assert is_weight(path, matrix)
    for path in ("embedding", "a/scale", "kernel/bias", "mykernel", "a/value"):
        assert not is_weight(path, matrix)
    assert not is_weight("kernel", jnp.ones(3))


# --- spectral norm ---------------------------------------------------------------------------


def norms(params):
    return {
        name: np.linalg.norm(np.asarray(layer["kernel"], np.float64).reshape(-1, out), 2)
        for name, layer, out in (("dense", params["dense"], 7), ("conv", params["conv"], 6))
    }


@pytest.mark.parametrize("bound", [0.5, 2.0])
def test_operator_norm_is_bounded(bound):
    params = make_params()
    result = spectral_norm(params, bound)
    for name, size in norms(params).items():
        assert norms(result)[name] == pytest.approx(min(size, bound), rel=1e-5)
    np.testing.assert_array_equal(result["embed"]["embedding"], params["embed"]["embedding"])
    np.testing.assert_array_equal(result["dense"]["bias"], params["dense"]["bias"])


def test_within_the_bound_nothing_changes():
    params = make_params()
    assert_same(spectral_norm(params, 100.0), params)
    zero = {"kernel": jnp.zeros((3, 4))}
    assert_same(spectral_norm(zero), zero)
    grads = jax.grad(lambda p: spectral_norm(p)["kernel"].sum())(zero)
    np.testing.assert_array_equal(grads["kernel"], np.ones((3, 4)))


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (3, 2), (64, 64), (200, 30), (30, 200)])
def test_norm_by_random_starts_against_svd(shape):
    w = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    bounded = jax.jit(lambda w, key: spectral_norm({"w": w}, 0.3, key=key)["w"])
    for seed in range(3):
        got = bounded(w, jax.random.key(seed))
        assert np.linalg.norm(np.asarray(got), 2) == pytest.approx(0.3, rel=1e-5)


def test_hard_spectrum_stays_within_the_stated_error():
    """No gap: the edge of a large Gaussian matrix, and several equal singular values."""
    w = np.random.default_rng(4).normal(size=(400, 400)).astype(np.float32)
    bounded = jax.jit(lambda w: spectral_norm({"w": w})["w"])
    assert 1 - 1e-6 < np.linalg.norm(np.asarray(bounded(w)), 2) < 1.002
    size = np.linalg.norm(np.asarray(bounded(5 * np.linalg.qr(w[:40, :40])[0])), 2)
    assert size == pytest.approx(1, rel=1e-5)


def test_spectral_norm_gradients_against_differences(x64):
    params = make_params(jnp.float64)
    check_gradient(lambda p: spectral_norm(p, 0.5, iters=60), params, rtol=1e-5)


def test_spectral_norm_under_jit_and_in_bfloat16():
    params = make_params()
    jitted = jax.jit(lambda p: spectral_norm(p, 0.5))(params)
    for name, size in norms(jitted).items():
        assert size == pytest.approx(0.5, rel=1e-5), name
    low = spectral_norm(make_params(jnp.bfloat16), 0.5)
    assert all(a.dtype == jnp.bfloat16 for a in jax.tree.leaves(low))
    for name, size in norms(low).items():
        assert size == pytest.approx(0.5, rel=0.01), name


def test_spectral_norm_refuses_bad_settings():
    with pytest.raises(ValueError, match="bound=0"):
        spectral_norm(make_params(), 0)
    with pytest.raises(ValueError, match="one positive number"):
        spectral_norm(make_params(), jnp.ones(3))
    with pytest.raises(ValueError, match="iters=0"):
        spectral_norm(make_params(), iters=0)


def test_spectral_norm_takes_a_learned_or_scheduled_bound(x64):
    """Where a matrix exceeds the bound, the derivative in the bound is the matrix of norm one."""
    params = make_params(jnp.float64)
    weights = jax.tree.map(lambda a: jax.random.normal(KEY, a.shape), params)

    def loss(bound):
        bounded = spectral_norm(params, bound, iters=60)
        return sum(map(jnp.vdot, jax.tree.leaves(weights), jax.tree.leaves(bounded)))

    slope = jax.jit(jax.grad(loss))(0.5)
    unit = spectral_norm(params, 1.0, iters=60)
    wanted = sum(jnp.vdot(weights[k]["kernel"], unit[k]["kernel"]) for k in ("dense", "conv"))
    np.testing.assert_allclose(slope, wanted, rtol=1e-6)
    assert jax.jit(jax.grad(loss))(1e3) == 0  # within the bound it has no effect
    for bound in (0.5, 2.0):
        jitted = jax.jit(lambda b: spectral_norm(params, b))(jnp.float32(bound))
        for name, size in norms(params).items():
            assert norms(jitted)[name] == pytest.approx(min(size, bound), rel=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_strict_dtype_promotion(dtype):
    params = make_params(dtype)
    split, plain = weight_norm.split(params), spectral_norm(params, 0.5)
    merged = weight_norm.merge(split)
    with jax.numpy_dtype_promotion("strict"):
        assert_same(weight_norm.split(params), split)
        assert_same(weight_norm.merge(split), merged)
        assert_same(spectral_norm(params, jnp.float32(0.5)), plain)
        jax.jit(spectral_norm)(params, jnp.float32(0.5))
