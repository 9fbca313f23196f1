"""Many processes as one run: joining, agreeing, and noticing when one of them is gone.

Within one process, every function here returns at once and communicates with nobody.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from deq_jax.training.errors import UsageError
from deq_jax.training.watch import Watch

_HEARTBEAT = 30
"""Seconds of silence after which JAX takes a process for dead, where `Watch` has not noticed."""


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Watch | None:
    """Joins the other processes of the run; to be called before anything asks for a device.

    Without arguments it looks into the environment: SLURM (``srun``), Open MPI (``mpirun``), a TPU
    pod under Kubernetes, or JAX's own JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID.  Where these say nothing it does nothing: a single process.

    Args:
      coordinator: "host:port" of process 0; "auto" to have JAX ask the cluster, as on a Cloud TPU
        pod, whose environment says nothing.
      num_processes: how many there are.
      process_id: which of them this is, from 0.

    Returns:
      The `Watch` that ends this process when another is gone; None of a single process.

    Raises:
      UsageError: the three do not go together, or the others cannot be reached.

    Example:
      >>> initialize()  # a single process
    """
    given = (coordinator, num_processes, process_id)
    automatic = coordinator == "auto" or (given == (None, None, None) and is_announced(os.environ))
    if not automatic and given == (None, None, None):
        return None
    arguments: dict[str, Any] = {} if automatic else _arguments(*given)
    try:
        jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=_HEARTBEAT)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UsageError(
            f"cannot join the other processes: {reason}; see that all are started with the same "
            "--coordinator and --num_processes, and each with a --process_id of its own"
        ) from error
    if jax.process_count() == 1:
        return None
    return Watch(jax.process_index(), jax.process_count(), _exchange)


def is_announced(environment: Mapping[str, str]) -> bool:
    """Tells whether a launcher has said that there are several processes.

    Args:
      environment: `os.environ`.

    Returns:
      True for a step of SLURM, an Open MPI job or a TPU pod of more than one process.

    Example:
      >>> is_announced({"OMPI_COMM_WORLD_SIZE": "4"})
      True
    """
    if "JAX_COORDINATOR_ADDRESS" in environment or "MEGASCALE_NUM_SLICES" in environment:
        return True
    slurm = environment.get("SLURM_NTASKS", "1") if "SLURM_STEP_NODELIST" in environment else "1"
    mpi = environment.get("OMPI_COMM_WORLD_SIZE", "1")
    return slurm != "1" or mpi != "1" or "," in environment.get("TPU_WORKER_HOSTNAMES", "")


def is_first() -> bool:
    """Whether this process is the one that writes and talks for all.

    Returns:
      True in process 0, and in a single process.

    Example:
      >>> is_first()
      True
    """
    return jax.process_index() == 0


def largest(value: int) -> int:
    """The largest of the processes' numbers; all of them must call it.

    Args:
      value: this process's.

    Returns:
      The same in every process.

    Example:
      >>> largest(3)
      3
    """
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.int32(value)).max())


def from_first(value: Any) -> Any:
    """What process 0 has; all of them must call it.

    Args:
      value: what JSON can hold; that of other processes is not looked at.

    Returns:
      The same in every process.

    Example:
      >>> from_first({"step": 3})
      {'step': 3}
    """
    if jax.process_count() == 1:
        return value
    data = np.frombuffer(json.dumps(value).encode() if is_first() else b"", np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    sent = data if is_first() else np.zeros(size, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(sent)).tobytes())


def barrier(name: str) -> None:
    """Waits until all processes are here.

    Args:
      name: of the place in the program, the same in all of them.

    Example:
      >>> barrier("begin")
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def fetch(tree: Any) -> Any:
    """Arrays on the host, whole also where other processes hold parts of them.

    Args:
      tree: of arrays; all processes must call it with the same.

    Returns:
      The tree, of numpy arrays.

    Example:
      >>> fetch(jax.numpy.arange(2)).tolist()
      [0, 1]
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def _arguments(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> dict[str, Any]:
    """What was said by flags, checked."""
    if coordinator is None or num_processes is None or process_id is None:
        raise UsageError(
            f"got coordinator={coordinator}, num_processes={num_processes}, process_id="
            f"{process_id}; wanted all three of them, or none"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"got coordinator={coordinator!r}; wanted host:port of process 0, or auto")
    if not 0 <= process_id < num_processes:
        raise UsageError(
            f"got process_id={process_id} of num_processes={num_processes}; wanted 0 to "
            f"{num_processes - 1}"
        )
    return {
        "coordinator_address": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }


def _exchange(text: str) -> list[str]:
    """A short text of every process."""
    row = np.zeros(256, np.uint8)
    data = text.encode()[:256]
    row[: len(data)] = np.frombuffer(data, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(row))
    return [bytes(row).rstrip(b"\0").decode() for row in rows]
