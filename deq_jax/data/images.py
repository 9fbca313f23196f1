"""Image sets as random-access sources, and what is done to an image on its way into a batch."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from deq_jax.data.records import CorruptRecord, Record
from deq_jax.errors import UsageError

_SPLIT = re.compile(r"(train|test)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")


@dataclasses.dataclass(frozen=True, eq=False)
class InMemory:
    """A small image set held in memory; a `tfds.data_source` serves the same way.

    Attributes:
      images: uint8 or float [N, H, W, C].
      labels: int32 [N], or a class for every pixel, integers [N, H, W].
      name: of the set, for messages.
      unreadable: place of a record that could not be read -> that in words; reading it raises
        `CorruptRecord`.  Its image and label hold nothing of worth.
      reported: places of the corrupt records that were reported on stderr.

    Example:
      >>> InMemory(np.zeros((3, 8, 8, 1)), np.arange(3, dtype=np.int32))[1]["label"]
      np.int32(1)
    """

    images: np.ndarray
    labels: np.ndarray
    name: str = ""
    unreadable: Mapping[int, str] = dataclasses.field(default_factory=dict)
    reported: set[int] = dataclasses.field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        """Refuses images and labels that do not belong together."""
        images = self.images.shape
        if len(images) != 4 or self.labels.shape not in (images[:1], images[:3]):
            raise ValueError(
                f"got images {images} and labels {self.labels.shape}; wanted [N, H, W, C] and [N], "
                "or [N, H, W] for a class of every pixel"
            )

    def __len__(self) -> int:
        """N."""
        return len(self.labels)

    def __getitem__(self, index: int) -> Record:
        """{"image": [H, W, C], "label": int32 or [H, W]}."""
        if index in self.unreadable:
            raise CorruptRecord(self.unreadable[index])
        return {"image": self.images[index], "label": self.labels[index]}


def digits(split: str) -> InMemory:
    """scikit-learn's bundled scans of handwritten digits: 1,797 images of 8 x 8, values 0 to 16.

    Every fifth image is a test image: 360 to test, 1,437 to train.

    Args:
      split: "train" or "test", or a part of it as TFDS writes it: "train[:1000]", "train[80%:]".

    Returns:
      images uint8 [N, 8, 8, 1], labels 0 to 9.

    Raises:
      UsageError: another split, or an empty part.

    Example:
      >>> len(digits("test")), len(digits("train[80%:]"))
      (360, 287)

    Reference: Alpaydin & Kaynak, Optical Recognition of Handwritten Digits, UCI repository, 1998.
    """
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    found = _SPLIT.fullmatch(split)
    places = np.arange(len(bunch.target))
    if found:
        places = places[(places % 5 == 0) == (found[1] == "test")]
        places = places[slice(*(_bound(text, len(places)) for text in found.groups()[1:]))]
    if not found or not places.size:
        raise UsageError(
            f'digits: got split={split!r}; wanted "train", "test", or a part of one: "train[:80%]"'
        )
    images = bunch.images[places].astype(np.uint8)[..., None]
    return InMemory(images, bunch.target[places].astype(np.int32), f"digits/{split}")


def _bound(text: str | None, length: int) -> int | None:
    """A place in a split: a number, or a share of its length."""
    if text is None:
        return None
    return round(int(text[:-1]) / 100 * length) if text.endswith("%") else int(text)


@dataclasses.dataclass(frozen=True)
class Standardize:
    """Subtracts a mean and divides by a standard deviation, channel by channel.

    ``image = (image - mean) / std``

    Attributes:
      mean: one number per channel, in the units of the source.
      std: likewise, above 0.

    Example:
      >>> Standardize((8.0,), (4.0,))({"image": np.full((1, 1, 1), 16), "label": 3})["image"].item()
      2.0
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuses statistics that do not fit each other."""
        if len(self.mean) != len(self.std) or min(self.std, default=0) <= 0:
            raise ValueError(
                f"got mean={self.mean}, std={self.std}; wanted as many of each, every std above 0"
            )

    @classmethod
    def of(cls, source: InMemory) -> Standardize:
        """The statistics of a set, over examples and positions.

        Args:
          source: the training set; what could not be read is left out.

        Returns:
          What brings it to mean 0 and variance 1 per channel.
        """
        images = np.delete(source.images, list(source.unreadable), axis=0).astype(np.float64)
        mean, std = images.mean(axis=(0, 1, 2)), images.std(axis=(0, 1, 2))
        return cls(tuple(mean.tolist()), tuple(std.tolist()))

    def __call__(self, record: Record) -> Record:
        """Image of any dtype [H, W, C] -> float32 [H, W, C]; the label becomes int32."""
        image = np.array(record["image"], np.float32, order="C")
        height, width, channels = image.shape
        if channels != len(self.mean):
            raise ValueError(
                f"got an image of {channels} channels; wanted {len(self.mean)}, as many as there "
                "are means"
            )
        # In place and whole rows at a time: the run of the channels is too short to be fast.
        rows = image.reshape(height, width * channels)
        rows -= _row(self.mean, width)
        rows /= _row(self.std, width)
        return {"image": image, "label": np.asarray(record["label"], np.int32)}


@functools.lru_cache
def _row(values: tuple[float, ...], width: int) -> np.ndarray:
    """One number per channel, repeated over a row of an image."""
    row = np.tile(np.asarray(values, np.float32), width)
    row.setflags(write=False)
    return row


def _of_255(mean: tuple[float, ...], std: tuple[float, ...]) -> Standardize:
    return Standardize(tuple(255 * m for m in mean), tuple(255 * s for s in std))


CIFAR = _of_255((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
"""Statistics of CIFAR-10's 8-bit images, as the published settings have them."""

IMAGENET = _of_255((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Statistics of ImageNet's 8-bit images, as the published settings have them."""


@dataclasses.dataclass(frozen=True)
class RandomShift:
    """Moves an image by up to ``pixels`` in each direction; the edge is repeated into the gap.

    Attributes:
      pixels: largest shift, at least 0.

    Example:
      >>> shift = RandomShift(1)
      >>> record = {"image": np.zeros((8, 8, 1), np.float32), "label": np.int32(3)}
      >>> shift(record, np.random.default_rng(0))["image"].shape
      (8, 8, 1)
    """

    pixels: int

    def __post_init__(self) -> None:
        """Refuses a negative shift."""
        if self.pixels < 0:
            raise ValueError(f"got pixels={self.pixels}; wanted at least 0")

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        """Returns the record with its image moved."""
        n = self.pixels
        height, width = record["image"].shape[:2]
        down, right = rng.integers(2 * n + 1), rng.integers(2 * n + 1)
        rows = np.clip(np.arange(height) + (down - n), 0, height - 1)
        columns = np.clip(np.arange(width) + (right - n), 0, width - 1)
        return {**record, "image": record["image"][rows[:, None], columns]}
