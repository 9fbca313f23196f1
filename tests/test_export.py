"""Programs lowered for platforms that are not here: nothing in them may be for a CPU only."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import deq_jax as deq
from deq_jax.models import layers
from deq_jax.training import make_train_step, parallel
from deq_jax.training.optim import make_optimizer
from deq_jax.training.state import abstract_state
from experiments.image_classification.presets import PRESETS as IMAGE_PRESETS
from experiments.image_classification.task import build_task as build_image_task
from experiments.language_modeling.presets import PRESETS as LANGUAGE_PRESETS
from experiments.language_modeling.task import build_task as build_language_task

PLATFORMS = ("cpu", "cuda", "tpu")


def contraction(p, z, x):
    return jnp.tanh(p * z + x)


@pytest.mark.parametrize(
    "solver",
    [deq.Picard(tol=1e-5), deq.Anderson(tol=1e-5), deq.Broyden(tol=1e-5)],
    ids=lambda s: type(s).__name__,
)
def test_a_solve_of_any_batch_is_exported_for_all_platforms(solver):
    @jax.jit
    def gradient(p, x):
        def loss(p, x):
            z = deq.fixed_point(contraction, p, jnp.zeros_like(x), x, solver=solver).value
            return z.sum(), z

        return jax.grad(loss, (0, 1), has_aux=True)(p, x)

    (batch,) = export.symbolic_shape("batch")
    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 6), (batch, 6)))
    exported = export.export(gradient, platforms=PLATFORMS)(*shapes)
    assert exported.platforms == PLATFORMS
    p, x = jnp.linspace(0.1, 0.5, 6)[None], jax.random.normal(jax.random.key(0), (3, 6))
    for ours, plain in zip(
        jax.tree.leaves(exported.call(p, x)), jax.tree.leaves(gradient(p, x)), strict=True
    ):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-6)


def image_task(mesh):
    return IMAGE_PRESETS["digits"], build_image_task(IMAGE_PRESETS["digits"], mesh)


def language_task(mesh):
    return LANGUAGE_PRESETS["prose"], build_language_task(LANGUAGE_PRESETS["prose"], mesh)


@pytest.mark.slow
@pytest.mark.parametrize("build", [image_task, language_task], ids=["digits", "prose"])
def test_training_steps_are_lowered_for_all_platforms(build):
    """With the penalty, and with the statistics of the backward solve."""
    mesh = parallel.make_mesh(jax.devices()[:1])
    config, task = build(mesh)
    config = dataclasses.replace(config, jac=dataclasses.replace(config.jac, prob=1.0))
    optimizer = make_optimizer(config.optim, config.train.steps)
    state = abstract_state(task, optimizer, mesh)
    mask = jax.ShapeDtypeStruct((config.train.batch_size,), jnp.float32)
    batch = {**task.sample, "mask": mask}
    step = make_train_step(task, config, optimizer, mesh)
    exported = export.export(step, platforms=PLATFORMS)(state, batch)
    assert exported.platforms == PLATFORMS


def convolutions(platform):
    """Layouts of the convolutions of a penalty's gradient, lowered for a platform."""
    x, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 4))

    def penalty(x, kernel):
        out, pull = jax.vjp(lambda x: layers.conv2d(jnp.sin(x), kernel, strides=2), x)
        return jnp.sum(pull(out)[0] ** 2)

    lowered = (
        jax.jit(jax.grad(penalty, (0, 1))).trace(x, kernel).lower(lowering_platforms=(platform,))
    )
    return set(re.findall(r"dim_numbers = (.*?->\[.*?\])", lowered.as_text()))


def test_gradients_of_convolutions_are_rewritten_on_a_cpu_only():
    plain = "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"
    assert convolutions("cpu") == {plain}
    assert convolutions("cuda") == convolutions("tpu") > {plain}
