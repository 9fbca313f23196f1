"""Where metrics go: metrics.jsonl and TensorBoard event files in the workdir."""

from __future__ import annotations

import json
import math
import os
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

HISTORY = "metrics.jsonl"


def read_history(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads metrics.jsonl.

    Args:
      workdir: folder of a run.

    Returns:
      The records, oldest first; a last line that was cut short by a crash is left out.

    Example:
      >>> read_history("no/such/run")
      []
    """
    path = Path(workdir) / HISTORY
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is unfinished
    return [json.loads(line) for line in lines]


class MetricWriter:
    """Appends records to metrics.jsonl and to a TensorBoard event file.

    A resumed run first cuts off what an earlier attempt wrote beyond the step it resumes from, so
    that every step appears once.  A record that cannot be written (disk full) is kept and written
    together with the next one.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        step: int,
        say: Callable[[str], None],
        *,
        enabled: bool = True,
    ) -> None:
        """Opens the files.

        Args:
          workdir: an existing folder.
          step: records after this step are dropped from what is there.
          say: called with a sentence when something cannot be written.
          enabled: False on all processes but one: nothing is opened or written.
        """
        self._say, self._enabled = say, enabled
        if not enabled:
            return
        self._path = Path(workdir) / HISTORY
        self._unsaved: list[bytes] = []
        kept = [r for r in read_history(workdir) if r["step"] <= step]
        whole = self._path.with_suffix(".tmp")
        whole.write_bytes(b"".join(_line(record) for record in kept))
        os.replace(whole, self._path)
        self._events = _EventFile(workdir, step, say)

    def write(
        self, kind: str, step: int, values: Mapping[str, float], *, budget: int | None = None
    ) -> None:
        """Writes one record.

        Args:
          kind: "train" or "eval".
          step: the number of finished steps.
          values: name -> number.
          budget: the solver budget of an evaluation.
        """
        if not self._enabled:
            return
        tags = {} if budget is None else {"budget": budget}
        self._unsaved.append(_line({"kind": kind, "step": step, **tags, **values}))
        try:
            _append(self._path, b"".join(self._unsaved))
            self._unsaved.clear()
        except OSError as error:
            self._say(f"metrics of step {step} wait in memory: {self._path}: {error.strerror}")
        suffix = "" if budget is None else f"/budget_{budget}"
        self._events.write({f"{kind}/{name}{suffix}": v for name, v in values.items()}, step)


def _line(record: Mapping[str, Any]) -> bytes:
    # JSON has no infinity, which is the residual of a solve that met no finite number.
    plain = {k: None if v in (math.inf, -math.inf) or v != v else v for k, v in record.items()}
    return json.dumps(plain).encode() + b"\n"


def _append(path: Path, data: bytes) -> None:
    """Appends all of the data or nothing."""
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            while data:  # a raw write may take a part, and say so by its return value alone
                data = data[file.write(data) :]
        except OSError:
            os.truncate(path, end)
            raise


class _EventFile:
    """A TensorBoard file, written in the calling thread.

    The usual SummaryWriter writes from a thread of its own, where a full disk ends in a traceback
    that nobody can catch.
    """

    def __init__(
        self, workdir: str | os.PathLike[str], step: int, say: Callable[[str], None]
    ) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]

        self._say, self._event = say, Event
        self._path: Path | None = Path(workdir) / f"events.out.tfevents.{time.time_ns()}"
        first = [Event(wall_time=time.time(), file_version="brain.Event:2")]
        if step:  # TensorBoard forgets what older files hold from here on
            start = SessionLog(status=SessionLog.START)
            first.append(Event(wall_time=time.time(), step=step + 1, session_log=start))
        self._put(first)

    def write(self, values: Mapping[str, float], step: int) -> None:
        from tensorboardX.summary import scalar

        now = time.time()
        self._put(
            [
                self._event(wall_time=now, step=step, summary=scalar(name, value))
                for name, value in values.items()
                if math.isfinite(value)  # tensorboardX complains about the others on stderr
            ]
        )

    def _put(self, events: list[Any]) -> None:
        from tensorboardX.record_writer import masked_crc32c

        if self._path is None:
            return
        parts = []
        for event in events:  # the TFRecord frame: length, its checksum, data, its checksum
            data = event.SerializeToString()
            length = struct.pack("<Q", len(data))
            parts += [length, struct.pack("<I", masked_crc32c(length))]
            parts += [data, struct.pack("<I", masked_crc32c(data))]
        try:
            _append(self._path, b"".join(parts))
        except OSError as error:
            self._path = None
            self._say(f"no more TensorBoard events are written: {error.strerror}")
