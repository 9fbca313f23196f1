"""Settings of labelled images, which experiments share."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from deq_jax.training import option, require


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

    @property
    def reading(self) -> dict[str, Any]:
        """How `run.open_batches` reads."""
        return {
            "eval_batch": self.eval_batch_size,
            "workers": self.workers,
            "on_corrupt": self.on_corrupt,
        }
