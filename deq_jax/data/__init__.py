"""Data sources and pipelines.  Grain, TFDS, datasets, scikit-learn and Pillow are imported late."""

from deq_jax.data.augment import Chain, PadCrop, RandomFlip, RandomResizedCrop, ResizeCrop, Then
from deq_jax.data.corpora import prose, wiki_files, wiki_tfds
from deq_jax.data.hub import HubImages, open_hub
from deq_jax.data.images import CIFAR, IMAGENET, InMemory, RandomShift, Standardize, digits
from deq_jax.data.pipeline import TrainIterator, eval_batches, train_iterator
from deq_jax.data.records import CorruptRecord, Source
from deq_jax.data.segmentation import (
    CAMVID,
    CITYSCAPES,
    Classes,
    Labelled,
    RandomScaleCropFlip,
    class_weights,
)
from deq_jax.data.sources import Fields, MissingData, in_memory, num_classes, open_tfds
from deq_jax.data.synthetic import Pairs, regression
from deq_jax.data.text import Corpus, Vocabulary, corpus, eval_segments, segments

__all__ = [
    "CAMVID",
    "CIFAR",
    "CITYSCAPES",
    "IMAGENET",
    "Chain",
    "Classes",
    "Corpus",
    "CorruptRecord",
    "Fields",
    "HubImages",
    "InMemory",
    "Labelled",
    "MissingData",
    "PadCrop",
    "Pairs",
    "RandomFlip",
    "RandomResizedCrop",
    "RandomScaleCropFlip",
    "RandomShift",
    "ResizeCrop",
    "Source",
    "Standardize",
    "Then",
    "TrainIterator",
    "Vocabulary",
    "class_weights",
    "corpus",
    "digits",
    "eval_batches",
    "eval_segments",
    "in_memory",
    "num_classes",
    "open_hub",
    "open_tfds",
    "prose",
    "regression",
    "segments",
    "train_iterator",
    "wiki_files",
    "wiki_tfds",
]
