"""Data parallelism: a mesh, its shardings, batches on it, the solve per device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import deq_jax as deq
from deq_jax import tree
from deq_jax.adjoints import Adjoint, BackwardStats, Map
from deq_jax.errors import UsageError
from deq_jax.solvers import Equation, Keep, Solution, Solver, SolveStats
from deq_jax.training.task import CORRUPT, Batch
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


def pad(batch: Batch, multiple: int) -> Batch:
    """Fills a batch up, so that it can be split.

    Args:
      batch: numpy arrays [B, ...] with "mask".
      multiple: what B is to be a multiple of.

    Returns:
      The batch with copies of its first example, whose mask is 0, at the end.

    Example:
      >>> pad({"x": np.array([7, 8, 9]), "mask": np.ones(3)}, 2)["x"].tolist()
      [7, 8, 9, 7]
    """
    size = np.size(batch.get("mask", ()))
    missing = -size % multiple
    if size == 0 or missing == 0:
        return batch

    def filled(name: str, array: Any) -> np.ndarray:
        array = np.asarray(array)
        copies = np.repeat(array[:1], missing, axis=0)
        counted = name in ("mask", CORRUPT)
        return np.concatenate([array, 0 * copies if counted else copies])

    return {name: filled(name, array) for name, array in batch.items()}


def require_even(name: str, size: int, devices: int) -> None:
    """Refuses a batch that cannot be split over the devices, before anything is built.

    Args:
      name: of the flag that says the size.
      size: examples in the batch, over all devices.
      devices: how many.

    Raises:
      UsageError: ``size`` is not a multiple of ``devices``.

    Example:
      >>> require_even("train.batch_size", 16, 2)
    """
    if size % devices:
        raise UsageError(
            f"got --{name}={size} for {devices} devices; wanted a multiple of {devices}"
        )


def place(batch: Batch, mesh: Mesh) -> dict[str, Any]:
    """Splits every array of a batch over the "data" axis of the mesh.

    Args:
      batch: numpy arrays [B, ...] with "mask"; this process's part of the batch.
      mesh: the devices.

    Returns:
      The batch as global arrays.

    Raises:
      UsageError: there is no mask, or B does not divide over the devices.

    Example:
      >>> place({"mask": np.ones(8, np.float32)}, make_mesh())["mask"].shape
      (8,)
    """
    if "mask" not in batch:
        raise UsageError(f'got a batch of {sorted(batch)}; wanted "mask" float32[B] among them')
    size, devices = np.shape(batch["mask"])[0], mesh.local_mesh.size
    if size == 0 or size % devices:
        raise UsageError(
            f"got a batch of {size} examples for {devices} devices; wanted a multiple: choose "
            "another batch size, or pad the batch with examples whose mask is 0"
        )
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, np.asarray(array))
        for name, array in batch.items()
    }


def leaf_sharding(leaf: Any, mesh: Mesh, shard_above: int | None) -> NamedSharding:
    """Where an array of parameters lives.

    One axis is split into as many even parts as it and the number of devices allow.  Are these
    fewer than the devices, several hold the same: 48,000 rows on 256 devices make 128 parts.

    Args:
      leaf: anything with a shape.
      mesh: from `make_mesh`.
      shard_above: arrays of at least so many numbers are split along the axis that makes the most
        parts, of several such the longest; None for none.

    Returns:
      The sharding; replicated for small arrays, and for those that make no parts.

    Example:
      >>> import jax.numpy as jnp
      >>> n = jax.device_count()
      >>> leaf_sharding(jnp.ones((3, 4 * n)), make_mesh(), 2).spec
      P(None, 'data')
    """
    shape = np.shape(leaf)
    if shard_above is None or not shape or np.prod(shape) < shard_above:
        return replicated(mesh)
    parts, _, first = max((math.gcd(n, mesh.size), n, -i) for i, n in enumerate(shape))
    if parts < mesh.size:
        if parts == 1:
            return replicated(mesh)
        devices, kinds = mesh.devices.reshape(parts, -1), (AxisType.Auto, AxisType.Auto)
        mesh = Mesh(devices, (AXIS, "copies"), axis_types=kinds)
    return NamedSharding(mesh, PartitionSpec(*[None] * -first, AXIS))


def sharded_fixed_point(
    mesh: Mesh, x_axes: Any = 0, *, axis: str = AXIS
) -> Callable[..., Solution]:
    """Makes a `fixed_point` that each device runs on its own samples.

    Under plain jit the test for convergence is one all-reduce per step, and all devices wait for
    the slowest sample.  Here the forward and the backward loop stand inside `jax.shard_map`:
    neither communicates, and each device stops with its own samples.  Gradients of ``params`` and
    of replicated leaves of ``x`` are summed once, after the backward loop, and after a penalty that
    is taken at the solution's equation.

    ``z0`` is split along its leading axis, ``params`` are replicated, and ``x_axes`` says the same
    of ``x``, as ``in_axes`` does for `jax.vmap`.  f must not communicate between samples (no batch
    statistics).  The solution has an equation (unless ``has_aux``): its f too runs on each
    device's own samples, and its params and the replicated leaves of its x have a leading axis of
    one copy for each device.

    Args:
      mesh: devices, from `make_mesh` or `jax.make_mesh`; its axes may be Auto or Explicit.  A
        gradient outside jit on an Explicit mesh needs `jax.set_mesh`, as every JAX gradient there.
      x_axes: 0 for leaves of ``x`` ``[B, ...]``, which are split, None for leaves that every device
        gets whole; or a tree prefix of ``x`` with these as leaves.  A cell with masks gets
        ``x = (operands, masks)``.
      axis: name of the mesh axis that splits the batch; its size must divide B.

    Returns:
      A function with the signature of `deq_jax.fixed_point`, except that ``z0`` must have a batch
      axis, and what f returns beside z (``has_aux``) too.

    Raises:
      ValueError: the mesh has no such axis; (from the function) B does not divide by the devices,
        ``batched`` is False, or a leaf that is to be split has another leading axis than ``z0``.

    Example:
      >>> import jax.numpy as jnp
      >>> from deq_jax import Picard
      >>> solve = sharded_fixed_point(make_mesh(), {"input": 0, "bias": None})
      >>> f = lambda params, z, x: 0.5 * z + x["input"] + x["bias"]
      >>> one = jnp.ones((jax.device_count(), 1))
      >>> x = {"input": one, "bias": jnp.ones((1, 1))}
      >>> sol = solve(f, None, jnp.zeros_like(one), x, solver=Picard(tol=1e-6))
      >>> round(float(sol.value[0, 0]), 3)
      4.0
    """
    devices = ShardedMap(mesh, axis)
    split: Any = PartitionSpec(axis)

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
        keep: Keep = "best",
        batched: bool | None = None,
        trace: bool = True,
        states: Sequence[int] = (),
        has_aux: bool = False,
    ) -> Solution:
        if batched is False:
            raise ValueError(
                "got batched=False; wanted a z0 with a batch axis, along which the solve is split: "
                "call deq_jax.fixed_point for a single state"
            )
        is_split = split_leaves(x, _check_batch(z0, mesh.shape[axis]), x_axes)
        params = devices.copies(params)
        x = jax.tree.map(lambda a, s: a if s else devices.copies(a), x, is_split)
        mapped = MappedEquation(f, devices, tuple(jax.tree.leaves(is_split)))
        traced = isinstance(max_steps, (jax.Array, np.ndarray))
        budget = [max_steps] if traced else []

        def local(
            params: PyTree, z0: PyTree, x: PyTree, probe: BackwardStats | None, *budget: jax.Array
        ) -> Solution:
            return deq.fixed_point(
                f,
                _first(params),
                z0,
                mapped.own(x),
                solver=solver,
                adjoint=adjoint,
                max_steps=budget[0] if traced else max_steps,
                probe=probe,
                keep=keep,
                batched=batched,
                trace=trace,
                states=states,
                has_aux=has_aux,
            )

        budgets = (split if jnp.ndim(b) else PartitionSpec() for b in budget)
        by_step: Any = PartitionSpec(None, axis) if trace else None
        stats = SolveStats(num_steps=split, residual=split, converged=split, trace=by_step)
        out = Solution(value=split, stats=stats, states=split, aux=split)
        solve = _shard_map(local, mesh, axis, (split, split, split, split, *budgets), out)
        solution = solve(params, z0, x, probe, *budget)
        if has_aux:  # its f is none of z alone
            return solution
        return dataclasses.replace(solution, equation=Equation(f=mapped, params=params, x=x))

    return fixed_point


@dataclasses.dataclass(frozen=True)
class MappedEquation:
    """f(params, z, x) on each device's own samples, without communication.

    Attributes:
      f: the map.
      devices: over which the samples are split.
      split: for each leaf of x whether it is; of params and of other leaves of x there is one copy
        for each device, from `ShardedMap.copies`.

    Example:
      >>> devices = ShardedMap(make_mesh())
      >>> f = MappedEquation(lambda params, z, x: params * z + x, devices, (True,))
      >>> one = jnp.ones((jax.device_count(), 1))
      >>> f(devices.copies(jnp.float32(0.5)), one, one)[0].item()
      1.5
    """

    f: Map
    devices: ShardedMap
    split: tuple[bool, ...]

    def own(self, x: PyTree) -> PyTree:
        """Returns f's x on one device, of what the device has of the x of all."""
        leaves, structure = jax.tree.flatten(x)
        leaves = [a if s else a[0] for a, s in zip(leaves, self.split, strict=True)]
        return jax.tree.unflatten(structure, leaves)

    def __call__(self, params: PyTree, z: PyTree, x: PyTree) -> PyTree:
        """Evaluates f."""
        local = self.devices(lambda params, z, x: self.f(params, z, self.own(x)))
        return local(params, z, x)


