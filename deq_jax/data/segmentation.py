"""Labelled images: classes and colours of the sets, random scales and crops of both at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from deq_jax.data.augment import resize
from deq_jax.data.records import OnCorrupt, Reader, Record, Source, Unreadable, fetch

IGNORE = 255
"""Label of a pixel that counts for nothing."""


@dataclasses.dataclass(frozen=True, eq=False)
class Classes:
    """What the pixels of a set may be.

    Attributes:
      names: of the classes.
      palette: uint8 [classes, 3], the colours by which they are drawn.
      ids: label in the set -> class; every other label becomes ``IGNORE``.
      weights: of the classes in the published loss, float32 [classes], or None.

    Example:
      >>> len(CAMVID.names), CAMVID.palette.shape
      (11, (11, 3))
    """

    names: tuple[str, ...]
    palette: np.ndarray
    ids: dict[int, int]
    weights: np.ndarray | None = None

    def table(self) -> np.ndarray:
        """The 256 classes of the 256 possible labels, uint8."""
        table = np.full(256, IGNORE, np.uint8)
        for label, number in self.ids.items():
            table[label] = number
        return table


def _classes(rows: list[tuple[str, tuple[int, int, int], int, float | None]]) -> Classes:
    names, colours, labels, weights = zip(*rows, strict=True)
    return Classes(
        names=names,
        palette=np.asarray(colours, np.uint8),
        ids={label: number for number, label in enumerate(labels)},
        weights=None if None in weights else np.asarray(weights, np.float32),
    )


CITYSCAPES = _classes(
    [
        # name, colour, label id in the files, weight in the published loss
        ("road", (128, 64, 128), 7, 0.8373),
        ("sidewalk", (244, 35, 232), 8, 0.918),
        ("building", (70, 70, 70), 11, 0.866),
        ("wall", (102, 102, 156), 12, 1.0345),
        ("fence", (190, 153, 153), 13, 1.0166),
        ("pole", (153, 153, 153), 17, 0.9969),
        ("traffic light", (250, 170, 30), 19, 0.9754),
        ("traffic sign", (220, 220, 0), 20, 1.0489),
        ("vegetation", (107, 142, 35), 21, 0.8786),
        ("terrain", (152, 251, 152), 22, 1.0023),
        ("sky", (70, 130, 180), 23, 0.9539),
        ("person", (220, 20, 60), 24, 0.9843),
        ("rider", (255, 0, 0), 25, 1.1116),
        ("car", (0, 0, 142), 26, 0.9037),
        ("truck", (0, 0, 70), 27, 1.0865),
        ("bus", (0, 60, 100), 28, 1.0955),
        ("train", (0, 80, 100), 31, 1.0865),
        ("motorcycle", (0, 0, 230), 32, 1.1529),
        ("bicycle", (119, 11, 32), 33, 1.0507),
    ]
)
"""The 19 classes that Cityscapes evaluates, from the label ids 0 to 33 of its files."""

CAMVID = _classes(
    [
        ("sky", (128, 128, 128), 0, None),
        ("building", (128, 0, 0), 1, None),
        ("pole", (192, 192, 128), 2, None),
        ("road", (128, 64, 128), 3, None),
        ("pavement", (60, 40, 222), 4, None),
        ("tree", (128, 128, 0), 5, None),
        ("sign", (192, 128, 128), 6, None),
        ("fence", (64, 64, 128), 7, None),
        ("car", (64, 0, 128), 8, None),
        ("pedestrian", (64, 64, 0), 9, None),
        ("bicyclist", (0, 128, 192), 10, None),
    ]
)
"""The 11 classes of CamVid that are commonly evaluated; label 11 is everything else."""


@dataclasses.dataclass(frozen=True, eq=False)
class Labelled:
    """A source whose label maps hold the numbers of classes.

    Attributes:
      source: examples with "image" [H, W, 3] and "label" [H, W] or [H, W, 1], uint8.
      classes: of the set.

    Example:
      >>> record = {"image": np.zeros((1, 2, 3)), "label": np.array([[7, 0]], np.uint8)}
      >>> Labelled([record], CITYSCAPES)[0]["label"].tolist()
      [[0, 255]]
    """

    source: Source
    classes: Classes

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        """One example, its label uint8 [H, W] with ``IGNORE`` where no class is."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Record]:
        """Several examples, likewise."""
        table, records = self.classes.table(), []
        for record in fetch(self.source, indices):
            label = np.asarray(record["label"])
            label = label[..., 0] if label.ndim == 3 else label
            records.append({"image": record["image"], "label": table[label]})
        return records


