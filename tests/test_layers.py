"""The Linen and the NNX layer: the same answers, the same rules."""

import dataclasses
import subprocess
import sys

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


def test_a_reparam_that_cannot_split_and_merge_is_refused():
    message = "got reparam=.*spectral_norm.*wanted None or an object with split and merge"
    with pytest.raises(ValueError, match=message):
        deq_jax.linen.DEQ(LinenCell(), solver=SOLVER, reparam=deq.spectral_norm)
    with pytest.raises(ValueError, match=message):
        deq_jax.nnx.DEQ(NnxCell(nnx.Rngs(0)), solver=SOLVER, reparam=deq.spectral_norm)


@pytest.mark.parametrize("reparam", [None, deq.weight_norm], ids=["plain", "weight norm"])
def test_linen_and_nnx_agree_in_value_and_gradient(reparam):
    z0, x = inputs()
    linen, variables = linen_layer(LinenCell(), reparam=reparam)
    layer = deq_jax.nnx.DEQ(NnxCell(nnx.Rngs(0)), solver=SOLVER, reparam=reparam)
    weights = variables["params"]["f"]["Dense_0"]
    nnx.update(layer, {"cell": {"dense": weights}})

    def linen_loss(variables):
        return jnp.sum(linen.apply(variables, z0, x, train=True).value ** 2)

    def nnx_loss(layer):
        return jnp.sum(layer(z0, x).value ** 2)

    np.testing.assert_allclose(linen_loss(variables), nnx_loss(layer), rtol=1e-5)
    ours = jax.jit(jax.grad(linen_loss))(variables)["params"]["f"]["Dense_0"]
    theirs = nnx.to_pure_dict(nnx.jit(nnx.grad(nnx_loss))(layer))["cell"]["dense"]
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
    nnx.update(layer, {"cell": weights})
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
    theirs = value, nnx.to_pure_dict(grads)["cell"]
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


@pytest.mark.parametrize("which", ["linen", "nnx"])
def test_keep_reaches_the_solver(which):
    """f(z) = 3 z: the start is the best iterate, and every step triples it."""
    z0 = jnp.ones((2, 4))
    kernel, values = 3 * jnp.eye(4), {}
    for keep in ("best", "last"):
        options = {"solver": deq.Picard(max_steps=3, stop="abs"), "keep": keep}
        if which == "linen":
            layer = deq_jax.linen.DEQ(nn.Dense(4, use_bias=False), **options)
            sol = layer.apply({"params": {"f": {"kernel": kernel}}}, z0)
        else:
            cell = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0))
            cell.kernel[...] = kernel
            sol = deq_jax.nnx.DEQ(cell, **options)(z0)
        values[keep] = sol.value
    assert (values["best"] == z0).all()
    assert (values["last"] == 27 * z0).all()


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


# --- modules shared with a parent -------------------------------------------------------------

WORDS = jnp.arange(3)


class LinenShared(nn.Module):
    """A cell with a module of its parent, one of its own, and one in a tuple."""

    embed: nn.Module
    others: tuple[nn.Module, ...] = ()

    @nn.compact
    def __call__(self, z, x):
        z = jnp.tanh(nn.Dense(4, kernel_init=KERNEL)(z) + self.embed(x))
        return z + 0.1 * sum(jnp.sin(part(x)) for part in self.others)


class Applied(nn.Module):
    """The same place in the tree of modules as a DEQ, and 30 steps of plain iteration."""

    cell: nn.Module

    def __call__(self, z, x):
        for _ in range(30):
            z = self.cell(z, x)
        return z


class LinenParent(nn.Module):
    """Uses its embedding before or after the solve, and in it."""

    unrolled: bool = False
    embed_first: bool = True
    reparam: object = None

    def setup(self):
        self.embed = nn.Embed(7, 4)
        cell = LinenShared(self.embed, (nn.Embed(7, 4), self.embed))
        self.inner = (
            Applied(cell)
            if self.unrolled
            else deq_jax.linen.DEQ(cell, solver=SOLVER, reparam=self.reparam)
        )

    def __call__(self, words):
        first = self.embed(words) if self.embed_first else 0
        z = self.inner(jnp.zeros((3, 4)), words)
        z = z if self.unrolled else z.value
        return z + (first if self.embed_first else self.embed(words))


def square_loss(model):
    return lambda variables: jnp.sum(model.apply(variables, WORDS) ** 2)


