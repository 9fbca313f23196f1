"""Gradients of a batch from those of its parts: one after the other, and one on each device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deq_jax.training.errors import UsageError
from deq_jax.training.metrics import Mean
from deq_jax.training.parallel import AXIS, per_device
from deq_jax.training.task import CARRY, Batch


@flax.struct.dataclass
class Gradients:
    """What the forward and backward pass over some examples gives.

    Attributes:
      grads: like the parameters.
      objective: float32 scalar, loss and penalty.
      weight: float32 scalar, what the loss is a mean over.
      collections: the untrained collections after the pass.
      measured: name -> `Mean`.
    """

    grads: Any
    objective: jax.Array
    weight: jax.Array
    collections: Any
    measured: dict[str, Mean]


def over_parts(
    gradients: Callable[..., Gradients],
    collections: Any,
    batch: Batch,
    keys: tuple[jax.Array, jax.Array],
    parts: int,
    mesh: Mesh | None,
    axis: str | None = None,
) -> Gradients:
    """Computes a batch in parts, for the memory of one part.

    The mean over all examples is that of the whole batch, up to the order of its sums; each part
    draws masks and probes of its own, and has its own batch statistics, as smaller batches have.

    Args:
      gradients: ``(collections, batch, model_key, probe_key) -> Gradients``.
      collections: untrained collections, what is carried among them.
      batch: arrays ``[B, ...]``.
      keys: of masks and probes.
      parts: how many.
      mesh: devices that B is split over; every one computes a part of each part.
      axis: see `step.make_update`.

    Returns:
      Gradients of the whole batch.

    Raises:
      UsageError: B does not divide by parts times devices.

    Example:
      >>> def gradients(collections, batch, *keys):
      ...     mean = batch["x"].mean()
      ...     return Gradients(mean, mean, jnp.float32(batch["x"].size), collections, {})
      >>> key = jax.random.key(0)
      >>> batch = {"x": jnp.arange(4.0), "mask": jnp.ones(4)}
      >>> over_parts(gradients, {}, batch, (key, key), 2, None).grads.item()
      1.5
    """
    if parts == 1:
        return gradients(collections, batch, *keys)
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
        return cut if mesh is None else _place(cut, mesh, (None, AXIS))

    def join(array: jax.Array) -> jax.Array:
        cut = array.reshape(parts, devices, size // (devices * parts), *array.shape[2:])
        whole = cut.swapaxes(0, 1).reshape(size, *array.shape[2:])
        return whole if mesh is None else _place(whole, mesh, (AXIS,))

    shared = {name: part for name, part in collections.items() if name != CARRY}
    carried = {name: part for name, part in collections.items() if name == CARRY}

    def one(before: Any, part: Any) -> tuple[Any, Any]:
        shared, number = before
        examples, own = part
        found = gradients(
            {**shared, **own}, examples, *(jax.random.fold_in(key, number) for key in keys)
        )
        after = dict(found.collections)
        own = {name: after.pop(name) for name in carried}
        return (after, number + 1), (_weighted(found), own)

    first = (shared, jnp.int32(0))
    (shared, _), (found, carried) = _scan_sum(
        one, first, jax.tree.map(split, (dict(batch), carried)), axis
    )
    return _unweighted(found, {**shared, **jax.tree.map(join, carried)})


def over_devices(found: Gradients, axis: str) -> Gradients:
    """Brings the gradients of several devices together, inside `jax.pmap` or `jax.shard_map`.

    Args:
      found: of this device's examples.
      axis: name of the axis.

    Returns:
      Gradients of all examples; ``collections`` are averaged, but what is carried is left as it is.

    Example:
      >>> over_devices(found, "data")  # doctest: +SKIP
    """
    collections = dict(found.collections)
    carried = {CARRY: collections.pop(CARRY)} if CARRY in collections else {}
    collections = lax.pmean(collections, axis)
    return _unweighted(lax.psum(_weighted(found), axis), {**collections, **carried})


def _weighted(found: Gradients) -> Gradients:
    """Sums instead of means, which can be added; without collections."""
    weigh = lambda a: a * found.weight.astype(a.dtype)  # noqa: E731
    return found.replace(  # type: ignore[attr-defined]
        grads=jax.tree.map(weigh, found.grads),
        objective=weigh(found.objective),
        collections=None,
    )


def _unweighted(found: Gradients, collections: Any) -> Gradients:
    """Means again."""
    mean = lambda a: a / jnp.where(found.weight > 0, found.weight, 1).astype(a.dtype)  # noqa: E731
    return found.replace(  # type: ignore[attr-defined]
        grads=jax.tree.map(mean, found.grads),
        objective=mean(found.objective),
        collections=collections,
    )


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


def _place(array: jax.Array, mesh: Mesh, axes: tuple[str | None, ...]) -> jax.Array:
    return lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec(*axes)))