def class_weights(source: Source, classes: int, on_corrupt: OnCorrupt = "stop") -> np.ndarray:
    """Weights that lift rare classes, from the frequencies of a set.

    w_c = 1 / log(1.02 + p_c), scaled to mean 1

    with p_c the share of class c among all pixels that have one.

    Args:
      source: examples with "label" [H, W].
      classes: number of classes.
      on_corrupt: "stop" raises `CorruptRecord` for a record that cannot be read, "skip" tells of
        it and leaves it out.

    Returns:
      float32 [classes].

    Raises:
      CorruptRecord: a record cannot be read.
      ValueError: no pixel has a class.

    Example:
      >>> labels = np.array([[0, 0, 0, 1, IGNORE]])
      >>> print(class_weights([{"label": labels}], 2).round(2))
      [0.59 1.41]

    Reference: Paszke et al., ENet, arXiv 1606.02147, section 5.2.
    """
    counts = np.zeros(classes, np.int64)
    reader = Reader(source, on_corrupt=on_corrupt)
    for record in map(reader.one, range(len(source))):
        if isinstance(record, Unreadable):
            continue
        label = np.asarray(record["label"]).ravel()
        counts += np.bincount(label[label < classes], minlength=classes)
    if not counts.any():
        raise ValueError(f"got no pixel of the {classes} classes; wanted labels below {classes}")
    weights = 1 / np.log(1.02 + counts / counts.sum())
    return (weights / weights.mean()).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class RandomScaleCropFlip:
    """Scales image and label by one random factor, crops both at one random place, mirrors both.

    Where the scaled image is smaller than the crop it is filled up with a colour and ``IGNORE``.

    Attributes:
      height: of the crop.
      width: of the crop.
      low: smallest scale; the factor is uniform between both.
      high: largest scale.
      fill: colour of the filling; the mean colour becomes 0 when it is standardised.

    Example:
      >>> record = {"image": np.zeros((8, 9, 3), np.uint8), "label": np.zeros((8, 9), np.uint8)}
      >>> RandomScaleCropFlip(6, 6)(record, np.random.default_rng(0))["label"].shape
      (6, 6)
    """

    height: int
    width: int
    low: float = 0.5
    high: float = 2.0
    fill: tuple[int, int, int] = (124, 116, 104)

    def __post_init__(self) -> None:
        """Refuses sizes and scales that are none."""
        if min(self.height, self.width) < 1 or not 0 < self.low <= self.high:
            raise ValueError(
                f"got a crop of {self.height} x {self.width} and scales {self.low} to {self.high}; "
                "wanted at least 1 x 1, and scales above 0, the smaller one first"
            )

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        """Image uint8 [H, W, 3] and label uint8 [H, W] -> both of the crop's size."""
        scale = rng.uniform(self.low, self.high)
        height, width = (max(round(scale * n), 1) for n in record["label"].shape)
        # The crop is placed first and only its part is resized: at most one crop of work.
        top, rows, out_top = _place(height, self.height, rng)
        left, columns, out_left = _place(width, self.width, rng)
        box = (left / scale, top / scale, (left + columns) / scale, (top + rows) / scale)
        box = _inside(box, record["label"].shape)
        image = np.empty((self.height, self.width, 3), np.uint8)
        image[:] = np.asarray(self.fill, np.uint8)
        label = np.full((self.height, self.width), IGNORE, np.uint8)
        inner = slice(out_top, out_top + rows), slice(out_left, out_left + columns)
        image[inner] = resize(record["image"], (rows, columns), box)
        label[inner] = _nearest(record["label"], (rows, columns), box)
        if rng.random() < 0.5:
            image, label = image[:, ::-1], label[:, ::-1]
        return {"image": image, "label": label}


def _place(size: int, crop: int, rng: np.random.Generator) -> tuple[int, int, int]:
    """Where the crop starts in the image, how long it is there, where that part goes in it."""
    spare = size - crop
    offset = int(rng.integers(abs(spare) + 1))
    return (offset, crop, 0) if spare >= 0 else (0, size, offset)


def _inside(
    box: tuple[float, float, float, float], shape: tuple[int, int]
) -> tuple[float, float, float, float]:
    """Rounding of the scaled size may lead out of the image by a part of a pixel."""
    left, top, right, bottom = box
    return max(left, 0), max(top, 0), min(right, shape[1]), min(bottom, shape[0])


def _nearest(
    label: np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float]
) -> np.ndarray:
    """The label under the centre of every new pixel."""
    left, top, right, bottom = box
    rows = top + (np.arange(size[0]) + 0.5) * ((bottom - top) / size[0])
    columns = left + (np.arange(size[1]) + 0.5) * ((right - left) / size[1])
    rows = np.minimum(rows.astype(int), label.shape[0] - 1)
    columns = np.minimum(columns.astype(int), label.shape[1] - 1)
    return label[rows[:, None], columns[None]]
