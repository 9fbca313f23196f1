"""Learning-rate schedules and optimisers against formulas written out here."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deq_jax.training import OptimConfig
from deq_jax.training.optim import make_optimizer, make_schedule


def rates(steps, total=100, **settings):
    schedule = make_schedule(OptimConfig(**settings), total)
    return np.array([schedule(jnp.int32(t)) for t in steps])


def test_every_schedule_rises_linearly_to_its_peak():
    for name in ("constant", "cosine", "inverse_sqrt"):
        got = rates(range(5), lr=2.0, schedule=name, warmup_steps=4)
        np.testing.assert_allclose(got[:4], [0.5, 1.0, 1.5, 2.0], rtol=1e-6)


def test_schedules_after_the_warm_up():
    steps = np.array([10, 30, 55, 99, 100, 130])
    got = rates(steps, lr=2.0, schedule="constant", warmup_steps=10)
    np.testing.assert_allclose(got, 2.0)
    got = rates(steps, lr=2.0, schedule="inverse_sqrt", warmup_steps=10)
    np.testing.assert_allclose(got, 2.0 * np.sqrt(10 / (steps + 1)), rtol=1e-6)
    got = rates(steps, lr=2.0, schedule="cosine", warmup_steps=10, end_lr=0.5)
    share = np.minimum((steps - 10) / 90, 1)
    np.testing.assert_allclose(got, 0.5 + 0.75 * (1 + np.cos(np.pi * share)), rtol=1e-5)


def run(config, grads, start):
    optimizer = make_optimizer(config, total_steps=len(grads))
    params, state = jnp.asarray(start), optimizer.init(jnp.asarray(start))
    for grad in grads:
        updates, state = jax.jit(optimizer.update)(jnp.asarray(grad), state, params)
        params = optax.apply_updates(params, updates)
    return np.asarray(params)


GRADS = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
START = np.array([1.0, -2.0, 0.5], np.float32)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_adds_the_decay_to_the_gradient(nesterov):
    config = OptimConfig(
        name="sgd", lr=0.1, schedule="constant", weight_decay=0.3, nesterov=nesterov
    )
    p, v = START.astype(np.float64), np.zeros(3)
    for grad in GRADS:
        g = grad + 0.3 * p
        v = 0.9 * v + g
        p = p - 0.1 * (g + 0.9 * v if nesterov else v)
    np.testing.assert_allclose(run(config, GRADS, START), p, rtol=1e-5)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_decays_the_gradient_and_adamw_the_weights(name):
    config = OptimConfig(name=name, lr=0.1, schedule="constant", weight_decay=0.3)
    p, m, v = START.astype(np.float64), np.zeros(3), np.zeros(3)
    for t, grad in enumerate(GRADS, 1):
        g = grad + 0.3 * p * (name == "adam")
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        p = p - 0.1 * (step + 0.3 * p * (name == "adamw"))
    np.testing.assert_allclose(run(config, GRADS, START), p, rtol=1e-4)


def test_radam_begins_as_momentum():
    config = OptimConfig(name="radam", lr=0.1, schedule="constant")
    got = run(config, GRADS[:1], START)  # the variance is not yet rectifiable: m / (1 - b1)
    np.testing.assert_allclose(got, START - 0.1 * GRADS[0], rtol=1e-5)


def test_gradients_are_clipped_by_global_norm_before_anything_else():
    config = OptimConfig(
        name="sgd", lr=1.0, schedule="constant", momentum=0.0, clip=0.5, weight_decay=0.1
    )
    got = run(config, 100 * GRADS[:1], START)
    clipped = 0.5 * GRADS[0] / np.linalg.norm(GRADS[0])
    np.testing.assert_allclose(got, START - clipped - 0.1 * START, rtol=1e-5)
