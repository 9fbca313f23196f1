"""From a batch in host memory to arrays split over the devices."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from deq_jax.training.errors import UsageError
from deq_jax.training.parallel import batch_sharding
from deq_jax.training.task import Batch


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
