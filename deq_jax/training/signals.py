"""SIGTERM and SIGINT as a request that the loop honours between two steps."""

from __future__ import annotations

import signal
import threading
from collections import deque
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from deq_jax.training.parallel import batch_sharding, replicated


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


class Votes:
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
        """Votes, and reads an earlier outcome; to be called once a step by every process.

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
