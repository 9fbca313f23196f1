"""The images of the sweep, as arrays that a compiled program takes batches from."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deq_jax.data import images, sources
from deq_jax.training import Batch
from experiments.initialization.config import DataConfig


class Set(NamedTuple):
    """A set of examples.

    Attributes:
      x: float32 ``[N, n]``.
      label: int32 ``[N]``.
      mask: float32 ``[N]``, 0 marks padding.
    """

    x: jax.Array
    label: jax.Array
    mask: jax.Array

    def batch(self, places: jax.Array) -> Batch:
        """The examples at some places ``[B]``."""
        return {name: array[places] for name, array in self._asdict().items()}


def build_data(data: DataConfig) -> tuple[Set, Set, int]:
    """Reads both sets into memory; pixels get mean 0 and variance 1 over the training set.

    Args:
      data: what to read.

    Returns:
      The training set, the test set padded to whole batches, and the number of classes.

    Raises:
      MissingData: the set is not prepared.
      ValueError: it has no such split.
      UsageError: a record cannot be read.
    """
    train, test = (_open(data, split) for split in (data.train_split, data.eval_split))
    standardize = images.Standardize.of(train)
    padding = -len(test) % data.eval_batch_size
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    return _arrays(train, standardize, 0), _arrays(test, standardize, padding), classes


def order(examples: int, batch_size: int, steps: int, seed: int) -> np.ndarray:
    """Which examples every training batch holds: all once, shuffled, before any comes again.

    Args:
      examples: in the training set.
      batch_size: examples in a batch.
      steps: batches.
      seed: of the order.

    Returns:
      int32 ``[steps, batch_size]``.

    Example:
      >>> order(4, 2, 3, seed=0).shape
      (3, 2)
    """
    rng = np.random.default_rng(seed)
    passes = -(-steps * batch_size // examples)
    places = np.concatenate([rng.permutation(examples) for _ in range(passes)])
    return places[: steps * batch_size].reshape(steps, batch_size).astype(np.int32)


def _open(data: DataConfig, split: str) -> images.InMemory:
    if data.name == "digits":
        return images.digits(split)
    opened = sources.open_tfds(data.name, split, data.dir)
    return sources.in_memory(sources.Fields(opened, {"image": "image", "label": "label"}))


def _arrays(source: images.InMemory, standardize: images.Standardize, padding: int) -> Set:
    count, _, *rest = source.images.shape
    tall = {"image": source.images.reshape(-1, *rest), "label": 0}  # all images as one
    pixels = standardize(tall)["image"]
    return Set(
        x=jnp.asarray(np.pad(pixels.reshape(count, -1), ((0, padding), (0, 0)))),
        label=jnp.asarray(np.pad(source.labels, (0, padding))),
        mask=jnp.asarray(np.pad(np.ones(count, np.float32), (0, padding))),
    )
