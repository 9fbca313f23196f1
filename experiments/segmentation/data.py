"""Opens the set of labelled images that a configuration names."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from deq_jax.data import images, pipeline, segmentation, sources
from deq_jax.data.records import Reader
from deq_jax.data.segmentation import Classes
from deq_jax.training import DataIterator, EvalData, UsageError
from experiments import corrupt, trunk
from experiments.segmentation.config import SegmentationConfig

CLASSES = {"camvid": segmentation.CAMVID, "cityscapes": segmentation.CITYSCAPES}
TFDS = {"camvid": "camvid", "cityscapes": "cityscapes/semantic_segmentation"}
IMAGE = {"camvid": "image", "cityscapes": "image_left"}
"""What TFDS calls a set, and the images in it."""

NORMALIZE = images.IMAGENET
"""What is done to the colours: the trunk may come from ImageNet."""


@dataclasses.dataclass(frozen=True, eq=False)
class Sets:
    """Images to train on and to evaluate on.

    Attributes:
      train: endless batches: "image" float32 [B, H, W, 3], "label" int32 [B, H, W] with 255 for no
        label, "mask" float32 [B]; the part of this process.
      eval: gives one pass over the evaluation images at full size, likewise.
      source: all evaluation images as they are: "image" uint8 [H, W, 3], "label" uint8 [H, W]; in
        the place of one that was left out stands the next.
      classes: names and colours.
      weights: of the classes in the loss, float [classes].
    """

    train: DataIterator
    eval: EvalData
    source: pipeline.Source
    classes: Classes
    weights: np.ndarray


@corrupt.in_words()
def build_data(config: SegmentationConfig) -> Sets:
    """Opens the set.

    Args:
      config: model, data and train are read.

    Returns:
      Its two parts.

    Raises:
      MissingData: the set is not prepared.
      UsageError: it does not fit the model or the number of processes; a record cannot be read,
        which the batches also raise.
    """
    data, processes, classes = config.data, jax.process_count(), choose_classes(config)
    train, test = (open_set(config, split) for split in (data.train_split, data.eval_split))
    frame = Reader(test, on_corrupt=data.on_corrupt).first()["label"]
    try:
        trunk.check_size(config.model, *frame.shape)
    except ValueError as error:
        raise UsageError(f"{data.name} at full size: {error}") from None
    for name, size in (
        ("train.batch_size", config.train.batch_size),
        ("data.eval_batch_size", data.eval_batch_size),
    ):
        if size % processes:
            raise UsageError(f"{name} must divide by the {processes} processes, got {size}")
    shard = jax.process_index(), processes
    height, width = data.crop
    batches = pipeline.train_iterator(
        train,
        batch_size=config.train.batch_size // processes,
        seed=config.train.seed,
        transform=NORMALIZE,
        augment=segmentation.RandomScaleCropFlip(height, width, data.scale_low, data.scale_high),
        shard=shard,
        workers=data.workers,
        on_corrupt=data.on_corrupt,
    )
    one_pass = functools.partial(
        pipeline.eval_batches,
        test,
        batch_size=data.eval_batch_size // processes,
        transform=NORMALIZE,
        shard=shard,
        threads=data.workers,
        on_corrupt=data.on_corrupt,
    )
    return Sets(
        train=corrupt.Training(batches),
        eval=corrupt.passes(one_pass),
        source=corrupt.Readable(test, data.on_corrupt),
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


def shapes(config: SegmentationConfig) -> dict[str, tuple[tuple[int, ...], Any]]:
    """What a training batch over all devices is made of, for `experiments.dry_run`.

    Args:
      config: data and train are read.

    Returns:
      Name -> (shape, dtype).
    """
    place = (config.train.batch_size, *config.data.crop)
    return {"image": ((*place, 3), np.float32), "label": (place, np.int32)}


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
