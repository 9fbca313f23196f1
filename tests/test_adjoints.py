"""Every gradient rule in one table: against its own definition, dense algebra, and all of JAX."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deq_jax as deq
from deq_jax import testing, tree
from deq_jax.solvers import history, loop
from deq_jax.solvers.loop import Settings, iterate
from deq_jax.training import parallel

TIGHT = deq.Broyden(tol=1e-13, max_steps=200, memory=60, stop="abs")
DEEP = deq.Picard(tol=1e-14, max_steps=400, stop="abs")

# name -> (rule, forward solver, keep)
RULES = {
    "implicit": (deq.Implicit(TIGHT), TIGHT, "best"),
    "forward": (deq.Implicit(TIGHT, forward=True), TIGHT, "best"),
    "neumann": (deq.Implicit(deq.Picard(tol=1e-30, max_steps=150), keep="last"), TIGHT, "best"),
    "unroll": (deq.Unroll(150), TIGHT, "best"),
    "backprop": (deq.Backprop(), DEEP, "last"),
    "segments": (deq.Backprop(segments=20), DEEP, "best"),
    # Too few steps to converge: more do not run backward, as rounding grows at every one.
    "reversible": (deq.Reversible(0.4), deq.Picard(tol=1e-14, max_steps=16, stop="abs"), "last"),
    "shine": (deq.Shine(TIGHT), TIGHT, "best"),
}
# The programs of "implicit" and "backprop" again, with other numbers.
SAME = ("neumann", "segments")


def every_rule(*but):
    return pytest.mark.parametrize("name", [name for name in RULES if name not in but])


def f(params, z, x):
    """A map on a tree of two leaves with an integer and a key among its operands."""
    keep = jax.random.bits(x["key"], z["a"].shape[1:], "uint32") > 2**30
    keep = keep.astype(z["a"].dtype)
    masked = z["a"] * keep[None] + jnp.arange(5, dtype=z["a"].dtype)[None] * x["count"]
    a = jnp.tanh(masked @ params["W"] + z["b"].mean(axis=(1, 2))[:, None] + x["input"])
    b = 0.3 * jnp.cos(z["b"]) * params["s"] + 0.1 * z["a"].sum(axis=1)[:, None, None]
    return {"a": a, "b": b}


def operands(batch=4, dtype=jnp.float64):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "W": deq.init.orthogonal(0.4)(keys[0], (5, 5), dtype),
        "s": jnp.asarray(0.5, dtype),
    }
    # Samples stop at different steps.
    size = jnp.logspace(-6, 0, batch, dtype=dtype)[:, None]
    x = {"input": size * jax.random.normal(keys[1], (batch, 5), dtype), "key": keys[2], "count": 0}
    z0 = {"a": jnp.zeros((batch, 5), dtype), "b": jnp.zeros((batch, 2, 2), dtype)}
    return params, z0, x


def solve(name, params, value, x, z0, **options):
    rule, solver, keep = RULES[name]
    options = {"solver": solver, "keep": keep, "adjoint": rule} | options
    return deq.fixed_point(f, params, z0, x | {"input": value}, **options)


def loss_of(sol):
    by_sample = jnp.sum(jnp.sin(sol["a"]), axis=1) + jnp.sum(sol["b"] ** 2, axis=(1, 2))
    return jnp.sum(jnp.arange(1.0, 1 + by_sample.shape[0], dtype=by_sample.dtype) * by_sample)


def gradient(name, **options):
    """(params, input) -> gradient by both."""
    _, z0, x = operands()

    def loss(params, value):
        start = jax.tree.map(lambda a: a[: value.shape[0]], z0)
        return loss_of(solve(name, params, value, x, start, **options).value)

    return loss, jax.grad(loss, (0, 1))


def close(a, b, rtol, atol=0.0):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


def newton(f, params, z, x, rounds=2):
    """A fixed point found elsewhere, with its derivatives up to order 2^rounds - 1.

    Newton's method with the dense Jacobian, sample by sample, from a constant start.
    """
    z = jax.lax.stop_gradient(z)
    unravel = jax.flatten_util.ravel_pytree(jax.tree.map(lambda a: a[0], z))[1]
    flat = jax.vmap(lambda one: jax.flatten_util.ravel_pytree(one)[0])(z)

    def g(rows):
        image = f(params, jax.vmap(unravel)(rows), x)
        return jax.vmap(lambda one: jax.flatten_util.ravel_pytree(one)[0])(image) - rows

    for _ in range(rounds):
        # Samples do not mix: one Jacobian-vector product an entry gives all dense Jacobians.
        tangents = jnp.broadcast_to(
            jnp.eye(flat.shape[1], dtype=flat.dtype)[:, None], (flat.shape[1], *flat.shape)
        )
        columns = jax.vmap(lambda t, flat=flat: jax.jvp(g, (flat,), (t,))[1])(tangents)
        jacobian = jnp.moveaxis(columns, 0, 2)
        flat = flat - jnp.linalg.solve(jacobian, g(flat)[..., None])[..., 0]
    return jax.vmap(unravel)(flat)


@every_rule("reversible")
def test_every_rule_at_a_solution_gives_the_dense_gradient(x64, name):
    params, z0, x = operands()
    loss, grad = gradient(name)
    found = deq.fixed_point(f, params, z0, x, solver=TIGHT).value

    def dense(params, value):
        return loss_of(newton(f, params, found, x | {"input": value}))

    value, wanted = jax.jit(jax.value_and_grad(dense, (0, 1)))(params, x["input"])
    close(loss(params, x["input"]), value, 1e-10)
    close(grad(params, x["input"]), wanted, 1e-8, 1e-10)


# They differ from logistic-3.3 in nothing that a rule sees.
ALIKE = ("cosine", "exponential", "logistic-2.8")
PROBLEMS = [p.name for p in testing.all_problems(3) if p.kind != "unsolvable"]


def problem_of(name, dtype):
    return next(p for p in testing.all_problems(3, dtype=dtype) if p.name == name)


@pytest.mark.parametrize(
    ("which", "dtype"),
    [
        ("logistic-3.3", "float64"),
        ("logistic-2.8", "float32"),
        ("multiscale", "float64"),
    ],
)
def test_every_derivative_is_that_of_dense_algebra(which, dtype):
    """jvp, jacfwd, jvp of grad, hessian, linearize; grad, grad of grad."""
    with jax.enable_x64(dtype == "float64"):
        problem = problem_of(which, jnp.dtype(dtype))
        tol, rtol = (1e-13, 1e-8) if dtype == "float64" else (1e-7, 1e-4)
        solver = deq.Broyden(tol=tol, max_steps=120, memory=60)
        wide = problem_of(which, jnp.float64) if dtype == "float64" else problem
        start = deq.fixed_point(
            wide.f,
            wide.params,
            wide.z0,
            wide.x,
            solver=deq.Broyden(tol=tol, max_steps=200, memory=60),
        ).value
        rules = (deq.Implicit(solver), deq.Implicit(solver, forward=True))
        flat, unravel = jax.flatten_util.ravel_pytree(problem.params)

        def value(theta, rule=None):
            params = unravel(theta)
            if rule is None:
                z = newton(problem.f, params, start, problem.x)
            else:
                z = deq.fixed_point(
                    problem.f, params, start, problem.x, solver=solver, adjoint=rule
                ).value
            return jnp.concatenate([jnp.ravel(a) for a in jax.tree.leaves(z)])

        def scalar(theta, rule=None):
            return jnp.sum(jnp.sin(value(theta, rule)))

        d = jax.random.normal(jax.random.key(1), flat.shape, flat.dtype)

        def reverse(rule):
            first = jax.grad(scalar)
            return first(flat, rule), jax.grad(lambda t: jnp.sum(first(t, rule) * d))(flat)

        def forward(rule):
            out, tangent = jax.jvp(lambda t: value(t, rule), (flat,), (d,))
            mixed = jax.jvp(lambda t: jax.grad(scalar)(t, rule), (flat,), (d,))[1]
            other = jax.grad(lambda t: jax.jvp(lambda t: scalar(t, rule), (t,), (d,))[1])(flat)
            again = jax.jvp(
                lambda t: jax.jvp(lambda t: scalar(t, rule), (t,), (d,))[1], (flat,), (d,)
            )
            linear = jax.linearize(lambda t: value(t, rule), flat)[1](d)
            return out, tangent, mixed, other, again, linear

        def compiled(derivatives, *rule):  # hundreds of small programs otherwise
            return jax.jit(lambda: derivatives(*rule))()

        wanted = compiled(reverse, None)
        for rule in rules:
            compare(compiled(reverse, rule), wanted, rtol)
        compare(compiled(forward, rules[1]), compiled(forward, None), rtol)
        if flat.size <= 40:

            def dense(rule):
                return jax.jacfwd(value)(flat, rule), jax.hessian(scalar)(flat, rule)

            ours, wanted = compiled(dense, rules[1]), compiled(dense, None)
            compare(ours[0], wanted[0], rtol)
            compare(ours[1], wanted[1], 10 * rtol)


@pytest.mark.parametrize("which", [name for name in PROBLEMS if name not in ALIKE])
def test_rules_on_problems_with_known_answers(x64, which):
    """Those that solve on all; those that iterate where that ends at a solution."""
    problem = problem_of(which, jnp.float64)
    anderson = deq.Anderson(tol=1e-13, max_steps=100, stop="abs")
    long = deq.Picard(tol=1e-14, max_steps=400, stop="abs")
    rules: dict = {
        "implicit": (deq.Implicit(TIGHT), TIGHT),
        "forward": (deq.Implicit(TIGHT, forward=True), TIGHT),
        "shine": (deq.Shine(TIGHT), TIGHT),
    }
    if which in ("affine-0.5", "kinsol"):
        # On rotation and nonnormal these end early by luck: what they return is no solution of
        # neighbouring equations.
        rules |= {
            "backprop, Broyden": (deq.Backprop(segments=10), TIGHT),
            "backprop, Anderson": (deq.Backprop(segments=10), anderson),
        }
    if which in ("affine-0.5", "nonnormal"):  # contractions
        rules |= {
            "neumann": (deq.Implicit(long, keep="last"), TIGHT),
            "unroll": (deq.Unroll(400), TIGHT),
        }
    if which == "affine-0.5":
        rules["backprop, Picard"] = (deq.Backprop(segments=20), long)
    found = deq.fixed_point(problem.f, problem.params, problem.z0, problem.x, solver=TIGHT).value

    def loss(params, rule=None, solver=None):
        if rule is None:
            z = newton(problem.f, params, found, problem.x)
        else:
            z = deq.fixed_point(
                problem.f, params, problem.z0, problem.x, solver=solver, adjoint=rule
            ).value
        return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(z))

    wanted = jax.jit(jax.grad(loss))(problem.params)
    for rule, solver in rules.values():
        ours = jax.jit(jax.grad(lambda p, r=rule, s=solver: loss(p, r, s)))(problem.params)
        # Differentiated steps of Anderson and Broyden converge later than the steps themselves.
        compare(ours, wanted, 1e-3 if isinstance(rule, deq.Backprop) else 1e-8)


def compare(ours, theirs, rtol):
    """Relative to the size of the whole result: entries that cancel have no digits of their own."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        gap = np.abs(np.asarray(a) - np.asarray(b)).max(initial=0)
        assert gap <= rtol * np.abs(b).max(initial=0) + rtol, (gap, np.abs(b).max())


