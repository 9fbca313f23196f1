"""Random and fixed changes of image size and place, on 8-bit images before they are standardised.

Random ones are called with the record and a numpy generator, from which all their chance comes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from deq_jax.data.records import Augment, Record, Transform


@dataclasses.dataclass(frozen=True)
class PadCrop:
    """Pads with black and crops to the old size at a random place.

    Attributes:
      pixels: of padding on each side, at least 0.

    Example:
      >>> record = {"image": np.ones((8, 8, 3), np.uint8)}
      >>> PadCrop(4)(record, np.random.default_rng(0))["image"].shape
      (8, 8, 3)
    """

    pixels: int = 4

    def __post_init__(self) -> None:
        """Refuses negative padding."""
        if self.pixels < 0:
            raise ValueError(f"got pixels={self.pixels}; wanted at least 0")

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        """Returns the record with its image [H, W, C] moved."""
        image, n = record["image"], self.pixels
        height, width, channels = image.shape
        padded = np.zeros((height + 2 * n, width + 2 * n, channels), image.dtype)
        padded[n : n + height, n : n + width] = image
        # Two numbers, not an array of two: that takes three times as long.
        down, right = rng.integers(2 * n + 1), rng.integers(2 * n + 1)
        return {**record, "image": padded[down : down + height, right : right + width]}


@dataclasses.dataclass(frozen=True)
class RandomFlip:
    """Mirrors left and right with probability 1/2.

    Example:
      >>> record = {"image": np.arange(2)[None, :, None]}
      >>> RandomFlip()(record, np.random.default_rng(1))["image"].ravel().tolist()
      [0, 1]
    """

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        """Returns the record, its image [H, W, C] mirrored or not."""
        if rng.random() < 0.5:
            return {**record, "image": record["image"][:, ::-1]}
        return record


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
    """Cuts out a box of random area and shape and resizes it to a square.

    The area is uniform in ``scale`` times the image's, the logarithm of width / height uniform in
    ``ratio``'s; a box that does not fit is drawn again, ten times, then the largest central box of
    allowed shape is taken.

    Attributes:
      size: height and width of the result.
      scale: smallest and largest share of the area.
      ratio: smallest and largest width / height.

    Example:
      >>> record = {"image": np.zeros((50, 80, 3), np.uint8)}
      >>> RandomResizedCrop(32)(record, np.random.default_rng(0))["image"].shape
      (32, 32, 3)

    Reference: Szegedy et al., arXiv 1409.4842, section 6.
    """

    size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        """Refuses ranges that are none."""
        if self.size < 1 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(
                f"got size={self.size}, scale={self.scale}; wanted a size of at least 1 and shares "
                "in (0, 1], the smaller one first"
            )
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"got ratio={self.ratio}; wanted above 0, the smaller one first")

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        """Returns the record with an image uint8 [size, size, 3]."""
        image = as_colour(record["image"])
        box = self._box(image.shape[0], image.shape[1], rng)
        return {**record, "image": resize(image, (self.size, self.size), box)}

    def _box(
        self, height: int, width: int, rng: np.random.Generator
    ) -> tuple[float, float, float, float]:
        low, high = (math.log(r) for r in self.ratio)
        for _ in range(10):
            area = height * width * rng.uniform(*self.scale)
            shape = math.exp(rng.uniform(low, high))
            w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
            if 0 < w <= width and 0 < h <= height:
                top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
                return left, top, left + w, top + h
        shape = min(max(width / height, self.ratio[0]), self.ratio[1])
        w, h = min(width, round(height * shape)), min(height, round(width / shape))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h


@dataclasses.dataclass(frozen=True)
class ResizeCrop:
    """Resizes the shorter side and cuts out the central square, for evaluation.

    Attributes:
      resize: length of the shorter side.
      crop: height and width of the result, at most ``resize``.

    Example:
      >>> ResizeCrop(36, 32)({"image": np.zeros((50, 80, 3), np.uint8)})["image"].shape
      (32, 32, 3)
    """

    resize: int = 256
    crop: int = 224

    def __post_init__(self) -> None:
        """Refuses a crop larger than the image."""
        if not 1 <= self.crop <= self.resize:
            raise ValueError(
                f"got resize={self.resize}, crop={self.crop}; wanted 1 <= crop <= resize"
            )

    def __call__(self, record: Record) -> Record:
        """Returns the record with an image uint8 [crop, crop, 3]."""
        image = as_colour(record["image"])
        height, width = image.shape[:2]
        factor = self.resize / min(height, width)
        height, width = round(height * factor), round(width * factor)
        image = resize(image, (height, width))
        top, left = (height - self.crop) // 2, (width - self.crop) // 2
        return {**record, "image": image[top : top + self.crop, left : left + self.crop]}


@dataclasses.dataclass(frozen=True)
class Chain:
    """Several random changes, one after the other.

    Attributes:
      steps: each called with the record and the generator.

    Example:
      >>> both = Chain((PadCrop(4), RandomFlip()))
      >>> both({"image": np.zeros((8, 8, 3))}, np.random.default_rng(0))["image"].shape
      (8, 8, 3)
    """

    steps: Sequence[Augment]

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        """Returns the record after all changes."""
        for step in self.steps:
            record = step(record, rng)
        return record


@dataclasses.dataclass(frozen=True)
class Then:
    """Several fixed changes, one after the other.

    Attributes:
      steps: each called with the record.

    Example:
      >>> Then((ResizeCrop(8, 8),))({"image": np.zeros((4, 4, 3), np.uint8)})["image"].shape
      (8, 8, 3)
    """

    steps: Sequence[Transform]

    def __call__(self, record: Record) -> Record:
        """Returns the record after all changes."""
        for step in self.steps:
            record = step(record)
        return record


def as_colour(image: np.ndarray) -> np.ndarray:
    """Gives a grey image three channels.

    Args:
      image: [H, W, 1] or [H, W, 3].

    Returns:
      [H, W, 3].

    Example:
      >>> as_colour(np.zeros((2, 2, 1))).shape
      (2, 2, 3)
    """
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image


def resize(image: np.ndarray, size: tuple[int, int], box: Any = None) -> np.ndarray:
    """Resizes with bilinear weights, smoothed when it shrinks.

    Args:
      image: uint8 [H, W, 3].
      size: height and width wanted.
      box: (left, top, right, bottom) of the part to take; None for all.

    Returns:
      uint8 [*size, 3].

    Example:
      >>> resize(np.full((4, 4, 3), 7, np.uint8), (2, 2)).max()
      np.uint8(7)
    """
    from PIL import Image

    wanted = (size[1], size[0])
    picture = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(picture.resize(wanted, Image.Resampling.BILINEAR, box=box))
