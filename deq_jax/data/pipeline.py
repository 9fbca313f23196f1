"""From a random-access source to batches: shuffled to train, exact and padded to evaluate.

A source is anything with ``len(source)`` and ``source[i] -> record``, a dict of numbers and numpy
arrays: an in-memory set such as `deq_jax.data.images.digits`, or a ``tfds.data_source``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

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


class TrainIterator:
    """An endless iterator of batches; its position is the number of batches it has given.

    Any position is reached at once, and is the same with any number of worker processes.
    """

    def __init__(self, batches: Any, workers: int) -> None:
        """Starts at the first batch.

        Args:
          batches: a grain `MapDataset` of batches.
          workers: processes that make batches; 0 for one thread of this one.
        """
        self._batches, self._workers = batches, workers
        self._position, self._running = 0, None

    def __iter__(self) -> TrainIterator:
        """The iterator itself."""
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch: name -> array ``[batch_size, ...]``."""
        if self._running is None:
            self._running = self._start()
        batch = next(self._running)
        self._position += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """The position before the next batch, as JSON holds it."""
        return {"batches": self._position}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Returns to a position.

        Args:
          state: from `get_state`.
        """
        self._position, self._running = int(state["batches"]), None

    def _start(self) -> Iterator[dict[str, np.ndarray]]:
        import grain

        rest = self._batches[self._position :]
        # One thread, a few batches ahead: small sets live in memory, and the cores belong to the
        # solver.  Decoding goes to other processes.
        data = rest.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
        if self._workers:
            from absl import flags

            # Grain reads flags of its own, which outside of an absl program nobody has parsed.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            data = data.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._workers))
        return iter(data)


def train_iterator(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    transform: Transform | None = None,
    augment: Augment | None = None,
    shard: tuple[int, int] = (0, 1),
    workers: int = 0,
) -> TrainIterator:
    """An endless iterator of shuffled, augmented batches that can be put back where it was.

    Every epoch is a new permutation.  Order and augmentation depend on (seed, epoch, index) alone,
    so two iterators with equal arguments and equal states give equal batches, with any number of
    workers.  Process p of n takes every n-th example of that one order from the p-th on: together
    they give the batches that one process would give, and each gives as many.

    Args:
      source: the examples.
      batch_size: examples in a batch of this process; a batch may run over the end of an epoch.
      seed: of order and augmentation, in [0, 2^32).
      transform: applied to every example, after the augmentation.
      augment: called with the example and a generator of its own.
      shard: (p, n), number of this process and of all processes.
      workers: processes that read, augment and transform; 0 for a thread of this one.

    Returns:
      ``next(it)`` gives name -> array ``[batch_size, ...]``, among them "mask", float32 ones;
      ``it.get_state()`` and ``it.set_state(state)`` hold the position.

    Raises:
      ValueError: an empty source, a batch size below 1, a shard that does not exist.

    Example:
      >>> squares = [{"x": np.float32(i * i)} for i in range(5)]
      >>> it = train_iterator(squares, batch_size=5, seed=0)
      >>> sorted(next(it)["x"].tolist())
      [0.0, 1.0, 4.0, 9.0, 16.0]
    """
    import grain

    _check(source, batch_size, shard)
    if workers < 0:
        raise ValueError(f"got workers={workers}; wanted at least 0")
    records: Any = source  # grain's own protocol differs in the name of an argument only
    data = grain.MapDataset.source(records).seed(seed).shuffle()
    if augment is not None:
        data = data.random_map(augment)
    if transform is not None:
        data = data.map(transform)
    data = data.map(_with_mask).repeat()
    number, count = shard
    if count > 1:
        data = data[number::count]
    return TrainIterator(data.batch(batch_size), workers)


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    transform: Transform | None = None,
    shard: tuple[int, int] = (0, 1),
    threads: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """One pass over a set, in order, in batches of one shape, with every example counted once.

    Process p of n takes every n-th example from the p-th on; all give the same number of batches.

    Args:
      source: the examples.
      batch_size: examples in a batch of this process.  A batch that is not full is filled up with
        copies of an example, whose mask is 0: padding is a valid input that counts for nothing.
      transform: applied to every example.
      shard: (p, n), number of this process and of all processes.
      threads: how many read and transform; 0 for none beside the caller's.

    Yields:
      name -> array ``[batch_size, ...]``, among them "mask", float32, 1 for examples, 0 for
      padding.

    Raises:
      ValueError: an empty source, a batch size below 1, a shard that does not exist.

    Example:
      >>> squares = [{"x": np.float32(i * i)} for i in range(5)]
      >>> [batch["mask"].tolist() for batch in eval_batches(squares, batch_size=3)]
      [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]
    """
    _check(source, batch_size, shard)
    number, count = shard
    own = range(number, len(source), count)

    def fetch(index: int) -> Record:
        record = source[index]
        return record if transform is None else transform(record)

    with ThreadPoolExecutor(max(threads, 1)) as pool:
        for start in range(0, -(-len(source) // count), batch_size):
            chosen = own[start : start + batch_size]
            records = list(pool.map(fetch, chosen)) if threads else [fetch(i) for i in chosen]
            mask = (np.arange(batch_size) < len(records)).astype(np.float32)
            filler = records[0] if records else fetch(0)
            records += [filler] * (batch_size - len(records))
            yield {k: np.stack([r[k] for r in records]) for k in records[0]} | {"mask": mask}


def _with_mask(record: Record) -> dict[str, Any]:
    return {**record, "mask": np.float32(1)}


def _check(source: Source, batch_size: int, shard: tuple[int, int]) -> None:
    if batch_size < 1:
        raise ValueError(f"got batch_size={batch_size}; wanted at least 1")
    if len(source) == 0:
        raise ValueError("got an empty source; wanted at least one example: check the split's name")
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(f"got shard={shard}; wanted (p, n) with 0 <= p < n")