def plain_loop(solver, n, keep="last", tol=None):
    """What autodiff sees of n steps, written without the library's loop."""

    def run(params, value, z0, x):
        z, state, x = z0, solver.init(z0), x | {"input": value}
        best, least = z0, jnp.inf
        for _ in range(n):
            fz = f(params, z, x)
            gap = sum(
                jnp.sum((a - b) ** 2, axis=range(1, a.ndim))
                for a, b in zip(jax.tree.leaves(fz), jax.tree.leaves(z), strict=True)
            )
            better = gap < least
            least = jnp.where(better, gap, least)
            best = jax.tree.map(
                lambda a, b, better=better: jnp.where(
                    better.reshape(-1, *(1,) * (a.ndim - 1)), a, b
                ),
                z,
                best,
            )
            z, state = solver.step(z, fz, state)
        return z if keep == "last" else best

    return run


@pytest.mark.parametrize(("segments", "keep"), [(1, "last"), (3, "best")])
@pytest.mark.parametrize(
    "solver",
    [
        deq.Picard(tol=1e-30, max_steps=6, damping=0.7, stop="abs"),
        deq.Anderson(tol=1e-30, max_steps=6, memory=3, stop="abs"),
        deq.Broyden(tol=1e-30, max_steps=6, memory=4, damping=0.8, stop="abs"),
    ],
    ids=lambda s: type(s).__name__,
)
def test_backprop_is_autodiff_of_the_unrolled_loop(x64, solver, segments, keep):
    params, z0, x = operands()
    z0 = jax.tree.map(lambda a: a + 0.2, z0)

    def ours(params, value, z0, budget=None):
        sol = deq.fixed_point(
            f,
            params,
            z0,
            x | {"input": value},
            solver=solver,
            keep=keep,
            adjoint=deq.Backprop(segments),
            max_steps=budget,
        )
        return loss_of(sol.value)

    traced = jax.jit(jax.grad(ours, (0, 1, 2)))
    for budget in (6, 1):

        def plain(*a, budget=budget):
            return loss_of(plain_loop(solver, budget, keep)(*a, x))

        wanted = jax.grad(plain, (0, 1, 2))(params, x["input"], z0)
        close(traced(params, x["input"], z0, budget), wanted, 1e-10, 1e-12)
    close(
        jax.grad(ours, (0, 1, 2))(params, x["input"], z0, 4),
        traced(params, x["input"], z0, 4),
        1e-10,
        1e-12,
    )
    assert traced._cache_size() == 1


