"""What can be set in segmentation; the presets are in `presets.py`."""

from __future__ import annotations

import dataclasses
from typing import Literal

from deq_jax.training import option, require
from experiments import trunk
from experiments.variants import ComparedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(trunk.TrunkConfig):
    """A multiscale DEQ with a segmentation head."""

    classes: int = option(11, "number of classes")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.classes >= 2, "classes", "at least 2", self.classes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The set of labelled images and what is done to them."""

    name: Literal["camvid", "cityscapes"] = option("camvid", "the set")
    dir: str = option(
        "", "folder of TFDS sets; empty for TFDS' own default (~/tensorflow_datasets)",
        may_change=True,
    )  # fmt: skip
    train_split: str = option("train", "split to train on, as TFDS writes it: train[:90%]")
    eval_split: str = option("test", "split to evaluate on; test[:10] for a quick look")
    crop: tuple[int, ...] = option((128, 192), "height and width of the training crops")
    scale_low: float = option(0.5, "smallest random scale before the crop")
    scale_high: float = option(2.0, "largest random scale before the crop")
    class_weights: Literal["none", "published", "frequency"] = option(
        "frequency",
        "weights of the classes in the loss: none; those published for the set; larger for rare "
        "classes, from their frequencies in the training split",
    )
    in_memory: bool = option(True, "decode the whole set once", may_change=True)
    workers: int = option(0, "processes that decode and augment", may_change=True)
    on_corrupt: Literal["stop", "skip"] = option(
        "stop",
        "a record that cannot be read: stop with its name; or skip, which tells of it, trains on "
        "another one instead and evaluates without it",
        may_change=True,
    )
    eval_batch_size: int = option(8, "images in an evaluation batch, over all devices")

    def __post_init__(self) -> None:
        require(
            len(self.crop) == 2 and min(self.crop) >= 1,
            "crop",
            "a height and a width",
            self.crop,
        )
        require(self.scale_low > 0, "scale_low", "above 0", self.scale_low)
        require(
            self.scale_high >= self.scale_low,
            "scale_high",
            f"at least scale_low = {self.scale_low}",
            self.scale_high,
        )
        require(self.workers >= 0, "workers", "at least 0", self.workers)
        require(self.eval_batch_size >= 1, "eval_batch_size", "at least 1", self.eval_batch_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentationConfig(ComparedConfig):
    """The whole configuration."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    drawn: int = option(4, "evaluation images in predictions.png", may_change=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        height, width = self.data.crop
        trunk.check_size(self.model, height, width)
        require(self.drawn >= 1, "drawn", "at least 1", self.drawn)
