"""What can be set in image classification; the presets are in `presets.py`."""

from __future__ import annotations

import dataclasses
from typing import Literal

from deq_jax.training import option, require
from experiments.common import mdeq
from experiments.common.compare import ComparedConfig
from experiments.common.image_data import ImageDataConfig

HUB = "hf:"
"""How the name of a set begins that is a `datasets.Dataset`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(mdeq.TrunkConfig):
    """A multiscale DEQ with a classification head, or the explicit network it is compared with."""

    name: Literal["mdeq", "resnet18", "resnet50", "resnet101"] = option(
        "mdeq",
        "the network; a resnet reads classes, momentum, width and downsample only: 0 for the CIFAR "
        "stem, 2 for the ImageNet one",
    )
    width: int = option(
        64, "channels of a resnet's first stage; each later stage has twice as many"
    )
    classes: int = option(10, "number of classes")
    head: tuple[int, ...] = option((8, 16), "widths of the head's bottlenecks, one for each branch")
    final: int = option(200, "channels before the final pooling")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.classes >= 2, "classes", "at least 2", self.classes)
        require(
            len(self.head) == len(self.channels) and min(self.head) >= 1,
            "head",
            f"one width for each of the {len(self.channels)} branches",
            self.head,
        )
        require(self.final >= 1, "final", "at least 1", self.final)
        if self.name == "mdeq":
            require(self.width == 64, "width", "64 for mdeq, which has channels", self.width)
        else:
            require(self.width >= 1, "width", "at least 1", self.width)
            require(self.init == "published", "init", "published for a resnet", self.init)
            require(self.downsample in (0, 2), "downsample", "0 or 2 for a resnet", self.downsample)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(ImageDataConfig):
    """The image set and what is done to its images."""

    name: str = option(
        "digits",
        "digits (scikit-learn's 8 x 8 scans), the name of a TFDS set, or hf:NAME: a folder of "
        "Dataset.save_to_disk, or a set in the cache of Hugging Face's datasets",
    )
    dir: str = option(
        "", "folder of TFDS sets, for hf:NAME of saved sets or of the cache; empty for the "
        "packages' own defaults (~/tensorflow_datasets, ~/.cache/huggingface)",
        may_change=True,
    )  # fmt: skip
    size: int = option(8, "height and width of the images that the model sees")
    colors: int = option(1, "channels of the images")
    augment: Literal["none", "shift", "crop_flip", "resized_crop"] = option(
        "none",
        "training images: as they are; moved by up to `shift` pixels; padded by `shift`, cropped "
        "and flipped (CIFAR); a resized random crop, flipped (ImageNet)",
    )
    shift: int = option(0, "pixels for shift and crop_flip")
    statistics: Literal["own", "cifar", "imagenet"] = option(
        "own", "mean and deviation of the colours: the training set's, CIFAR-10's or ImageNet's"
    )
    eval_batch_size: int = option(120, "examples in an evaluation batch, over all devices")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.name not in ("", HUB), "name", "the name of a set", self.name)
        require(self.shift >= 0, "shift", "at least 0", self.shift)
        for name in ("size", "colors"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        if self.statistics == "own":
            require(self.in_memory, "statistics", "cifar or imagenet without in_memory", "own")
        else:
            require(self.colors == 3, "colors", f"3 for {self.statistics} statistics", self.colors)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageConfig(ComparedConfig):
    """The whole configuration."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.name == "mdeq":
            mdeq.check_size(self.model, self.data.size, self.data.size)
        elif self.precision != "float32":
            raise ValueError(f"precision must be float32 without a solve, got {self.precision}")
        elif self.jac.gamma > 0 or self.jac.increment > 0 or self.jac.warmup_gamma > 0:
            raise ValueError(
                f"jac.gamma must be 0 for {self.model.name}, which has no equilibrium, got "
                f"{self.jac.gamma}"
            )
