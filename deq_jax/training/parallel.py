"""Data parallelism: a mesh, its shardings, and the solve per device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deq_jax import implicit, tree
from deq_jax.implicit import Adjoint, BackwardStats, Map
from deq_jax.solvers import Solution, Solver, SolveStats
from deq_jax.training.config import Config
from deq_jax.training.precision import in_bfloat16
from deq_jax.tree import PyTree

AXIS = "data"


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """Arranges devices in one axis, ``data``.

    Args:
      devices: the devices; all of them if None.

    Returns:
      A one-dimensional mesh.
    """
    chosen = jax.devices() if devices is None else list(devices)
    return Mesh(np.asarray(chosen), (AXIS,), axis_types=(AxisType.Auto,))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays whose leading axis is the batch.

    Args:
      mesh: from `make_mesh`.

    Returns:
      The leading axis split over ``data``.
    """
    return NamedSharding(mesh, PartitionSpec(AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of what every device holds whole.

    Args:
      mesh: from `make_mesh`.

    Returns:
      No axis split.
    """
    return NamedSharding(mesh, PartitionSpec())


def make_fixed_point(config: Config, mesh: Mesh | None) -> Callable[..., Solution]:
    """The `fixed_point` that a configuration asks for.

    Args:
      config: precision is read.
      mesh: the devices over which solves are split; None for one device.

    Returns:
      A function with the signature of `deq_jax.fixed_point`.

    Example:
      >>> make_fixed_point(Config(), None) is implicit.fixed_point
      True
    """
    solve = implicit.fixed_point if mesh is None else sharded_fixed_point(mesh)
    return in_bfloat16(solve) if config.precision == "bf16" else solve


def leaf_sharding(leaf: Any, mesh: Mesh, shard_above: int | None) -> NamedSharding:
    """Where an array of parameters lives.

    Args:
      leaf: anything with a shape.
      mesh: from `make_mesh`.
      shard_above: arrays of at least so many numbers are split along their longest axis that the
        number of devices divides; None for none.

    Returns:
      The sharding; replicated for small arrays, and for those that cannot be split evenly.

    Example:
      >>> import jax.numpy as jnp
      >>> n = jax.device_count()
      >>> leaf_sharding(jnp.ones((3, 4 * n)), make_mesh(), 2).spec
      P(None, 'data')
    """
    shape = np.shape(leaf)
    even = [axis for axis, length in enumerate(shape) if length and length % mesh.size == 0]
    if shard_above is None or np.prod(shape) < shard_above or not even:
        return replicated(mesh)
    longest = max(even, key=lambda axis: shape[axis])
    return NamedSharding(
        mesh, PartitionSpec(*(AXIS if a == longest else None for a in range(longest + 1)))
    )


def sharded_fixed_point(mesh: Mesh) -> Callable[..., Solution]:
    """Makes a `fixed_point` that each device runs on its own samples.

    Under plain jit the test for convergence is one all-reduce per step, and all devices wait for
    the slowest sample.  Here the forward and the backward loop stand inside `jax.shard_map`:
    no communication in either, and each device stops with its own samples; gradients of ``params``
    are summed once, after the backward loop.

    Leaves of ``x`` whose leading axis has the length of the batch are split, all others and
    ``params`` are replicated.  f must not communicate between samples (no batch statistics).

    Args:
      mesh: from `make_mesh`; its size must divide the batch.

    Returns:
      A function with the signature of `deq_jax.fixed_point`.

    Raises:
      ValueError: (from the function) if the batch does not divide by the number of devices.

    Example:
      >>> import jax.numpy as jnp
      >>> from deq_jax import Picard
      >>> solve = sharded_fixed_point(make_mesh())
      >>> f = lambda params, z, x: 0.5 * z + x
      >>> one = jnp.ones((jax.device_count(), 1))
      >>> sol = solve(f, None, jnp.zeros_like(one), one, solver=Picard(tol=1e-6))
      >>> round(float(sol.value[0, 0]), 3)
      2.0
    """
    whole: Any = PartitionSpec()
    split: Any = PartitionSpec(AXIS)
    by_step: Any = PartitionSpec(None, AXIS)
    stats = SolveStats(num_steps=split, residual=split, converged=split, trace=by_step)

    def fixed_point(
        f: Map,
        params: PyTree,
        z0: PyTree,
        x: PyTree = None,
        *,
        solver: Solver,
        adjoint: Adjoint | None = None,
        max_steps: int | jax.Array | None = None,
        probe: BackwardStats | None = None,
    ) -> Solution:
        batch = tree.batch_size(z0)
        if batch % mesh.size:
            raise ValueError(
                f"got a batch of {batch} for {mesh.size} devices; wanted a multiple; change the "
                "batch size, or pad the last batch and mask it"
            )
        static = max_steps is None or isinstance(max_steps, int)
        budget = [] if max_steps is None or static else [jnp.asarray(max_steps)]

        def local(
            params: PyTree, z0: PyTree, x: PyTree, probe: BackwardStats | None, *budget: jax.Array
        ) -> Solution:
            params = jax.tree.map(_per_device, params)
            x = jax.tree.map(lambda a, s: a if s == split else _per_device(a), x, spec)
            return implicit.fixed_point(
                f,
                params,
                z0,
                x,
                solver=solver,
                adjoint=adjoint,
                max_steps=max_steps if static else budget[0],
                probe=probe,
            )

        spec = jax.tree.map(lambda a: split if np.shape(a)[:1] == (batch,) else whole, x)
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(whole, split, spec, split, *(whole for _ in budget)),
            out_specs=Solution(value=split, stats=stats),
        )(params, z0, x, probe, *budget)

    return fixed_point


def sharded_map(mesh: Mesh) -> Callable[[Callable[..., PyTree]], Callable[..., PyTree]]:
    """Makes functions run on every device's own examples, without communication.

    For work whose amount depends on the examples, such as sorting words by frequency: under plain
    jit it would be done with the examples of all devices gathered.

    Args:
      mesh: from `make_mesh`; its size must divide the batch.

    Returns:
      A wrapper of functions ``(params, *examples) -> examples``, trees of arrays ``[B, ...]`` but
      for params, whose gradients are summed over the devices.

    Example:
      >>> import jax.numpy as jnp
      >>> double = sharded_map(make_mesh())(lambda w, x: w * x)
      >>> double(2.0 * jnp.ones(()), jnp.ones(jax.device_count())).sum() == 2 * jax.device_count()
      Array(True, dtype=bool)
    """
    whole: Any = PartitionSpec()
    split: Any = PartitionSpec(AXIS)

    def wrap(f: Callable[..., PyTree]) -> Callable[..., PyTree]:
        def local(params: PyTree, *examples: PyTree) -> PyTree:
            return f(jax.tree.map(_per_device, params), *examples)

        def mapped(params: PyTree, *examples: PyTree) -> PyTree:
            specs = (whole, *(split for _ in examples))
            return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=split)(
                params, *examples
            )

        return mapped

    return wrap


def _per_device(a: jax.Array) -> jax.Array:
    """Marks a replicated array as one copy a device, so that its gradients are summed outside."""
    differentiable = jnp.issubdtype(a.dtype, jnp.inexact)
    return jax.lax.pcast(a, AXIS, to="varying") if differentiable else a