@pytest.mark.parametrize("name", ["unroll", "backprop", "segments", "reversible", "implicit"])
def test_the_gradient_of_a_sample_is_that_of_its_own_budget(x64, name):
    params, z0, x = operands()
    budgets = jnp.array([2, 5, 9, 3], jnp.int32)
    if name == "unroll":  # few steps, which depend on where they begin
        options = {"adjoint": deq.Unroll(2)}
    else:
        options = {}

    @jax.jit
    def gradient(budget, i):
        def loss(params, value, z0):
            sol = solve(name, params, value, x, z0, max_steps=budget, **options)
            return jnp.sum(jnp.sin(sol.value["a"][i])) + jnp.sum(sol.value["b"][i] ** 2)

        return jax.grad(loss, (0, 1, 2))(params, x["input"], z0)

    for i, budget in enumerate(budgets):
        close(gradient(budgets, i), gradient(budget, i), 1e-10, 1e-12)


def test_backprop_skips_the_steps_beyond_the_budget():
    count = []

    def counted(params, z, x):
        jax.debug.callback(lambda: count.append(1))
        return jnp.tanh(params * z + x)

    def loss(w, budget):
        one = jnp.ones((2, 3))
        return deq.fixed_point(
            counted,
            w,
            one,
            one,
            solver=deq.Picard(tol=1e-30, max_steps=16),
            keep="last",
            adjoint=deq.Backprop(),
            max_steps=budget,
        ).value.sum()

    step = jax.jit(jax.grad(loss))
    used = {}
    for budget in (4, 16):
        count.clear()
        jax.block_until_ready(step(jnp.float32(0.5), budget))
        jax.effects_barrier()
        used[budget] = len(count)
    assert used == {4: 8, 16: 32}  # once forward, once again backward


@pytest.mark.parametrize("damping", [0.2, 0.5, 0.8])
def test_reversible_is_autodiff_of_its_coupled_iteration(x64, damping):
    """y' = (1 - b) y + b f(z), z' = (1 - b) z + b f(y'), as the paper writes it."""
    params, z0, x = operands()
    z0 = jax.tree.map(lambda a: a + 0.2, z0)

    def mix(a, b):
        return jax.tree.map(lambda a, b: (1 - damping) * a + damping * b, a, b)

    def plain(params, value, z0):
        full = x | {"input": value}
        y = z = z0
        for _ in range(4):
            y = mix(y, f(params, z, full))
            z = mix(z, f(params, y, full))
        return loss_of(z)

    def ours(params, value, z0):
        solver = deq.Picard(tol=1e-30, max_steps=8)
        sol = deq.fixed_point(
            f,
            params,
            z0,
            x | {"input": value},
            solver=solver,
            keep="last",
            adjoint=deq.Reversible(damping),
        )
        return loss_of(sol.value)

    args = (params, x["input"], z0)
    close(ours(*args), plain(*args), 1e-12)
    wanted = jax.grad(plain, (0, 1, 2))(*args)
    close(jax.grad(ours, (0, 1, 2))(*args), wanted, 1e-10, 1e-12)
    close(jax.jit(jax.grad(ours, (0, 1, 2)))(*args), wanted, 1e-10, 1e-12)


