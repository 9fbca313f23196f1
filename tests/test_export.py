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
from experiments.image_classification.task import ImageTask
from experiments.language_modeling.presets import PRESETS as LANGUAGE_PRESETS
from experiments.language_modeling.task import LanguageTask

PLATFORMS = ("cpu", "cuda", "tpu")
VOCABULARY = 1600


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
    config = IMAGE_PRESETS["digits"]
    data = config.data
    size, images = config.train.batch_size, (data.size, data.size, data.colors)
    batch = {"image": ((size, *images), jnp.float32), "label": ((size,), jnp.int32)}
    return config, ImageTask(config, mesh), batch | {"mask": ((size,), jnp.float32)}


def language_task(mesh):
    config = LANGUAGE_PRESETS["prose"]
    size, length = config.train.batch_size, config.data.length
    batch = {"words": ((size, length), jnp.int32), "targets": ((size, length), jnp.int32)}
    batch |= {"weight": ((size, length), jnp.float32), "fresh": ((size,), jnp.float32)}
    batch |= {"mask": ((size,), jnp.float32)}
    return config, LanguageTask(config, mesh, VOCABULARY), batch


@pytest.mark.slow
@pytest.mark.parametrize("build", [image_task, language_task], ids=["digits", "prose"])
def test_training_steps_are_lowered_for_all_platforms(build):
    """With the penalty, and with the statistics of the backward solve."""
    mesh = parallel.make_mesh(jax.devices()[:1])
    config, task, batch = build(mesh)
    config = dataclasses.replace(config, jac=dataclasses.replace(config.jac, prob=1.0))
    optimizer = make_optimizer(config.optim, config.train.steps)
    state = abstract_state(task, optimizer, mesh)
    batch = {name: jax.ShapeDtypeStruct(*described) for name, described in batch.items()}
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
