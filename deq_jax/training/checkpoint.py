"""Checkpoints of a run: state, configuration, data position; asynchronous, verified, rotated."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import re
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from deq_jax import folders
from deq_jax.errors import UsageError
from deq_jax.folders import Folder, first_line
from deq_jax.training import distributed
from deq_jax.training.state import TrainState

_UNFINISHED = ".orbax-checkpoint-tmp"
_COMPLETE = "commit_success.txt"
"""What Orbax writes last, where a folder cannot be renamed."""
_PARTS = {"orbax.checkpoint", "_CHECKPOINT_METADATA", "state", "host"}
"""What there may be before, in any order."""
_MANIFEST = "files.json"


class CheckpointError(UsageError):
    """A checkpoint could not be written; older ones are as they were."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint held.

    Attributes:
      state: the training state.
      host: the JSON-able dict that was saved beside it.
    """

    state: TrainState
    host: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run: ``directory/000000500/`` after 500 steps, and so on.

    A save runs in the background, one at a time.  Older checkpoints go only when a newer one is
    complete.  The newest ones are kept, and on request every n-th step and the best one.

    Orbax's own ``training.Checkpointer`` rotates too, but it cannot be opened when a file of one
    checkpoint is damaged or a foreign folder has a number for a name, and after a full disk it
    repeats the old error and leaves the unfinished files where they are.

    A checkpoint lists its files with their checksums, and the shapes of its arrays; both are
    verified before anything is restored.  On gs:// the files are not listed: the store has a
    checksum of every object, and the checkpoint would have to be read back for ours.

    The processes of a run share the folder and call everything together.  Each writes what its
    devices alone hold, and all agree on what came of it.
    """

    def __init__(
        self,
        directory: Folder,
        *,
        keep: int,
        keep_every: int | None = None,
        keep_best: str = "",
        fits: Callable[[Any], str],
        say: Callable[[str], None],
    ) -> None:
        """Prepares the folder; use the object in a `with` statement.

        Args:
          directory: from `folders.parse`; created when first needed.
          keep: how many to keep, the newest ones.
          keep_every: steps that are multiples of it are kept for ever; None for none.
          keep_best: "min:NAME" or "max:NAME", a metric given to `save`; "" for none.
          fits: given the saved `host` dict, returns why it cannot be continued, "" if it can.
          say: called with a sentence that the user should see.
        """
        self._directory, self._fits, self._say = directory, fits, say
        self._keep, self._keep_every, self._keep_best = keep, keep_every, keep_best
        self._metrics: dict[int, dict[str, float]] = {}
        self._unchecked = True
        self._failures = (ValueError, RuntimeError, *folders.errors(directory))
        self._pending: tuple[int, Future[None]] | None = None
        self._background = ThreadPoolExecutor(max_workers=1)
        self._context = _make_context()
        self._quiet = _WithoutOrbaxTracebacks()

    def __enter__(self) -> Checkpoints:
        """Clears what a killed run left unfinished."""
        logging.getLogger("absl").addFilter(self._quiet)
        self._clean()
        distributed.barrier("checkpoints")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits for the save under way, and reports its failure without raising.

        After an exception it does so in a single process only: others may not have met it, and
        would be waited for in vain.
        """
        try:
            if kind is None or jax.process_count() == 1:
                self.finish()
        except CheckpointError as error:
            self._say(str(error))
        finally:
            self._background.shutdown(wait=self._pending is None)
            logging.getLogger("absl").removeFilter(self._quiet)

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, rising."""
        return saved_steps(self._directory)

    def best(self) -> int | None:
        """The step of the best checkpoint by the metric ``keep_best``.

        Returns:
          The earliest of several equal ones; None if no checkpoint was saved with that metric.
        """
        direction, _, name = self._keep_best.partition(":")
        scores = {step: (self._metrics_of(step) or {}).get(name) for step in self.steps()}
        known = {step: score for step, score in scores.items() if score is not None}
        sign = -1 if direction == "max" else 1
        return min(known, key=lambda step: (sign * known[step], step), default=None)

    def save(
        self,
        step: int,
        state: Any,
        host: dict[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Begins to save; returns as soon as ``state`` may be donated.

        Args:
          step: the number of finished steps.
          state: what to save, a `TrainState` or any tree of arrays.
          host: what else to save, a dict that JSON can hold.
          metrics: of an evaluation of this very state, for ``keep_best``; None if there was none.

        Raises:
          CheckpointError: this save could not begin, or the one before it failed.
        """
        self.finish()
        if metrics is not None:
            self._complain_once(metrics)
        # A copy: the file is written later, when the caller may have changed its dict.
        record: dict[str, Any] = {"host": json.loads(json.dumps(host))}
        record["leaves"] = _describe(state)
        record["metrics"] = {n: float(v) for n, v in (metrics or {}).items() if math.isfinite(v)}
        self._metrics.pop(step, None)
        path = self._path(step)
        failure, response = None, None
        try:
            with self._context:
                response = ocp.save_checkpointables_async(
                    str(path), {"state": state, "host": record}
                )
        except self._failures as error:
            failure = error
        self._agree(step, failure)

        def complete() -> None:
            assert response is not None
            response.result()
            if distributed.is_first() and isinstance(path, Path):
                _seal(path)

        self._pending = step, self._background.submit(complete)

    def finish(self) -> None:
        """Waits for the save under way, then removes the checkpoints that are no longer kept.

        Raises:
          CheckpointError: the save failed.
        """
        if self._pending is None:
            return
        (step, saving), self._pending = self._pending, None
        failure = None
        try:
            saving.result()
        except self._failures as error:
            failure = error
        self._agree(step, failure)
        try:
            self._rotate()
        except folders.errors(self._directory) as error:
            self._say(f"no checkpoint was removed: {self._directory}: {folders.reason(error)}")

    def restore(self, template: TrainState) -> Restored | None:
        """Reads the newest checkpoint that is whole and belongs to this run.

        Newer ones that are not are renamed to ``damaged-...``, never overwritten or deleted.

        Args:
          template: a TrainState of `jax.ShapeDtypeStruct` with shardings.

        Returns:
          The checkpoint, or None if the folder has none.

        Raises:
          UsageError: there are checkpoints, but none of them can be used; all stay as they are.
        """
        steps: list[int] = distributed.from_first(self.steps())
        refused: dict[int, str] = {}
        for step in reversed(steps):
            restored, reason = self._try(step, template)
            if restored is None:
                refused[step] = reason
                continue
            for bad, reason in refused.items():
                moved = self._set_aside(bad)
                self._say(f"checkpoint of step {bad} cannot be used ({reason}); moved to {moved}")
            if refused:
                self._say(f"falling back to the checkpoint of step {step}")
            return restored
        if refused:
            reasons = "\n".join(f"  step {step}: {reason}" for step, reason in refused.items())
            raise UsageError(
                f"no checkpoint in {self._directory} can be used:\n{reasons}\n"
                "nothing was changed; move that folder away to start anew, or choose another "
                "folder with --workdir"
            )
        return None

    def _clean(self) -> None:
        """Removes what killed or failed saves have left."""
        if distributed.is_first():
            for folder in _unfinished(self._directory):
                folders.remove(folder)

    def _complain_once(self, metrics: Mapping[str, float]) -> None:
        """Of a metric that is unknown, which shows only now."""
        if self._keep_best and self._unchecked and self._keep_best[4:] not in metrics:
            known = ", ".join(sorted(metrics))
            self._say(f"got keep_best={self._keep_best}, wanted one of {known}; no best is kept")
        self._unchecked = False

    def _rotate(self) -> None:
        """Removes what is no longer kept."""
        if not distributed.is_first():
            return
        steps = self.steps()
        kept = set(steps[-self._keep :])
        if self._keep_every:
            kept.update(step for step in steps if step % self._keep_every == 0)
        if self._keep_best:
            kept.update(step for step in steps if self._metrics_of(step) is None)
            if (best := self.best()) is not None:
                kept.add(best)
        for step in steps:
            if step not in kept:
                _discard(self._path(step))

    def _metrics_of(self, step: int) -> dict[str, float] | None:
        """What a checkpoint was saved with; None if that cannot be read, now or ever."""
        if step not in self._metrics:
            # Without Orbax, whose loading all processes would have to join.
            try:
                record = json.loads((self._path(step) / "host" / "data.json").read_text())
                self._metrics[step] = record.get("metrics", {})
            except (AttributeError, *self._failures):
                return None
        return self._metrics[step]

    def _try(self, step: int, template: TrainState) -> tuple[Restored | None, str]:
        """Reads a checkpoint, or says why none of the processes can."""
        restored, reason = None, ""
        if distributed.is_first():  # one of them reads all files for the checksums
            reason = _reason(lambda: _check_files(self._path(step)))
        reason = distributed.from_first(reason)
        if reason:
            return None, reason

        def load() -> None:
            nonlocal restored
            restored = self._load(step, template)

        reason = _reason(load)
        if distributed.largest(bool(reason)):
            return None, distributed.from_first(reason) or "another process cannot read it"
        return restored, ""

    def _path(self, step: int) -> Folder:
        return self._directory / f"{step:09d}"

    def _load(self, step: int, template: TrainState) -> Restored:
        path = self._path(step)
        with self._context:
            record = ocp.load_checkpointables(str(path), {"host": None})["host"]
            reason = _mismatch(record["leaves"], _describe(template))
            reason = reason or self._fits(record["host"])
            if reason:
                raise ValueError(reason)
            state = ocp.load_checkpointables(str(path), {"state": template})["state"]
        return Restored(state=state, host=record["host"])

    def _set_aside(self, step: int) -> Folder:
        count = 0
        while (target := self._directory / f"damaged-{step:09d}-{count}").exists():
            count += 1
        if distributed.is_first():
            self._path(step).rename(target)
        return target

    def _agree(self, step: int, failure: Exception | None) -> None:
        """Raises in all processes if one of them could not save."""
        if not distributed.largest(failure is not None):
            return
        kept = "older ones, which cannot be listed now, are as they were"
        with contextlib.suppress(*folders.errors(self._directory)):
            self._clean()  # also frees the space it took
            kept = "there is no older one"
            if older := self.steps():
                kept = f"the checkpoint of step {older[-1]} is intact"
        reason = "another process failed" if failure is None else first_line(failure)
        if any(words in str(failure) for words in ("No space left", "RESOURCE_EXHAUSTED")):
            reason = "the disk is full"
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {self._directory}: "
            f"{reason}; {kept}"
        ) from failure


def saved_steps(directory: Folder) -> list[int]:
    """The steps of the complete checkpoints in a folder.

    Args:
      directory: ``.../checkpoints``; it need not exist.

    Returns:
      Rising.

    Example:
      >>> saved_steps(folders.parse("nowhere"))
      []
    """
    if not directory.is_dir():
        return []
    remote = folders.is_remote(directory)
    return sorted(
        int(entry.name)
        for entry in directory.iterdir()
        if re.fullmatch(r"\d+", entry.name)
        and entry.is_dir()
        and not (remote and _is_unfinished(entry))
    )


def read(path: Folder) -> tuple[Any, dict[str, Any]]:
    """Reads one checkpoint as plain nested dicts, whatever model and run it is of.

    Args:
      path: folder of the checkpoint, ``.../checkpoints/000000500``.

    Returns:
      (state, host): what was saved, arrays on a device of this process; the dict saved beside it.

    Raises:
      ValueError: it is damaged.  Other exceptions, of any kind, come from Orbax.

    Example:
      >>> path = folders.parse("runs/digits/jr/checkpoints/000000600")
      >>> state, host = read(path)  # doctest: +SKIP
    """
    _check_files(path)
    # Every process reads its own copy: a device of another one could not be written to.
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with _make_context():
        record = ocp.load_checkpointables(str(path), {"host": None})["host"]
        shapes = ocp.checkpointables_metadata(str(path)).metadata["state"]
        template = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), shapes
        )
        state = ocp.load_checkpointables(str(path), {"state": template})["state"]
    return state, record["host"]


def _unfinished(directory: Folder) -> list[Folder]:
    """What killed or failed saves have left behind."""
    if not directory.is_dir():
        return []
    if not folders.is_remote(directory):
        return [entry for entry in directory.iterdir() if _UNFINISHED in entry.name]
    numbers = [entry for entry in directory.iterdir() if re.fullmatch(r"\d+", entry.name)]
    return [entry for entry in numbers if _is_unfinished(entry)]


def _is_unfinished(checkpoint: Folder) -> bool:
    """Of a remote one, which has its name from the beginning; a foreign folder is none."""
    return {entry.name for entry in checkpoint.iterdir()} <= _PARTS


def _discard(checkpoint: Folder) -> None:
    """Removes a checkpoint; a remote one that is removed in part must not count as complete."""
    if folders.is_remote(checkpoint):
        with contextlib.suppress(*folders.errors(checkpoint)):
            (checkpoint / _COMPLETE).unlink()
    folders.remove(checkpoint)


def _make_context() -> Any:
    context = ocp.Context()
    context.checkpointables.registry = ocp.handlers.local_registry()
    context.checkpointables.registry.add(ocp.handlers.JsonHandler, checkpointable_name="host")
    return context


class _WithoutOrbaxTracebacks(logging.Filter):
    """Orbax logs every failed save with a dozen tracebacks; `Checkpoints` reports it in words."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname


def _reason(action: Callable[[], None]) -> str:
    """Does something; returns why it could not be done, "" if it could."""
    try:
        action()
    except Exception as error:  # whatever a library makes of a damaged file
        return first_line(error)
    return ""


def _files(folder: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of every file, by its path inside the folder."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.name != _MANIFEST:
            checksum = 0
            with path.open("rb") as file:
                while data := file.read(1 << 24):
                    checksum = zlib.crc32(data, checksum)
            found[str(path.relative_to(folder))] = [path.stat().st_size, checksum]
    return found


def _seal(folder: Path) -> None:
    """Writes down what a complete checkpoint consists of."""
    folders.write(folder / _MANIFEST, json.dumps(_files(folder)).encode())


def _check_files(folder: Folder) -> None:
    """Raises ValueError if a file is not the one that was saved.

    Orbax alone does not notice every damage: of 17 single bits flipped in the file of the arrays
    15 came back as other values without an error (Orbax 0.12.8).  OCDBT has checksums for its
    metadata only.

    A checkpoint without a manifest was completed, but its run was killed before it could say so:
    what Orbax itself notices has to do.
    """
    manifest = folder / _MANIFEST
    if not isinstance(folder, Path) or not manifest.exists():
        return
    found = _files(folder)
    try:
        listed = json.loads(manifest.read_text())
    except ValueError as error:
        raise ValueError(f"its list of files, {_MANIFEST}, is damaged") from error
    for name, (size, checksum) in listed.items():
        if name not in found:
            raise ValueError(f"its file {name} is missing")
        if found[name][0] != size:
            raise ValueError(f"its file {name} has {found[name][0]} bytes instead of {size}")
        if found[name][1] != checksum:
            raise ValueError(f"its file {name} was altered")


def _describe(state: Any) -> dict[str, str]:
    """Shape and dtype of every array, by its path in the tree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): f"{a.dtype.name}{list(a.shape)}" for path, a in leaves}


def _mismatch(saved: dict[str, str], wanted: dict[str, str]) -> str:
    """The first difference between two descriptions, in words; "" if there is none."""
    for name in [*wanted, *saved]:
        there, here = saved.get(name, "absent"), wanted.get(name, "absent")
        if there != here:
            return f"it is of another model: {name} is {there} there, {here} in this run"
    return ""
