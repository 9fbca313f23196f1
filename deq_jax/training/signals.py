"""SIGTERM and SIGINT as a request that the loop honours between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


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
