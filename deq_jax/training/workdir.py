"""The folder of a run, which belongs to one configuration."""

from __future__ import annotations

import json
import os
from pathlib import Path

from deq_jax.training import fields
from deq_jax.training.config import Config
from deq_jax.training.errors import UsageError

CONFIG = "config.json"


def claim(config: Config) -> Path:
    """Creates `config.workdir`, or checks that it holds a run of the same configuration.

    Args:
      config: the configuration of this run; written to config.json.

    Returns:
      The folder.

    Raises:
      UsageError: the folder holds a run of another configuration, whose config.json is left as it
        is; or the folder cannot be written.

    Example:
      >>> import tempfile
      >>> claim(Config(workdir=tempfile.mkdtemp() + "/run")).name
      'run'
    """
    folder = Path(config.workdir).expanduser().absolute()
    path = folder / CONFIG
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _check(config, path)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(fields.to_dict(config), indent=2) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(
            f"cannot write to workdir {folder}: {error.strerror}; choose another with --workdir"
        ) from error
    return folder


def _check(config: Config, path: Path) -> None:
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