def assert_close(found, wanted, rtol=1e-4):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("embed_first", [True, False])
@pytest.mark.parametrize("lift", [lambda kind: kind, nn.remat], ids=["plain", "remat"])
def test_linen_module_shared_with_the_parent_has_one_set_of_weights(embed_first, lift):
    model = lift(LinenParent)(embed_first=embed_first)
    params = model.init(jax.random.key(0), WORDS)["params"]
    assert set(params) == {"embed", "inner"}
    assert set(params["inner"]["f"]) == {"Dense_0", "others_0"}
    value, grads = jax.jit(jax.value_and_grad(square_loss(model)))({"params": params})

    unrolled = LinenParent(unrolled=True)
    same = {"params": {**params, "inner": {"cell": params["inner"]["f"]}}}
    wanted, by_hand = jax.jit(jax.value_and_grad(square_loss(unrolled)))(same)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    grads, by_hand = grads["params"], by_hand["params"]
    assert_close(grads["embed"], by_hand["embed"])
    assert_close(grads["inner"]["f"], by_hand["inner"]["cell"])


def test_linen_sharing_in_a_compact_parent():
    class Parent(nn.Module):
        unrolled: bool = False

        @nn.compact
        def __call__(self, words):
            embed = nn.Embed(7, 4)
            cell, z = LinenShared(embed), jnp.zeros((3, 4))
            if self.unrolled:
                return embed(words) + Applied(cell)(z, words)
            return embed(words) + deq_jax.linen.DEQ(cell, solver=SOLVER)(z, words).value

    params = Parent().init(jax.random.key(0), WORDS)["params"]
    assert set(params) == {"Embed_0", "DEQ_0"}
    assert set(params["DEQ_0"]["f"]) == {"Dense_0"}
    grads = jax.grad(square_loss(Parent()))({"params": params})["params"]
    # In a compact parent Flax keeps the cell's own weights beside the module that calls it.
    same = {"Embed_0": params["Embed_0"], "LinenShared_0": params["DEQ_0"]["f"]}
    wanted = jax.grad(square_loss(Parent(unrolled=True)))({"params": same})["params"]
    assert_close(grads["Embed_0"], wanted["Embed_0"])


def test_linen_reparam_leaves_shared_weights_whole_or_says_that_it_would_not():
    model = LinenParent(reparam=deq.weight_norm)
    params = model.init(jax.random.key(0), WORDS)["params"]
    assert set(params["inner"]["f"]["Dense_0"]["kernel"]) == {"g", "v"}
    plain = LinenParent().init(jax.random.key(0), WORDS)
    np.testing.assert_allclose(
        square_loss(model)({"params": params}), square_loss(LinenParent())(plain), rtol=1e-6
    )

    class Parent(nn.Module):
        def setup(self):
            self.dense = nn.Dense(4)
            cell = LinenShared(self.dense)
            self.inner = deq_jax.linen.DEQ(cell, solver=SOLVER, reparam=deq.weight_norm)

        def __call__(self, x):
            return self.inner(jnp.zeros_like(x), self.dense(x)).value

    with pytest.raises(ValueError, match=r"shares a module with its parent \(dense\)"):
        Parent().init(jax.random.key(0), jnp.ones((3, 4)))


def test_linen_cell_that_the_parent_applies_too_raises():
    class Parent(nn.Module):
        def setup(self):
            self.cell = LinenCell()
            self.inner = deq_jax.linen.DEQ(self.cell, solver=SOLVER)

        def __call__(self, z, x):
            return self.inner(self.cell(z, x), x).value

    with pytest.raises(ValueError, match=r"applied outside this layer too \(LinenCell.* at cell"):
        Parent().init(jax.random.key(0), *inputs())


class NnxShared(nnx.Module):
    def __init__(self, embed, rngs):
        self.embed = embed
        self.parts = nnx.List([nnx.Linear(4, 4, kernel_init=KERNEL, rngs=rngs)])

    def __call__(self, z, x):
        return jnp.tanh(self.parts[0](z) + self.embed(x))


class NnxParent(nnx.Module):
    def __init__(self, rngs, **options):
        self.embed = nnx.Embed(7, 4, rngs=rngs)
        self.layer = deq_jax.nnx.DEQ(NnxShared(self.embed, rngs), solver=SOLVER, **options)

    def __call__(self, words):
        return self.embed(words) + self.layer(jnp.zeros((3, 4)), words).value


