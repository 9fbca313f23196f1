import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import init

FAMILIES = {"gaussian": init.gaussian, "orthogonal": init.orthogonal, "goe": init.goe}


def draw(family, scale, shape, seed=0, dtype=jnp.float32):
    return FAMILIES[family](scale)(jax.random.key(seed), shape, dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_entries_have_the_same_variance(family):
    n, scale = 400, 0.7
    w = np.asarray(draw(family, scale, (n, n)))
    off = w[~np.eye(n, dtype=bool)]
    # The sum of m squared Gaussians has relative spread sqrt(2/m); symmetric entries count once.
    spread = np.sqrt(2 / (off.size / 2))
    assert abs(n * off.var() / scale**2 - 1) < 5 * spread
    assert abs(off.mean()) < 5 * scale / np.sqrt(n * off.size / 2)
    diagonal = n * np.diagonal(w).var() / scale**2
    assert diagonal == pytest.approx(2.0 if family == "goe" else 1.0, abs=5 * np.sqrt(2 / n) * 2)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
@pytest.mark.parametrize("family", ["gaussian", "orthogonal"])
def test_rectangular_entries_have_variance_over_n_in(family, shape):
    w = np.asarray(draw(family, 0.5, shape))
    assert shape[0] * w.var() / 0.25 == pytest.approx(1, abs=0.03)


def test_orthogonal_is_orthogonal():
    square = np.asarray(draw("orthogonal", 0.5, (64, 64)), np.float64)
    np.testing.assert_allclose(square.T @ square, 0.25 * np.eye(64), atol=1e-6)
    tall = np.asarray(draw("orthogonal", 0.5, (64, 32)), np.float64)
    np.testing.assert_allclose(tall.T @ tall, 0.25 * np.eye(32), atol=1e-6)
    wide = np.asarray(draw("orthogonal", 0.5, (32, 64)), np.float64)
    np.testing.assert_allclose(wide @ wide.T, 0.5 * np.eye(32), atol=1e-6)


def test_orthogonal_is_haar_distributed():
    """Moments of the trace, E tr(Q)^(2k) = (2k-1)!! for k <= n, fail without the sign of R."""
    keys = jax.random.split(jax.random.key(0), 20_000)
    q = jax.vmap(lambda key: init.orthogonal(1.0)(key, (4, 4)))(keys)
    trace = np.asarray(jnp.trace(q, axis1=1, axis2=2), np.float64)
    assert trace.mean() == pytest.approx(0, abs=0.03)
    assert (trace**2).mean() == pytest.approx(1, abs=0.05)
    assert (trace**4).mean() == pytest.approx(3, abs=0.25)
    # Each entry is a coordinate of a uniform point on the sphere: E q^4 = 3 / (n (n + 2)).
    np.testing.assert_allclose((np.asarray(q) ** 4).mean(axis=0), 3 / 24, atol=0.006)
    # Both components of the group are equally likely.
    assert np.linalg.det(np.asarray(q)).mean() == pytest.approx(0, abs=0.03)


def test_goe_is_exactly_symmetric_in_any_dtype():
    for dtype in (jnp.float32, jnp.bfloat16):
        w = draw("goe", 0.4, (65, 65), dtype=dtype)
        assert bool((w == w.T).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_give_the_variance_that_was_asked_for(family):
    w = draw(family, 0.6, (3, 3, 64, 64))
    x = jax.random.normal(jax.random.key(1), (4, 12, 12, 64))
    y = jax.lax.conv_general_dilated(
        x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert float(y.var()) == pytest.approx(0.36, rel=0.05)
    if family != "gaussian":
        outside = np.delete(np.asarray(w).reshape(9, 64, 64), 4, axis=0)
        assert not outside.any()


@pytest.mark.parametrize("window", [(1, 1), (2, 2), (3, 3), (4, 3), (5,)])
def test_delta_orthogonal_kernels_keep_lengths(window):
    """Also with even windows: the tap must be the one "SAME" padding puts on the output."""
    w = draw("orthogonal", 0.5, (*window, 8, 8))
    x = jax.random.normal(jax.random.key(1), (2, *[6] * len(window), 8))
    names = ("NHWC", "HWIO", "NHWC") if len(window) == 2 else ("NWC", "WIO", "NWC")
    y = jax.lax.conv_general_dilated(x, w, (1,) * len(window), "SAME", dimension_numbers=names)
    np.testing.assert_allclose(jnp.linalg.norm(y), 0.5 * jnp.linalg.norm(x), rtol=1e-5)


def test_goe_kernel_is_a_symmetric_operator():
    w = draw("goe", 0.5, (3, 3, 4, 4))

    def convolve(flat):
        image = flat.reshape(1, 5, 5, 4)
        out = jax.lax.conv_general_dilated(
            image, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return out.ravel()

    matrix = jax.jacobian(convolve)(jnp.zeros(100))
    np.testing.assert_array_equal(matrix, matrix.T)


@pytest.mark.parametrize(
    ("family", "scales"),
    [("gaussian", (0.5, 0.7)), ("orthogonal", (0.5, 0.8)), ("goe", (0.25, 0.4))],
)
def test_predictions_match_the_matrices(family, scales):
    """Measured at n = 400: L1 within 4 % and L2 within 15 %, norms within 5 %."""
    n = 400
    unit = np.asarray(draw(family, 1.0, (n, n), seed=3), np.float64)
    size = largest = np.linalg.norm(unit, 2)
    if family == "gaussian":
        largest = np.abs(np.linalg.eigvals(unit)).max()
    else:  # a normal matrix, whose eigenvalues are as large as its singular values
        np.testing.assert_allclose(unit @ unit.T, unit.T @ unit, atol=1e-4)
    for scale in scales:
        w = np.asarray(draw(family, scale, (n, n), seed=3), np.float64)
        np.testing.assert_allclose(w, scale * unit, rtol=1e-5, atol=1e-6)
        resolvent = np.linalg.inv(np.eye(n) - w)
        gram = resolvent @ resolvent.T
        first, second = init.predicted_gain(family, scale)
        assert np.trace(gram) / n == pytest.approx(first, rel=0.04)
        assert (gram**2).sum() / n == pytest.approx(second, rel=0.15)
        radius, norm = init.predicted_norms(family, scale)
        assert scale * largest == pytest.approx(radius, rel=0.06)
        assert scale * size == pytest.approx(norm, rel=0.03)
        # The Jacobian penalty of the linear map, norm(W)_F^2 / n, is s^2 for all three.
        assert (w**2).sum() / n == pytest.approx(scale**2, rel=0.02)


def test_goe_prediction_is_right_at_small_scales():
    scale = 0.05  # where the formula of the docstring still has digits to compare
    formula = ((1 - 4 * scale**2) ** -0.5 - 1) / (2 * scale**2)
    assert init.predicted_gain("goe", scale)[0] == pytest.approx(formula, rel=1e-12)
    for family in FAMILIES:
        assert init.predicted_gain(family, 0.0) == (1.0, 1.0)
        assert init.predicted_gain(family, 1e-9) == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize("family", FAMILIES)
def test_dtype_key_and_value_semantics(family):
    make = FAMILIES[family]
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        assert draw(family, 0.5, (6, 6), dtype=dtype).dtype == dtype
    with jax.enable_x64(True):
        wide = draw(family, 0.5, (6, 6), dtype=jnp.float64)
        assert wide.dtype == jnp.float64
    np.testing.assert_array_equal(draw(family, 0.5, (6, 6)), draw(family, 0.5, (6, 6)))
    assert (draw(family, 0.5, (6, 6)) != draw(family, 0.5, (6, 6), seed=1)).any()
    np.testing.assert_allclose(
        draw(family, 0.5, (6, 6), dtype=jnp.bfloat16).astype(jnp.float32),
        draw(family, 0.5, (6, 6)),
        rtol=2**-8,
    )
    assert make(0.5) == make(0.5) and hash(make(0.5)) == hash(make(0.5))
    assert make(0.5) != make(0.6)
    jitted = jax.jit(make(0.5), static_argnums=1)(jax.random.key(0), (6, 6))
    np.testing.assert_allclose(jitted, draw(family, 0.5, (6, 6)), atol=1e-6)


def test_serves_flax_modules():
    layer = nn.Dense(8, kernel_init=init.goe(0.4), param_dtype=jnp.bfloat16)
    kernel = jnp.asarray(layer.init(jax.random.key(0), jnp.ones((1, 8)))["params"]["kernel"])
    assert kernel.dtype == jnp.bfloat16
    assert bool((kernel == kernel.T).all())
    assert hash(layer) == hash(nn.Dense(8, kernel_init=init.goe(0.4), param_dtype=jnp.bfloat16))


def test_refuses_what_it_cannot_draw():
    with pytest.raises(ValueError, match=r"goe: got shape \(3, 4\)"):
        init.goe(0.5)(jax.random.key(0), (3, 4))
    with pytest.raises(ValueError, match=r"got shape \(3,\)"):
        init.gaussian(0.5)(jax.random.key(0), (3,))
    with pytest.raises(ValueError, match="empty axes"):
        init.orthogonal(0.5)(jax.random.key(0), (3, 0))
    with pytest.raises(ValueError, match="dtype int32"):
        init.orthogonal(0.5)(jax.random.key(0), (3, 3), jnp.int32)
    for scale in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="scale"):
            init.gaussian(scale)


@pytest.mark.parametrize(
    ("family", "scale"),
    [("gaussian", 1.0), ("orthogonal", 1.2), ("goe", 0.5), ("gaussian", -0.1), ("goe", np.nan)],
)
def test_refuses_predictions_beyond_the_critical_scale(family, scale):
    with pytest.raises(ValueError, match=r"wanted 0 <= scale < "):
        init.predicted_gain(family, scale)


def test_refuses_an_unknown_family():
    for function in (init.predicted_gain, init.predicted_norms):
        with pytest.raises(ValueError, match="got family='wigner'; wanted \"gaussian\""):
            function("wigner", 0.1)
    assert [init.critical_scale(family) for family in FAMILIES] == [1.0, 1.0, 0.5]
