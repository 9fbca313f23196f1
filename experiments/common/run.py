"""The command of an experiment: a dry run, a diagnosis, or training and report."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from deq_jax.data import pipeline
from deq_jax.data.records import Augment, OnCorrupt, Source, Transform
from deq_jax.training import Config, DataIterator, EvalData, Task, distributed, train, workdir
from deq_jax.training.parallel import make_mesh
from experiments.common import compare, diagnose, dry_run, reporting
from experiments.common.reporting import Trained


@dataclasses.dataclass(frozen=True)
class Data:
    """What an experiment trains on: endless batches, and one pass over the evaluation set."""

    train: DataIterator
    eval: EvalData


def open_batches(
    config: Config,
    train: Source,
    test: Source,
    *,
    eval_batch: int,
    transform: Transform | None = None,
    augment: Augment | None = None,
    eval_transform: Transform | None = None,
    workers: int = 0,
    on_corrupt: OnCorrupt = "stop",
) -> Data:
    """Cuts two sets of examples into batches for this process.

    Args:
      config: train is read.
      train: training examples.
      test: evaluation examples.
      eval_batch: examples in an evaluation batch, over all processes.
      transform: of every example.
      augment: random change of a training example.
      eval_transform: of evaluation examples, if another one.
      workers: processes that read training examples, and threads that read the others.
      on_corrupt: see `pipeline.train_iterator`.

    Returns:
      The batches.

    Raises:
      UsageError: a batch does not divide by the processes.
    """
    common: Any = {
        "shard": (jax.process_index(), jax.process_count()),
        "on_corrupt": on_corrupt,
    }
    batches = pipeline.train_iterator(
        train,
        batch_size=distributed.per_process("train.batch_size", config.train.batch_size),
        seed=config.train.seed,
        transform=transform,
        augment=augment,
        workers=workers,
        **common,
    )
    one_pass = functools.partial(
        pipeline.eval_batches,
        test,
        batch_size=distributed.per_process("the evaluation batch", eval_batch),
        transform=eval_transform or transform,
        threads=workers,
        **common,
    )
    return Data(batches, one_pass)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """What is particular to an experiment.

    Attributes:
      open_data: ``config -> data``, a `Data` or another object with its fields; it says in one
        sentence what is missing.
      build_task: ``(config, mesh, data) -> Task``; data is None in a dry run.
      write_report: ``(folder, config, {name: Trained}, data, mesh) -> text``; writes tables and
        pictures.
      variants: ``config -> {name: config}``, the models that a command trains; each name is a
        folder in the workdir.
    """

    open_data: Callable[[Any], Any]
    build_task: Callable[[Any, Mesh, Any], Task]
    write_report: Callable[[Path, Any, Mapping[str, Trained], Any, Mesh], str]
    variants: Callable[[Any], Mapping[str, Any]] = compare.variants

    def run(self, config: Any, **seams: Any) -> dict[str, Trained]:
        """Runs the experiment; the models train one after the other, from the same data.

        Args:
          config: the whole configuration.
          **seams: optimizer, writers and callbacks of `deq_jax.training.train`.

        Returns:
          Name -> trained model; {} after a dry run or a diagnosis.

        Example:
          >>> EXPERIMENT.run(PRESETS["digits"], writers=[Wandb()])  # doctest: +SKIP
        """
        mesh, parts = make_mesh(), self.variants(config)
        if config.dry_run:
            reporting.show(dry_run.run(parts, lambda c: self.build_task(c, mesh, None), mesh))
            return {}
        data = self.open_data(config)  # before anything is written: it may be missing

        def build(part: Any) -> Task:
            return self.build_task(part, mesh, data)

        if config.diagnose:
            reporting.show(diagnose.run(parts, build, data.train, mesh))
            return {}
        start, trained = data.train.get_state(), {}
        with workdir.claimed(config) as folder:
            for name, part in parts.items():
                task = build(part)
                data.train.set_state(start)
                result = train(task, part, data.train, data.eval, mesh=mesh, **seams)
                trained[name] = Trained(part, task, result)
            reporting.show(self.write_report(folder, config, trained, data, mesh))
        return trained
