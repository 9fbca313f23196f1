"""What the compiled programs cost: compilations, copies, collectives, memory."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import deq_jax as deq
from benchmarks._scaling_program import LOOPS, collectives
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
    plain, state = peak(SOLVERS[0], 50), B * D * 4
    for solver, vectors in ((SOLVERS[1], 2 * 6), (SOLVERS[2], 7)):
        extra = (peak(solver, 50) - plain) / state
        assert vectors <= extra + 2 and extra <= vectors + 6


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