def split_leaves(x: PyTree, batch: int, x_axes: Any = 0) -> PyTree:
    """Reads off ``x_axes`` which leaves of ``x`` hold one entry for each sample.

    Args:
      x: any tree.
      batch: B.
      x_axes: see `sharded_fixed_point`.

    Returns:
      A tree like ``x``: True for the leaves whose leading axis is the batch, else False.

    Raises:
      ValueError: ``x_axes`` is not a tree prefix of ``x`` with leaves 0 and None, or a leaf of
        ``x`` under a 0 does not have the leading axis B.

    Example:
      >>> import numpy as np
      >>> split_leaves({"u": np.ones((4, 2)), "r": np.ones(2)}, 4, {"u": 0, "r": None})
      {'r': False, 'u': True}
    """

    def part(path: Any, axis: Any, below: PyTree) -> PyTree:
        if axis is not None and (isinstance(axis, bool) or axis != 0):
            raise ValueError(
                f"got x_axes{jax.tree_util.keystr(path)} = {axis!r}; wanted 0 to split the leading "
                "axis, or None to replicate"
            )

        def leaf(rest: Any, a: Any) -> bool:
            if axis is not None and np.shape(a)[:1] != (batch,):
                name = f"x{jax.tree_util.keystr((*path, *rest))}"
                raise ValueError(
                    f"got {name} of shape {np.shape(a)} for a batch of {batch}; wanted a leading "
                    f"axis of {batch}, along which x is split; for what all samples share, pass "
                    "x_axes with None at this place"
                )
            return axis is not None

        return jax.tree_util.tree_map_with_path(leaf, below)

    def is_none(a: Any) -> bool:
        return a is None

    try:
        jax.tree.structure(x_axes, is_leaf=is_none).flatten_up_to(x)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"got x_axes = {x_axes} for x of structure {jax.tree.structure(x)}; wanted a tree "
            "prefix of x with leaves 0 and None, as in_axes of jax.vmap"
        ) from error
    return jax.tree_util.tree_map_with_path(part, x_axes, x, is_leaf=is_none)


