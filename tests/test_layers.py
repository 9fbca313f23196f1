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

# The cells contract; a program of plain iteration compiles in a third of Anderson's time.
SOLVER = deq.Picard(tol=1e-6, max_steps=50)
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
    layer = deq_jax.linen.DEQ(cell, **{"solver": SOLVER} | options)
    return layer, layer.init(jax.random.key(0), z0, x, train=False, max_steps=0)


def exact(dense, u, masks=None, slope=lambda z: 2 * z):
    """The solution of z = tanh((masks z) W + b + u) and gradients of a loss with this slope.

    In float64; the last gradient is that in u.
    """
    w, u = whole(dense["kernel"]), wide(u)
    masks = np.ones_like(u) if masks is None else wide(masks)
    z = np.zeros_like(u)
    for _ in range(200):
        z = np.tanh((masks * z) @ w + wide(dense["bias"]) + u)
    v = slope(z)
    for _ in range(200):
        v = slope(z) + masks * ((v * (1 - z**2)) @ w.T)
    c = v * (1 - z**2)
    grads = {"kernel": stored((masks * z).T @ c, dense["kernel"]), "bias": c.sum(axis=0)}
    return z, grads, c


def wide(a):
    return np.asarray(a, np.float64)


def whole(kernel):
    """A kernel that weight norm may have split."""
    if not isinstance(kernel, dict):
        return wide(kernel)
    return wide(kernel["g"]) * wide(kernel["v"]) / np.linalg.norm(wide(kernel["v"]), axis=0)


def stored(grad, kernel):
    """The gradient in the parts of a kernel, from that in the whole."""
    if not isinstance(kernel, dict):
        return grad
    length = np.linalg.norm(wide(kernel["v"]), axis=0)
    unit = wide(kernel["v"]) / length
    along = (unit * grad).sum(axis=0)
    return {"g": along, "v": wide(kernel["g"]) / length * (grad - unit * along)}


def assert_close(found, wanted, rtol=1e-4, atol=1e-5):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def test_a_reparam_that_cannot_split_and_merge_is_refused():
    message = "got reparam=.*spectral_norm.*wanted None or an object with split and merge"
    with pytest.raises(ValueError, match=message):
        deq_jax.linen.DEQ(LinenCell(), solver=SOLVER, reparam=deq.spectral_norm)
    with pytest.raises(ValueError, match=message):
        deq_jax.nnx.DEQ(NnxCell(nnx.Rngs(0)), solver=SOLVER, reparam=deq.spectral_norm)


