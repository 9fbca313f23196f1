"""Labelled images of an experiment: settings, and batches for this process."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax

from deq_jax.data import pipeline
from deq_jax.data.records import Augment, Source, Transform
from deq_jax.training import distributed, option, require
from experiments.common.run import Data


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageDataConfig:
    """How a set of labelled images is read; an experiment inherits and adds its own."""

    dir: str = option(
        "", "folder of TFDS sets; empty for TFDS' own default (~/tensorflow_datasets)",
        may_change=True,
    )  # fmt: skip
    train_split: str = option("train", "split to train on, as TFDS writes it: train[:90%]")
    eval_split: str = option("test", "split to evaluate on; test[:100] for a quick look")
    in_memory: bool = option(
        True, "decode the whole set once, for sets of one image size", may_change=True
    )
    workers: int = option(
        0, "processes that decode and augment, for sets not in memory", may_change=True
    )
    on_corrupt: Literal["stop", "skip"] = option(
        "stop",
        "a record that cannot be read: stop with its name; or skip, which tells of it, trains on "
        "another one instead and evaluates without it",
        may_change=True,
    )
    eval_batch_size: int = option(8, "examples in an evaluation batch, over all devices")

    def __post_init__(self) -> None:
        require(self.workers >= 0, "workers", "at least 0", self.workers)
        require(self.eval_batch_size >= 1, "eval_batch_size", "at least 1", self.eval_batch_size)


def open_images(
    config: Any,
    train: Source,
    test: Source,
    *,
    transform: Transform,
    augment: Augment | None,
    eval_transform: Transform | None = None,
) -> Data:
    """Batches of a set.

    Args:
      config: train and data, an `ImageDataConfig`, are read.
      train: training examples.
      test: evaluation examples.
      transform: of every example.
      augment: random change of a training example.
      eval_transform: of evaluation examples, if another one.

    Returns:
      The batches.

    Raises:
      UsageError: a batch does not divide by the processes.
    """
    data, shard = config.data, (jax.process_index(), jax.process_count())
    size = distributed.per_process("train.batch_size", config.train.batch_size)
    eval_size = distributed.per_process("data.eval_batch_size", data.eval_batch_size)
    common: Any = {"shard": shard, "on_corrupt": data.on_corrupt}
    batches = pipeline.train_iterator(
        train,
        batch_size=size,
        seed=config.train.seed,
        transform=transform,
        augment=augment,
        workers=data.workers,
        **common,
    )
    one_pass = functools.partial(
        pipeline.eval_batches,
        test,
        batch_size=eval_size,
        transform=eval_transform or transform,
        threads=data.workers,
        **common,
    )
    return Data(batches, one_pass)
