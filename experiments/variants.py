"""A command's models: the configured one, and one without a penalty beside it where that is asked.

Every model trains in a folder of its own, from the same data in the same order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from jax.sharding import Mesh

from deq_jax.training import (
    Config,
    EvalData,
    JacConfig,
    Task,
    folders,
    option,
    require,
    train,
    workdir,
)
from deq_jax.training.metrics import compute
from experiments.report import Trained


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


ConfigT = TypeVar("ConfigT", bound=ComparedConfig)


def variants(config: ComparedConfig) -> dict[str, JacConfig]:
    """Which models a command trains, one after the other.

    Args:
      config: jac and compare are read.

    Returns:
      Name of the model's folder -> its penalty: "no_jr" and "jr", or "model" alone.

    Example:
      >>> list(variants(ComparedConfig()))
      ['model']
    """
    if not config.compare:
        return {"model": config.jac}
    plain = dataclasses.replace(config.jac, gamma=0.0, increment=0.0, warmup_gamma=0.0)
    return {"no_jr": plain, "jr": config.jac}


def parts(config: ConfigT) -> dict[str, ConfigT]:
    """The configuration of every model that a command trains.

    Args:
      config: the whole configuration.

    Returns:
      Name of the model's folder -> its configuration, that folder as its workdir.

    Example:
      >>> [Path(part.workdir).name for part in parts(ComparedConfig()).values()]
      ['model']
    """
    folder = folders.parse(config.workdir)
    return {
        name: dataclasses.replace(config, workdir=str(folder / name), jac=jac, compare=False)
        for name, jac in variants(config).items()
    }


def train_all(
    config: ConfigT,
    make_task: Callable[[ConfigT], Task],
    train_data: Any,
    eval_data: EvalData,
    mesh: Mesh,
) -> tuple[Path, dict[str, Trained]]:
    """Trains a command's models, or resumes them.

    Args:
      config: the whole configuration.
      make_task: builds a task; its method `summarize`, if it has one, makes numbers of the sums.
      train_data: endless batches; every model begins where they stand.
      eval_data: one pass over the evaluation set.
      mesh: the devices.

    Returns:
      The workdir, and name of a model -> what its training left.
    """
    start, trained = train_data.get_state(), {}
    with workdir.claimed(config) as folder:
        for name, part in parts(config).items():
            task = make_task(part)
            train_data.set_state(start)
            summarize = getattr(task, "summarize", compute)
            result = train(task, part, train_data, eval_data, mesh=mesh, summarize=summarize)
            trained[name] = Trained(task, result)
        return folder, trained