@pytest.mark.parametrize("reparam", [None, deq.weight_norm], ids=["plain", "weight norm"])
def test_linen_and_nnx_have_the_value_and_the_gradient_of_the_equation(reparam):
    z0, x = inputs()
    solver = deq.Picard(tol=1e-7, max_steps=50)
    linen, variables = linen_layer(LinenCell(), reparam=reparam, solver=solver)
    layer = deq_jax.nnx.DEQ(NnxCell(nnx.Rngs(0)), solver=solver, reparam=reparam)
    weights = variables["params"]["f"]["Dense_0"]
    nnx.update(layer, {"cell": {"dense": weights}})

    def linen_loss(weights):
        params = {"params": {"f": {"Dense_0": weights}}}
        return jnp.sum(linen.apply(params, z0, x, train=True).value ** 2)

    def nnx_loss(layer):
        return jnp.sum(layer(z0, x).value ** 2)

    z, wanted, _ = exact(weights, x)
    ours = jax.jit(jax.value_and_grad(linen_loss))(weights)
    value, state = nnx.jit(nnx.value_and_grad(nnx_loss))(layer)
    theirs = value, nnx.to_pure_dict(state)["cell"]["dense"]
    for value, grads in (ours, theirs):
        np.testing.assert_allclose(value, np.sum(z**2), rtol=1e-5)
        assert_close(grads, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("reparam", "masked"),
    [(None, False), (deq.weight_norm, True)],
    ids=["plain", "weight norm, masked"],
)
def test_what_a_cell_injects_is_part_of_the_map(reparam, masked):
    """The same equilibrium and gradients as of one function of all parameters, in both layers."""
    z0, x = inputs()
    linen, variables = linen_layer(LinenInjecting(), reparam=reparam)
    layer = deq_jax.nnx.DEQ(NnxInjecting(nnx.Rngs(0)), solver=SOLVER, reparam=reparam)
    weights = variables["params"]["f"]
    assert set(weights) == {"inner", "outer"}
    nnx.update(layer, {"cell": weights})
    key = jax.random.key(7)

    def by_hand(masks):
        outer = weights["outer"]
        before = wide(x) @ whole(outer["kernel"]) + wide(outer["bias"])
        z, inner, c = exact(weights["inner"], np.maximum(before, 0), masks)
        c = c * (before > 0)
        kernel = stored(wide(x).T @ c, outer["kernel"])
        return np.sum(z**2), {"inner": inner, "outer": {"kernel": kernel, "bias": c.sum(axis=0)}}

    def linen_loss(weights):
        params, rngs = {"params": {"f": weights}}, {"dropout": key}
        sol = linen.apply(params, z0, x, train=masked, rngs=rngs)
        penalty = deq.frobenius_penalty(*sol.at, key=key)
        return jnp.sum(sol.value**2), (sol.equation.x[1], penalty)

    def nnx_loss(layer):
        return jnp.sum(layer(z0, x, key=key if masked else None).value ** 2)

    ours = jax.jit(jax.value_and_grad(linen_loss, has_aux=True))(weights)
    (value, (masks, penalty)), grads = ours
    assert (masks is not None) == masked
    assert_close((value, grads), by_hand(masks), atol=1e-6)
    assert np.isfinite(penalty) and penalty > 0
    value, grads = nnx.jit(nnx.value_and_grad(nnx_loss))(layer)
    masks = deq.masks.bernoulli(key, z0.shape, 0.3) if masked else None
    wanted, exact_grads = by_hand(masks)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    assert_close(nnx.to_pure_dict(grads)["cell"], exact_grads, atol=1e-6)


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
        sol, weights = layer.apply(variables, z0, x, train=False), variables["params"]["f"]
        kernel = whole(weights["Dense_0"]["kernel"])
    else:
        layer = deq_jax.nnx.DEQ(NnxCell(nnx.Rngs(0)), solver=SOLVER)
        sol, kernel = layer(z0, x), whole(layer.cell.dense.kernel[...])
    f, params, z, operands = sol.at
    np.testing.assert_allclose(f(params, z, operands), z, atol=1e-5)
    jacobian = kernel[None] * (1 - wide(z) ** 2)[:, None]  # transposed
    estimate = deq.frobenius_penalty(*sol.at, key=jax.random.key(0), probes=2000)
    np.testing.assert_allclose(estimate, np.sum(jacobian**2) / z.size, rtol=0.05)
    radius = np.abs(np.linalg.eigvals(jacobian)).max(axis=1)
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
    for call in (
        lambda probe: layer.apply(variables, z0, x, train=False, max_steps=2, probe=probe),
        lambda probe: other(z0, x, max_steps=2, probe=probe),
    ):

        def total(probe, call=call):
            sol = call(probe)
            return sol.value.sum(), sol.stats.num_steps

        backward, steps = jax.grad(total, has_aux=True)(deq.backward_probe(z0))
        assert (steps == 2).all() and (backward.num_steps > 0).all()


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


class LinenParent(nn.Module):
    """Uses its embedding before or after the solve, and in it."""

    embed_first: bool = True
    reparam: object = None

    def setup(self):
        self.embed = nn.Embed(7, 4)
        cell = LinenShared(self.embed, (nn.Embed(7, 4), self.embed))
        self.inner = deq_jax.linen.DEQ(cell, solver=SOLVER, reparam=self.reparam)

    def __call__(self, words):
        first = self.embed(words) if self.embed_first else 0
        z = self.inner(jnp.zeros((3, 4)), words).value
        return z + (first if self.embed_first else self.embed(words))


def square_loss(model):
    return lambda variables: jnp.sum(model.apply(variables, WORDS) ** 2)


def shared_by_hand(table, dense, other=None):
    """The square loss and its gradients in the shared table, in the cell's weights, in `other`."""
    words, table, w = np.asarray(WORDS), wide(table), wide(dense["kernel"])
    u, zeros = table[words], np.zeros_like(table)
    added = 0 if other is None else 0.1 * (np.sin(wide(other)[words]) + np.sin(u))
    h = z = np.zeros_like(u)
    for _ in range(200):
        h = np.tanh(z @ w + wide(dense["bias"]) + u)
        z = h + added
    v = slope = 2 * (u + z)
    for _ in range(200):
        v = slope + (v * (1 - h**2)) @ w.T
    c = v * (1 - h**2)
    d_table, d_other = zeros, zeros.copy()
    d_table[words] += c + slope
    if other is not None:
        d_table[words] += 0.1 * np.cos(u) * v
        d_other[words] += 0.1 * np.cos(wide(other)[words]) * v
    return np.sum((u + z) ** 2), d_table, {"kernel": z.T @ c, "bias": c.sum(axis=0)}, d_other