def train_step(model):
    """One step of gradient descent on all parameters."""
    grads = nnx.grad(lambda m: jnp.sum(m(WORDS) ** 2))(model)
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads))
    return nnx.to_pure_dict(grads)


@pytest.mark.parametrize("reparam", [None, deq.weight_norm], ids=["plain", "weight norm"])
def test_nnx_module_shared_with_the_parent_has_one_set_of_weights(reparam):
    model = NnxParent(nnx.Rngs(0), reparam=reparam)
    cell = model.layer.cell
    table = model.embed.embedding[...]
    linear = nnx.to_pure_dict(nnx.state(NnxParent(nnx.Rngs(0)).layer.cell.parts, nnx.Param))[0]

    def by_hand(table, linear):
        z, u = jnp.zeros((3, 4)), table[WORDS]
        for _ in range(30):
            z = jnp.tanh(z @ linear["kernel"] + linear["bias"][None] + u)
        return jnp.sum((u + z) ** 2)

    wanted, _ = jax.grad(by_hand, argnums=(0, 1))(table, linear)
    tables = [path for path, _ in nnx.to_flat_state(nnx.state(model)) if path[-1] == "embedding"]
    assert len(tables) == 1
    grads = nnx.jit(train_step)(model)
    (found,) = (leaf for leaf in jax.tree.leaves(grads) if leaf.shape == (7, 4))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    # The update reached the parent's table and the cell's.
    np.testing.assert_allclose(model.embed.embedding[...], table - 0.1 * wanted, rtol=1e-4)
    assert cell.embed.embedding is model.embed.embedding
    other = model.layer(jnp.zeros((3, 4)), WORDS).value
    model.embed.embedding[...] = jnp.zeros_like(table)
    assert (model.layer(jnp.zeros((3, 4)), WORDS).value != other).any()


def test_nnx_layer_keeps_the_cell_itself():
    cell = NnxCell(nnx.Rngs(0))
    layer = deq_jax.nnx.DEQ(cell, solver=SOLVER)
    assert layer.cell is cell
    cell.dense.kernel[...] = jnp.zeros((4, 4))  # then z = tanh(x)
    z0, x = inputs()
    np.testing.assert_allclose(layer(z0, x).value, jnp.tanh(x), atol=1e-5)


def test_nnx_weight_norm_stores_the_parts_in_the_cell():
    z0, x = inputs()
    plain = deq_jax.nnx.DEQ(NnxCell(nnx.Rngs(0)), solver=SOLVER)
    cell = NnxCell(nnx.Rngs(0))
    kernel = cell.dense.kernel
    layer = deq_jax.nnx.DEQ(cell, solver=SOLVER, reparam=deq.weight_norm)
    assert cell.dense.kernel["v"] is kernel  # its metadata too
    shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(layer, nnx.Param)))
    assert shapes == {"cell": {"dense": {"bias": (4,), "kernel": {"g": (4,), "v": (4, 4)}}}}
    np.testing.assert_allclose(layer(z0, x).value, plain(z0, x).value, rtol=1e-6)
    # A second layer of the same cell has the same weights.
    again = deq_jax.nnx.DEQ(cell, solver=SOLVER, reparam=deq.weight_norm)
    kernel[...] = -kernel[...]
    assert (layer(z0, x).value == again(z0, x).value).all()
    assert (layer(z0, x).value != plain(z0, x).value).any()


# --- cells that are not a fixed function ------------------------------------------------------


class LinenWith(nn.Module):
    part: nn.Module

    @nn.compact
    def __call__(self, z, x):
        return jnp.tanh(self.part(nn.Dense(4, kernel_init=KERNEL)(z))) + x


class LinenSpectral(nn.Module):
    update: bool

    @nn.compact
    def __call__(self, z, x):
        return jnp.tanh(nn.SpectralNorm(nn.Dense(4))(z, update_stats=self.update)) + x


class NnxWith(nnx.Module):
    def __init__(self, part):
        self.dense = nnx.Linear(4, 4, kernel_init=KERNEL, rngs=nnx.Rngs(0))
        self.part = part

    def __call__(self, z, x):
        return jnp.tanh(self.part(self.dense(z))) + x


@pytest.mark.parametrize(
    "cell",
    [
        LinenWith(nn.Dropout(0.1, deterministic=False)),
        LinenWith(nn.BatchNorm(use_running_average=False)),
        LinenSpectral(update=True),
    ],
    ids=["dropout", "batch norm", "spectral norm"],
)
def test_linen_cells_that_change_in_a_solve_raise(cell):
    with pytest.raises(ValueError, match="draws random numbers or changes variables"):
        linen_layer(cell)


