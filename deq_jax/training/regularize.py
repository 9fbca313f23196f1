"""When and how much the Jacobian is penalised, and how many solver steps a training step gets."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deq_jax.training.config import Config, JacConfig


def gamma(config: JacConfig, step: jax.Array, warmup_steps: int) -> jax.Array:
    """The weight of the penalty at a step.

        warm-up:  warmup_gamma
        then:     gamma + increment * floor((step - warmup_steps) / increment_every)
        from stop_step on:  0

    Args:
      config: the schedule.
      step: int32 scalar, the number of finished steps.
      warmup_steps: length of the warm-up phase.

    Returns:
      float32 scalar.

    Example:
      >>> schedule = JacConfig(gamma=1.0, increment=0.1, increment_every=10)
      >>> round(float(gamma(schedule, jnp.int32(25), warmup_steps=0)), 3)
      1.2
    """
    raises = (step - warmup_steps) // config.increment_every
    value = jnp.where(
        step < warmup_steps, config.warmup_gamma, config.gamma + config.increment * raises
    )
    if config.stop_step is not None:
        value = jnp.where(step >= config.stop_step, 0.0, value)
    return value.astype(jnp.float32)


class Draw(NamedTuple):
    """What chance decides about one training step.

    Attributes:
      gamma: float32 scalar, the weight of the penalty.
      penalise: bool scalar, whether the penalty is computed.
      budget: int32 scalar, the steps that the solver may take.
    """

    gamma: jax.Array
    penalise: jax.Array
    budget: jax.Array


def draw(config: Config, step: jax.Array, key: jax.Array) -> Draw:
    """Draws whether a step is penalised, and its solver budget.

    Args:
      config: its parts jac, solver and train are read.
      step: int32 scalar, the number of finished steps.
      key: PRNG key of this step.

    Returns:
      A `Draw`.

    Example:
      >>> from deq_jax.training.config import SolverConfig
      >>> config = Config(solver=SolverConfig(max_steps=8), jac=JacConfig(budget_low=-2))
      >>> int(draw(config, jnp.int32(0), jax.random.key(0)).budget)
      8
    """
    jac = config.jac
    coin_key, budget_key = jax.random.split(key)
    weight = gamma(jac, step, config.train.warmup_steps)
    penalise = (weight > 0) & jax.random.bernoulli(coin_key, jac.prob)
    change = jax.random.randint(budget_key, (), jac.budget_low, jac.budget_high + 1)
    if jac.budget_on == "penalty":
        change = jnp.where(penalise, change, 0)
    return Draw(weight, penalise, jnp.int32(config.solver.max_steps) + change)


def is_used(config: Config, *, warmup: bool) -> bool:
    """Whether a phase of training can have a penalty at all.

    Args:
      config: its jac part is read.
      warmup: which phase.

    Returns:
      False if the penalty need not even be compiled.

    Example:
      >>> is_used(Config(), warmup=False)
      False
    """
    if warmup:
        return config.jac.warmup_gamma > 0
    return config.jac.gamma > 0 or config.jac.increment > 0
