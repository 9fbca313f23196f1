"""The folder of a run, which belongs to one configuration."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO, cast

import jax

from deq_jax import folders
from deq_jax.errors import UsageError
from deq_jax.folders import Folder
from deq_jax.training import distributed, fields
from deq_jax.training.config import Config

CONFIG = "config.json"
LOCK = "lock"


@contextlib.contextmanager
def claimed(config: Config) -> Iterator[Path]:
    """Creates `config.workdir`, or checks that it holds a run of the same configuration.

    While entered, no other run can enter the same folder: a lock that the operating system drops
    when the process ends, however it ends.  A folder on gs:// has no lock: see to it yourself that
    two runs do not share one.

    Args:
      config: the configuration of this run; written to config.json.

    Yields:
      The folder, a `pathlib.Path`; on gs:// an `epath.Path`.

    Raises:
      UsageError: the folder has a scheme other than gs://, and nothing is created; it holds a run
        of another configuration, whose config.json is left as it is; another run is at work in it;
        it cannot be written; or processes of one run do not see the same folder or the same
        configuration.

    Example:
      >>> import tempfile
      >>> with claimed(Config(workdir=tempfile.mkdtemp() + "/run")) as folder:
      ...     folder.name
      'run'
    """
    folder = folders.parse(config.workdir)
    path = folder / CONFIG
    with contextlib.ExitStack() as stack:
        problem = ""
        if distributed.is_first():
            try:
                _begin(config, path, stack)
            except UsageError as error:
                problem = str(error)
        problem = distributed.from_first(problem)
        if not problem:
            problem = "" if distributed.is_first() else _differs(config, path)
            # Whoever has no problem of its own leaves for those who have.
            if distributed.largest(bool(problem)) and not problem:
                problem = "another process of this run cannot go on; see what it says"
        if problem:
            raise UsageError(problem)
        yield cast(Path, folder)  # an epath.Path has the methods of a pathlib.Path


def _begin(config: Config, path: Folder, stack: contextlib.ExitStack) -> None:
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = stack.enter_context(_lock(folder / LOCK)) if isinstance(folder, Path) else None
        if path.exists():
            _check(config, path)
        if lock is not None:
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            lock.flush()
        folders.write(path, (json.dumps(fields.to_dict(config), indent=2) + "\n").encode())
    except UsageError:
        raise
    except folders.errors(folder) as error:
        raise UsageError(
            f"cannot write to workdir {folder}: {folders.reason(error)}; choose another with "
            "--workdir"
        ) from error


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[TextIO]:
    """Holds a lock; where the system or the file system knows none, there is none."""
    with path.open("a+") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows
            pass
        except BlockingIOError:
            raise UsageError(
                f"workdir {path.parent} is in use by another run ({_owner(file)}); wait for "
                "it to end, or choose another folder with --workdir"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                raise
        yield file


def _owner(file: TextIO) -> str:
    """What the holder of a lock has written into it, or is about to write."""
    for _ in range(20):
        file.seek(0)
        if owner := file.read().strip():
            return owner
        time.sleep(0.05)
    return "which has just begun"


def _differs(config: Config, path: Folder) -> str:
    """Why a process of this run cannot go on with what process 0 has written, in words."""
    try:
        saved = json.loads(path.read_text())
    except (ValueError, *folders.errors(path)):
        return (
            f"process {jax.process_index()} does not see {path}, which process 0 has written; "
            "--workdir must be on storage that all processes share"
        )
    # Data may lie elsewhere on another machine; all else decides what processes do together.
    differing = fields.differences(saved, config, free=lambda leaf: leaf.name.startswith("data."))
    if differing:
        return (
            f"process {jax.process_index()} was started with other flags than process 0: "
            f"{'; '.join(differing)}"
        )
    return ""


def _check(config: Config, path: Folder) -> None:
    try:
        saved = json.loads(path.read_text())
        if not isinstance(saved, dict):
            raise ValueError(f"a {type(saved).__name__}")
    except ValueError as error:
        raise UsageError(
            f"{path} is not the configuration of a run ({error}); choose another folder with "
            "--workdir, or remove that file if the folder's checkpoints are of this configuration"
        ) from error
    differing = fields.differences(saved, config)
    if differing:
        raise UsageError(
            f"workdir {path.parent} holds a run of another configuration:\n  "
            + "\n  ".join(differing)
            + "\nchoose another folder with --workdir, or set these values as they are there"
        )
