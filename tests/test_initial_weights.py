"""The family of initial weights as a setting of every model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deq_jax as deq
from deq_jax import linen
from deq_jax.models.mdeq_cell import MDEQCell
from deq_jax.models.mlp import ToyCell
from deq_jax.models.transformer_cell import Injection, Memory, TransformerCell, positions
from deq_jax.training import fields
from experiments.common.families import FAMILIES, FamilyConfig
from experiments.image_classification.presets import PRESETS as IMAGE_PRESETS
from experiments.language_modeling.presets import PRESETS as LANGUAGE_PRESETS
from experiments.segmentation.presets import PRESETS as SEGMENTATION_PRESETS
from experiments.toy_regression.config import PRESETS as TOY_PRESETS

SCALE, N = 0.7, 32


def assert_of(family, matrix):
    """A square matrix is of the family, at the scale."""
    n = len(matrix)
    variance = float(jnp.mean(matrix**2) * n) / SCALE**2
    if family == "orthogonal":
        np.testing.assert_allclose(matrix @ matrix.T, SCALE**2 * np.eye(n), atol=1e-5)
    else:
        assert variance == pytest.approx(1 + (family == "goe") / n, abs=8 / n)
        assert np.abs(matrix @ matrix.T - SCALE**2 * np.eye(n)).max() > 0.1
    symmetric = float(jnp.abs(matrix - matrix.T).max())
    assert symmetric < 1e-5 if family == "goe" else symmetric > 0.1


def transformer(**settings):
    cell = TransformerCell(features=N, heads=2, hidden=2 * N, **settings)
    z = jnp.zeros((1, 4, N))
    memory = Memory(z=z[:, :2], u=jnp.zeros((1, 2, 2 * N)), filled=jnp.array([2]))
    x = Injection(u=jnp.ones((1, 4, 3 * N)), memory=memory, positions=positions(6, N))
    return jax.jit(lambda key: cell.init(key, z, x, method=linen.once))(jax.random.key(1))["params"]


@pytest.mark.parametrize("family", FAMILIES)
def test_square_maps_of_the_transformer_are_of_the_family(family):
    params = transformer(weights=FAMILIES[family](SCALE))
    for part in jnp.split(params["qkv"]["kernel"], 3, axis=1):
        assert_of(family, part)
    assert_of(family, params["o"]["kernel"])
    product = params["ff1"]["kernel"] @ params["ff2"]["kernel"]
    if family == "gaussian":
        assert float(jnp.mean(product**2) * N) == pytest.approx(SCALE**2, rel=0.2)
    else:
        assert_of(family, product)
        first, second = (float(jnp.sum(params[name]["kernel"] ** 2)) for name in ("ff1", "ff2"))
        assert first == pytest.approx(second, rel=0.2)  # neither of them carries it all
    published = transformer()
    np.testing.assert_array_equal(params["r"]["kernel"], published["r"]["kernel"])


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_of_the_multiscale_cell_are_of_the_family_at_the_centre(family):
    cell = MDEQCell(channels=(8, N), groups=4, big_kernels=(0, 1), weights=FAMILIES[family](SCALE))
    z = (jnp.ones((1, 4, 4, 8)), jnp.ones((1, 2, 2, N)))
    params = jax.jit(lambda key: cell.init(key, z, z[0]))(jax.random.key(2))["params"]
    assert_of(family, params["post1"]["conv"]["kernel"][0, 0])
    first = params["branch1_block0"]["conv1"]["kernel"]  # 5 x 5
    second = params["branch1_block0"]["conv2"]["kernel"]  # 3 x 3
    assert first.shape == (5, 5, N, 5 * N) and second.shape == (3, 3, 5 * N, N)
    if family == "gaussian":
        assert all((kernel != 0).all() for kernel in (first, second))
        assert float(jnp.var(first)) == pytest.approx(SCALE / (25 * N), rel=0.05)
        assert float(jnp.var(second)) == pytest.approx(SCALE / (9 * 5 * N), rel=0.05)
        return
    assert_of(family, first[2, 2] @ second[1, 1])
    assert not first.at[2, 2].set(0).any() and not second.at[1, 1].set(0).any()


def test_gaussian_kernels_at_the_centre_tap_are_a_control():
    weights = FamilyConfig(init="gaussian", init_scale=SCALE, init_centre=True).build_weights()
    assert weights == deq.init.gaussian(SCALE, centre=True) != deq.init.gaussian(SCALE)
    first = deq.init.product_first(weights)(jax.random.key(0), (5, 5, N, 4 * N))
    second = deq.init.product_second(weights, first)(jax.random.key(1), (3, 3, 4 * N, N))
    assert not first.at[2, 2].set(0).any() and not second.at[1, 1].set(0).any()
    product = first[2, 2] @ second[1, 1]
    assert float(jnp.mean(product**2) * N) == pytest.approx(SCALE**2, rel=0.2)
    with pytest.raises(ValueError, match="init must be gaussian for init_centre, got 'goe'"):
        FamilyConfig(init="goe", init_centre=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_scalar_cell(family):
    z = jnp.ones((2, 1))
    params = ToyCell(50, FAMILIES[family](SCALE)).init(jax.random.key(0), z, z)["params"]
    product = params["W1"]["kernel"] @ params["W2"]["kernel"]
    if family == "orthogonal":
        assert abs(product.item()) == pytest.approx(SCALE, rel=1e-5)
    assert jnp.isfinite(product).all() and product.item() != 0


def test_hidden_layers_too_narrow_for_a_product_are_refused():
    with pytest.raises(ValueError, match="layer of 4 between layers of 8; wanted at least 8"):
        deq.init.product_first(deq.init.goe(0.5))(jax.random.key(0), (8, 4))


def test_a_product_of_scale_0_is_0():
    first = deq.init.product_first(deq.init.orthogonal(0.0))(jax.random.key(0), (3, 5))
    second = deq.init.product_second(deq.init.orthogonal(0.0), first)(jax.random.key(0), (5, 3))
    assert not (first @ second).any()


@pytest.mark.parametrize(
    "presets", [TOY_PRESETS, IMAGE_PRESETS, SEGMENTATION_PRESETS, LANGUAGE_PRESETS]
)
def test_all_presets_have_the_flag(presets):
    for config in presets.values():
        if getattr(config.model, "name", "").startswith("resnet"):
            with pytest.raises(ValueError, match=r"model.init must be published for a resnet"):
                fields.replace(config, {"model.init": "goe"})
            continue
        changed = fields.replace(config, {"model.init": "goe", "model.init_scale": 0.3})
        assert changed.model.build_weights() == deq.init.goe(0.3)
        assert config.model.build_weights() is None
        with pytest.raises(ValueError, match=r"model.init_scale must be above 0"):
            fields.replace(config, {"model.init_scale": 0.0})


def test_published_weights_are_the_default_and_unchanged():
    assert FamilyConfig().build_weights() is None
    cell = TransformerCell(features=8, heads=2, hidden=16)
    assert dataclasses.replace(cell, weights=None) == cell
