"""The models of a command: the configured one, and with --compare one without penalty beside it."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from deq_jax import folders
from deq_jax.training import Config, option, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparedConfig(Config):
    """The configuration of an experiment that can train two models."""

    compare: bool = option(
        False, "also train with jac.gamma = 0, and report both models side by side"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compare:
            require(self.jac.gamma > 0, "jac.gamma", "above 0 for --compare", self.jac.gamma)


ConfigT = TypeVar("ConfigT", bound=Config)


def variants(config: ConfigT) -> dict[str, ConfigT]:
    """The configuration of every model that a command trains, one after the other.

    Args:
      config: the whole configuration.

    Returns:
      Name -> configuration, the folder of that name as its workdir: "no_jr" and "jr" for a
      comparison, else "model" alone.

    Example:
      >>> list(variants(ComparedConfig()))
      ['model']
    """
    if not getattr(config, "compare", False):
        return {"model": in_folder(config, "model")}
    plain = dataclasses.replace(config.jac, gamma=0.0, increment=0.0, warmup_gamma=0.0)
    return {
        name: in_folder(config, name, jac=jac, compare=False)
        for name, jac in (("no_jr", plain), ("jr", config.jac))
    }


def in_runs(**presets: ConfigT) -> dict[str, ConfigT]:
    """Gives every preset a workdir of its own.

    Args:
      **presets: name -> configuration.

    Returns:
      The same, with the workdirs runs/NAME.

    Example:
      >>> in_runs(small=Config())["small"].workdir
      'runs/small'
    """
    return {n: dataclasses.replace(part, workdir=f"runs/{n}") for n, part in presets.items()}


def in_folder(config: ConfigT, name: str, **changes: object) -> ConfigT:
    """A configuration for one of several models.

    Args:
      config: the whole configuration.
      name: of the model's folder in the workdir.
      **changes: other values.

    Returns:
      The configuration, that folder as its workdir.

    Example:
      >>> Path(in_folder(Config(workdir="runs/a"), "jr").workdir).parts[-2:]
      ('a', 'jr')
    """
    folder = folders.parse(config.workdir)
    return dataclasses.replace(config, workdir=str(folder / name), **changes)
