"""What must hold on a GPU or TPU: it computes what the CPU computes.

    python -m pytest -m accelerator tests/test_accelerator.py

Matrix products run in full float32, or the accelerator's own rounding (TF32 on a GPU, bfloat16 on a
TPU) would be all that is seen.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import deq_jax as deq
from deq_jax import testing
from deq_jax.models.convolution import conv2d
from deq_jax.training import make_train_step, metrics, parallel
from deq_jax.training.checkpoint import read, saved_steps
from deq_jax.training.parallel import place
from deq_jax.training.solving import in_bfloat16
from deq_jax.training.state import create_state
from experiments.image_classification import data as image_data
from experiments.image_classification import task as image_task
from experiments.image_classification.presets import PRESETS as IMAGES
from experiments.language_modeling import data as language_data
from experiments.language_modeling import task as language_task
from experiments.language_modeling.presets import PRESETS as TEXTS

pytestmark = pytest.mark.accelerator

TIGHT = deq.Broyden(tol=1e-6, max_steps=60, memory=60)
SHORT = deq.Picard(tol=1e-30, max_steps=12)
SOLVERS = {
    "picard": deq.Picard(tol=1e-6, max_steps=400),
    "anderson": deq.Anderson(tol=1e-6, max_steps=100),
    "broyden": TIGHT,
}
# name -> (rule, forward solver, keep)
RULES = {
    "implicit": (deq.Implicit(TIGHT), TIGHT, "best"),
    "anderson": (deq.Implicit(SOLVERS["anderson"]), SOLVERS["anderson"], "best"),
    "forward": (deq.Implicit(TIGHT, forward=True), TIGHT, "best"),
    "neumann": (deq.Implicit(SHORT, keep="last"), TIGHT, "best"),
    "unroll": (deq.Unroll(5, 0.5), TIGHT, "best"),
    "backprop": (deq.Backprop(), SHORT, "last"),
    "segments": (deq.Backprop(segments=3), SHORT, "last"),
    "reversible": (deq.Reversible(0.5), SHORT, "last"),
    "shine": (deq.Shine(2), TIGHT, "best"),
}


@pytest.fixture(scope="module")
def device():
    found = jax.devices()[0]
    if found.platform == "cpu":
        pytest.skip("no accelerator here")
    return found


@pytest.fixture(autouse=True)
def full_float32():
    with jax.default_matmul_precision("highest"):
        yield


def on(place, function, *operands):
    """What a jitted function gives on one device, as NumPy arrays."""
    return jax.device_get(jax.jit(function)(*jax.device_put(operands, place)))


def on_both(device, function, *operands):
    """What it gives there, and on the CPU."""
    return [on(place, function, *operands) for place in (device, jax.devices("cpu")[0])]


def assert_near(found, wanted, rtol):
    """Every leaf, by its norm."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= rtol * np.linalg.norm(b)


def cell(params, z, x):
    """A dense layer, an image convolved and normalised, and what couples the two."""
    a = jnp.tanh(z["a"] @ params["W"] + z["b"].mean(axis=(1, 2)) @ params["U"] + x)
    b = conv2d(z["b"], params["K"]) + a[:, None, None, :4]
    return {"a": a, "b": 0.5 * jnp.tanh(b)}


def operands(batch=6):
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "W": deq.init.orthogonal(0.5)(keys[0], (16, 16), jnp.float32),
        "U": 0.1 * jax.random.normal(keys[1], (4, 16)),
        "K": 0.15 * jax.random.normal(keys[2], (3, 3, 4, 4)),
    }
    z0 = {"a": jnp.zeros((batch, 16)), "b": jnp.zeros((batch, 8, 8, 4))}
    return params, z0, jax.random.normal(keys[3], (batch, 16))


def loss(rule, params, z0, x, wrap=lambda solve: solve):
    rule, solver, keep = RULES[rule]
    sol = wrap(deq.fixed_point)(cell, params, z0, x, solver=solver, adjoint=rule, keep=keep)
    return jnp.sum(jnp.sin(sol.value["a"])) + jnp.sum(sol.value["b"] ** 2), sol.stats


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_problem_is_solved_as_on_the_cpu(device, solver, dtype):
    with jax.enable_x64(dtype == "float64"):
        method = SOLVERS[solver]
        if dtype == "float64":
            method = dataclasses.replace(method, tol=1e-11)
        problems = testing.all_problems(3, dtype=jnp.dtype(dtype))
        for problem in (p for p in problems if p.kind != "unsolvable"):

            def solve(params, z0, x, f=problem.f):
                return deq.fixed_point(f, params, z0, x, solver=method)

            parts = (problem.params, problem.z0, problem.x)
            there, here = on_both(device, solve, *parts)
            done = there.stats.converged & here.stats.converged
            np.testing.assert_array_equal(there.stats.converged, here.stats.converged)
            allowed = 1e-4 if dtype == "float32" else 1e-8
            there, here = ([a[done] for a in jax.tree.leaves(s.value)] for s in (there, here))
            if done.any():
                assert_near(there, here, allowed * max(1.0, problem.condition))


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_gives_the_gradient_of_the_cpu(device, rule):
    def run(*parts):
        return jax.grad(partial(loss, rule), (0, 2), has_aux=True)(*parts)[0]

    # The last factors of Broyden's method come of rounding, and Shine's gradient hangs on them:
    # on a CPU, weights changed by 1e-7 of themselves change it by 5e-3.
    assert_near(*on_both(device, run, *operands()), 1e-2 if rule == "shine" else 1e-4)