@pytest.mark.parametrize("reparam", [None, deq.weight_norm], ids=["plain", "weight norm"])
@pytest.mark.parametrize("kind", ["dropout", "batch norm"])
def test_nnx_cells_that_change_in_a_solve_raise_until_they_are_in_evaluation_mode(kind, reparam):
    z0, x = inputs()
    rngs = nnx.Rngs(0)
    part = nnx.Dropout(0.5, rngs=rngs) if kind == "dropout" else nnx.BatchNorm(4, rngs=rngs)
    layer = deq_jax.nnx.DEQ(NnxWith(part), solver=SOLVER, reparam=reparam)
    changes = "part.rngs.count" if kind == "dropout" else "part.mean, part.var"
    for _ in range(2):
        with pytest.raises(ValueError, match=f"variables change when it is called, {changes};"):
            layer(z0, x)
        layer.eval()
        sol = layer(z0, x)
        assert sol.stats.converged.all()
        layer.train()
    if kind == "dropout":  # without effect in evaluation
        identity = deq_jax.nnx.DEQ(NnxWith(lambda z: z), solver=SOLVER, reparam=reparam)
        np.testing.assert_allclose(sol.value, identity(z0, x).value, rtol=1e-6)


def test_nnx_attention_with_dropout_in_evaluation_mode_is_a_cell():
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    cell = nnx.MultiHeadAttention(
        2, 8, decode=False, dropout_rate=0.1, deterministic=True, rngs=nnx.Rngs(0)
    )
    assert deq_jax.nnx.DEQ(cell, solver=SOLVER)(jnp.zeros_like(x), x).stats.converged.all()


@pytest.mark.parametrize("which", ["linen", "nnx"])
def test_frozen_batch_statistics_enter_f_and_stay_as_they_are(which):
    z0, x = inputs()
    mean, var = jnp.full(4, 0.5), jnp.full(4, 4.0)
    if which == "linen":
        layer, variables = linen_layer(LinenWith(nn.BatchNorm(use_running_average=True)))
        assert set(variables) == {"params", "batch_stats"}
        given = {"f": {"part": {"mean": mean, "var": var}}}
        weights = variables["params"]["f"]["Dense_0"]
        sol, after = layer.apply(
            {**variables, "batch_stats": given}, z0, x, mutable=["batch_stats"]
        )
        assert_close(after["batch_stats"], given, rtol=0)
    else:
        part = nnx.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(0))
        layer = deq_jax.nnx.DEQ(NnxWith(part), solver=SOLVER)
        part.mean[...], part.var[...] = mean, var
        sol = layer(z0, x)
        weights = nnx.to_pure_dict(nnx.state(layer.cell.dense))
        assert (part.mean[...] == mean).all() and (part.var[...] == var).all()
    inner = sol.value @ weights["kernel"] + weights["bias"][None]
    image = jnp.tanh((inner - mean[None]) / jnp.sqrt(var[None] + 1e-5)) + x
    np.testing.assert_allclose(image, sol.value, atol=1e-5)


def test_linen_spectral_norm_without_updates_is_accepted():
    layer, variables = linen_layer(LinenSpectral(update=False))
    assert layer.apply(variables, *inputs()).stats.num_steps.all()


# --- how cells are called ---------------------------------------------------------------------


class LinenFields(nn.Module):
    """Fields with the names of the optional methods."""

    masks: bool = True
    inject: object = nn.relu

    @nn.compact
    def __call__(self, z, x):
        return jnp.tanh(nn.Dense(4, kernel_init=KERNEL)(z) + self.inject(x))


class NnxFields(nnx.Module):
    def __init__(self, rngs):
        self.masks = True
        self.inject = nnx.Linear(4, 4, rngs=rngs)
        self.dense = nnx.Linear(4, 4, kernel_init=KERNEL, rngs=rngs)

    def __call__(self, z, x):
        return jnp.tanh(self.dense(z) + self.inject(x))


