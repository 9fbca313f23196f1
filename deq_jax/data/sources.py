"""Opening prepared TFDS folders, and holding small sets in memory."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deq_jax import folders
from deq_jax.data.images import InMemory
from deq_jax.data.records import (
    OnCorrupt,
    Reader,
    Record,
    Source,
    Unreadable,
    fetch,
    name_of,
)
from deq_jax.errors import UsageError

CHUNK = 256
"""Examples read at once: one call for each record would take most of the time of decoding."""


class MissingData(FileNotFoundError):
    """A data set is not where it was looked for; the message says how to prepare it."""


def open_tfds(name: str, split: str, data_dir: str = "") -> Any:
    """Opens a prepared TFDS set in ArrayRecord format, without TensorFlow; nothing is downloaded.

    Args:
      name: of the set, with a version or configuration if wanted: "cifar10:3.0.2",
        "cityscapes/semantic_segmentation".
      split: as TFDS writes it, "train", "test[:1000]".
      data_dir: folder of TFDS sets; empty for TFDS' own default,
        ``$TFDS_DATA_DIR`` or ``~/tensorflow_datasets``.

    Returns:
      A ``tfds`` data source: random access to dicts of numbers, arrays and bytes.

    Raises:
      MissingData: the set is not there, or not in ArrayRecord format, or the package is not
        installed; the message has the command.
      UsageError: the set has no such split.

    Example:
      >>> train = open_tfds("cifar10", "train", "~/data")  # doctest: +SKIP
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise MissingData(
            f"the data set {name} needs the package tensorflow-datasets, which is not installed: "
            "pip install tensorflow-datasets array_record, or deq_jax with its extra data"
        ) from None
    default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    folder = local_folder(data_dir or default)
    command = f"tfds build {name} --file_format=array_record --data_dir={folder}"
    how = f"prepare it once, with TensorFlow installed: {command}"
    try:
        builder: Any = tfds.builder(name, data_dir=str(folder), try_gcs=False)
        prepared = builder.is_prepared()
    except Exception:  # TFDS raises kinds of its own, or a missing package of the set's builder
        raise MissingData(f"no data set {name} in {folder}; {how}") from None
    if not prepared:
        raise MissingData(f"the data set {name} is not prepared in {folder}; {how}")
    if builder.info.file_format.value != "array_record":
        raise MissingData(
            f"the data set {name} in {folder} is stored as {builder.info.file_format.value}, which "
            f"needs TensorFlow to read; {how}"
        )
    known = list(builder.info.splits)
    try:
        source = builder.as_data_source(split=split)
        len(source)  # negative where a slice ends before it begins
    except (ValueError, AssertionError) as error:  # AssertionError: bounds of a slice
        raise UsageError(
            f"got split {split!r} of {name}; wanted one of {known}, or a slice such as "
            f"{known[0]}[:90%]"
        ) from error
    return source


def local_folder(name: str) -> Path:
    """A folder of data that only local readers can open.

    Args:
      name: as the user writes it.

    Returns:
      The path.

    Raises:
      UsageError: it begins with gs:// or another scheme.

    Example:
      >>> local_folder("data/tfds").name
      'tfds'
    """
    folder = folders.parse(name)
    if not isinstance(folder, Path):
        raise UsageError(
            f"got the folder {name}; wanted a local one, since the files of this set are read "
            "where they are: mount the bucket (gcsfuse) or copy the set"
        )
    return folder


def num_classes(source: Any) -> int | None:
    """The number of classes of an opened set.

    Args:
      source: from `open_tfds`, or `open_hub`.

    Returns:
      What the set's description says of "label"; None if it says nothing.

    Example:
      >>> num_classes([]) is None
      True
    """
    info = getattr(source, "dataset_info", None)
    if info is None:
        return getattr(source, "num_classes", None)
    if "label" not in info.features:
        return None
    return getattr(info.features["label"], "num_classes", None)


@dataclasses.dataclass(frozen=True, eq=False)
class Fields:
    """Some fields of a source, under other names; what a batch cannot hold stays behind.

    Attributes:
      source: the examples.
      names: new name -> name there.
      reported: places of the corrupt records that were reported on stderr.

    Example:
      >>> Fields([{"id": b"a", "digit": 3}], {"label": "digit"})[0]
      {'label': 3}
    """

    source: Source
    names: Mapping[str, str]
    reported: set[int] = dataclasses.field(default_factory=set, repr=False)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        """The chosen fields of one example."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Record]:
        """The chosen fields of several examples."""
        names = self.names.items()
        return [{new: r[old] for new, old in names} for r in fetch(self.source, indices)]


def in_memory(source: Source, on_corrupt: OnCorrupt = "stop") -> InMemory:
    """Decodes a whole set into memory, once.

    Args:
      source: examples with "image" [H, W, C] of one size, and "label": a number or [H, W].
      on_corrupt: what is done about a record that cannot be read: "stop" raises `CorruptRecord`,
        which names it; "skip" tells of it on stderr, and reading it from the result raises that.

    Returns:
      The set, its images in the source's dtype; every record at its place, readable or not.

    Raises:
      ValueError: images of different sizes, an empty source.
      CorruptRecord: see ``on_corrupt``; under "skip" if no record at all can be read.

    Example:
      >>> part = [{"image": np.zeros((2, 2, 1), np.uint8), "label": 1}] * 3
      >>> in_memory(part).images.shape
      (3, 2, 2, 1)
    """
    reader = Reader(source, on_corrupt=on_corrupt)
    first = reader.first()
    shape, labels = np.shape(first["image"]), np.shape(first["label"])
    images = np.zeros((len(source), *shape), np.asarray(first["image"]).dtype)
    kind = np.int32 if labels == () else np.asarray(first["label"]).dtype
    held = np.zeros((len(source), *labels), kind)
    unreadable = {}
    for start in range(0, len(source), CHUNK):
        places = range(start, min(start + CHUNK, len(source)))
        for i, record in zip(places, reader.many(places), strict=True):
            if isinstance(record, Unreadable):
                unreadable[i] = record.what
                continue
            if np.shape(record["image"]) != shape:
                raise ValueError(
                    f"got images of {shape} and of {np.shape(record['image'])}; wanted one size: "
                    "use the set without in_memory, with an augmentation that resizes"
                )
            images[i], held[i] = record["image"], record["label"]
    return InMemory(images, held, name_of(source), unreadable, set(unreadable))
