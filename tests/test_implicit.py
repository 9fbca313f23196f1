"""The implicit layer: every gradient has a second computation, and every transformation passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deq_jax as deq
from deq_jax import testing

TIGHT = {
    "picard": deq.Picard(tol=1e-12, max_steps=400),
    "anderson": deq.Anderson(tol=1e-12, max_steps=200),
    "broyden": deq.Broyden(tol=1e-12, max_steps=200),
}


def cell(params, z, x):
    """A map on a tree of two leaves, with an injected input and a key among its operands."""
    keep = jax.random.bernoulli(x["key"], 0.8, z["a"].shape[1:]).astype(z["a"].dtype)
    masked = z["a"] * keep[None]
    a = jnp.tanh(masked @ params["W"] + z["b"].mean(axis=(1, 2))[:, None] + x["input"])
    b = 0.3 * jnp.cos(z["b"]) * params["s"] + 0.1 * z["a"].sum(axis=1)[:, None, None]
    return {"a": a, "b": b}


def operands(batch=3, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "W": deq.init.orthogonal(0.4)(keys[0], (5, 5), dtype),
        "s": jnp.asarray(0.5, dtype),
    }
    x = {"input": jax.random.normal(keys[1], (batch, 5), dtype), "key": keys[2]}
    z0 = {"a": jnp.zeros((batch, 5), dtype), "b": jnp.zeros((batch, 2, 2), dtype)}
    return params, z0, x


def loss(params, x, z0, **options):
    options = {"solver": deq.Anderson(tol=1e-6, max_steps=60)} | options
    sol = deq.fixed_point(cell, params, z0, x, **options)
    return jnp.sum(jnp.sin(sol.value["a"])) + jnp.sum(sol.value["b"] ** 2)


def of_input(function):
    """Turns a function of (params, x, ...) into one of (params, input): keys have no gradient."""
    params, z0, x = operands()
    return lambda params, value: function(params, x | {"input": value}, z0)


def assert_trees_close(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


@pytest.mark.parametrize("backward", TIGHT)
@pytest.mark.parametrize("radius", [0.5, 0.7])
def test_gradient_is_the_closed_form(x64, radius, backward):
    problem = testing.affine(radius=radius, dtype=jnp.float64)
    cotangent = jnp.cos(jnp.arange(problem.z0.size, dtype=jnp.float64)).reshape(problem.z0.shape)
    wanted = problem.vjp(cotangent)

    def value(params, x):
        return deq.fixed_point(
            problem.f,
            params,
            problem.z0,
            x,
            solver=TIGHT["anderson"],
            adjoint=deq.Implicit(TIGHT[backward]),
        ).value

    _, vjp = jax.vjp(value, problem.params, problem.x)
    assert_trees_close(vjp(cotangent), wanted, rtol=1e-8, atol=1e-9)
    z, f = problem.solution, problem.f
    *alone, stats = deq.root_vjp(f, problem.params, z, problem.x, cotangent, TIGHT[backward])
    assert_trees_close(tuple(alone), wanted, rtol=1e-8, atol=1e-9)
    assert stats.converged.all()


@pytest.mark.parametrize("backward", TIGHT)
def test_implicit_unrolled_and_finite_differences_agree(x64, backward):
    params, z0, x = operands(dtype=jnp.float64)
    testing.assert_gradients_agree(cell, params, z0, x, solver=TIGHT[backward], rtol=1e-7)


def test_long_unroll_is_the_implicit_gradient_and_one_step_is_jacobian_free(x64):
    params, z0, x = operands(dtype=jnp.float64)
    exact = jax.grad(loss)(params, x, z0, solver=TIGHT["anderson"])
    unrolled = jax.grad(loss)(params, x, z0, adjoint=deq.Unroll(80), max_steps=0)
    assert_trees_close(exact, unrolled, rtol=1e-9)
    damped = jax.grad(loss)(params, x, z0, solver=TIGHT["anderson"], adjoint=deq.Unroll(200, 0.5))
    assert_trees_close(exact, damped, rtol=1e-9)
    sol = deq.fixed_point(cell, params, z0, x, solver=TIGHT["anderson"])
    one = jax.grad(loss)(params, x, z0, solver=TIGHT["anderson"], adjoint=deq.Unroll(1))
    by_hand = jax.grad(
        lambda p: (
            jnp.sum(jnp.sin(cell(p, sol.value, x)["a"])) + jnp.sum(cell(p, sol.value, x)["b"] ** 2)
        )
    )(params)
    assert_trees_close(one, by_hand, rtol=1e-8)


def test_phantom_gradient_by_hand(x64):
    """Unroll(2, tau) from z*: the loss after two damped steps, differentiated by plain autodiff."""
    params, z0, x = operands(dtype=jnp.float64)
    z = deq.fixed_point(cell, params, z0, x, solver=TIGHT["anderson"]).value

    def by_hand(params):
        state = z
        for _ in range(2):
            image = cell(params, state, x)
            state = jax.tree.map(lambda a, b: 0.3 * a + 0.7 * b, state, image)
        return jnp.sum(jnp.sin(state["a"])) + jnp.sum(state["b"] ** 2)

    ours = jax.grad(loss)(params, x, z0, solver=TIGHT["anderson"], adjoint=deq.Unroll(2, 0.7))
    assert_trees_close(ours, jax.grad(by_hand)(params), rtol=1e-8)


@pytest.mark.parametrize("adjoint", [deq.Implicit(deq.Picard()), deq.Unroll(3)], ids=repr)
@pytest.mark.parametrize("budget", [None, 0])
def test_no_gradient_reaches_the_start(adjoint, budget):
    params, z0, x = operands()
    grads = jax.grad(loss, argnums=2)(params, x, z0, adjoint=adjoint, max_steps=budget)
    assert all((g == 0).all() for g in jax.tree.leaves(grads))


def test_two_solves_before_a_backward_pass_keep_apart():
    params, z0, x = operands()
    twice = jax.grad(lambda p: loss(p, x, z0) + loss(jax.tree.map(lambda a: a / 2, p), x, z0))
    first = jax.grad(loss)(params, x, z0)
    half = jax.grad(loss)(jax.tree.map(lambda a: a / 2, params), x, z0)
    together = jax.tree.map(lambda a, b: a + b / 2, first, half)
    assert_trees_close(twice(params), together, rtol=1e-4, atol=1e-6)
    _, vjp = jax.vjp(lambda p: loss(p, x, z0), params)
    assert_trees_close(vjp(jnp.float32(1)), vjp(jnp.float32(1)))


TRANSFORMATIONS = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": lambda function: (
        lambda *a: jax.lax.scan(lambda total, _: (total + function(*a), None), 0.0, None, length=1)[
            0
        ]
    ),
    "vmap": lambda function: (
        lambda *a: jax.vmap(function)(*jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), a)).mean()
    ),
    "jit of checkpoint of scan": lambda function: jax.jit(
        jax.checkpoint(TRANSFORMATIONS["scan"](function))
    ),
}


@pytest.mark.parametrize(
    ("which", "solver"),
    [(which, deq.Anderson(tol=1e-6)) for which in TRANSFORMATIONS]
    + [(which, deq.Broyden(tol=1e-6)) for which in ("vmap", "jit of checkpoint of scan")],
    ids=str,
)
def test_transformations_inside_and_outside_of_grad(which, solver):
    params, z0, x = operands()
    function = of_input(lambda p, x, z0: loss(p, x, z0, solver=solver))
    wanted = jax.grad(function, argnums=(0, 1))(params, x["input"])
    transform = TRANSFORMATIONS[which]
    inside = jax.grad(transform(function), argnums=(0, 1))(params, x["input"])
    assert_trees_close(inside, wanted, rtol=1e-4, atol=1e-5)
    if which in ("jit", "vmap"):
        gradient = jax.grad(function, argnums=(0, 1))
        if which == "jit":
            outside = jax.jit(gradient)(params, x["input"])
        else:
            stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), (params, x["input"]))
            outside = jax.tree.map(lambda leaf: leaf[1], jax.vmap(gradient)(*stacked))
        assert_trees_close(outside, wanted, rtol=1e-4, atol=1e-5)


def test_the_probe_carries_the_backward_statistics(x64):
    params, z0, x = operands(dtype=jnp.float64)  # rounding stays far below the tolerance
    sol = deq.fixed_point(cell, params, z0, x, solver=deq.Anderson(tol=1e-6, max_steps=60))
    backward = deq.Anderson(tol=1e-5, max_steps=40)
    probe = deq.backward_probe(z0)
    through = jax.grad(
        lambda probe: loss(params, x, z0, adjoint=deq.Implicit(backward), probe=probe)
    )(probe)
    cotangent = {"a": jnp.cos(sol.value["a"]), "b": 2 * sol.value["b"]}
    *_, stats = deq.root_vjp(cell, params, sol.value, x, cotangent, backward)
    np.testing.assert_array_equal(through.num_steps, stats.num_steps)
    np.testing.assert_array_equal(through.converged, stats.converged)
    np.testing.assert_allclose(through.residual, stats.residual, rtol=1e-2)
    assert (through.num_steps > 1).all()


def test_the_backward_solver_has_its_own_tolerance_and_budget():
    params, z0, x = operands()

    def stats_of(backward):
        return jax.grad(
            lambda probe: loss(params, x, z0, adjoint=deq.Implicit(backward), probe=probe)
        )(deq.backward_probe(z0))

    loose, tight = stats_of(deq.Picard(tol=0.5)), stats_of(deq.Picard(tol=1e-5))
    assert (loose.num_steps < tight.num_steps).all()
    short = stats_of(deq.Picard(tol=1e-5, max_steps=2))
    assert (short.num_steps == 2).all() and (short.converged == 0).all()


def test_a_traced_budget_passes_through_grad(x64):
    params, z0, x = operands(dtype=jnp.float64)  # rounding stays far below the tolerance
    gradient = jax.jit(lambda budget: jax.grad(loss)(params, x, z0, max_steps=budget))
    full = jax.grad(loss)(params, x, z0)
    assert_trees_close(gradient(jnp.int32(60)), full, rtol=1e-5, atol=1e-6)
    three = jax.grad(loss)(params, x, z0, max_steps=3)
    assert_trees_close(gradient(jnp.int32(3)), three, rtol=1e-4, atol=1e-6)


def test_bfloat16_state_with_float32_weights():
    params, z0, x = operands()

    def low(params, z, x):
        image = cell(params, jax.tree.map(lambda a: a.astype(jnp.float32), z), x)
        return jax.tree.map(lambda a: a.astype(jnp.bfloat16), image)

    z0 = jax.tree.map(lambda a: a.astype(jnp.bfloat16), z0)

    def low_loss(params):
        sol = deq.fixed_point(low, params, z0, x, solver=deq.Anderson(tol=1e-2))
        return jnp.sum(jnp.sin(sol.value["a"].astype(jnp.float32)))

    def high_loss(params):
        sol = deq.fixed_point(cell, params, operands()[1], x, solver=deq.Anderson(tol=1e-5))
        return jnp.sum(jnp.sin(sol.value["a"]))

    low_grad, high_grad = jax.grad(low_loss)(params), jax.grad(high_loss)(params)
    assert low_grad["W"].dtype == jnp.float32
    assert_trees_close(low_grad, high_grad, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(("steps", "damping"), [(0, 1.0), (1.5, 1.0), (3, 0.0), (3, 1.1)])
def test_bad_unrolls_are_refused(steps, damping):
    with pytest.raises(ValueError, match="Unroll: got"):
        deq.Unroll(steps, damping)


@pytest.mark.parametrize("adjoint", [None, deq.Unroll(2)], ids=repr)
def test_an_f_of_another_dtype_is_refused_in_words(adjoint):
    with pytest.raises(ValueError, match="wanted"):
        deq.fixed_point(
            lambda p, z, x: z.astype(jnp.bfloat16),
            None,
            jnp.ones((2, 3)),
            solver=deq.Picard(),
            adjoint=adjoint,
        )


def test_at_without_an_equation_says_what_to_do():
    sol = deq.solve(deq.Picard(), jnp.cos, jnp.ones((1, 1)))
    with pytest.raises(ValueError, match="pass f, params, z and x yourself"):
        _ = sol.at


def test_a_function_may_close_over_traced_values(x64):
    """F4, L2: "a function transformed by JAX had a side effect"."""
    keys = jax.random.split(jax.random.key(0))
    w = deq.init.orthogonal(0.5)(keys[0], (4, 4), jnp.float64)
    x = jax.random.normal(keys[1], (3, 4))

    def closed(w, x):
        f = lambda p, z, _: jnp.tanh(z @ w + x)  # noqa: E731
        sol = deq.fixed_point(f, None, jnp.zeros_like(x), solver=TIGHT["anderson"])
        return jnp.sum(sol.value**3)

    def open_(w, x):
        f = lambda w, z, x: jnp.tanh(z @ w + x)  # noqa: E731
        sol = deq.fixed_point(f, w, jnp.zeros_like(x), x, solver=TIGHT["anderson"])
        return jnp.sum(sol.value**3)

    wanted = jax.grad(open_, argnums=(0, 1))(w, x)
    assert_trees_close(jax.grad(closed, (0, 1))(w, x), wanted, rtol=1e-8, atol=1e-10)
    for transform in (jax.jit, jax.checkpoint):  # the outer jit makes one program of it
        ours = jax.jit(jax.grad(transform(closed), argnums=(0, 1)))(w, x)
        assert_trees_close(ours, wanted, rtol=1e-8, atol=1e-10)
    alone = jax.grad(lambda w, x: closed(w, x[None]))
    per_example = jax.jit(jax.vmap(alone, in_axes=(None, 0)))(w, x)
    assert_trees_close(per_example.sum(axis=0), wanted[0], rtol=1e-8, atol=1e-10)
    unrolled = jax.grad(
        lambda w: jnp.sum(
            deq.fixed_point(
                lambda p, z, _: jnp.tanh(z @ w + x),
                None,
                jnp.zeros_like(x),
                solver=TIGHT["anderson"],
                adjoint=deq.Unroll(80),
            ).value
            ** 3
        )
    )(w)
    assert_trees_close(unrolled, wanted[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("scale", [1e-6, 1e-12, 1e-20, 1e-30, 1e12, 0.0])
def test_the_gradient_is_proportional_to_the_loss(scale):
    """W4, L3: an absolute floor made it the Jacobian-free gradient for a small loss."""
    params, z0, x = operands()
    backward = deq.Implicit(deq.Anderson(tol=1e-5, max_steps=60))
    gradient = lambda s: jax.grad(lambda p: s * loss(p, x, z0, adjoint=backward))(params)  # noqa: E731
    wanted, ours = gradient(1.0), gradient(scale)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        bound = scale * 1e-4 * np.abs(b).max()
        np.testing.assert_allclose(np.asarray(a, np.float64), scale * np.asarray(b), atol=bound)


def test_statistics_are_constants_and_the_residual_penalty_is_written_out(x64):
    """W5: `loss + sol.stats.residual` trains nothing; SolveStats says what does."""
    params, z0, x = operands(dtype=jnp.float64)
    solver = deq.Picard(tol=1e-30, max_steps=3)

    def of_statistics(params):
        return deq.fixed_point(cell, params, z0, x, solver=solver).stats.residual.sum()

    def written_out(params):
        sol = deq.fixed_point(cell, params, z0, x, solver=solver)
        gap = jax.tree.map(jnp.subtract, cell(params, sol.value, x), sol.value)
        return sum(jnp.sum(a**2) for a in jax.tree.leaves(gap))

    assert all((g == 0).all() for g in jax.tree.leaves(jax.grad(of_statistics)(params)))
    assert any((g != 0).any() for g in jax.tree.leaves(jax.grad(written_out)(params)))


def test_a_solution_found_elsewhere_gets_the_implicit_gradient(x64):
    params, z0, x = operands(dtype=jnp.float64)
    wanted = jax.grad(loss)(params, x, z0, solver=TIGHT["anderson"])

    def elsewhere(params):
        z = z0
        for _ in range(100):
            z = cell(params, z, x)
        return loss(params, x, jax.lax.stop_gradient(z), solver=TIGHT["anderson"], max_steps=0)

    assert_trees_close(jax.grad(elsewhere)(params), wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "adjoint", [deq.Unroll, deq.Implicit, deq.Picard(), "implicit"], ids=lambda a: str(a)[:20]
)
def test_what_is_not_a_gradient_rule_is_named(adjoint):
    params, z0, x = operands()
    with pytest.raises(ValueError, match="got adjoint=.*wanted a gradient rule"):
        loss(params, x, z0, adjoint=adjoint)


@pytest.mark.parametrize("solver", [deq.Unroll(1), deq.Anderson, None], ids=str)
def test_implicit_wants_a_solver(solver):
    with pytest.raises(ValueError, match="the solver of Implicit"):
        deq.Implicit(solver)


def test_a_probe_of_another_batch_is_named():
    params, z0, x = operands()
    with pytest.raises(ValueError, match="of the same batch"):
        loss(params, x, z0, probe=deq.backward_probe(jnp.zeros((9, 2))))


def test_a_start_of_zeros_takes_the_type_of_its_image():
    """In shard_map: zeros that are the same everywhere, an image that varies with the device."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.random.normal(jax.random.key(0), (8, 3))
    part = jax.sharding.PartitionSpec("data")

    def solve(x):
        f = lambda p, z, x: jnp.tanh(0.5 * z + x)  # noqa: E731
        return deq.fixed_point(f, None, jnp.zeros((2, 3)), x, solver=deq.Anderson()).value

    split = jax.jit(jax.shard_map(solve, mesh=mesh, in_specs=part, out_specs=part))(x)
    alone = jnp.concatenate([solve(rows) for rows in jnp.split(x, 4)])
    np.testing.assert_allclose(split, alone, rtol=1e-5, atol=1e-6)