def test_reversible_drifts_in_float32_as_its_docstring_says():
    """Rounding grows by 1 / sqrt(1 - damping) a step: the table in the docstring."""
    rng = np.random.default_rng(0)
    w = 0.9 * np.linalg.qr(rng.normal(size=(256, 256)))[0]
    x, c = rng.normal(size=(2, 16, 256))

    def error(damping, steps):
        rule, solver = deq.Reversible(damping), deq.Picard(tol=1e-30, max_steps=steps)

        def ours(w, x, c):
            g = lambda w, z, x: jnp.tanh(z @ w + x)  # noqa: E731
            sol = deq.fixed_point(g, w, 0 * x, x, solver=solver, adjoint=rule, keep="last")
            return jnp.sum(c * sol.value)

        def plain(w, x, c):
            step = lambda pair, _: (  # noqa: E731
                ((1 - damping) * pair[1] + damping * jnp.tanh(pair[0] @ w + x), pair[0]),
                None,
            )
            return jnp.sum(c * jax.lax.scan(step, (0 * x, 0 * x), None, length=steps)[0][0])

        low = jax.grad(ours)(*(jnp.asarray(a, jnp.float32) for a in (w, x, c)))
        with jax.enable_x64(True):
            exact = np.asarray(jax.grad(plain)(*map(jnp.asarray, (w, x, c))))
        return np.linalg.norm(low - exact) / np.linalg.norm(exact)

    for damping, steps, most in ((0.2, 32, 1e-5), (0.5, 8, 1e-5), (0.5, 16, 1e-4), (0.8, 4, 1e-5)):
        assert error(damping, steps) < most
    assert error(0.5, 32) > 1e-4 and error(0.8, 16) > 1e-3


@pytest.mark.parametrize("name", ["backprop", "segments", "reversible", "implicit", "shine"])
def test_samples_with_step_counts_of_their_own_do_not_mix(x64, name):
    """The gradient of a batch is that of its samples alone, though they stop at other steps."""
    params, z0, x = operands()
    rule, solver, keep = RULES[name]
    tol = 0.1 if name == "reversible" else 1e-5
    options = {"solver": dataclasses.replace(solver, tol=tol), "keep": keep, "adjoint": rule}
    loss, grad = gradient(name, **options)
    steps = solve(name, params, x["input"], x, z0, **options).stats.num_steps
    assert len(set(steps.tolist())) > 1
    _, together = grad(params, x["input"])
    for i in range(4):
        one = jax.tree.map(lambda a, i=i: a[i : i + 1], z0)

        def alone(value, one=one):
            return loss_of(solve(name, params, value, x, one, **options).value)

        single = jax.grad(alone)(x["input"][i : i + 1])[0]
        close((i + 1) * single, together[i], 1e-9, 1e-12)


def test_a_sample_that_stops_at_once_has_finite_gradients(x64):
    """Exact solutions: norms of zero must not divide."""
    w, x = 0.5 * jnp.eye(3), jnp.stack([jnp.zeros(3), jnp.ones(3)])
    for solver in (deq.Picard(), deq.Anderson(), deq.Broyden()):

        def loss(w, x, solver=solver):
            return deq.fixed_point(
                lambda w, z, x: jnp.tanh(z @ w) + x,
                w,
                jnp.zeros((2, 3)),
                x,
                solver=solver,
                adjoint=deq.Backprop(),
            ).value.sum()

        assert all(jnp.isfinite(g).all() for g in jax.grad(loss, (0, 1))(w, x))


TRANSFORMATIONS = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": lambda function: (
        lambda *a: jax.lax.scan(lambda t, _: (t + function(*a), None), 0.0, None, length=1)[0]
    ),
    "vmap": lambda function: (
        lambda *a: jax.vmap(function)(*jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), a)).mean()
    ),
}


@every_rule(*SAME)
@pytest.mark.parametrize("which", TRANSFORMATIONS)
def test_every_rule_under_every_transformation(x64, name, which):
    params, _, x = operands()
    loss, grad = gradient(name)
    wanted = grad(params, x["input"])
    inside = jax.grad(TRANSFORMATIONS[which](loss), (0, 1))(params, x["input"])
    close(inside, wanted, 1e-8, 1e-10)
    if which == "jit":
        close(jax.jit(grad)(params, x["input"]), wanted, 1e-8, 1e-10)
    if which == "vmap":
        twice = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), (params, x["input"]))
        outside = jax.tree.map(lambda leaf: leaf[1], jax.vmap(grad)(*twice))
        close(outside, wanted, 1e-8, 1e-10)