@dataclasses.dataclass(frozen=True)
class ShardedMap:
    """Makes functions run on every device's own examples, without communication.

    For work whose amount depends on the examples, such as sorting words by frequency: under plain
    jit it would be done with the examples of all devices gathered.

    Parameters go in as copies, one for each device.  Their gradient is summed over the devices
    once, however many of such functions take the same copies.

    Attributes:
      mesh: devices; see `sharded_fixed_point`.
      axis: name of the mesh axis that splits the batch; its size must divide B.

    Raises:
      ValueError: the mesh has no such axis.

    Example:
      >>> devices = ShardedMap(make_mesh())
      >>> double = devices(lambda w, x: w * x)
      >>> w = devices.copies(2.0 * jnp.ones(()))
      >>> double(w, jnp.ones(jax.device_count())).sum() == 2 * jax.device_count()
      Array(True, dtype=bool)
    """

    mesh: Mesh
    axis: str = AXIS

    def __post_init__(self) -> None:
        """Refuses a mesh without the axis."""
        if self.axis not in self.mesh.axis_names:
            raise ValueError(
                f"got axis={self.axis!r} for a mesh with the axes {self.mesh.axis_names}; wanted "
                "the one that splits the batch: pass axis="
            )

    def copies(self, params: PyTree) -> PyTree:
        """Gives each device a copy.

        Args:
          params: tree of arrays.

        Returns:
          The tree, with a leading axis of one entry for each device, split over them.
        """

        def local(params: PyTree) -> PyTree:
            return jax.tree.map(lambda a: a[None], per_device(params, self.axis))

        whole: Any = PartitionSpec()
        spec: Any = PartitionSpec(self.axis)
        params = jax.tree.map(jnp.asarray, params)
        return _shard_map(local, self.mesh, self.axis, (whole,), spec)(params)

    def __call__(self, f: Callable[..., PyTree]) -> Callable[..., PyTree]:
        """Wraps a function.

        Args:
          f: ``(params, *examples) -> examples``, trees of arrays ``[B, ...]`` but for params.

        Returns:
          The same of all devices, which takes `copies` of params.
        """
        split: Any = PartitionSpec(self.axis)

        def local(copies: PyTree, *examples: PyTree) -> PyTree:
            return f(_first(copies), *examples)

        def mapped(copies: PyTree, *examples: PyTree) -> PyTree:
            specs = (split,) * (1 + len(examples))
            return _shard_map(local, self.mesh, self.axis, specs, split)(copies, *examples)

        return mapped