@pytest.mark.parametrize(
    ("embed_first", "lift"),
    [(True, lambda kind: kind), (False, lambda kind: kind), (False, nn.remat)],
    ids=["first", "last", "last, remat"],
)
def test_linen_module_shared_with_the_parent_has_one_set_of_weights(embed_first, lift):
    model = lift(LinenParent)(embed_first=embed_first)
    params = jax.jit(model.init)(jax.random.key(0), WORDS)["params"]
    assert set(params) == {"embed", "inner"}
    own = params["inner"]["f"]
    assert set(own) == {"Dense_0", "others_0"}
    value, grads = jax.jit(jax.value_and_grad(square_loss(model)))({"params": params})
    tables = params["embed"]["embedding"], own["others_0"]["embedding"]
    wanted, d_embed, d_dense, d_other = shared_by_hand(tables[0], own["Dense_0"], tables[1])
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    d_own = {"Dense_0": d_dense, "others_0": {"embedding": d_other}}
    assert_close(grads["params"], {"embed": {"embedding": d_embed}, "inner": {"f": d_own}})


def test_linen_sharing_in_a_compact_parent():
    class Parent(nn.Module):
        @nn.compact
        def __call__(self, words):
            embed = nn.Embed(7, 4)
            layer = deq_jax.linen.DEQ(LinenShared(embed), solver=SOLVER)
            return embed(words) + layer(jnp.zeros((3, 4)), words).value

    params = jax.jit(Parent().init)(jax.random.key(0), WORDS)["params"]
    assert set(params) == {"Embed_0", "DEQ_0"}
    assert set(params["DEQ_0"]["f"]) == {"Dense_0"}
    grads = jax.jit(jax.grad(square_loss(Parent())))({"params": params})["params"]
    table, dense = params["Embed_0"]["embedding"], params["DEQ_0"]["f"]["Dense_0"]
    _, d_table, d_dense, _ = shared_by_hand(table, dense)
    assert_close(grads, {"Embed_0": {"embedding": d_table}, "DEQ_0": {"f": {"Dense_0": d_dense}}})


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

    _, wanted, *_ = shared_by_hand(table, linear)
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


@pytest.mark.parametrize(
    ("kind", "reparam"),
    [("dropout", deq.weight_norm), ("batch norm", None)],
    ids=["dropout, weight norm", "batch norm"],
)
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
    assert jax.eval_shape(layer.apply, variables, *inputs()).value.shape == (3, 4)


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
    variables = jax.jit(stacked.init, static_argnums=3)(jax.random.key(0), z0, x, False)

    @jax.jit
    def both(variables, key):
        still = stacked.apply(variables, z0, x, False)
        drawn = stacked.apply(variables, z0, x, True, rngs={"dropout": key})
        return still, drawn

    still, drawn = both(variables, jax.random.key(1))
    for sol in (still, drawn):
        assert sol.stats.converged.shape == (2, 3) and sol.stats.converged.all()
        for i in range(2):
            dense = jax.tree.map(lambda a, i=i: a[i], variables["params"]["f"]["Dense_0"])
            masks = sol.equation.x[1]
            alone, *_ = exact(dense, x[i], None if masks is None else masks[i])
            np.testing.assert_allclose(sol.value[i], alone, atol=1e-5)
    kernels, masks = variables["params"]["f"]["Dense_0"]["kernel"], drawn.equation.x[1]
    assert (kernels[0] != kernels[1]).any() and (masks[0] != masks[1]).any()


def test_nnx_layer_as_a_linen_module():
    z0, x = inputs()
    module = nnx.bridge.ToLinen(lambda rngs: deq_jax.nnx.DEQ(NnxCell(rngs), solver=SOLVER))
    variables = jax.jit(module.init)(jax.random.key(0), z0, x)
    assert set(variables["params"]["cell"]["dense"]) == {"kernel", "bias"}

    def loss(variables):
        return module.apply(variables, z0, x).value.sum()

    grads = jax.jit(jax.grad(loss))(variables)["params"]["cell"]["dense"]
    _, wanted, _ = exact(variables["params"]["cell"]["dense"], x, slope=np.ones_like)
    assert_close(grads, wanted)


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


@pytest.mark.parametrize(
    ("which", "reparam"),
    [("linen", None), ("nnx", deq.weight_norm)],
    ids=["linen", "nnx, weight norm"],
)
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
