import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import tree


def make():
    return {
        "a": jnp.arange(6, dtype=jnp.float32).reshape(2, 3),
        "b": jnp.arange(8, dtype=jnp.float32).reshape(2, 2, 2),
        "c": jnp.arange(2, dtype=jnp.float32),
    }


def test_ravel_round_trip_keeps_order_shape_and_dtype():
    original = make() | {"d": jnp.ones((2, 1), jnp.bfloat16)}
    flat, unravel = tree.batch_ravel(original)
    assert flat.shape == (2, 9) and flat.dtype == jnp.float32
    np.testing.assert_array_equal(flat[1, :3], [3, 4, 5])
    back = unravel(flat)
    for a, b in zip(jax.tree.leaves(original), jax.tree.leaves(back), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_dot_and_norm_are_per_sample_sums_over_leaves():
    a = make()
    flat = np.concatenate([np.asarray(x).reshape(2, -1) for x in jax.tree.leaves(a)], axis=1)
    np.testing.assert_allclose(tree.dot(a, a), (flat**2).sum(1), rtol=1e-6)
    np.testing.assert_allclose(tree.norm(a), np.linalg.norm(flat, axis=1), rtol=1e-6)


def test_sums_over_bfloat16_are_float32():
    ones = jnp.ones((1, 1000), jnp.bfloat16)
    assert tree.dot(ones, ones).dtype == jnp.float32
    assert tree.dot(ones, ones)[0] == 1000  # bfloat16 would stop counting at 256


def test_where_chooses_whole_samples():
    a, b = make(), jax.tree.map(lambda x: -x - 1, make())
    mixed = tree.where(jnp.array([True, False]), a, b)
    for x, y, z in zip(*map(jax.tree.leaves, (a, b, mixed)), strict=True):
        np.testing.assert_array_equal(z[0], x[0])
        np.testing.assert_array_equal(z[1], y[1])


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({}, "at least one array"),
        ({"a": jnp.ones(())}, "leading batch axis"),
        ({"a": jnp.ones((2, 1)), "b": jnp.ones((3, 1))}, r"float32\[3,1\]"),
        (jnp.ones((0, 4)), "empty batch"),
        (jnp.ones((2, 3), jnp.int32), "floating-point"),
    ],
)
def test_bad_states_are_refused_in_words(state, words):
    with pytest.raises(ValueError, match=words):
        tree.batch_ravel(state)
