"""The one training step of all tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import deq_jax as deq
from deq_jax.training import accumulation, metrics, regularize
from deq_jax.training.accumulation import Gradients
from deq_jax.training.config import Config
from deq_jax.training.optim import make_schedule
from deq_jax.training.parallel import batch_sharding, per_device, replicated
from deq_jax.training.state import TrainState, abstract_state, split_seed
from deq_jax.training.task import CORRUPT, Batch, Output, Task

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, metrics.Mean]]]


def make_train_step(
    task: Task,
    config: Config,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    warmup: bool = False,
) -> TrainStep:
    """Builds the compiled step of one phase of training.

    Args:
      task: model and loss.
      config: the whole configuration.
      optimizer: from `optim.make_optimizer`.
      mesh: batches are split over it; the state is placed as `state.abstract_state` says.
      warmup: True for the phase that trains the weight-tied unrolled network.

    Returns:
      `make_update`, jitted.  The state given is donated: it must not be used again.

    Example:
      >>> step = make_train_step(task, config, optimizer, mesh)  # doctest: +SKIP
      >>> state, metrics = step(state, batch)  # doctest: +SKIP
    """
    step = make_update(task, config, optimizer, mesh=mesh, warmup=warmup)
    shapes = abstract_state(task, optimizer, mesh, shard_above=config.shard_above)
    state = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    shardings: Any = {
        "in_shardings": (state, batch_sharding(mesh)),
        "out_shardings": (state, replicated(mesh)),
    }
    return jax.jit(step, donate_argnums=0, **shardings)


def make_update(
    task: Task,
    config: Config,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh | None = None,
    axis: str | None = None,
    warmup: bool = False,
) -> TrainStep:
    """Builds the step as a pure function, for whoever compiles it in a way of their own.

        minimise  loss(params) + gamma(step) * Bernoulli(prob) * penalty(params)

    If the objective or the gradient is not finite, the update is skipped: only ``step`` advances,
    and the step contributes to no metric except "skipped".  The learning rate is a function of
    ``step``, also after a skipped update.

    Args:
      task: model and loss.
      config: the whole configuration.
      optimizer: from `optim.make_optimizer`; another one applies its own learning rate, by its own
        count of updates, and is called with ``step=state.step`` if it takes extra arguments.
      mesh: the devices that jit splits the batch over; None for one device, or with `axis`.
      axis: name of the axis of `jax.pmap` or `jax.shard_map` (with any ``check_vma``) in which
        every device calls this with the same state and its own part of the batch: gradients,
        metrics and ``extra`` are averaged over it.  ``carry`` is each device's own.
      warmup: True for the phase that trains the weight-tied unrolled network.

    Returns:
      A function (state, batch) -> (state, metrics), `Mean`s that stand for all devices: "loss", the
      task's own, statistics of both solves, "penalty", "budget", "gamma", "lr", "grad_norm",
      "skipped".

    Example:
      >>> update = make_update(task, config, optimizer, axis="data")  # doctest: +SKIP
      >>> step = jax.pmap(update, axis_name="data")  # doctest: +SKIP
    """
    root = split_seed(config.train.seed)[1]
    learning_rate = make_schedule(config.optim, config.train.steps)
    gradients = _make_gradients(task, config, warmup, axis)
    apply = optax.with_extra_args_support(optimizer).update

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, metrics.Mean]]:
        model_key, draw_key, probe_key = jax.random.split(jax.random.fold_in(root, state.step), 3)
        drawn = regularize.draw(config, state.step, draw_key)
        if axis is not None:
            index = jax.lax.axis_index(axis)
            model_key, probe_key = (jax.random.fold_in(k, index) for k in (model_key, probe_key))
        params, collections = state.params, state.collections()
        if axis is not None:  # over_devices sums the gradients; autodiff must not
            params, extra = per_device((params, state.extra), axis)
            collections = dataclasses.replace(state, extra=extra).collections()
        found = accumulation.over_parts(
            lambda *part: gradients(params, drawn, *part),
            collections,
            batch,
            (model_key, probe_key),
            config.accumulate,
            mesh,
            axis,
        )
        if axis is not None:
            found = accumulation.over_devices(found, axis)
        updates, opt_state = apply(found.grads, state.opt_state, state.params, step=state.step)
        params = optax.apply_updates(state.params, updates)

        norm = optax.tree.norm(found.grads)
        finite = jnp.isfinite(found.objective) & jnp.isfinite(norm)
        one = jnp.float32(1)
        measured = dict(found.measured)
        if not warmup:
            measured["budget"] = metrics.Mean(drawn.budget.astype(jnp.float32), one)
        measured["gamma"] = metrics.Mean(drawn.gamma, one)
        measured["lr"] = metrics.Mean(learning_rate(state.step), one)
        measured["grad_norm"] = metrics.Mean(norm, one)
        measured = _select(finite, measured, jax.tree.map(jnp.zeros_like, measured))
        measured["skipped"] = metrics.Mean(1 - finite.astype(jnp.float32), one)
        after = state.after(params, opt_state, found.collections)
        kept = dataclasses.replace(state, step=after.step)
        return _select(finite, after, kept), measured

    return step


def _select(condition: jax.Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def _make_gradients(
    task: Task, config: Config, warmup: bool, axis: str | None
) -> Callable[..., Gradients]:
    """Gradients and metrics of one part of a batch."""
    penalised = regularize.is_used(config, warmup=warmup)

    def gradients(
        params: Any, drawn: Any, collections: Any, batch: Batch, model_key: Any, probe_key: Any
    ) -> Gradients:
        budget = 0 if warmup else drawn.budget  # an int: no solve is compiled

        def objective(params: Any, probe: Any) -> tuple[jax.Array, tuple[Output, jax.Array]]:
            output = task.forward(
                params,
                collections,
                batch,
                key=model_key,
                train=True,
                warmup=warmup,
                max_steps=budget,
                probe=probe,
            )
            penalty = jnp.float32(0)
            if penalised:
                none = jnp.float32(0) if axis is None else per_device(jnp.float32(0), axis)
                penalty = _penalty(output, drawn.penalise, probe_key, config.jac.probes, none)
            return output.loss + drawn.gamma * penalty, (output, penalty)

        # The gradient with respect to the probe is no gradient: it carries the statistics of the
        # backward solve.  The unrolled network has no such solve.
        probe = None if warmup else deq.backward_probe(jnp.zeros(jnp.shape(batch["mask"])))
        if axis is not None:
            probe = per_device(probe, axis)
        (value, (output, penalty)), (grads, backward) = jax.value_and_grad(
            objective, argnums=(0, 1), has_aux=True
        )(params, probe)
        measured = forward_metrics(output, batch)
        if penalised:
            measured["penalty"] = metrics.Mean(penalty, drawn.penalise.astype(jnp.float32))
        if not warmup:
            measured |= _backward_metrics(backward, batch["mask"])
        weight = output.sums["count"] if output.weight is None else output.weight
        return Gradients(grads, value, weight.astype(jnp.float32), output.extra, measured)

    return gradients


def forward_metrics(output: Output, batch: Batch) -> dict[str, metrics.Mean]:
    """Loss, the task's own sums, and the statistics of the forward solve.

    Args:
      output: of a forward pass.
      batch: what it was of; "mask" is read, and "corrupt" if it is there.

    Returns:
      "loss", the task's names, and if there was an equilibrium layer "fwd_steps", "fwd_residual"
      and "unconverged" (the share of examples whose solve did not reach the tolerance); "corrupt",
      the share of records that could not be read, of data that counts them.

    Example:
      >>> one = jnp.ones(2)
      >>> output = Output(loss=jnp.float32(0.5), sums={"count": one.sum()}, extra={}, solution=None)
      >>> metrics.compute(forward_metrics(output, {"mask": one}))
      {'loss': 0.5}
    """
    weight = output.sums["count"] if output.weight is None else output.weight
    measured = {**metrics.means(output.sums), "loss": metrics.Mean(output.loss * weight, weight)}
    mask = batch["mask"]
    if CORRUPT in batch:
        corrupt = batch[CORRUPT]
        # In training another example stands in its place, in evaluation there is padding.
        measured[CORRUPT] = metrics.Mean(corrupt.sum(), jnp.maximum(mask, corrupt).sum())
    if output.solution is not None:
        stats = output.solution.stats
        mask = mask * (stats.num_steps > 0)  # the unrolled network solves nothing
        measured["fwd_steps"] = _masked(stats.num_steps, mask)
        measured["fwd_residual"] = _masked(stats.residual, mask)
        measured["unconverged"] = _masked(~stats.converged, mask)
    return measured


def _backward_metrics(stats: Any, mask: jax.Array) -> dict[str, metrics.Mean]:
    mask = mask * (stats.num_steps > 0)  # an unrolled gradient solves no backward system
    return {
        "bwd_steps": _masked(stats.num_steps, mask),
        "bwd_residual": _masked(stats.residual, mask),
        "bwd_unconverged": _masked(1 - stats.converged, mask),
    }


def _masked(values: jax.Array, mask: jax.Array) -> metrics.Mean:
    """Sum over the real examples; where() because 0 * inf would spoil it."""
    return metrics.Mean(jnp.where(mask > 0, values * mask, 0).sum(), mask.sum())


def _penalty(
    output: Output, penalise: jax.Array, key: jax.Array, probes: int, none: jax.Array
) -> jax.Array:
    """The penalty at the solution if `penalise`, else `none` without computing it."""
    if output.solution is None:
        raise ValueError(
            "got Output.solution=None with a Jacobian penalty; wanted the solution of the DEQ "
            "layer: return it from forward, or set jac.gamma, jac.increment and jac.warmup_gamma "
            "to 0"
        )
    at = output.solution.at
    return jax.lax.cond(
        penalise,
        lambda: deq.frobenius_penalty(*at, key=key, probes=probes).astype(jnp.float32),
        lambda: none,
    )
