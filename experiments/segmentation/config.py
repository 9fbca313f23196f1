"""What can be set in segmentation; the presets are in `presets.py`."""

from __future__ import annotations

import dataclasses
from typing import Literal

from deq_jax.training import option, require
from experiments.common import mdeq
from experiments.common.compare import ComparedConfig
from experiments.common.image_data import ImageDataConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(mdeq.TrunkConfig):
    """A multiscale DEQ with a segmentation head."""

    classes: int = option(11, "number of classes")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.classes >= 2, "classes", "at least 2", self.classes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(ImageDataConfig):
    """The set of labelled images and what is done to them."""

    name: Literal["camvid", "cityscapes"] = option("camvid", "the set")
    crop: tuple[int, ...] = option((128, 192), "height and width of the training crops")
    scale_low: float = option(0.5, "smallest random scale before the crop")
    scale_high: float = option(2.0, "largest random scale before the crop")
    class_weights: Literal["none", "published", "frequency"] = option(
        "frequency",
        "weights of the classes in the loss: none; those published for the set; larger for rare "
        "classes, from their frequencies in the training split",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentationConfig(ComparedConfig):
    """The whole configuration."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    drawn: int = option(4, "evaluation images in predictions.png", may_change=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        height, width = self.data.crop
        mdeq.check_size(self.model, height, width)
        require(self.drawn >= 1, "drawn", "at least 1", self.drawn)