@every_rule(*SAME)
@pytest.mark.parametrize("way", ["shard_map", "sharded_fixed_point", "explicit mesh"])
def test_every_rule_on_several_devices(x64, name, way):
    """Devices stop at different steps; gradients of shared parameters are summed outside loops."""
    if way == "explicit mesh" and jax.__version_info__[:2] == (0, 10):
        pytest.skip("JAX 0.10 cannot transpose a product of matrices inside of a trace there")
    params, z0, x = operands(batch=8)
    rule, solver, keep = RULES[name]
    whole, split = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("data")
    options = {"solver": solver, "keep": keep, "adjoint": rule}

    def local(params, value, z0):
        return deq.fixed_point(f, params, z0, x | {"input": value}, **options).value

    def loss(solve):
        return jax.grad(lambda p, v: loss_of(solve(p, v, z0)), (0, 1))

    wanted = loss(local)(params, x["input"])
    kind = jax.sharding.AxisType.Explicit if way == "explicit mesh" else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    if way == "shard_map":
        solve = jax.shard_map(local, mesh=mesh, in_specs=(whole, split, split), out_specs=split)
    elif way == "sharded_fixed_point":
        sharded = parallel.sharded_fixed_point(mesh, {"input": 0, "key": None, "count": None})

        def solve(params, value, z0):
            return sharded(f, params, z0, x | {"input": value}, **options).value
    else:
        solve = local
    with jax.set_mesh(mesh):
        value = x["input"]
        if way == "explicit mesh":
            value = jax.device_put(value, jax.sharding.NamedSharding(mesh, split))
        close(jax.jit(loss(solve))(params, value), wanted, 1e-8, 1e-10)


