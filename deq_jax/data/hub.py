"""Image sets in the format of the Hugging Face hub: a `datasets.Dataset` as a source.

They need neither TensorFlow nor a step that builds them.  Nothing is downloaded here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deq_jax import folders
from deq_jax.data.records import Record
from deq_jax.data.sources import MissingData, local_folder
from deq_jax.errors import UsageError

_MODES = ("RGB", "L", "I", "I;16", "F")
"""Modes of Pillow whose arrays are [H, W, 3] or [H, W]; images of others are converted."""


@dataclasses.dataclass(frozen=True, eq=False)
class HubImages:
    """Images and labels of a `datasets.Dataset`, random access.

    Attributes:
      dataset: with a column of type Image and one of class numbers.
      image: name of the column of images.
      label: name of the column of labels.
      num_classes: classes that the labels are of; None if the set does not say.
      name: of the set, for messages.
      reported: places of the corrupt records that were reported on stderr.

    Example:
      >>> import datasets
      >>> from PIL import Image
      >>> columns = {"img": [Image.new("RGB", (4, 2))], "label": [3]}
      >>> source = HubImages(datasets.Dataset.from_dict(columns), "img", "label")
      >>> source[0]["image"].shape, source[0]["label"]
      ((2, 4, 3), np.int32(3))
    """

    dataset: Any
    image: str
    label: str
    num_classes: int | None = None
    name: str = ""
    reported: set[int] = dataclasses.field(default_factory=set, repr=False)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Record:
        """{"image": uint8 [H, W, 3], or [H, W, 1] of its own dtype; "label": int32}."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Record]:
        """Several examples, likewise."""
        rows = self.dataset.__getitems__([int(index) for index in indices])
        return [
            {"image": _pixels(row[self.image]), "label": self._class(row[self.label])}
            for row in rows
        ]

    def _class(self, label: int | None) -> np.int32:
        """Refuses what stands for an unknown label, None and -1."""
        if label is None or label < 0 or (self.num_classes and label >= self.num_classes):
            last = "" if self.num_classes is None else f" to {self.num_classes - 1}"
            raise ValueError(f"got the label {label}; wanted a class, 0{last or ' or above'}")
        return np.int32(label)


def open_hub(name: str, split: str, data_dir: str = "") -> HubImages:
    """Opens an image set that `datasets` has stored on this machine.

    Args:
      name: a folder written by ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk``, or the
        name of a set in the cache of ``datasets.load_dataset``, "OWNER/NAME".
      split: "train", "train[:90%]", "train+test".  A folder of one Dataset without a split's name
        is the split "train".
      data_dir: where folder or cache is; empty for the current directory and the default cache.

    Returns:
      The images and labels.  Their columns are those of the types Image and ClassLabel.  Of
      several, the ones called image or img, label or labels are taken; a column of integers of such
      a name will do for labels.

    Raises:
      MissingData: the set is not there or cannot be opened, or ``datasets`` is not installed; the
        message has the command.
      UsageError: the set has no such split, or not these columns.

    Example:
      >>> import tempfile, datasets
      >>> from PIL import Image
      >>> columns = {"img": [Image.new("L", (4, 2))], "label": [3]}
      >>> folder = tempfile.mkdtemp()
      >>> datasets.Dataset.from_dict(columns).save_to_disk(f"{folder}/dots")
      >>> open_hub("dots", "train", folder)[0]["image"].shape
      (2, 4, 1)
    """
    datasets = _package(name)
    splits = _open(datasets, name, data_dir)
    image, label = _columns(datasets, next(iter(splits.values())).features, name)
    sizes = {key: len(part) for key, part in splits.items()}
    try:
        chosen = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        raise UsageError(
            f"got split {split!r} of {name}; wanted one of {list(sizes)}, or a slice such as "
            f"{next(iter(sizes))}[:90%]"
        ) from error
    parts = [splits[part.splitname].select(range(part.from_, part.to)) for part in chosen]
    dataset = datasets.concatenate_datasets(parts).with_format(None).select_columns([image, label])
    if not dataset.features[image].decode:
        dataset = dataset.cast_column(image, datasets.Image())
    classes = getattr(dataset.features[label], "num_classes", None)
    return HubImages(dataset, image, label, classes, f"hf:{name}/{split}")


def _open(datasets: Any, name: str, data_dir: str) -> Mapping[str, Any]:
    """The splits of a stored set, by name."""
    folder = local_folder(data_dir) / Path(name).expanduser()
    saved = any((folder / file).is_file() for file in ("state.json", "dataset_dict.json"))
    try:
        if saved:
            found = datasets.load_from_disk(str(folder))
        else:
            from datasets.packaged_modules.cache.cache import Cache

            cache = Cache(
                cache_dir=str(Path(data_dir).expanduser()) if data_dir else None,
                dataset_name=name.rsplit("/", 1)[-1],
                repo_id=name,
                version="auto",
                hash="auto",
            )
            found = cache.as_dataset()
    except Exception as error:  # of datasets, of Arrow, of the file system
        reason = folders.first_line(error)
        if saved:
            raise MissingData(
                f"the image set {name} in {folder} cannot be opened ({reason}); save it again by "
                "Dataset.save_to_disk"
            ) from error
        raise MissingData(
            f"no image set {name}: {folder} is no folder of Dataset.save_to_disk, and the cache of "
            f"datasets has none of this name ({reason}); store it once, with network access: "
            f"python -c \"import datasets; datasets.load_dataset('OWNER/NAME').save_to_disk("
            f"'{folder}')\""
        ) from error
    if isinstance(found, Mapping):
        return found
    return {str(found.split or "train"): found}


def _columns(datasets: Any, features: Mapping[str, Any], name: str) -> tuple[str, str]:
    """The names of the columns of images and of labels."""

    def of_type(kind: type) -> list[str]:
        return [key for key, feature in features.items() if isinstance(feature, kind)]

    def choose(found: list[str], names: tuple[str, ...]) -> str | None:
        """The only one, or the only one that is called so."""
        found = found if len(found) == 1 else [key for key in found if key in names]
        return found[0] if len(found) == 1 else None

    integers = [
        key for key in of_type(datasets.Value) if features[key].dtype.lstrip("u").startswith("int")
    ]
    labels = ("label", "labels")
    image = choose(of_type(datasets.Image), ("image", "img"))
    label = choose(of_type(datasets.ClassLabel), labels)
    label = label or choose([key for key in integers if key in labels], labels)
    if image is None or label is None:
        listed = ", ".join(f"{key} ({type(f).__name__})" for key, f in features.items())
        raise UsageError(
            f"got the columns {listed} in {name}; wanted one of type Image and one of type "
            "ClassLabel, or of several one called image and one called label: use "
            "Dataset.rename_column, cast_column or remove_columns, then save_to_disk"
        )
    return image, label


def _pixels(image: Any) -> np.ndarray:
    """A decoded image as an array with an axis of channels."""
    if image is None:
        raise ValueError("got no image; wanted one in every record")
    if image.mode not in _MODES:
        image = image.convert("L" if image.mode == "1" else "RGB")
    array = np.asarray(image)
    return array if array.ndim == 3 else array[..., None]


def _package(name: str) -> Any:
    """The package, imported where a set needs it."""
    try:
        import datasets
        import PIL.Image  # noqa: F401 - what images are decoded with
    except ImportError:
        raise MissingData(
            f"the image set hf:{name} needs the packages datasets and pillow, which are not "
            "installed: pip install datasets pillow, or deq_jax with its extra hub"
        ) from None
    return datasets