@pytest.mark.parametrize("which", ["linen", "nnx"])
def test_fields_named_as_the_optional_methods_are_only_fields(which):
    z0, x = inputs()
    if which == "linen":
        layer, variables = linen_layer(LinenFields())
        sol = layer.apply(variables, z0, x, train=True)
    else:
        sol = deq_jax.nnx.DEQ(NnxFields(nnx.Rngs(0)), solver=SOLVER)(z0, x, key=jax.random.key(0))
    assert sol.equation.x is x  # neither injected nor paired with masks
    assert sol.stats.converged.all()


def test_a_cell_of_z_alone_needs_no_x():
    """f(z) = z A + b, solved in closed form."""
    z0, _ = inputs()
    layer = deq_jax.linen.DEQ(nn.Dense(4, kernel_init=KERNEL), solver=SOLVER)
    variables = layer.init(jax.random.key(0), z0)
    dense = variables["params"]["f"]
    bias = jnp.arange(4.0)
    wanted = jnp.linalg.solve((jnp.eye(4) - dense["kernel"]).T, bias)
    linen = layer.apply({"params": {"f": {**dense, "bias": bias}}}, z0)
    cell = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    cell.kernel[...], cell.bias[...] = dense["kernel"], bias
    for sol in (linen, deq_jax.nnx.DEQ(cell, solver=SOLVER)(z0)):
        np.testing.assert_allclose(sol.value, jnp.broadcast_to(wanted, (3, 4)), rtol=1e-4)
        assert deq.frobenius_penalty(*sol.at, key=jax.random.key(0)) > 0


def test_masks_without_x():
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, z, x, masks):
            assert x is None
            return 1 + nn.Dense(4, kernel_init=KERNEL)(z) * (1 if masks is None else masks)

        def masks(self, key, z, x):
            assert x is None
            return deq.masks.bernoulli(key, z.shape, 0.3)

    layer = deq_jax.linen.DEQ(Linen(), solver=SOLVER)
    z0, _ = inputs()
    variables = layer.init(jax.random.key(0), z0)
    rngs = {"dropout": jax.random.key(1)}
    drawn = layer.apply(variables, z0, train=True, rngs=rngs)
    assert drawn.stats.converged.all()
    assert (drawn.value != layer.apply(variables, z0).value).any()


@pytest.mark.parametrize("make", [deq_jax.linen.DEQ, deq_jax.nnx.DEQ], ids=["linen", "nnx"])
def test_what_is_no_cell_raises_and_names_the_remedy(make):
    linen = make is deq_jax.linen.DEQ
    other = nnx.Linear(4, 4, rngs=nnx.Rngs(0)) if linen else nn.Dense(4)
    remedy = "deq_jax.nnx.DEQ for an NNX" if linen else "deq_jax.linen.DEQ for a Linen"
    for cell in (other, nn.Dense if linen else nnx.Linear, jnp.tanh):
        with pytest.raises(ValueError, match=remedy) as caught:
            make(cell, solver=SOLVER)
        assert "call the class first" in str(caught.value)
        assert len(str(caught.value)) < 300  # the cell's type, not all of its weights


@pytest.mark.parametrize("which", ["linen", "nnx"])
def test_a_cell_that_returns_a_carry_and_an_output_raises(which):
    z0, x = inputs()
    with pytest.raises(ValueError, match=r"f returned \(float32\[3,4\], float32\[3,4\]\)"):
        if which == "linen":
            linen_layer(nn.GRUCell(4))
        else:
            deq_jax.nnx.DEQ(nnx.GRUCell(4, 4, rngs=nnx.Rngs(0)), solver=SOLVER)(z0, x)


def test_linen_layer_under_nn_vmap():
    """Two layers side by side, with weights, masks and statistics of their own."""
    z0, x = inputs()
    z0, x = jnp.stack([z0, z0]), jnp.stack([x, -x])
    stacked = nn.vmap(
        deq_jax.linen.DEQ,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, 0, None),
    )(LinenMasked(), solver=SOLVER)
    variables = stacked.init(jax.random.key(0), z0, x, False)
    sol = stacked.apply(variables, z0, x, False)
    assert sol.stats.converged.shape == (2, 3) and sol.stats.converged.all()
    single = deq_jax.linen.DEQ(LinenMasked(), solver=SOLVER)
    for i in range(2):
        alone = single.apply(jax.tree.map(lambda a, i=i: a[i], variables), z0[i], x[i])
        np.testing.assert_allclose(sol.value[i], alone.value, atol=1e-5)
    drawn = stacked.apply(variables, z0, x, True, rngs={"dropout": jax.random.key(1)})
    assert drawn.stats.converged.all() and (drawn.value != sol.value).any()


