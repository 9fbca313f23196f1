import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import masks


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_keeps_the_mean_and_drops_at_the_rate(rate):
    size = 40_000
    mask = np.asarray(masks.bernoulli(jax.random.key(0), (200, 200), rate))
    np.testing.assert_allclose(np.unique(mask), [0, 1 / (1 - rate)], rtol=1e-6)
    spread = np.sqrt(rate * (1 - rate) / size)
    assert abs((mask == 0).mean() - rate) < 4 * spread
    assert abs(mask.mean() - 1) < 4 * spread / (1 - rate)


@pytest.mark.parametrize(
    ("share", "shape"),
    [((), (4, 5, 6, 7)), ((1, 2), (4, 1, 1, 7)), ((-1,), (4, 5, 6, 1)), ((0, -4), (1, 5, 6, 7))],
)
def test_shared_axes_have_size_one(share, shape):
    mask = masks.bernoulli(jax.random.key(1), (4, 5, 6, 7), 0.5, share_axes=share)
    assert mask.shape == shape
    assert (jnp.ones((4, 5, 6, 7)) * mask).shape == (4, 5, 6, 7)


def test_rate_zero_is_ones_and_dtype_is_kept():
    ones = masks.bernoulli(jax.random.key(0), (3, 2), 0.0, dtype=jnp.bfloat16)
    assert ones.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(ones, np.float32), np.ones((3, 2)))
    assert masks.bernoulli(jax.random.key(0), (3,), 0.5, dtype=jnp.float16).dtype == jnp.float16


def test_same_key_same_mask_and_works_under_transformations():
    def draw(key):
        return masks.bernoulli(key, (50,), 0.4)

    keys = jax.random.split(jax.random.key(2), 3)
    plain = jnp.stack([draw(k) for k in keys])
    np.testing.assert_array_equal(jax.jit(draw)(keys[0]), plain[0])
    np.testing.assert_array_equal(jax.vmap(draw)(keys), plain)
    np.testing.assert_array_equal(jax.lax.map(draw, keys), plain)
    assert (plain[0] != plain[1]).any()


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
def test_refuses_a_rate_outside_the_unit_interval(rate):
    with pytest.raises(ValueError, match=r"0 <= rate < 1"):
        masks.bernoulli(jax.random.key(0), (2,), rate)


def test_refuses_axes_that_do_not_exist_and_integer_masks():
    with pytest.raises(ValueError, match="share_axes"):
        masks.bernoulli(jax.random.key(0), (2, 3), 0.5, share_axes=(2,))
    with pytest.raises(ValueError, match="floating-point"):
        masks.bernoulli(jax.random.key(0), (2, 3), 0.5, dtype=jnp.int32)


class Cell:
    """What counts as a method of a cell."""

    inject = "a default value"

    def __init__(self):
        self.other = jnp.tanh

    def masks(self, key, z, x):
        return None


@dataclasses.dataclass
class Fields:
    masks: object = jnp.tanh


def test_only_methods_of_the_class_count():
    assert masks.has_method(Cell(), "masks")
    assert not any(masks.has_method(Cell(), name) for name in ("inject", "other", "absent"))
    assert not masks.has_method(Fields(), "masks")
