"""What the compiled programs cost: compilations, copies, collectives, memory."""

import contextlib
import dataclasses
import re
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import deq_jax as deq
from benchmarks.programs import LOOPS, collectives
from deq_jax.training import parallel

pytestmark = pytest.mark.usefixtures("compilation_cache_off")
B, D = 8, 512


def f(params, z, x):
    return jnp.tanh(z @ params + x)


def operands():
    keys = jax.random.split(jax.random.key(0), 2)
    params = deq.init.gaussian(0.5)(keys[0], (D, D), jnp.float32)
    return params, jax.random.normal(keys[1], (B, D))


def gradient(solver, backward=None, fixed_point=deq.fixed_point):
    adjoint = None if backward is None else deq.Implicit(backward)

    def loss(params, x):
        sol = fixed_point(f, params, jnp.zeros_like(x), x, solver=solver, adjoint=adjoint)
        return jnp.sum(sol.value**2)

    return jax.jit(jax.grad(loss))


def compiled(solver, **options):
    return gradient(solver, **options).lower(*operands()).compile()


def bodies(text):
    """Texts of the bodies and conditions of while loops, and of all that they call."""
    parts = re.split(r"\n(?=(?:ENTRY )?%?[\w.\-]+ \([^\n]*\{\n)", text)
    named = {}
    for part in parts:
        head = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(", part)
        if head:
            named[head[1]] = part
    reached, queue = set(), re.findall(r"(?:body|condition)=%?([\w.\-]+)", text)
    while queue:
        name = queue.pop()
        if name in reached or name not in named:
            continue
        reached.add(name)
        called = (
            r"(?:calls|to_apply|body|condition|branch_computations)="
            r"\{?([^,}\s]+(?:, ?%[^,}]+)*)"
        )
        for group in re.findall(called, named[name]):
            queue += [item.strip().lstrip("%") for item in group.split(",")]
    return [named[name] for name in reached]


SOLVERS = [
    deq.Picard(tol=1e-30, max_steps=20),
    deq.Anderson(tol=1e-30, max_steps=20, memory=6),
    deq.Broyden(tol=1e-30, max_steps=20, memory=7),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_a_second_call_compiles_nothing(solver):
    go, (params, x) = gradient(solver), operands()
    go(params, x)
    before = go._cache_size()
    go(params, x + 1)
    assert go._cache_size() == before == 1


@pytest.mark.parametrize("solver", SOLVERS[1:], ids=lambda s: type(s).__name__)
def test_the_history_is_neither_selected_nor_copied_in_the_loop(solver):
    text = compiled(solver).as_text()
    rows = solver.memory
    whole = rf"f32\[{B},{rows},{D}\]"
    loops = bodies(text)
    assert any(re.search(whole, body) for body in loops), "the search itself finds the history"
    for body in loops:
        found = re.findall(rf"= {whole}\S* (select|copy|transpose|concatenate|pad)\(", body)
        assert not found


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_f_is_evaluated_in_three_places_and_weight_gradients_stay_outside_the_loops(solver):
    text = compiled(solver).as_text()
    product = rf"= f32\[{D},{D}\]\S* dot\("  # x^T u, the gradient by the weights
    assert len(re.findall(product, text)) == 1
    assert not any(re.search(product, body) for body in bodies(text))


def test_no_collective_in_the_loops_and_the_same_gradient_on_eight_devices():
    mesh = parallel.make_mesh()
    assert mesh.size == 8
    params, x = operands()
    x = jax.device_put(x, parallel.batch_sharding(mesh))
    solver = deq.Broyden(tol=1e-5, max_steps=40)
    ours = gradient(solver, fixed_point=parallel.sharded_fixed_point(mesh))
    text = ours.lower(params, x).compile().as_text()
    assert {found.place for found in collectives(text)} == {"once"}  # the gradients' sum

    plain = gradient(solver).lower(params, x).compile().as_text()
    assert {found.place for found in collectives(plain)} & set(LOOPS), "what shard_map is for"

    alone = gradient(solver)(params, np.asarray(x))
    np.testing.assert_allclose(ours(params, x), alone, rtol=1e-4, atol=1e-5)


def test_each_device_stops_with_its_own_samples():
    mesh = parallel.make_mesh()

    def map_(params, z, x):
        jax.debug.callback(lambda: calls.append(1))
        return params * z + x["rate"] * z + x["input"]

    rate = jnp.linspace(0, 0.9, 8)[:, None]
    x = {"rate": rate, "input": jnp.ones((8, 3))}
    calls = []
    sol = parallel.sharded_fixed_point(mesh)(
        map_,
        jnp.float32(0),
        jnp.zeros((8, 3)),
        x,
        solver=deq.Picard(tol=1e-4, max_steps=200),
        max_steps=jnp.int32(150),
    )
    jax.block_until_ready(sol)
    jax.effects_barrier()
    assert sol.stats.converged.all()
    assert len(calls) == sol.stats.num_steps.sum()  # one sample per device, no waiting
    assert sol.stats.num_steps[0] < sol.stats.num_steps[-1] / 10


def test_sharding_is_kept_and_bad_batches_are_refused():
    mesh = parallel.make_mesh()
    params, x = operands()
    x = jax.device_put(x, parallel.batch_sharding(mesh))
    solve = parallel.sharded_fixed_point(mesh)
    sol = jax.jit(lambda x: solve(f, params, jnp.zeros_like(x), x, solver=deq.Anderson()))(x)
    assert sol.value.sharding.is_equivalent_to(x.sharding, x.ndim)
    assert sol.stats.residual.sharding.spec == PartitionSpec(parallel.AXIS)
    with pytest.raises(ValueError, match="multiple"):
        solve(f, params, jnp.zeros((6, D)), x[:6], solver=deq.Anderson())


def peak(solver, steps):
    solver = dataclasses.replace(solver, max_steps=steps)
    return compiled(solver, backward=solver).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_peak_memory_does_not_grow_with_max_steps(solver):
    """Only the trace does, 4 bytes a step and sample, forward and backward."""
    assert peak(solver, 50) - peak(solver, 10) <= 2 * 40 * B * 4


def test_peak_memory_holds_one_history_of_its_own_size():
    """Anderson keeps two vectors a row, Broyden one; forward and backward solves take turns."""
    params, x = operands()

    def peak(solver):
        def loss(x):  # not of the weights, whose gradient is larger than a history here
            adjoint = deq.Implicit(solver)
            sol = deq.fixed_point(f, params, jnp.zeros_like(x), x, solver=solver, adjoint=adjoint)
            return jnp.sum(sol.value**2)

        program = jax.jit(jax.grad(loss)).lower(x).compile()
        return program.memory_analysis().temp_size_in_bytes

    plain, state = peak(SOLVERS[0]), B * D * 4
    for solver, vectors in ((SOLVERS[1], 2 * 6), (SOLVERS[2], 7)):
        extra = (peak(solver) - plain) / state
        assert vectors - 1 <= extra <= vectors + 4


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_no_sum_over_the_start_is_left_to_the_compiler(solver):
    """Under shard_map XLA folded one over a state of zeros element by element, for seconds."""
    mesh = parallel.make_mesh(jax.devices()[:2])
    fixed_point = parallel.sharded_fixed_point(mesh)
    text = gradient(solver, fixed_point=fixed_point).lower(*operands()).as_text()
    sums = re.findall(r"applies stablehlo\.or across .*: \(tensor<([\dx]+)xi1>", text)
    assert sums and all(np.prod(list(map(int, shape.split("x")))) <= B for shape in sums)


def states_of(rule, steps):
    """Temporary memory of a gradient, in states [B, D]; f is two layers, which are not stored."""
    params, x = operands()
    solver = deq.Picard(tol=1e-30, max_steps=steps)

    def loss(x):
        sol = deq.fixed_point(
            lambda params, z, x: f(params, jnp.sin(f(params, z, x)), x),
            params,
            jnp.zeros_like(x),
            x,
            solver=solver,
            adjoint=rule,
            keep="last",
            trace=False,
        )
        return jnp.sum(sol.value**2)

    program = jax.jit(jax.grad(loss)).lower(x).compile()
    return program.memory_analysis().temp_size_in_bytes / (B * D * 4)


def test_backprop_stores_one_iterate_a_step_and_with_segments_the_square_root():
    extra = states_of(deq.Backprop(), 4) - 4
    # jaxlib 0.10 copies the weights for every loop: once in extra, and once more with segments.
    copied = D // B if version("jaxlib").startswith("0.10.") else 0
    for steps in (16, 64):
        assert abs(states_of(deq.Backprop(), steps) - steps - extra) < 4
        segments = states_of(deq.Backprop(segments=round(steps**0.5)), steps)
        assert segments < 2 * steps**0.5 + extra + copied + 4


def test_the_memory_of_reversible_is_flat():
    few, *more = (states_of(deq.Reversible(), steps) for steps in (4, 16, 64))
    assert all(abs(memory - few) <= 0.05 * few for memory in more)


def test_unrolling_does_grow_with_its_steps():
    """The other side of the comparison: memory linear in depth."""
    params, x = operands()

    def memory(steps):
        def loss(params):
            sol = deq.fixed_point(
                f,
                params,
                jnp.zeros_like(x),
                x,
                solver=deq.Picard(),
                adjoint=deq.Unroll(steps),
                max_steps=0,
            )
            return jnp.sum(sol.value**2)

        program = jax.jit(jax.grad(loss)).lower(params).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert memory(50) - memory(10) >= 40 * B * D * 4


@pytest.mark.skipif(
    version("jaxlib") in ("0.10.0", "0.10.1"), reason="the compiler of jaxlib 0.10.0 copies it"
)
@pytest.mark.parametrize("solver", SOLVERS[1:], ids=lambda s: type(s).__name__)
def test_the_history_of_one_sample_is_not_copied_in_the_loop(solver):
    """S1: XLA removed the batch axis, and kept the history in both shapes."""
    params, x = operands()
    text = gradient(solver).lower(params, x[:1]).compile().as_text()
    rows = solver.memory
    loops = bodies(text)
    assert any(re.search(rf"f32\[{rows},{D}\]", body) for body in loops)
    for body in loops:
        found = re.findall(rf"= f32\[(?:1,)?{rows},{D}\]\S* (copy|select|transpose)\(", body)
        assert not found


def compilations(call):
    """How many programs a call compiles."""
    with _counted() as count:
        jax.block_until_ready(call())
    return len(count)


@contextlib.contextmanager
def _counted():
    events = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def make_map(weight):
    return lambda p, z, x: jnp.tanh(z @ (p * weight) + x)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_a_second_call_outside_jit_compiles_nothing(solver):
    """B2, S2: each call compiled the loop anew, 0.5 s forward and 1 s with the gradient."""
    p, x = 0.3 * jnp.eye(6), jnp.ones((4, 6))
    solver = dataclasses.replace(solver, tol=1e-4)

    def go(p, weight):
        # The function is made anew by every call, as in a notebook's loop; it closes over an array.
        f = make_map(weight)
        z0 = jnp.zeros_like(x)
        return deq.fixed_point(f, p, z0, x, solver=solver).value.sum()

    weight = jnp.eye(6)
    calls = {
        "call": lambda scale: go(scale * p, scale * weight),
        "gradient": lambda scale: jax.grad(go, argnums=(0, 1))(scale * p, scale * weight),
        "solve": lambda scale: deq.solve(solver, lambda z: jnp.cos(scale * z), x).value,
    }
    for name, call in calls.items():
        assert compilations(lambda call=call: call(jnp.float32(1))) > 0, "the count finds them"
        call(jnp.float32(1.05))
        assert compilations(lambda call=call: call(jnp.float32(1.1))) == 0, name
    # The numbers are those of the new arrays, not of the ones that were there at compilation.
    np.testing.assert_allclose(
        calls["call"](jnp.float32(1.1)),
        jax.jit(lambda: calls["call"](jnp.float32(1.1)))(),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        calls["gradient"](jnp.float32(1.1))[1],
        jax.jit(lambda: calls["gradient"](jnp.float32(1.1)))()[1],
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_changed_global_or_closure_is_another_program():
    x, solver = jnp.ones((2, 3)), deq.Picard(tol=1e-6, max_steps=60)

    def value(rate):
        f = lambda p, z, x: rate * z + x  # noqa: E731
        return deq.fixed_point(f, None, 0 * x, x, solver=solver).value[0, 0]

    np.testing.assert_allclose([value(0.5), value(0.25), value(0.5)], [2, 4 / 3, 2], rtol=1e-4)

    class Model:
        weight = jnp.float32(0.5)

        def f(self, p, z, x):
            return self.weight * z + x

    model = Model()
    first = deq.fixed_point(model.f, None, 0 * x, x, solver=solver).value[0, 0]
    model.weight = jnp.float32(0.25)
    second = deq.fixed_point(model.f, None, 0 * x, x, solver=solver).value[0, 0]
    np.testing.assert_allclose([first, second], [2, 4 / 3], rtol=1e-4)


@pytest.mark.parametrize("make", [deq.Anderson, deq.Broyden])
def test_programs_for_accelerators_have_no_conditional_and_no_library_call(make):
    """A CPU skips blocks of a large history that hold no row; elsewhere the host would wait."""
    x = jax.ShapeDtypeStruct((16, 100_000), jnp.float32)
    solver = make(memory=20, max_steps=20)

    def solve(x):
        return deq.solve(solver, lambda z: jnp.tanh(0.5 * z + x), jnp.zeros_like(x)).value

    def operations(platform):
        text = jax.export.export(jax.jit(solve), platforms=[platform])(x).mlir_module()
        chosen = re.findall(r"stablehlo\.case\"\((%\w+)", text)
        # The choice of the platform is one by constants, which XLA makes; others are by data.
        by_data = set(chosen) & set(re.findall(r"(%\w+) = stablehlo\.convert", text))
        return by_data, set(re.findall(r"stablehlo\.(\w+)", text))

    costly = {"if", "custom_call", "scatter", "gather", "triangular_solve", "cholesky"}
    assert operations("cpu")[0], "the search finds the conditionals that a CPU has"
    for platform in ("cuda", "tpu"):
        by_data, used = operations(platform)
        assert not by_data
        assert not used & costly


def test_the_program_of_anderson_does_not_grow_with_its_memory():
    """S3: its elimination was unrolled, and took 7 s to compile at memory 50."""

    def size(memory):
        solver = deq.Anderson(memory=memory, max_steps=60)
        go = jax.jit(lambda x: deq.solve(solver, jnp.cos, x).value)
        return len(go.lower(jnp.ones((2, 3))).as_text().splitlines())

    assert size(50) == size(20)
    assert size(8) < 2.5 * size(20)  # small systems are unrolled, up to this one


def test_a_large_history_under_vmap_and_without_a_trace():
    """The split history of a CPU and the whole one of others, batched by vmap."""
    solver = deq.Broyden(tol=1e-30, max_steps=8, memory=7)
    x = jax.random.normal(jax.random.key(0), (2, 4, 200_000))

    def solve(x):
        f = lambda p, z, x: jnp.tanh(0.5 * z + x)  # noqa: E731
        return deq.fixed_point(f, None, jnp.zeros_like(x), x, solver=solver, trace=False).value

    both = jax.jit(jax.vmap(solve))(x)
    np.testing.assert_allclose(both[1], solve(x[1]), rtol=1e-5, atol=1e-5)
