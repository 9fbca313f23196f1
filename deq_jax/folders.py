"""Folders that a user names: local ones, and those of Google Cloud Storage."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from deq_jax.errors import UsageError

if TYPE_CHECKING:
    from etils import epath

    Folder: TypeAlias = Path | epath.Path
else:
    Folder = Any
"""A local path, or one that begins with gs://; both have the methods of `pathlib.Path`."""


def parse(name: str | os.PathLike[str]) -> Folder:
    """The folder that a user names.

    Args:
      name: a local folder, perhaps with ~, or gs://BUCKET/FOLDER.  For gs:// the package gcsfs must
        be installed, or TensorFlow.

    Returns:
      A `pathlib.Path`, absolute, or an `epath.Path`.

    Raises:
      UsageError: the name has another scheme, such as s3://.

    Example:
      >>> parse("runs/digits").name, str(parse("gs://bucket/digits"))
      ('digits', 'gs://bucket/digits')
    """
    text = os.fspath(name)
    # pathlib makes one slash of two.  A single letter is a drive of Windows.
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/+", text)
    if scheme is None:
        return Path(text).expanduser().absolute()
    if scheme[1] != "gs" or scheme.end() == len(text):
        raise UsageError(f"got the folder {text}; wanted a local folder or gs://BUCKET/FOLDER")
    from etils import epath

    return epath.Path(f"gs://{text[scheme.end() :]}")


def cache() -> Path:
    """The folder for what can be made again.

    Returns:
      ``deq_jax`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``.

    Example:
      >>> cache().name
      'deq_jax'
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "deq_jax"


def is_remote(folder: Folder) -> bool:
    """Whether a folder is in a store of objects: no lock, no appending, no renaming at once.

    Args:
      folder: from `parse`, or inside of one.

    Returns:
      True for gs://.

    Example:
      >>> is_remote(parse("runs/digits")), is_remote(parse("gs://bucket/digits"))
      (False, True)
    """
    return str(folder).startswith("gs://")


def errors(folder: Folder) -> tuple[type[Exception], ...]:
    """What may be raised where a folder cannot be read or written.

    Args:
      folder: from `parse`, or inside of one.

    Returns:
      For `except`: OSError; of a remote folder any exception, as its libraries raise their own.

    Example:
      >>> errors(parse("runs/digits"))
      (<class 'OSError'>,)
    """
    return (Exception,) if is_remote(folder) else (OSError,)


def first_line(error: Exception) -> str:
    r"""What an exception says, short enough to stand in a sentence.

    Args:
      error: any exception.

    Returns:
      The first line of its message, cut at 200 characters; its type if it says nothing.

    Example:
      >>> first_line(ValueError("too long\nfor a sentence")), first_line(KeyError())
      ('too long', 'KeyError')
    """
    text = str(error).strip().split("\n")[0] or type(error).__name__
    return text if len(text) <= 200 else text[:200] + " ..."


def reason(error: Exception) -> str:
    """Why a folder or file that the sentence names cannot be read or written.

    Args:
      error: what was raised.

    Returns:
      What the operating system says, or the first line of the message.

    Example:
      >>> reason(OSError(28, "No space left on device"))
      'No space left on device'
    """
    return getattr(error, "strerror", None) or first_line(error)


def write(path: Folder, data: bytes) -> None:
    """Writes a file: all of the data, or the file stays as it was.

    Args:
      path: of the file, in an existing folder.
      data: its new contents.

    Example:
      >>> import tempfile
      >>> path = parse(tempfile.mkdtemp()) / "file"
      >>> write(path, b"whole")
      >>> path.read_bytes()
      b'whole'
    """
    if is_remote(path):  # an object appears when it is complete
        path.write_bytes(data)
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def remove(folder: Folder) -> None:
    """Removes a folder and all in it, as far as that can be done.

    Args:
      folder: it need not exist.

    Example:
      >>> remove(parse("no/such/folder"))
    """
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
        return
    try:
        folder.rmtree(missing_ok=True)
    except Exception:  # whatever the library of the store raises; the next run tries again
        return