@pytest.mark.parametrize("rule", ["implicit", "forward", "backprop"])
def test_second_derivatives_are_those_of_the_cpu(device, rule):
    def run(params, z0, x):
        def squared(x):
            return jnp.sum(jax.grad(lambda x: loss(rule, params, z0, x)[0])(x) ** 2)

        return jax.grad(squared)(x)

    assert_near(*on_both(device, run, *operands()), 1e-3)


def test_forward_mode_gives_the_derivative_of_the_cpu(device):
    def run(params, z0, x):
        return jax.jvp(lambda x: loss("forward", params, z0, x)[0], (x,), (jnp.ones_like(x),))

    assert_near(*on_both(device, run, *operands()), 1e-4)


def test_without_jit_as_with_it(device):
    parts = jax.device_put(operands(), device)
    eager = jax.grad(partial(loss, "implicit"), (0, 2), has_aux=True)(*parts)[0]
    jitted = jax.jit(jax.grad(partial(loss, "implicit"), (0, 2), has_aux=True))(*parts)[0]
    assert_near(eager, jitted, 1e-5)


def test_penalty_and_radius_are_those_of_the_cpu(device):
    def run(params, z0, x):
        sol = deq.fixed_point(cell, params, z0, x, solver=TIGHT)

        def penalty(params):
            return deq.frobenius_penalty(
                cell, params, sol.value, x, key=jax.random.key(3), probes=2
            )

        radius = deq.spectral_radius(cell, params, sol.value, x, key=jax.random.key(4))
        return jax.value_and_grad(penalty)(params), radius

    assert_near(*on_both(device, run, *operands()), 1e-3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_does_not_depend_on_its_batch_mates(device, solver):
    with jax.default_device(device):
        testing.assert_batch_independent(SOLVERS[solver], testing.affine(batch=3))


def test_f_in_bfloat16_is_as_exact_as_its_rounding(device):
    def run(params, z0, x, wrap):
        return jax.value_and_grad(
            lambda p: loss("implicit", p, z0, x, wrap)[0],
        )(params)

    low = on(device, partial(run, wrap=in_bfloat16), *operands())
    assert_near(low, on(device, partial(run, wrap=lambda s: s), *operands()), 3e-2)


def images():
    config = in_six_steps(IMAGES["digits"])
    return config, image_task.build_task, image_data.open_data(config)


def text():
    config = in_six_steps(TEXTS["prose"])
    return config, language_task.build_task, language_data.open_data(config)


def in_six_steps(config):
    """With short solves: after 40 steps at initial weights the gradient hangs on the rounding."""
    solver = dataclasses.replace(config.solver, tol=1e-9, max_steps=6)
    backward = dataclasses.replace(config.backward, tol=1e-9, max_steps=6)
    return dataclasses.replace(config, solver=solver, backward=backward)


@pytest.mark.parametrize("build", [images, text])
def test_a_training_step_is_that_of_the_cpu(device, build):
    """Gradient and loss of one step of a preset.

    Weights changed by 1e-7 of themselves change a leaf of the gradient by up to 3e-4 of its norm.
    """

    def step(place_on):
        mesh = parallel.make_mesh([place_on])
        config, build_task, data = build()
        task = build_task(config, mesh, data)
        optimizer = optax.sgd(1.0)
        with jax.default_device(place_on):
            state = create_state(task, optimizer, 0, mesh)
            before = jax.device_get(state.params)
            run = make_train_step(task, config, optimizer, mesh)
            state, measured = run(state, place(next(data.train), mesh))
        gradient = jax.tree.map(lambda a, b: a - b, before, jax.device_get(state.params))
        return before, gradient, metrics.compute(jax.device_get(measured))

    (start, found, seen), (other, wanted, expected) = map(step, (device, jax.devices("cpu")[0]))
    assert_near(start, other, 1e-6)
    size = np.sqrt(sum(np.sum(np.square(a)) for a in jax.tree.leaves(wanted)))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.linalg.norm(a - b) <= 3e-3 * size
    assert seen["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_bits(device, tmp_path):
    """By the compiler's deterministic kernels, in processes of their own."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_exclude_nondeterministic_ops=true"
    environment = os.environ | {
        "XLA_FLAGS": flags,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }

    def run(folder):
        command = [sys.executable, "-m", "experiments.image_classification.main"]
        options = ["--preset=digits", f"--workdir={folder}", "--compare=false"]
        options += ["--train.steps=6", "--train.checkpoint_every=3"]
        done = subprocess.run(
            [*command, *options],
            env=environment,
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        checkpoints = folder / "model" / "checkpoints"
        assert saved_steps(checkpoints) == [3, 6]
        return read(checkpoints / "000000006")[0]

    straight = run(tmp_path / "straight")
    shutil.copytree(tmp_path / "straight", tmp_path / "halves")
    shutil.rmtree(tmp_path / "halves" / "model" / "checkpoints" / "000000006")
    resumed = run(tmp_path / "halves")
    for a, b in zip(*map(jax.tree.leaves, (straight, resumed)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
