"""Opens the image set that a configuration names."""

from __future__ import annotations

from typing import Any

from deq_jax.data import augment, hub, images, pipeline, sources
from deq_jax.data.records import Reader
from deq_jax.training import UsageError
from experiments.common.run import Data, open_batches
from experiments.image_classification.config import HUB, DataConfig, ImageConfig

# Of the size that the model sees: ImageNet is evaluated on the centre of images of 256.
RESIZE = 256 / 224


def open_data(config: ImageConfig) -> Data:
    """Opens the image set.

    Args:
      config: model.classes, data and train are read.

    Returns:
      Its batches.

    Raises:
      MissingData: the set is not prepared, or its package is not installed.
      UsageError: it has no such split, or not the columns of an image set; its classes or images
        are not those of the model; a record cannot be read, which the batches also raise.
    """
    data = config.data
    train, test = (open_set(config, split) for split in (data.train_split, data.eval_split))
    standardize = {"cifar": images.CIFAR, "imagenet": images.IMAGENET}.get(data.statistics)
    if standardize is None:
        standardize = images.Standardize.of(train)
    resized = augment.ResizeCrop(round(RESIZE * data.size), data.size)
    fixed = augment.Then((resized, standardize)) if data.augment == "resized_crop" else standardize
    return open_batches(
        config,
        train,
        test,
        transform=standardize,
        augment=build_augment(data),
        eval_transform=fixed,
        **data.reading,
    )


def open_set(config: ImageConfig, split: str) -> Any:
    """Opens one split.

    Args:
      config: model.classes and data are read.
      split: its name.

    Returns:
      A source of {"image", "label"}.

    Raises:
      MissingData: the set is not prepared, or its package is not installed.
      UsageError: it has no such split, or not the columns of an image set; its classes or images
        are not those of the model.
      CorruptRecord: a record that is read here cannot be read.
    """
    data, classes = config.data, config.model.classes
    if data.name == "digits":
        found, source = 10, images.digits(split)
    else:
        found, source = _open_stored(data, split)
        source = sources.in_memory(source, data.on_corrupt) if data.in_memory else source
    if found not in (None, classes):
        raise UsageError(f"{data.name} has {found} classes; set model.classes, which is {classes}")
    shape = Reader(source, on_corrupt=data.on_corrupt).first()["image"].shape
    if data.augment != "resized_crop" and shape != (data.size, data.size, data.colors):
        raise UsageError(
            f"{data.name} has images of {shape}; set data.size and data.colors, which are "
            f"{data.size} and {data.colors}, or data.augment=resized_crop to resize them"
        )
    return source


def _open_stored(data: DataConfig, split: str) -> tuple[int | None, Any]:
    """The number of classes and the examples of a split on disk."""
    if data.name.startswith(HUB):
        source = hub.open_hub(data.name.removeprefix(HUB), split, data.dir)
        return source.num_classes, source
    opened = sources.open_tfds(data.name, split, data.dir)
    fields = sources.Fields(opened, {"image": "image", "label": "label"})
    return sources.num_classes(opened), fields


def build_augment(data: DataConfig) -> pipeline.Augment | None:
    """The random changes of a training image.

    Args:
      data: augment, shift and size are read.

    Returns:
      A callable, or None for no change.
    """
    if data.augment == "crop_flip":
        return augment.Chain((augment.PadCrop(data.shift), augment.RandomFlip()))
    if data.augment == "resized_crop":
        return augment.Chain((augment.RandomResizedCrop(data.size), augment.RandomFlip()))
    return images.RandomShift(data.shift) if data.augment == "shift" else None
