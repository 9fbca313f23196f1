"""Learning-rate schedules and optimisers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from deq_jax.training.config import OptimConfig


def make_schedule(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """The learning rate as a function of the number of finished steps.

    With w = warmup_steps, the rate first rises as lr * (t + 1) / w; from t = w on it is

        constant:      lr
        cosine:        end_lr + (lr - end_lr) * (1 + cos(pi * (t - w) / (total_steps - w))) / 2
        inverse_sqrt:  lr * sqrt(w / (t + 1))

    Args:
      config: schedule, lr, end_lr and warmup_steps.
      total_steps: length of the run.

    Returns:
      A function int32 scalar -> float32 scalar.

    Example:
      >>> rate = make_schedule(OptimConfig(lr=1.0, schedule="cosine"), total_steps=10)
      >>> round(float(rate(5)), 6)
      0.5
    """
    warmup = config.warmup_steps

    def rate(step: jax.typing.ArrayLike) -> jax.Array:
        t = jnp.asarray(step, jnp.float32)
        if config.schedule == "constant":
            after = jnp.full_like(t, config.lr)
        elif config.schedule == "inverse_sqrt":
            after = config.lr * jnp.sqrt(warmup / (t + 1))
        else:
            share = jnp.clip((t - warmup) / max(1, total_steps - warmup), 0, 1)
            after = config.end_lr + (config.lr - config.end_lr) * (1 + jnp.cos(jnp.pi * share)) / 2
        return jnp.where(t < warmup, config.lr * (t + 1) / max(1, warmup), after)

    return rate


def make_optimizer(config: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    """Builds the optimiser: clip, decay, direction, learning rate, in this order.

    Weight decay is added to the (clipped) gradient, except for adamw, which adds it to the step.

    Args:
      config: all of the optimiser's settings.
      total_steps: length of the run, for the schedule.

    Returns:
      An optax transformation of gradients into updates.  ``update(..., step=t)`` applies the
      learning rate of step t; without ``step``, t is the number of updates so far.

    Example:
      >>> import optax
      >>> optimizer = make_optimizer(OptimConfig(name="sgd", lr=0.5, schedule="constant"), 10)
      >>> state = optimizer.init(jnp.float32(1.0))
      >>> updates, state = optimizer.update(jnp.float32(2.0), state, jnp.float32(1.0))
      >>> float(updates)
      -1.0
    """
    decay = optax.add_decayed_weights(config.weight_decay)
    direction = {
        "adam": [decay, optax.scale_by_adam(config.b1, config.b2, config.eps)],
        "adamw": [optax.scale_by_adam(config.b1, config.b2, config.eps), decay],
        "radam": [decay, optax.scale_by_radam(config.b1, config.b2, config.eps)],
        "sgd": [decay, optax.trace(config.momentum, nesterov=config.nesterov)],
    }[config.name]
    clip = [] if config.clip is None else [optax.clip_by_global_norm(config.clip)]
    return optax.chain(*clip, *direction, _scale_by_rate(make_schedule(config, total_steps)))


def _scale_by_rate(rate: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_learning_rate` at a step that the caller may name."""
    counted = optax.scale_by_learning_rate(rate)

    def update(
        updates: Any, state: Any, params: Any = None, *, step: Any = None, **others: Any
    ) -> tuple[Any, Any]:
        del others  # those of other transformations in the chain
        state = state if step is None else state._replace(count=jnp.asarray(step, jnp.int32))
        return counted.update(updates, state, params)

    return optax.GradientTransformationExtraArgs(counted.init, update)