def test_nnx_layer_as_a_linen_module():
    z0, x = inputs()
    module = nnx.bridge.ToLinen(lambda rngs: deq_jax.nnx.DEQ(NnxCell(rngs), solver=SOLVER))
    variables = module.init(jax.random.key(0), z0, x)
    assert set(variables["params"]["cell"]["dense"]) == {"kernel", "bias"}

    def loss(variables):
        return module.apply(variables, z0, x).value.sum()

    plain, same = linen_layer(LinenCell())
    same = {"params": {"f": {"Dense_0": variables["params"]["cell"]["dense"]}}}
    grads = jax.jit(jax.grad(loss))(variables)["params"]["cell"]["dense"]
    wanted = jax.jit(jax.grad(lambda v: plain.apply(v, z0, x).value.sum()))(same)
    assert_close(grads, wanted["params"]["f"]["Dense_0"])


# --- cost and what comes out ------------------------------------------------------------------


class LinenMany(LinenInjecting):
    """A field of modules and one with a list, which Flax makes a tuple."""

    parts: tuple[nn.Module, ...] = (nn.Dense(4),)
    sizes: list[int] = dataclasses.field(default_factory=lambda: [1, 2])


@pytest.mark.parametrize("reparam", [None, deq.weight_norm], ids=["plain", "weight norm"])
@pytest.mark.parametrize("which", ["linen", "nnx"])
def test_the_map_of_two_calls_is_the_same(which, reparam):
    """So that nothing that is cached by f compiles again."""
    z0, x = inputs()
    if which == "linen":
        layer, variables = linen_layer(LinenMany(), reparam=reparam)
        call = lambda: layer.apply(variables, z0, x, train=False)  # noqa: E731
    else:
        layer = deq_jax.nnx.DEQ(NnxInjecting(nnx.Rngs(0)), solver=SOLVER, reparam=reparam)
        call = lambda: layer(z0, x)  # noqa: E731
    first, second = jax.eval_shape(call).equation.f, jax.eval_shape(call).equation.f
    assert first == second and hash(first) == hash(second)


@pytest.mark.parametrize("reparam", [None, deq.weight_norm], ids=["plain", "weight norm"])
@pytest.mark.parametrize("which", ["linen", "nnx"])
def test_a_second_eager_call_compiles_nothing(which, reparam, compilations):
    z0, x = inputs()
    key = jax.random.key(0)
    if which == "linen":
        layer, variables = linen_layer(LinenInjecting(), reparam=reparam)

        def loss(variables):
            sol = layer.apply(variables, z0, x, train=True, rngs={"dropout": key})
            return sol.value.sum()

        call = lambda: jax.value_and_grad(loss)(variables)  # noqa: E731
    else:
        layer = deq_jax.nnx.DEQ(NnxInjecting(nnx.Rngs(0)), solver=SOLVER, reparam=reparam)
        call = lambda: nnx.value_and_grad(lambda m: m(z0, x, key=key).value.sum())(layer)  # noqa: E731
    first, _ = call()
    compilations.clear()
    second, _ = call()
    assert not compilations and float(first) == float(second)
    jax.jit(lambda a: a + x)(z0)
    assert compilations  # the counter counts


def test_a_solution_without_its_equation_leaves_jit_without_weights():
    layer, variables = linen_layer(LinenCell())

    @jax.jit
    def light(variables, z0, x):
        return dataclasses.replace(layer.apply(variables, z0, x), equation=None)

    assert set(map(jnp.shape, jax.tree.leaves(light(variables, *inputs())))) == {
        (3, 4),
        (3,),
        (50, 3),
    }


def test_the_parts_of_the_package_are_attributes():
    """In a fresh process, since other imports set the attributes too."""
    program = """
import sys, deq_jax as deq
assert not {"flax", "optax"} & set(sys.modules)
parts = "convert data linen models nnx testing training".split()
assert {*parts, "__version__", "solve"} <= set(dir(deq))
assert "flax" not in sys.modules  # dir imports nothing
for name in parts:
    assert getattr(deq, name) is sys.modules[f"deq_jax.{name}"]
assert deq.linen.DEQ and deq.nnx.DEQ
assert deq.__version__[0].isdigit()
try:
    deq.andersen
except AttributeError as error:
    assert "'andersen'" in str(error)
else:
    raise AssertionError("deq.andersen")
"""
    subprocess.run([sys.executable, "-c", program], check=True)