def _first(copies: PyTree) -> PyTree:
    return jax.tree.map(lambda a: a[0], copies)


def per_device(arrays: PyTree, axis: str) -> PyTree:
    """Marks replicated arrays as one copy a device.

    Inside `jax.shard_map` (with check_vma) the gradient by a replicated array is summed over the
    devices by autodiff; by a marked one it is left to the caller.

    Args:
      arrays: any tree, replicated over the axis.
      axis: name of the mesh axis.

    Returns:
      The tree, marked; as it is outside of `jax.shard_map`, as under `jax.pmap` and `jax.vmap`.

    Example:
      >>> per_device(1.0, "data")
      1.0
    """
    if axis not in jax.sharding.get_abstract_mesh().manual_axes:
        return arrays
    return jax.tree.map(lambda a: jax.lax.pcast(a, axis, to="varying"), arrays)


def _check_batch(z0: PyTree, devices: int) -> int:
    batch = tree.batch_size(z0)
    if batch % devices:
        raise ValueError(
            f"got a batch of {batch} for {devices} devices; wanted a multiple; change the "
            "batch size, or pad the last batch and mask it"
        )
    return batch


def _shard_map(
    local: Callable[..., Any], mesh: Mesh, axis: str, in_specs: tuple[Any, ...], out_specs: Any
) -> Callable[..., Any]:
    """`jax.shard_map` over one axis; other axes of the mesh stay as they are.

    Over an Explicit axis, operands that are placed in another way are moved first.
    """
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names={axis}
    )
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if kinds[axis] != AxisType.Explicit:
        return mapped

    def move(spec: PartitionSpec, part: PyTree) -> PyTree:
        def leaf(a: Any) -> jax.Array:
            a = jnp.asarray(a)
            own = jax.typeof(a).sharding.spec
            others = [None if name == axis else name for name in own]
            others[: len(spec)] = spec
            return jax.reshard(a, NamedSharding(mesh, PartitionSpec(*others)))

        return jax.tree.map(leaf, part)

    def is_spec(a: Any) -> bool:
        return isinstance(a, PartitionSpec)

    return lambda *operands: mapped(*jax.tree.map(move, in_specs, operands, is_leaf=is_spec))
