"""Many processes as one run: joining, agreeing, stopping, and noticing when one of them is gone.

Within one process, the functions here return at once and communicate with nobody.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from deq_jax.errors import UsageError
from deq_jax.training.parallel import batch_sharding, replicated

_HEARTBEAT = 30
"""Seconds of silence after which JAX takes a process for dead, if `PeerMonitor` missed its end."""

_BYE, _FAILED = b".", b"!"
_TOKEN = 32
_GRACE = 0.7
"""Seconds in which the others may fail for the same reason, and say so in their own words."""

EXIT_CODE = 75
"""Exit code of a process that another has left alone, EX_TEMPFAIL ("try again")."""


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> PeerMonitor | None:
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
      The `PeerMonitor` that ends this process when another is gone; None of a single process.

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
    return PeerMonitor(jax.process_index(), jax.process_count(), _exchange)


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


def per_process(name: str, size: int) -> int:
    """The part of a batch that each process reads.

    Args:
      name: of the size, for the message.
      size: examples in the batch, over all processes.

    Returns:
      Examples in the batch of one process.

    Raises:
      UsageError: ``size`` is not a multiple of the number of processes.

    Example:
      >>> per_process("train.batch_size", 16)
      16
    """
    processes = jax.process_count()
    if size % processes:
        raise UsageError(f"{name} must divide by the {processes} processes, got {size}")
    return size // processes


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


class StopRequest:
    """While entered, remembers the first SIGTERM or SIGINT instead of dying from it.

    A second signal acts as if nobody listened, for the impatient.  Outside the main thread (a
    notebook's worker, for instance), where Python allows no handlers, it never fires.

    Attributes:
      number: the signal that came, or None.
    """

    def __init__(self) -> None:
        """Listens to nothing yet."""
        self.number: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        """Begins to listen."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        """Puts the previous handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.number = number
        self.__exit__()


class PreemptionSync:
    """Makes all processes obey a signal that some of them received, after the same step.

    Every step adds a reduction of one number to what the devices have to do, whose outcome is read
    when it is there anyway: nobody waits for it.
    """

    def __init__(self, mesh: Mesh, delay: int) -> None:
        """Prepares the reduction.

        Args:
          mesh: devices of all processes.
          delay: after how many more votes an outcome is read.
        """
        self._delay, self._running = delay, deque[jax.Array]()
        self._split, self._size = batch_sharding(mesh), mesh.local_mesh.size
        self._reduce = jax.jit(jnp.max, out_shardings=replicated(mesh))

    def poll(self, number: int | None) -> int:
        """Votes and reads an earlier outcome; every process calls it once a step.

        Args:
          number: the signal that came to this process, or None.

        Returns:
          The signal that all obey now, 0 for none.
        """
        if jax.process_count() == 1:
            return number or 0
        own = np.full(self._size, number or 0, np.int32)
        votes = jax.make_array_from_process_local_data(self._split, own)
        self._running.append(self._reduce(votes))
        if len(self._running) <= self._delay:
            return 0
        return int(self._running.popleft())


class PeerMonitor:
    """Connections between process 0 and all others.

    Where none can be made (a firewall), nothing is watched and JAX's heartbeat has to do.
    """

    def __init__(self, index: int, count: int, exchange: Callable[[str], list[str]]) -> None:
        """Connects.

        Args:
          index: number of this process.
          count: of processes.
          exchange: given a text, returns those of all processes, in order.
        """
        self._closing, self._gone = False, threading.Event()
        self._sockets: dict[int, socket.socket] = {}
        self._server = None
        if index == 0:
            self._server = socket.create_server(("", 0), backlog=count)
            self._server.settimeout(10)
            # Whoever else finds the port does not know the token, and is not listened to.
            token = secrets.token_hex(_TOKEN // 2)
            exchange(f"{_address()}:{self._server.getsockname()[1]}:{token}")
            arguments = (token.encode(), count - 1)
            threading.Thread(target=self._welcome, args=arguments, daemon=True).start()
        else:
            host, port, token = exchange("")[0].rsplit(":", 2)
            try:
                connection = socket.create_connection((host, int(port)), timeout=10)
                connection.sendall(token.encode() + index.to_bytes(4))
            except OSError:
                return
            self._listen(0, connection)

    def close(self) -> None:
        """Says goodbye: from now on the others may go."""
        self._closing = True
        self._tell(_BYE)

    def fail(self, message: str) -> NoReturn:
        """Ends this process for a reason that the others may share, and them if they do not.

        Args:
          message: shown on stderr.
        """
        self._closing = True
        sys.stderr.write(f"error: {message}\n")
        self._tell(_FAILED)
        # Without process 0, to which JAX too is connected, the others would be aborted.
        time.sleep(_GRACE if self._server is None else 3 * _GRACE)
        _leave(1)

    def is_alone(self) -> bool:
        """Tells whether an error of communication has its cause in another process's end."""
        return self._gone.wait(_GRACE)

    def _tell(self, word: bytes) -> None:
        for connection in self._sockets.values():
            with contextlib.suppress(OSError):
                connection.sendall(word)

    def _welcome(self, token: bytes, others: int) -> None:
        assert self._server is not None
        while len(self._sockets) < others:
            try:
                connection, _ = self._server.accept()
            except OSError:  # nobody has come for a while
                return
            connection.settimeout(5)
            try:
                greeting = connection.recv(_TOKEN + 4, socket.MSG_WAITALL)
            except OSError:
                greeting = b""
            if greeting[:_TOKEN] == token:
                self._listen(int.from_bytes(greeting[_TOKEN:]), connection)
            else:
                connection.close()

    def _listen(self, number: int, connection: socket.socket) -> None:
        connection.settimeout(None)
        self._sockets[number] = connection
        threading.Thread(target=self._wait, args=(number, connection), daemon=True).start()

    def _wait(self, number: int, connection: socket.socket) -> None:
        try:
            last = connection.recv(1)
        except OSError:
            last = b""
        if last == _BYE or self._closing:
            return
        self._gone.set()
        if last == _FAILED:
            time.sleep(_GRACE)
            if number:
                with contextlib.suppress(OSError):
                    connection.settimeout(10 * _GRACE)
                    connection.recv(1)  # returns when the other has ended
        if not self._closing:
            # A process that lost another goes too, which is all that the rest of them see.
            who = f"process {number}" if number else "process 0, or one that it waited for,"
            sys.stderr.write(
                f"error: {who} is gone; this one cannot go on without it.  Run the same command "
                "again in all processes to resume from the newest checkpoint\n"
            )
            _leave(EXIT_CODE)


def _leave(code: int) -> NoReturn:
    """Ends this process at once: what is still to be done would wait for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _address() -> str:
    """The address by which other machines reach this one; loopback where there is no network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a documentation address; nothing is sent
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"


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
