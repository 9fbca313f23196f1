"""What a training step draws: whether it is penalised, and how long its solver may run."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deq_jax.training.config import Config, JacConfig, TrainConfig


def penalty_weight(config: JacConfig, step: jax.Array, train: TrainConfig) -> jax.Array:
    """The weight of the penalty at a step.

        warm-up:  warmup_gamma
        then:     gamma + increment * floor((step - warmup_steps) / increment_every)
        before the share ``start`` of the steps, and from stop_step on:  0

    Args:
      config: the schedule.
      step: int32 scalar, the number of finished steps.
      train: length of training and of its warm-up phase.

    Returns:
      float32 scalar.

    Example:
      >>> schedule = JacConfig(gamma=1.0, increment=0.1, increment_every=10)
      >>> round(float(penalty_weight(schedule, jnp.int32(25), TrainConfig())), 3)
      1.2
    """
    raises = (step - train.warmup_steps) // config.increment_every
    value = jnp.where(
        step < train.warmup_steps, config.warmup_gamma, config.gamma + config.increment * raises
    )
    value = jnp.where(step < round(config.start * train.steps), 0.0, value)
    if config.stop_step is not None:
        value = jnp.where(step >= config.stop_step, 0.0, value)
    return value.astype(jnp.float32)


class StepDraw(NamedTuple):
    """Random choices of one training step.

    Attributes:
      gamma: float32 scalar, the weight of the penalty.
      penalise: bool scalar, whether the penalty is computed.
      budget: int32 scalar, the steps that the solver may take; each example draws its own if
        ``jac.budget_per`` says so.
    """

    gamma: jax.Array
    penalise: jax.Array
    budget: jax.Array


def draw_step(config: Config, step: jax.Array, key: jax.Array) -> StepDraw:
    """Draws whether a step is penalised, and its solver budget.

    Args:
      config: its parts jac, solver and train are read.
      step: int32 scalar, the number of finished steps.
      key: PRNG key of this step.

    Returns:
      A `StepDraw`.

    Example:
      >>> from deq_jax.training.config import SolverConfig
      >>> config = Config(solver=SolverConfig(max_steps=8), jac=JacConfig(budget_low=-2))
      >>> int(draw_step(config, jnp.int32(0), jax.random.key(0)).budget)
      8
    """
    jac = config.jac
    coin_key, budget_key = jax.random.split(key)
    weight = penalty_weight(jac, step, config.train)
    penalise = (weight > 0) & jax.random.bernoulli(coin_key, jac.prob)
    return StepDraw(weight, penalise, draw_budget(config, penalise, budget_key))


def draw_budget(
    config: Config, penalise: jax.Array, key: jax.Array, shape: tuple[int, ...] = ()
) -> jax.Array:
    """Draws solver budgets.

    Args:
      config: its parts jac and solver are read.
      penalise: bool scalar, whether the step has a penalty.
      key: PRNG key.
      shape: of the result.

    Returns:
      int32 array.

    Example:
      >>> from deq_jax.training.config import SolverConfig
      >>> jac = JacConfig(budget_draw="lognormal", budget_on="all")
      >>> config = Config(solver=SolverConfig(max_steps=16), jac=jac)
      >>> budgets = draw_budget(config, jnp.bool(False), jax.random.key(0), (1000,))
      >>> budgets.min().item(), budgets.max().item()
      (1, 16)

    Reference: Geiping et al., arXiv 2502.05171, section 3 (poisson).
    """
    jac, limit = config.jac, config.solver.max_steps
    if jac.budget_draw == "uniform":
        drawn = limit + jax.random.randint(key, shape, jac.budget_low, jac.budget_high + 1)
    else:
        rate_key, count_key = jax.random.split(key)
        drawn = jnp.exp(jac.budget_mu + jac.budget_sigma * jax.random.normal(rate_key, shape))
        if jac.budget_draw == "poisson":
            drawn = 1 + jax.random.poisson(count_key, drawn)
        drawn = jnp.clip(jnp.round(drawn), 1, limit).astype(jnp.int32)
    return drawn if jac.budget_on == "all" else jnp.where(penalise, drawn, limit)


def is_penalised(config: Config, *, warmup: bool) -> bool:
    """Whether a phase of training can have a penalty at all.

    Args:
      config: its jac part is read.
      warmup: which phase.

    Returns:
      False if the penalty need not even be compiled.

    Example:
      >>> is_penalised(Config(), warmup=False)
      False
    """
    if warmup:
        return config.jac.warmup_gamma > 0
    return config.jac.gamma > 0 or config.jac.increment > 0
