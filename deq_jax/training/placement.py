"""From a batch in host memory to arrays split over the devices."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from deq_jax.training.errors import UsageError
from deq_jax.training.parallel import batch_sharding
from deq_jax.training.task import CORRUPT, Batch


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
      >>> from deq_jax.training.parallel import make_mesh
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
