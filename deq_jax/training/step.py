"""The training step: penalty, gradients of a batch in parts, update."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import deq_jax as deq
from deq_jax.errors import UsageError
from deq_jax.training.config import Config
from deq_jax.training.draw import StepDraw, draw_budget, draw_step, is_penalised
from deq_jax.training.gate import value_if
from deq_jax.training.metrics import Mean
from deq_jax.training.optim import make_schedule
from deq_jax.training.parallel import AXIS, batch_sharding, per_device, replicated
from deq_jax.training.state import TrainState, abstract_state, split_seed
from deq_jax.training.task import CORRUPT, Batch, Pass, Task, forward

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Mean]]]


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
      optimizer: from ``optim.make_optimizer``.
      mesh: batches are split over it; the state is placed as ``state.abstract_state`` says.
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
    """Builds the step as a pure function, to be compiled by the caller.

        minimise  loss(params) + gamma(step) * Bernoulli(prob) * penalty(params)

    or, with ``jac.blend``, (1 - gamma(step)) * loss(params) + the same.

    If the objective or the gradient is not finite, the update is skipped: only ``step`` advances,
    and the step contributes to no metric except "skipped".  The learning rate is a function of
    ``step``, also after a skipped update.

    Args:
      task: model and loss.
      config: the whole configuration.
      optimizer: from ``optim.make_optimizer``; another one applies its own learning rate, by its
        own count of updates, and is called with ``step=state.step`` if it takes extra arguments.
      mesh: the devices that jit splits the batch over; None for one device, or with ``axis``.
      axis: name of the axis of `jax.pmap` or `jax.shard_map` (with any ``check_vma``) in which
        every device calls this with the same state and its own part of the batch: gradients,
        metrics and ``extra`` are averaged over it.  ``carry`` is each device's own.
      warmup: True for the phase that trains the weight-tied unrolled network.

    Returns:
      A function (state, batch) -> (state, metrics), a `Mean` each that stands for all devices:
      "loss", the task's own, statistics of both solves, "penalty", "budget", "gamma", "lr",
      "grad_norm", "skipped".

    Example:
      >>> update = make_update(task, config, optimizer, axis="data")  # doctest: +SKIP
      >>> step = jax.pmap(update, axis_name="data")  # doctest: +SKIP
    """
    root = split_seed(config.train.seed)[1]
    learning_rate = make_schedule(config.optim, config.train.steps)
    apply = optax.with_extra_args_support(optimizer).update

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Mean]]:
        model_key, draw_key, probe_key = jax.random.split(jax.random.fold_in(root, state.step), 3)
        drawn = draw_step(config, state.step, draw_key)
        params, extra = state.params, state.extra
        if axis is not None:
            index = lax.axis_index(axis)
            model_key, probe_key = (jax.random.fold_in(k, index) for k in (model_key, probe_key))
            # over_devices sums the gradients; autodiff must not.
            params, extra = per_device((params, extra), axis)
        gradients = _make_gradients(task, config, params, drawn, warmup, axis)
        keys = model_key, probe_key
        found = over_parts(
            gradients, extra, state.carry, batch, keys, config.accumulate, mesh, axis
        )
        if axis is not None:
            found = over_devices(found, axis)
        updates, opt_state = apply(found.grads, state.opt_state, state.params, step=state.step)
        params = optax.apply_updates(state.params, updates)

        norm = optax.tree.norm(found.grads)
        finite = jnp.isfinite(found.objective) & jnp.isfinite(norm)
        one = jnp.float32(1)
        measured = dict(found.measured)
        measured["gamma"] = Mean(drawn.gamma, one)
        measured["lr"] = Mean(learning_rate(state.step), one)
        measured["grad_norm"] = Mean(norm, one)
        measured = _select(finite, measured, jax.tree.map(jnp.zeros_like, measured))
        measured["skipped"] = Mean(1 - finite.astype(jnp.float32), one)
        after = TrainState(state.step + 1, params, opt_state, found.extra, found.carry)
        kept = dataclasses.replace(state, step=after.step)
        return _select(finite, after, kept), measured

    return step


def _select(condition: jax.Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


# Gradients of a batch: of its parts one after the other, and of one part on each device.


@flax.struct.dataclass
class Gradients:
    """The result of the forward and backward pass over some examples.

    Attributes:
      grads: like the parameters.
      objective: float32 scalar, loss and penalty.
      weight: float32 scalar, what the loss is a mean over.
      extra: the other collections after the pass.
      carry: what the examples leave to the next batch.
      measured: name -> `Mean`.
    """

    grads: Any
    objective: jax.Array
    weight: jax.Array
    extra: Any
    carry: Any
    measured: dict[str, Mean]


def _make_gradients(
    task: Task, config: Config, params: Any, drawn: StepDraw, warmup: bool, axis: str | None
) -> Callable[..., Gradients]:
    """Gradients and metrics of one part of a batch, as a function of what `over_parts` splits."""
    penalised = is_penalised(config, warmup=warmup)
    none = jnp.float32(0) if axis is None else per_device(jnp.float32(0), axis)

    def gradients(
        extra: Any, carry: Any, batch: Batch, model_key: jax.Array, probe_key: jax.Array
    ) -> Gradients:
        mask, budget = batch["mask"], drawn.budget
        if config.jac.budget_per == "example":
            key = jax.random.fold_in(model_key, 1)
            budget = draw_budget(config, drawn.penalise, key, mask.shape)

        def objective(params: Any, probe: Any) -> tuple[jax.Array, tuple[Pass, jax.Array]]:
            found = forward(
                task,
                config,
                params,
                extra,
                carry,
                batch,
                key=model_key,
                train=True,
                warmup=warmup,
                max_steps=budget,
                probe=probe,
            )
            penalty = jnp.float32(0)
            if penalised:
                penalty = _penalty(found, drawn.penalise, probe_key, config.jac.probes, none)
            share = 1 - drawn.gamma if config.jac.blend else 1
            return share * found.loss + drawn.gamma * penalty, (found, penalty)

        # The gradient with respect to the probe is no gradient: it carries the statistics of the
        # backward solve.  The unrolled network has no such solve.
        probe = None if warmup else deq.backward_probe(jnp.zeros(mask.shape))
        if axis is not None:
            probe = per_device(probe, axis)
        (value, (found, penalty)), (grads, backward) = jax.value_and_grad(
            objective, argnums=(0, 1), has_aux=True
        )(params, probe)
        measured = forward_metrics(found, batch)
        if penalised:
            measured["penalty"] = Mean(penalty, drawn.penalise.astype(jnp.float32))
        if not warmup:
            measured |= _backward_metrics(backward, mask)
            measured["budget"] = Mean((budget * mask).sum(), mask.sum())
        weight = found.means["loss"].count.astype(jnp.float32)
        return Gradients(grads, value, weight, found.extra, found.carry, measured)

    return gradients


def _penalty(
    found: Pass, penalise: jax.Array, key: jax.Array, probes: int, none: jax.Array
) -> jax.Array:
    """The penalty at the solution if `penalise`, else `none` without computing it."""
    if found.solution is None:
        raise ValueError(
            "got a Jacobian penalty for a model without a DEQ layer; wanted a model with the "
            "attribute solver that returns (output, solution), or jac.gamma, jac.increment and "
            "jac.warmup_gamma of 0"
        )
    f, params, z, x = found.solution.at

    def penalty(operands: Any, constants: Any) -> jax.Array:
        (params, x), (z, key) = operands, constants
        return deq.frobenius_penalty(f, params, z, x, key=key, probes=probes).astype(jnp.float32)

    return value_if(penalise, penalty, (params, x), (z, key), none)


def over_parts(
    gradients: Callable[..., Gradients],
    extra: Any,
    carry: Any,
    batch: Batch,
    keys: tuple[jax.Array, jax.Array],
    parts: int,
    mesh: Mesh | None,
    axis: str | None = None,
) -> Gradients:
    """Computes a batch in parts, with the memory of one part.

    The mean over all examples is that of the whole batch, up to the order of its sums; each part
    draws masks and probes of its own, and has its own batch statistics, as smaller batches have.

    Args:
      gradients: ``(extra, carry, batch, model_key, probe_key) -> Gradients``.
      extra: collections that one part hands to the next.
      carry: tree of arrays ``[B, ...]``, split like the batch.
      batch: arrays ``[B, ...]``.
      keys: of masks and probes.
      parts: how many.
      mesh: devices that B is split over; every one computes a part of each part.
      axis: see `make_update`.

    Returns:
      Gradients of the whole batch.

    Raises:
      UsageError: B does not divide by parts times devices.

    Example:
      >>> def gradients(extra, carry, batch, *keys):
      ...     mean = batch["x"].mean()
      ...     return Gradients(mean, mean, jnp.float32(batch["x"].size), extra, carry, {})
      >>> key = jax.random.key(0)
      >>> batch = {"x": jnp.arange(4.0), "mask": jnp.ones(4)}
      >>> over_parts(gradients, {}, None, batch, (key, key), 2, None).grads.item()
      1.5
    """
    if parts == 1:
        return gradients(extra, carry, batch, *keys)
    devices = 1 if mesh is None else mesh.size
    size = jnp.shape(batch["mask"])[0]
    if size % (parts * devices):
        raise UsageError(
            f"got a batch of {size} examples for {parts} parts (accumulate) on {devices} devices; "
            f"wanted a multiple of {parts * devices}: choose another batch size or accumulate"
        )

    def split(array: jax.Array) -> jax.Array:
        # Of every device's examples, which are neighbours, some go into each part.
        cut = array.reshape(devices, parts, size // (devices * parts), *array.shape[1:])
        cut = cut.swapaxes(0, 1).reshape(parts, size // parts, *array.shape[1:])
        return cut if mesh is None else _constrain(cut, mesh, (None, AXIS))

    def join(array: jax.Array) -> jax.Array:
        cut = array.reshape(parts, devices, size // (devices * parts), *array.shape[2:])
        whole = cut.swapaxes(0, 1).reshape(size, *array.shape[2:])
        return whole if mesh is None else _constrain(whole, mesh, (AXIS,))

    def one(extra: Any, part: Any) -> tuple[Any, Any]:
        number, examples, carry = part
        found = gradients(
            extra, carry, examples, *(jax.random.fold_in(key, number) for key in keys)
        )
        return found.extra, (_weighted(found), found.carry)

    scanned = (jnp.arange(parts), *jax.tree.map(split, (dict(batch), carry)))
    extra, (found, carry) = _scan_sum(one, extra, scanned, axis)
    return _unweighted(found, extra, jax.tree.map(join, carry))


def over_devices(found: Gradients, axis: str) -> Gradients:
    """Combines the gradients of several devices, inside `jax.pmap` or `jax.shard_map`.

    Args:
      found: of this device's examples.
      axis: name of the axis.

    Returns:
      Gradients of all examples; ``extra`` is averaged, ``carry`` stays the device's own.

    Example:
      >>> over_devices(found, "data")  # doctest: +SKIP
    """
    extra = lax.pmean(found.extra, axis)
    return _unweighted(lax.psum(_weighted(found), axis), extra, found.carry)


def _weighted(found: Gradients) -> Gradients:
    """Sums instead of means, which can be added; without what is not summed."""
    weigh = lambda a: a * found.weight.astype(a.dtype)  # noqa: E731
    grads, objective = jax.tree.map(weigh, (found.grads, found.objective))
    return Gradients(grads, objective, found.weight, None, None, found.measured)


def _unweighted(found: Gradients, extra: Any, carry: Any) -> Gradients:
    """Means again."""
    mean = lambda a: a / jnp.where(found.weight > 0, found.weight, 1).astype(a.dtype)  # noqa: E731
    grads, objective = jax.tree.map(mean, (found.grads, found.objective))
    return Gradients(grads, objective, found.weight, extra, carry, found.measured)


def _scan_sum(one: Callable[..., Any], first: Any, parts: Any, axis: str | None) -> Any:
    """`lax.scan` whose first output is summed as it goes, not stacked."""
    shapes = jax.eval_shape(lambda: one(first, jax.tree.map(lambda a: a[0], parts))[1][0])
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    if axis is not None:
        zeros = per_device(zeros, axis)

    def body(before: Any, part: Any) -> Any:
        state, total = before
        state, (found, own) = one(state, part)
        return (state, jax.tree.map(jnp.add, total, found)), own

    (state, total), own = lax.scan(body, (first, zeros), parts)
    return state, (total, own)


def _constrain(array: jax.Array, mesh: Mesh, axes: tuple[str | None, ...]) -> jax.Array:
    return lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec(*axes)))


# Metrics of a pass.


def forward_metrics(found: Pass, batch: Batch) -> dict[str, Mean]:
    """The task's means, and the statistics of the forward solve.

    Args:
      found: of a forward pass.
      batch: its examples; "mask" is read, and "corrupt" if it is there.

    Returns:
      "loss", the task's names, and if there was a DEQ layer "fwd_steps", "fwd_residual" and
      "unconverged" (the share of examples whose solve did not reach the tolerance); "corrupt", the
      share of records that could not be read, of data that counts them.

    Example:
      >>> found = Pass({"loss": Mean(1.0, 2.0)}, None, {}, None, None)
      >>> from deq_jax.training import metrics
      >>> metrics.compute(forward_metrics(found, {"mask": jnp.ones(2)}))
      {'loss': 0.5}
    """
    measured, mask = dict(found.means), batch["mask"]
    if CORRUPT in batch:
        corrupt = batch[CORRUPT]
        # In training another example stands in its place, in evaluation there is padding.
        measured[CORRUPT] = Mean(corrupt.sum(), jnp.maximum(mask, corrupt).sum())
    if found.solution is not None:
        stats = found.solution.stats
        mask = mask * (stats.num_steps > 0)  # the unrolled network solves nothing
        measured["fwd_steps"] = _masked(stats.num_steps, mask)
        measured["fwd_residual"] = _masked(stats.residual, mask)
        measured["unconverged"] = _masked(~stats.converged, mask)
    return measured


def _backward_metrics(stats: Any, mask: jax.Array) -> dict[str, Mean]:
    mask = mask * (stats.num_steps > 0)  # an unrolled gradient solves no backward system
    return {
        "bwd_steps": _masked(stats.num_steps, mask),
        "bwd_residual": _masked(stats.residual, mask),
        "bwd_unconverged": _masked(1 - stats.converged, mask),
    }


def _masked(values: jax.Array, mask: jax.Array) -> Mean:
    """Sum over the real examples; where() because 0 * inf would spoil it."""
    return Mean(jnp.where(mask > 0, values * mask, 0).sum(), mask.sum())
