"""From a random-access source to batches: shuffled to train, exact and padded to evaluate.

A source is anything with ``len(source)`` and ``source[i] -> record``, a dict of numbers and numpy
arrays: an in-memory set such as `deq_jax.data.images.digits`, or a ``tfds.data_source``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from grain import DatasetIterator

Record = Mapping[str, Any]
"""One example: name -> number or numpy array."""

Transform = Callable[[Record], Record]
"""What is done to every example, in training and in evaluation."""

Augment = Callable[[Record, np.random.Generator], Record]
"""A random change of a training example; all its chance must come from the generator."""


class Source(Protocol):
    """Random access to the examples of a set."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def __getitem__(self, index: Any, /) -> Record:
        """The example at a place."""
        ...


def train_iterator(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    transform: Transform | None = None,
    augment: Augment | None = None,
) -> DatasetIterator:
    """An endless iterator of shuffled, augmented batches that can be put back where it was.

    Every epoch is a new permutation.  Order and augmentation depend on (seed, epoch, index) alone,
    so two iterators with equal arguments and equal states give equal batches.

    Args:
      source: the examples.
      batch_size: examples in a batch; a batch may run over the end of an epoch.
      seed: of order and augmentation, in [0, 2^32).
      transform: applied to every example, before the augmentation.
      augment: called with the example and a generator of its own.

    Returns:
      A grain iterator: ``next(it)`` gives name -> array ``[batch_size, ...]``, among them "mask",
      float32 ones; ``it.get_state()`` and ``it.set_state(state)`` as grain defines them.

    Raises:
      ValueError: an empty source, or a batch size below 1.

    Example:
      >>> squares = [{"x": np.float32(i * i)} for i in range(5)]
      >>> it = train_iterator(squares, batch_size=5, seed=0)
      >>> sorted(next(it)["x"].tolist())
      [0.0, 1.0, 4.0, 9.0, 16.0]
    """
    import grain

    _check(source, batch_size)
    records: Any = source  # grain's own protocol differs in the name of an argument only
    data = grain.MapDataset.source(records).seed(seed).shuffle()
    if transform is not None:
        data = data.map(transform)
    if augment is not None:
        data = data.random_map(augment)
    data = data.map(_with_mask).repeat().batch(batch_size)
    # One thread, a few batches ahead: the sets live in memory, and the cores belong to the solver.
    return iter(data.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def eval_batches(
    source: Source, *, batch_size: int, transform: Transform | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """One pass over a set, in order, in batches of one shape, with every example counted once.

    Args:
      source: the examples.
      batch_size: examples in a batch.  The last one is filled up with copies of its first example
        whose mask is 0: padding is a valid input that counts for nothing.
      transform: applied to every example.

    Yields:
      name -> array ``[batch_size, ...]``, among them "mask", float32, 1 for examples, 0 for
      padding.

    Raises:
      ValueError: an empty source, or a batch size below 1.

    Example:
      >>> squares = [{"x": np.float32(i * i)} for i in range(5)]
      >>> [batch["mask"].tolist() for batch in eval_batches(squares, batch_size=3)]
      [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]
    """
    _check(source, batch_size)
    for start in range(0, len(source), batch_size):
        records = [source[i] for i in range(start, min(start + batch_size, len(source)))]
        if transform is not None:
            records = [transform(record) for record in records]
        mask = (np.arange(batch_size) < len(records)).astype(np.float32)
        records += [records[0]] * (batch_size - len(records))
        yield {name: np.stack([r[name] for r in records]) for name in records[0]} | {"mask": mask}


def _with_mask(record: Record) -> dict[str, Any]:
    return {**record, "mask": np.float32(1)}


def _check(source: Source, batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"got batch_size={batch_size}; wanted at least 1")
    if len(source) == 0:
        raise ValueError("got an empty source; wanted at least one example: check the split's name")
