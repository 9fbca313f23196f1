"""Opens the set of labelled images that a configuration names."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from deq_jax.data import images, segmentation, sources
from deq_jax.data.records import Readable, Reader, Source
from deq_jax.data.segmentation import Classes
from deq_jax.training import UsageError
from experiments.common import mdeq
from experiments.common.run import Data, open_batches
from experiments.segmentation.config import SegmentationConfig

CLASSES = {"camvid": segmentation.CAMVID, "cityscapes": segmentation.CITYSCAPES}
TFDS = {"camvid": "camvid", "cityscapes": "cityscapes/semantic_segmentation"}
IMAGE = {"camvid": "image", "cityscapes": "image_left"}
"""What TFDS calls a set, and the images in it."""

NORMALIZE = images.IMAGENET
"""What is done to the colours: the trunk may come from ImageNet."""


@dataclasses.dataclass(frozen=True, eq=False)
class Sets(Data):
    """Images to train on and to evaluate on; labels are classes, 255 for none.

    Attributes:
      source: the evaluation images one by one, as they are.
      classes: names and colours.
      weights: of the classes in the loss, float [classes].
    """

    source: Source
    classes: Classes
    weights: np.ndarray


def open_data(config: SegmentationConfig) -> Sets:
    """Opens the set.

    Args:
      config: model, data and train are read.

    Returns:
      Its two parts.  In the place of an evaluation image that cannot be read stands the next.

    Raises:
      MissingData: the set is not prepared.
      UsageError: it does not fit the model or the number of processes; a record cannot be read,
        which the batches also raise.
    """
    data, classes = config.data, choose_classes(config)
    train, test = (open_set(config, split) for split in (data.train_split, data.eval_split))
    frame = Reader(test, on_corrupt=data.on_corrupt).first()["label"]
    try:
        mdeq.check_size(config.model, *frame.shape)
    except ValueError as error:
        raise UsageError(f"{data.name} at full size: {error}") from None
    height, width = data.crop
    crop = segmentation.RandomScaleCropFlip(height, width, data.scale_low, data.scale_high)
    opened = open_batches(config, train, test, transform=NORMALIZE, augment=crop, **data.reading)
    return Sets(
        train=opened.train,
        eval=opened.eval,
        source=Readable(test, data.on_corrupt),
        classes=classes,
        weights=choose_weights(config, classes, train),
    )


def choose_classes(config: SegmentationConfig) -> Classes:
    """The classes of the set.

    Args:
      config: data.name and model.classes are read.

    Returns:
      Names and colours.

    Raises:
      UsageError: the model has another number of them.
    """
    classes = CLASSES[config.data.name]
    if len(classes.names) != config.model.classes:
        raise UsageError(
            f"{config.data.name} has {len(classes.names)} classes; set model.classes, which is "
            f"{config.model.classes}"
        )
    return classes


def open_set(config: SegmentationConfig, split: str) -> Any:
    """Opens one split.

    Args:
      config: data is read.
      split: its name.

    Returns:
      A source of {"image": uint8 [H, W, 3], "label": uint8 [H, W]}, labels being classes or 255.
    """
    data = config.data
    opened = sources.open_tfds(TFDS[data.name], split, data.dir)
    names = {"image": IMAGE[data.name], "label": "segmentation_label"}
    labelled = segmentation.Labelled(sources.Fields(opened, names), CLASSES[data.name])
    return sources.in_memory(labelled, data.on_corrupt) if data.in_memory else labelled


def choose_weights(config: SegmentationConfig, classes: Classes, train: Any) -> np.ndarray:
    """Weights of the classes in the loss.

    Args:
      config: data is read.
      classes: of the set.
      train: source of the training examples.

    Returns:
      float [classes].

    Raises:
      UsageError: none were published for this set.
    """
    count, data = len(classes.names), config.data
    if data.class_weights == "none":
        return np.ones(count)
    if data.class_weights == "frequency":
        # Their root: as they are, up to 13 to 1 on CamVid, the thin classes would rule the loss.
        return np.sqrt(segmentation.class_weights(train, count, data.on_corrupt))
    if classes.weights is None:
        raise UsageError(
            f"no class weights were published for {data.name}; set data.class_weights to "
            "frequency or none"
        )
    return classes.weights