def test_a_shared_closure_in_a_differentiated_loop_is_refused():
    """Its gradient would be summed over the devices in every step, and they stop by themselves."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

    def local(w, x):
        rule, solver = deq.Backprop(), deq.Picard()
        f = lambda _, z, x: jnp.tanh(w * z + x)  # noqa: E731
        return deq.fixed_point(f, None, 0 * x, x, solver=solver, adjoint=rule).value

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(whole, split), out_specs=split)
    with pytest.raises(ValueError, match="closes over .* wanted them in params or x"):
        mapped(jnp.ones(()), jnp.ones((8, 2)))


@every_rule(*SAME)
def test_a_second_eager_gradient_compiles_nothing(x64, name, compilations):
    params, _, x = operands()
    _, grad = gradient(name)
    grad(params, 1.5 * x["input"])
    compilations.clear()
    grad(params, x["input"])
    assert not compilations


@every_rule(*SAME)
def test_no_program_keeps_what_f_closes_over(x64, name):
    """Since JAX 0.12 a Jaxpr holds its consts: programs that are kept would hold tracers."""
    rule, solver, keep = RULES[name]
    x = jnp.ones((2, 3))

    def loss(w):
        sol = deq.fixed_point(
            lambda _, z, x: jnp.tanh(z * w + x), None, 0 * x, x,
            solver=solver, adjoint=rule, keep=keep,
        )  # fmt: skip
        return sol.value.sum()

    with jax.checking_leaks():
        close(jax.grad(loss)(0.3), jax.jit(jax.grad(loss))(0.3), 1e-9)


@pytest.mark.parametrize("has_aux", [False, True])
def test_wrapped_functions_made_anew_do_not_compile_again(has_aux, compilations):
    def once():
        f = lambda p, z, x: (0.5 * z + x, 1) if has_aux else 0.5 * z + x  # noqa: E731
        one = jnp.ones(3)
        deq.fixed_point(f, None, one, one, solver=deq.Picard(), batched=False, has_aux=has_aux)

    once()
    compilations.clear()
    once()
    assert not compilations


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@every_rule("reversible", *SAME)
def test_every_rule_keeps_low_precision(name, dtype):
    params, z0, x = operands(dtype=jnp.dtype(dtype))
    rule, solver, keep = RULES[name]
    loose = dataclasses.replace(solver, tol=1e-2, max_steps=20)
    rule = {
        "implicit": deq.Implicit(loose),
        "forward": deq.Implicit(loose, forward=True),
        "shine": deq.Shine(2),
    }.get(name, rule)

    def loss(params, value):
        sol = deq.fixed_point(
            f, params, z0, x | {"input": value}, solver=loose, keep=keep, adjoint=rule
        )
        assert all(a.dtype == dtype for a in jax.tree.leaves(sol.value))
        return loss_of(sol.value).astype(jnp.float32)

    grads = jax.grad(loss, (0, 1))(params, x["input"])
    assert all(g.dtype == dtype for g in jax.tree.leaves(grads))
    with jax.enable_x64(True):
        wide = [jnp.asarray(a, jnp.float64) for a in jax.tree.leaves((params, x["input"]))]
        wide = jax.tree.unflatten(jax.tree.structure((params, x["input"])), wide)
        _, exact = gradient("implicit")
        wanted = exact(*wide)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        gap = np.linalg.norm(np.asarray(a, np.float64) - np.asarray(b))
        assert gap <= 0.15 * np.linalg.norm(b) + 0.1, (gap, np.linalg.norm(b))


# Broyden's factors


def dense_inverse(solver, steps):
    """H by its definition, from the steps of one sample."""
    lag = 1 - solver.damping
    h = -np.eye(steps.shape[1])
    for s, following in zip(steps[:-1], steps[1:], strict=True):
        h = h + np.outer(following - lag * s, s) @ h / (s @ s)
    return h


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("settings", "n", "first"),
    [
        ({}, 6, 0),
        ({"damping": 0.7}, 6, 0),
        ({"memory": 4}, 7, 3),
        ({"memory": 3, "restart": True}, 8, 6),
    ],
    ids=str,
)
def test_the_transposed_inverse_is_broydens_matrix(x64, batch, settings, n, first):
    solver = deq.Broyden(tol=1e-30, max_steps=20, **settings)
    w = deq.init.orthogonal(0.9)(jax.random.key(0), (8, 8), jnp.float64)
    x, v = jax.random.normal(jax.random.key(1), (2, batch, 8), jnp.float64)
    z, state, steps = jnp.zeros((batch, 8)), solver.init(x), []
    for _ in range(n):
        z_next, state = solver.step(z, jnp.tanh(z @ w + x), state)
        steps.append(z_next - z)
        z = z_next
    moves = jnp.asarray([n, n - 1, n][:batch], jnp.int32)
    got = solver.transposed_inverse(v, state, moves)
    for i in range(batch):
        taken = np.stack([s[i] for s in steps])[: int(moves[i])]
        if "memory" in settings:
            taken = taken[first:]
        h = dense_inverse(solver, taken)
        np.testing.assert_allclose(got[i], -h.T @ v[i], rtol=1e-9, atol=1e-12)


def cosine(a, b):
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (a, b))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def hard(batch=6, size=30):
    w = deq.init.orthogonal(0.95)(jax.random.key(0), (size, size), jnp.float64)
    x = 0.3 * jax.random.normal(jax.random.key(1), (batch, size), jnp.float64)
    c = jax.random.normal(jax.random.key(2), (batch, size), jnp.float64)
    return w, x, c


def test_shine_is_nearer_to_the_gradient_than_the_jacobian_free_one(x64):
    w, x, c = hard()
    solver = deq.Broyden(tol=1e-8, max_steps=60, memory=60)

    def grad(rule):
        def loss(x):
            g = lambda w, z, x: jnp.tanh(z @ w) + x  # noqa: E731
            sol = deq.fixed_point(g, w, jnp.zeros_like(x), x, solver=solver, adjoint=rule)
            return jnp.sum(c * sol.value)

        return jax.grad(loss)(x)

    exact = grad(deq.Implicit(TIGHT))
    plain, free = cosine(grad(deq.Shine()), exact), cosine(grad(deq.Unroll(1)), exact)
    refined = [cosine(grad(deq.Shine(k)), exact) for k in (1, 3, 6)]
    assert free + 0.05 < plain
    assert plain < refined[0] < refined[1] < refined[2] and refined[2] > 0.999


def test_shine_falls_back_to_the_jacobian_free_gradient_sample_by_sample(x64):
    w, x, c = hard()
    x = x * jnp.logspace(-9, 0, 6)[:, None]  # the first ones converge within the budget
    solver = deq.Broyden(tol=1e-7, max_steps=6, stop="abs")
    g = lambda w, z, x: jnp.tanh(z @ w) + x  # noqa: E731

    def grad(rule):
        def loss(x):
            sol = deq.fixed_point(g, w, jnp.zeros_like(x), x, solver=solver, adjoint=rule)
            return jnp.sum(c * sol.value), sol.stats.converged

        return jax.grad(loss, has_aux=True)(x)

    for refine in (0, 3):
        ours, converged = grad(deq.Shine(refine))
        assert converged.any() and not converged.all()
        # f is z @ w through tanh, plus x: of x the Jacobian-free gradient is the cotangent.
        np.testing.assert_allclose(ours[~converged], c[~converged], rtol=1e-12)
        assert (jnp.abs(ours - c)[converged] > 1e-3).any()


def test_shine_is_finite_where_finished_samples_stay(monkeypatch):
    """As they do on accelerators: the factors of their later steps grew until they were NaN."""
    monkeypatch.setattr(loop, "_kept", tree.where)
    W = deq.init.orthogonal(0.9)(jax.random.key(0), (16, 16), jnp.float32)
    size = jnp.array([1e-7, 1.0, 1.0])[:, None]  # the first sample is done at once
    x = size * jax.random.normal(jax.random.key(1), (3, 16))
    solver = deq.Broyden(tol=1e-6, max_steps=60, memory=60, stop="abs")

    def value(W, rule):
        def f(W, z, x):
            return jnp.tanh(z @ W + x)

        sol = deq.fixed_point(f, W, jnp.zeros_like(x), x, solver=solver, adjoint=rule)
        return jnp.sum(jnp.sin(sol.value))

    gradient = jax.grad(value)
    exact, found = gradient(W, deq.Implicit(solver)), gradient(W, deq.Shine(2))
    assert jnp.linalg.norm(found - exact) < 0.05 * jnp.linalg.norm(exact)


def test_shine_counts_its_products(x64):
    w, x, c = hard()
    z0 = jnp.zeros_like(x)

    def loss(probe, rule):
        g = lambda w, z, x: jnp.tanh(z @ w) + x  # noqa: E731
        solver = deq.Broyden(tol=1e-4, max_steps=60, memory=60)
        sol = deq.fixed_point(g, w, z0, x, solver=solver, adjoint=rule, probe=probe)
        return jnp.sum(c * sol.value)

    used = {
        name: jax.grad(loss)(deq.backward_probe(z0), rule).num_steps
        for name, rule in {
            "none": deq.Shine(),
            "two": deq.Shine(2),
            "warm": deq.Shine(deq.Broyden(tol=1e-3, max_steps=60)),
            "cold": deq.Implicit(deq.Broyden(tol=1e-3, max_steps=60)),
        }.items()
    }
    assert (used["none"] == 0).all() and (used["two"] <= 2).all()
    assert used["warm"].mean() < 0.6 * used["cold"].mean()


# Wrong combinations

ANY = deq.Broyden()


@pytest.mark.parametrize(
    ("rule", "solver", "keep", "words"),
    [
        (deq.Reversible(), ANY, "last", "wanted Picard"),
        (deq.Reversible(), deq.Picard(damping=0.5), "last", "wanted Picard"),
        (deq.Reversible(), deq.Picard(), "best", 'wanted keep="last"'),
        (deq.Shine(), deq.Anderson(), "best", "wanted Broyden"),
        (None, ANY, "first", "wanted .best. or .last."),
    ],
    ids=str,
)
def test_rules_that_do_not_go_with_a_solver_say_so_at_construction(rule, solver, keep, words):
    from flax import linen as nn
    from flax import nnx

    for build in (
        lambda: deq.linen.DEQ(nn.Dense(2), solver, adjoint=rule, keep=keep),
        lambda: deq.nnx.DEQ(
            nnx.Linear(2, 2, rngs=nnx.Rngs(0)), solver=solver, adjoint=rule, keep=keep
        ),
        lambda: deq.fixed_point(
            jnp.cos, None, jnp.ones((2, 2)), solver=solver, adjoint=rule, keep=keep
        ),
    ):
        with pytest.raises(ValueError, match=words):
            build()


@pytest.mark.parametrize(
    "build",
    [
        lambda: deq.Backprop(0),
        lambda: deq.Backprop(1.5),
        lambda: deq.Reversible(1.0),
        lambda: deq.Reversible(0.0),
        lambda: deq.Shine(-1),
        lambda: deq.Shine(0.5),
        lambda: deq.Implicit(ANY, keep="first"),
        lambda: deq.correction([]),
        lambda: deq.correction([jnp.ones(())], decay=2.0),
    ],
)
def test_bad_settings_of_rules_raise(build):
    with pytest.raises(ValueError, match="got .*wanted"):
        build()


def test_what_a_rule_cannot_do_is_said():
    one = jnp.ones((2, 3))
    g = lambda p, z, x: 0.5 * z + x  # noqa: E731
    with pytest.raises(ValueError, match="forward mode has no place"):
        deq.fixed_point(
            g,
            None,
            one,
            one,
            solver=ANY,
            probe=deq.backward_probe(one),
            adjoint=deq.Implicit(ANY, forward=True),
        )
    with pytest.raises(ValueError, match="use Backprop"):
        deq.fixed_point(
            g,
            None,
            one,
            one,
            solver=deq.Picard(),
            keep="last",
            states=(1,),
            adjoint=deq.Reversible(),
        )
    with pytest.raises(ValueError, match="from 1 to solver.max_steps"):
        deq.fixed_point(g, None, one, one, solver=ANY, states=(31,))
    with pytest.raises(ValueError, match=r"wanted \(z, aux\)"):
        deq.fixed_point(g, None, one, one, solver=ANY, has_aux=True)


# Sampled iterates, correction, aux


@pytest.mark.parametrize(
    "solver",
    [
        deq.Picard(tol=1e-30, max_steps=8),
        deq.Anderson(tol=1e-30, max_steps=8),
        deq.Broyden(tol=1e-30, max_steps=8),
    ],
    ids=lambda s: type(s).__name__,
)
def test_sampled_states_are_the_iterates(x64, solver):
    params, z0, x = operands()
    numbers = (5, 1, 8, 5)

    def sample(rule, states=numbers, params=params):
        return deq.fixed_point(
            f, params, z0, x, solver=solver, keep="last", adjoint=rule, states=states
        )

    iterates = [plain_loop(solver, n)(params, x["input"], z0, x) for n in numbers]
    images = [f(params, z, x) for z in iterates]
    close(sample(deq.Backprop()).states, tuple(iterates), 1e-8, 1e-10)
    close(sample(deq.Implicit(solver)).states, tuple(images), 1e-8, 1e-10)
    close(sample(deq.Implicit(solver, forward=True)).states, tuple(images), 1e-8, 1e-10)
    close(sample(deq.Unroll(1)).states, tuple(images), 1e-8, 1e-10)
    if isinstance(solver, deq.Broyden):
        close(sample(deq.Shine()).states, tuple(images), 1e-8, 1e-10)

    def loss(params, rule):
        sol = sample(rule, params=params)
        return deq.correction([loss_of(z) for z in sol.states], decay=0.5)

    def held(params):
        each = [loss_of(f(params, jax.lax.stop_gradient(z), x)) for z in iterates]
        return each[0] / 8 + each[1] / 4 + each[2] / 2 + each[3]

    def through(params):
        each = [loss_of(plain_loop(solver, n)(params, x["input"], z0, x)) for n in numbers]
        return each[0] / 8 + each[1] / 4 + each[2] / 2 + each[3]

    close(jax.grad(loss)(params, deq.Unroll(1)), jax.grad(held)(params), 1e-8, 1e-10)
    close(jax.grad(loss)(params, deq.Implicit(solver)), jax.grad(held)(params), 1e-8, 1e-10)
    close(jax.grad(loss)(params, deq.Backprop()), jax.grad(through)(params), 1e-8, 1e-10)


def test_a_sample_that_stopped_repeats_its_value(x64):
    w, x = 0.5 * jnp.eye(3), jnp.stack([1e-9 * jnp.ones(3), jnp.ones(3)])
    solver = deq.Picard(tol=1e-6, max_steps=40, stop="abs")
    g = lambda w, z, x: z @ w + x  # noqa: E731
    sol = deq.fixed_point(g, w, 0 * x, x, solver=solver, adjoint=deq.Backprop(), states=(1, 10, 40))
    steps = sol.stats.num_steps
    assert steps[0] < 10 < steps[1] < 40
    for number, state in zip((1, 10, 40), sol.states, strict=True):
        for i in (0, 1):
            plain = 2 * x[i] * (1 - 0.5**number)
            wanted = plain if number < steps[i] else sol.value[i]
            np.testing.assert_allclose(state[i], wanted, rtol=1e-12)


def test_layers_sample_states_too():
    from flax import linen as nn
    from flax import nnx

    x = jnp.ones((2, 3))

    class Cell(nn.Module):
        @nn.compact
        def __call__(self, z, x):
            return jnp.tanh(nn.Dense(3, kernel_init=deq.init.orthogonal(0.5))(z) + x)

    class Twin(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(3, 3, kernel_init=deq.init.orthogonal(0.5), rngs=rngs)

        def __call__(self, z, x):
            return jnp.tanh(self.dense(z) + x)

    layer = deq.linen.DEQ(Cell(), deq.Anderson(), states=(2, 4))
    sol = layer.apply(layer.init(jax.random.key(0), 0 * x, x), 0 * x, x)
    twin = deq.nnx.DEQ(Twin(nnx.Rngs(0)), solver=deq.Anderson(), states=(2, 4))(0 * x, x)
    assert [z.shape for z in sol.states] == [z.shape for z in twin.states] == [(2, 3)] * 2


@every_rule("reversible", *SAME)
@pytest.mark.parametrize("batched", [None, False])
def test_aux_is_taken_at_the_solution_and_differentiated(x64, name, batched):
    w, x = 0.3 * jnp.eye(3), jnp.ones((2, 3)) if batched is None else jnp.ones(3)
    rule, solver, keep = RULES[name]

    def loss(w, x):
        def g(w, z, x):
            image = jnp.tanh(z @ w + x)
            return image, {"sum": (image**2).sum(), "label": 3}

        sol = deq.fixed_point(
            g, w, 0 * x, x, solver=solver, keep=keep, adjoint=rule, batched=batched, has_aux=True
        )
        assert sol.aux["label"] == 3
        return sol.aux["sum"]

    def dense(w, x):
        h = lambda w, z, x: jnp.tanh(z @ w + x)  # noqa: E731
        rows = jnp.atleast_2d(x)
        z = deq.fixed_point(h, w, 0 * rows, rows, solver=TIGHT).value
        return (h(w, newton(h, w, z, rows), rows) ** 2).sum()

    close(loss(w, x), dense(w, x), 1e-9)
    close(jax.grad(loss, (0, 1))(w, x), jax.grad(dense, (0, 1))(w, x), 1e-8, 1e-10)


@pytest.mark.parametrize("core", ["indexing", "sliced"])
@pytest.mark.parametrize("steps", [1, 3])
def test_states_and_gradients_are_torchdeqs(core, steps):
    torch = pytest.importorskip("torch")
    torchdeq = pytest.importorskip("torchdeq")
    from torchdeq.loss import fp_correction

    rng = np.random.default_rng(0)
    w = (0.4 * np.linalg.qr(rng.normal(size=(6, 6)))[0]).astype(np.float32)
    x, target = rng.normal(size=(2, 3, 6)).astype(np.float32)
    numbers, budget, tau = (3, 7), 12, 0.8

    tw, tx = torch.tensor(w, requires_grad=True), torch.tensor(x, requires_grad=True)
    theirs = torchdeq.get_deq(
        core=core,
        f_solver="fixed_point_iter",
        f_max_iter=budget,
        f_tol=0.0,
        grad=steps,
        tau=tau,
        indexing=list(numbers),
        no_stat=True,
    ).train()
    trajectory, _ = theirs(lambda z: torch.tanh(z @ tw + tx), torch.zeros(3, 6))
    crit = lambda z, y: ((z - y) ** 2).mean()  # noqa: E731
    fp_correction(crit, (trajectory, torch.tensor(target)), gamma=0.7).backward()

    def states(w, x):
        g = lambda w, z, x: jnp.tanh(z @ w + x)  # noqa: E731
        rule, z0 = deq.Unroll(steps, tau), jnp.zeros((3, 6))
        solver = deq.Picard(tol=1e-30, max_steps=budget)
        if core == "indexing":
            sol = deq.fixed_point(
                g, w, z0, x, solver=solver, adjoint=rule, keep="last", states=numbers
            )
            return (*sol.states, sol.value)
        found, z = [], z0
        for n in np.diff([0, *numbers, budget]):
            z = deq.fixed_point(
                g, w, z, x, solver=solver, adjoint=rule, keep="last", max_steps=int(n)
            ).value
            found.append(z)
        return found

    def loss(w, x):
        return deq.correction([jnp.mean((z - target) ** 2) for z in states(w, x)], decay=0.7)

    for ours, their in zip(states(w, x), trajectory, strict=True):
        np.testing.assert_allclose(ours, their.detach().numpy(), atol=1e-5)
    for ours, their in zip(jax.grad(loss, (0, 1))(w, x), (tw.grad, tx.grad), strict=True):
        np.testing.assert_allclose(ours, their.numpy(), atol=1e-5)


# The loop that rules share


def test_hold_keeps_what_finished_samples_have(x64):
    """The state of a batch of one has no batch axis."""
    w, x, _ = hard(batch=2)
    solver = deq.Broyden(tol=1e-6, max_steps=40, memory=40, stop="abs")
    x = x * jnp.asarray([3e-6, 1])[:, None]
    g = lambda z: jnp.tanh(z @ w) + x  # noqa: E731
    found = iterate(Settings(solver, 40, "last", False), g, 0 * x, hold=True, carry=True)
    first = int(found.stats.num_steps[0]) - 1
    assert first + 1 < found.stats.num_steps[1]
    (block,) = found.last.state.steps.blocks
    assert (block[0, first:] == 0).all() and (jnp.abs(block[1, first:]).max() > 0)
    assert isinstance(found.last.state.steps, history.History)
    x, y = x[:1], found.value[:1]
    alone = iterate(Settings(solver, 40, "last", False), g, 0 * x, hold=True)
    np.testing.assert_allclose(alone.value, y, rtol=1e-9, atol=1e-12)