def test_solutions_can_be_exported_and_stored():
    """F7: "unregistered type SolveStats"."""
    pytest.importorskip("flatbuffers")
    params, z0, x = operands()

    def solve(params, x):
        sol = deq.fixed_point(cell, params, z0, x, solver=deq.Anderson())
        return sol, deq.backward_probe(z0)

    stored = jax.export.export(jax.jit(solve))(params, x).serialize()
    sol, probe = jax.export.deserialize(stored).call(params, x)
    assert isinstance(sol, deq.Solution) and isinstance(probe, deq.BackwardStats)
    assert_trees_close(sol.value, solve(params, x)[0].value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("backward", "jit"),
    [(deq.Picard, True), (deq.Anderson, True), (deq.Anderson, False), (deq.Broyden, True)],
)
def test_reverse_mode_to_third_order_matches_the_unrolled_iteration(x64, backward, jit):
    """L1: the backward solve was a loop that could not be differentiated."""
    keys = jax.random.split(jax.random.key(0), 2)
    w, x = 0.2 * jax.random.normal(keys[0], (4, 4)), jax.random.normal(keys[1], (3, 4))
    rule = deq.Implicit(backward(tol=1e-13, max_steps=150))

    def f(w, z, x):
        return jnp.tanh(z @ w + x)

    def implicit(w, x):
        solver = deq.Anderson(tol=1e-13, max_steps=100)
        return deq.fixed_point(f, w, jnp.zeros_like(x), x, solver=solver, adjoint=rule).value

    def unrolled(w, x):
        return jax.lax.scan(lambda z, _: (f(w, z, x), None), jnp.zeros_like(x), length=150)[0]

    def orders(value):
        def penalty(w):  # the gradient penalty of WGAN-GP
            return jnp.sum(jax.grad(lambda x: jnp.sum(value(w, x) ** 3))(x) ** 2)

        third = jax.grad(lambda w: jnp.sum(jax.grad(penalty)(w) ** 2))
        both = lambda w: (jax.grad(penalty)(w), third(w))  # noqa: E731
        return (jax.jit(both) if jit else both)(w)

    for ours, expected in zip(orders(implicit), orders(unrolled), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-8, atol=1e-10)
