"""The Linen and the NNX layer: the same answers, the same rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import deq_jax as deq
import deq_jax.linen
import deq_jax.nnx

SOLVER = deq.Anderson(tol=1e-6, max_steps=50)
KERNEL = deq.init.orthogonal(0.5)


class LinenCell(nn.Module):
    @nn.compact
    def __call__(self, z, x):
        return jnp.tanh(nn.Dense(4, kernel_init=KERNEL)(z) + x)


class LinenMasked(LinenCell):
    @nn.compact
    def __call__(self, z, x, masks):
        z = z if masks is None else z * masks
        return jnp.tanh(nn.Dense(4, kernel_init=KERNEL)(z) + x)

    def masks(self, key, z, x):
        return deq.masks.bernoulli(key, z.shape, 0.3)


class NnxCell(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 4, kernel_init=KERNEL, rngs=rngs)

    def __call__(self, z, x):
        return jnp.tanh(self.dense(z) + x)


class NnxMasked(NnxCell):
    def __call__(self, z, x, masks):
        z = z if masks is None else z * masks
        return jnp.tanh(self.dense(z) + x)

    def masks(self, key, z, x):
        return deq.masks.bernoulli(key, z.shape, 0.3)


class LinenInjecting(nn.Module):
    """What of the map does not depend on z is a method of its own."""

    def setup(self):
        self.inner = nn.Dense(4, kernel_init=KERNEL)
        self.outer = nn.Dense(4)

    def __call__(self, z, x, masks):
        z = z if masks is None else z * masks
        return jnp.tanh(self.inner(z) + x)

    def inject(self, x):
        return nn.relu(self.outer(x))

    def masks(self, key, z, x):
        return deq.masks.bernoulli(key, z.shape, 0.3)


class NnxInjecting(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(4, 4, kernel_init=KERNEL, rngs=rngs)
        self.outer = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, z, x, masks):
        z = z if masks is None else z * masks
        return jnp.tanh(self.inner(z) + x)

    def inject(self, x):
        return nnx.relu(self.outer(x))

    def masks(self, key, z, x):
        return deq.masks.bernoulli(key, z.shape, 0.3)


def inputs():
    x = jax.random.normal(jax.random.key(1), (3, 4))
    return jnp.zeros_like(x), x


def linen_layer(cell, **options):
    z0, x = inputs()
    layer = deq_jax.linen.DEQ(cell, solver=SOLVER, **options)
    return layer, layer.init(jax.random.key(0), z0, x, train=False)


@pytest.mark.parametrize("reparam", [None, deq.weight_norm], ids=["plain", "weight norm"])
def test_linen_and_nnx_agree_in_value_and_gradient(reparam):
    z0, x = inputs()
    linen, variables = linen_layer(LinenCell(), reparam=reparam)
    layer = deq_jax.nnx.DEQ(NnxCell(nnx.Rngs(0)), solver=SOLVER, reparam=reparam)
    weights = variables["params"]["f"]["Dense_0"]
    nnx.update(layer, {"params": {"dense": weights}})

    def linen_loss(variables):
        return jnp.sum(linen.apply(variables, z0, x, train=True).value ** 2)

    def nnx_loss(layer):
        return jnp.sum(layer(z0, x).value ** 2)

    np.testing.assert_allclose(linen_loss(variables), nnx_loss(layer), rtol=1e-6)
    ours = jax.jit(jax.grad(linen_loss))(variables)["params"]["f"]["Dense_0"]
    theirs = nnx.to_pure_dict(nnx.jit(nnx.grad(nnx_loss))(layer))["params"]["dense"]
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reparam", [None, deq.weight_norm], ids=["plain", "weight norm"])
def test_what_a_cell_injects_is_part_of_the_map(reparam):
    """The same equilibrium and gradients as of one function of all parameters, in both layers."""
    z0, x = inputs()
    linen, variables = linen_layer(LinenInjecting(), reparam=reparam)
    layer = deq_jax.nnx.DEQ(NnxInjecting(nnx.Rngs(0)), solver=SOLVER, reparam=reparam)
    weights = variables["params"]["f"]
    assert set(weights) == {"inner", "outer"}
    nnx.update(layer, {"params": weights})
    key = jax.random.key(7)

    def bare(weights, masks):
        merged = weights if reparam is None else reparam.merge(weights)

        def f(p, z, x):
            u = nn.relu(x @ p["outer"]["kernel"] + p["outer"]["bias"][None])
            return jnp.tanh((z * masks) @ p["inner"]["kernel"] + p["inner"]["bias"][None] + u)

        return jnp.sum(deq.fixed_point(f, merged, z0, x, solver=SOLVER).value ** 2)

    def linen_loss(weights):
        value = linen.apply({"params": {"f": weights}}, z0, x, train=False).value
        return jnp.sum(value**2)

    def nnx_loss(layer, key=None):
        return jnp.sum(layer(z0, x, key=key).value ** 2)

    one = jnp.ones_like(z0)
    wanted = jax.jit(jax.value_and_grad(bare))(weights, one)
    ours = jax.jit(jax.value_and_grad(linen_loss))(weights)
    value, grads = nnx.jit(nnx.value_and_grad(nnx_loss))(layer)
    theirs = value, nnx.to_pure_dict(grads)["params"]
    for found in (ours, theirs):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    masks = deq.masks.bernoulli(key, z0.shape, 0.3)
    np.testing.assert_allclose(nnx_loss(layer, key), bare(weights, masks), rtol=1e-5)
    at = linen.apply(variables, z0, x, train=False).at
    penalty = deq.frobenius_penalty(*at, key=key)
    assert np.isfinite(penalty) and penalty > 0


def test_linen_gradient_is_that_of_the_bare_fixed_point():
    z0, x = inputs()
    layer, variables = linen_layer(LinenCell())
    dense = variables["params"]["f"]["Dense_0"]

    def bare(dense):
        f = lambda p, z, x: jnp.tanh(z @ p["kernel"] + p["bias"][None] + x)  # noqa: E731
        return jnp.sum(deq.fixed_point(f, dense, z0, x, solver=SOLVER).value ** 2)

    def layered(dense):
        params = {"params": {"f": {"Dense_0": dense}}}
        return jnp.sum(layer.apply(params, z0, x, train=False).value ** 2)

    for a, b in zip(
        jax.tree.leaves(jax.grad(bare)(dense)),
        jax.tree.leaves(jax.grad(layered)(dense)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_weight_norm_is_stored_split_and_starts_at_the_cells_own_weights():
    z0, x = inputs()
    plain_layer, plain = linen_layer(LinenCell())
    split_layer, split = linen_layer(LinenCell(), reparam=deq.weight_norm)
    assert set(split["params"]["f"]["Dense_0"]["kernel"]) == {"g", "v"}
    np.testing.assert_array_equal(
        plain_layer.apply(plain, z0, x, train=False).value,
        split_layer.apply(split, z0, x, train=False).value,
    )


def test_linen_masks_are_drawn_once_per_solve_and_only_in_training():
    z0, x = inputs()
    layer, variables = linen_layer(LinenMasked())

    def value(train, seed):
        rngs = {"dropout": jax.random.key(seed)}
        return layer.apply(variables, z0, x, train=train, rngs=rngs)

    assert value(True, 0).stats.converged.all()  # one mask for all steps: there is a fixed point
    assert (value(True, 0).value == value(True, 0).value).all()
    assert (value(True, 0).value != value(True, 1).value).any()
    assert (value(False, 0).value == value(False, 1).value).all()


def test_nnx_masks_are_drawn_once_per_solve_and_only_with_a_key():
    z0, x = inputs()
    layer = deq_jax.nnx.DEQ(NnxMasked(nnx.Rngs(0)), solver=SOLVER)
    first, again, other = (layer(z0, x, key=jax.random.key(s)) for s in (0, 0, 1))
    assert first.stats.converged.all()
    assert (first.value == again.value).all() and (first.value != other.value).any()
    assert (layer(z0, x).value != first.value).any()


@pytest.mark.parametrize("which", ["linen", "nnx"])
def test_the_equation_feeds_the_penalty_and_the_spectral_radius(which):
    z0, x = inputs()
    if which == "linen":
        layer, variables = linen_layer(LinenCell(), reparam=deq.weight_norm)
        sol = layer.apply(variables, z0, x, train=False)
    else:
        sol = deq_jax.nnx.DEQ(NnxCell(nnx.Rngs(0)), solver=SOLVER)(z0, x)
    f, params, z, operands = sol.at
    np.testing.assert_allclose(f(params, z, operands), z, atol=1e-5)
    jacobian = jax.vmap(lambda z, x: jax.jacrev(lambda v: f(params, v[None], x[None])[0])(z))(
        z, operands
    )
    exact = jnp.sum(jacobian**2) / z.size
    estimate = deq.frobenius_penalty(*sol.at, key=jax.random.key(0), probes=2000)
    np.testing.assert_allclose(estimate, exact, rtol=0.05)
    radius = np.abs(np.linalg.eigvals(np.asarray(jacobian))).max(axis=1)
    np.testing.assert_allclose(
        deq.spectral_radius(*sol.at, key=jax.random.key(0)), radius, rtol=0.1
    )


def test_budget_and_probe_reach_the_solver():
    z0, x = inputs()
    layer, variables = linen_layer(LinenCell())
    other = deq_jax.nnx.DEQ(NnxCell(nnx.Rngs(0)), solver=SOLVER)
    assert (layer.apply(variables, z0, x, train=False, max_steps=2).stats.num_steps == 2).all()
    assert (other(z0, x, max_steps=2).stats.num_steps == 2).all()
    for call in (
        lambda probe: layer.apply(variables, z0, x, train=False, probe=probe),
        lambda probe: other(z0, x, probe=probe),
    ):
        stats = jax.grad(lambda p, call=call: call(p).value.sum())(deq.backward_probe(z0))
        assert (stats.num_steps > 0).all()


@pytest.mark.parametrize("kind", ["dropout", "batch norm"])
def test_nnx_cells_that_change_themselves_are_refused(kind):
    class Cell(nnx.Module):
        def __init__(self, rngs):
            self.part = (
                nnx.Dropout(0.1, rngs=rngs) if kind == "dropout" else nnx.BatchNorm(4, rngs=rngs)
            )

        def __call__(self, z, x):
            return self.part(z) + x

    with pytest.raises(ValueError, match="variables change") as caught:
        deq_jax.nnx.DEQ(Cell(nnx.Rngs(0)), solver=SOLVER)
    assert "part" in str(caught.value)


def test_nnx_layers_train_with_nnx_transformations():
    z0, x = inputs()
    layer = deq_jax.nnx.DEQ(NnxCell(nnx.Rngs(0)), solver=SOLVER)

    @nnx.jit
    def step(layer):
        value, grads = nnx.value_and_grad(lambda m: jnp.sum((m(z0, x).value - 0.3) ** 2))(layer)
        weights = nnx.state(layer, nnx.Param)
        nnx.update(layer, jax.tree.map(lambda p, g: p - 0.1 * g, weights, grads))
        return value

    losses = [float(step(layer)) for _ in range(10)]
    assert losses[-1] < 0.7 * losses[0]
