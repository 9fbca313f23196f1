"""Where metrics go: metrics.jsonl and TensorBoard event files in the workdir."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from deq_jax import folders
from deq_jax.folders import Folder

HISTORY = "metrics.jsonl"
_PERIOD = 30
"""Seconds between two writes of the same object on gs://."""


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
    path = folders.parse(workdir) / HISTORY
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is unfinished
    return [json.loads(line) for line in lines]


class Writer(Protocol):
    """Receives metrics: any object with this method."""

    def write(
        self, kind: str, step: int, values: Mapping[str, float], *, budget: int | None = None
    ) -> None:
        """Writes one set of metrics.

        Args:
          kind: "train" or "eval".
          step: the number of finished steps.
          values: metric -> number.
          budget: of the solver, for an evaluation.
        """
        ...


class MetricWriter:
    """Appends records to metrics.jsonl and to a TensorBoard event file.

    A resumed run first cuts off what an earlier attempt wrote beyond the step it resumes from, so
    that every step appears once.  A record that cannot be written (disk full) is kept and written
    together with the next one.  Use it in a `with` statement, or close it.

    On gs:// nothing can be appended: both files are written anew, at most every half a minute, by
    `flush` and at the end.
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
        self._say = say
        self._events: _EventFile | None = None
        if not enabled:
            return
        folder = folders.parse(workdir)
        self._path, self._flushed = folder / HISTORY, time.monotonic()
        kept = [r for r in read_history(workdir) if r["step"] <= step]
        self._saved = b"".join(_line(record) for record in kept)
        self._unsaved: list[bytes] = []
        folders.write(self._path, self._saved)
        self._events = _EventFile(folder, step, say)

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Writes what is left; nothing may be written after it."""
        self.flush()
        if self._events is not None:
            self._events.close()

    def flush(self) -> None:
        """Sees to it that all records are in the folder, before a checkpoint that is beyond them.

        What cannot be written is told, and waits in memory.
        """
        if self._events is None:
            return
        self._flushed = time.monotonic()
        self._events.flush()
        if not self._unsaved:
            return
        try:
            self._save(b"".join(self._unsaved))
            self._unsaved.clear()
        except folders.errors(self._path) as error:
            self._say(f"metrics wait in memory: {self._path}: {folders.reason(error)}")

    def _save(self, data: bytes) -> None:
        if isinstance(self._path, Path):
            _append(self._path, data)
            return
        folders.write(self._path, self._saved + data)
        self._saved += data

    def write(
        self, kind: str, step: int, values: Mapping[str, float], *, budget: int | None = None
    ) -> None:
        """Writes one record; see `Writer`."""
        if self._events is None:
            return
        tags = {} if budget is None else {"budget": budget}
        self._unsaved.append(_line({"kind": kind, "step": step, **tags, **values}))
        suffix = "" if budget is None else f"/budget_{budget}"
        self._events.write({f"{kind}/{name}{suffix}": v for name, v in values.items()}, step)
        if isinstance(self._path, Path) or time.monotonic() - self._flushed > _PERIOD:
            self.flush()


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

    SummaryWriter writes from a thread of its own, where nobody can catch the error of a full disk.
    Its EventsWriter names files by the second, and so overwrites that of a run started just before.
    """

    def __init__(self, workdir: Folder, step: int, say: Callable[[str], None]) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]
        from tensorboardX.record_writer import RecordWriter

        self._say, self._event = say, Event
        self._target = workdir / f"events.out.tfevents.{time.time_ns()}"
        self._local, self._temporary = self._target, None
        if folders.is_remote(workdir):
            self._temporary = tempfile.TemporaryDirectory()
            self._local = Path(self._temporary.name) / self._target.name
        self._records: RecordWriter | None = RecordWriter(str(self._local))
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
        if self._records is None:
            return
        try:
            for event in events:
                self._records.write(event.SerializeToString())
            self._records.flush()
        except OSError as error:
            self._say(f"no more TensorBoard events are written: {error.strerror}")
            self.close()

    def flush(self) -> None:
        """Copies the file to gs://; what fails is made up for by the next copy."""
        if self._records is not None and self._temporary is not None:
            with contextlib.suppress(*folders.errors(self._target)):
                self._target.write_bytes(self._local.read_bytes())

    def close(self) -> None:
        if self._records is not None:
            with contextlib.suppress(OSError):  # after a failure it tries once more
                self._records.close()
        self._records = None
        if self._temporary is not None:
            self._temporary.cleanup()
