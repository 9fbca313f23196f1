"""From a random-access source to batches: shuffled to train, exact and padded to evaluate.

A source is anything with ``len(source)`` and ``source[i] -> record``, a dict of numbers and numpy
arrays: an in-memory set such as `deq_jax.data.images.digits`, or a ``tfds.data_source``.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from deq_jax.data.prefetch import Batches, prefetched

Record = Mapping[str, Any]
"""One example: name -> number or numpy array."""

Transform = Callable[[Record], Record]
"""What is done to every example, in training and in evaluation."""

Augment = Callable[[Record, np.random.Generator], Record]
"""A random change of a training example; all its chance must come from the generator."""


class Source(Protocol):
    """Random access to the examples of a set.

    One that reads many examples faster than one by one may have ``__getitems__(list of places)``,
    as ``tfds.data_source`` has.
    """

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def __getitem__(self, index: Any, /) -> Record:
        """The example at a place."""
        ...


def fetch(source: Source, indices: Sequence[int]) -> Sequence[Record]:
    """Reads several examples, at once where the source can.

    Args:
      source: the examples.
      indices: places in it.

    Returns:
      The records, in the order of the indices.

    Example:
      >>> fetch([{"x": 0}, {"x": 1}, {"x": 2}], [2, 0])
      [{'x': 2}, {'x': 0}]
    """
    many = getattr(source, "__getitems__", None)
    return [source[i] for i in indices] if many is None else many(list(indices))


class TrainIterator:
    """An endless iterator of batches; its position is the number of batches it has given.

    Any position is reached at once, and is the same with any number of worker processes.
    """

    def __init__(self, batches: Batches, workers: int) -> None:
        """Starts at the first batch.

        Args:
          batches: random access to the batches.
          workers: processes that make batches; 0 for one thread of this one.
        """
        self._batches, self._workers = batches, workers
        self._position = 0
        self._running: list[Any] = []  # grain's iterator, once it is wanted
        # Also run at the end of the program, while the modules that closing needs are still there.
        weakref.finalize(self, _end, self._running)

    def __iter__(self) -> TrainIterator:
        """The iterator itself."""
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch: name -> array ``[batch_size, ...]``."""
        if not self._running:
            rest = range(self._position, sys.maxsize)
            self._running.append(prefetched(self._batches, rest, self._workers))
        batch = next(self._running[0])
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
        self.close()
        self._position = int(state["batches"])

    def close(self) -> None:
        """Ends the thread or the worker processes; the next batch starts them again."""
        _end(self._running)


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
      workers: processes that read, augment and transform; 0 for a thread of this one.  They import
        the main module again: its work must stand under ``if __name__ == "__main__"``.

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
    _check(source, batch_size, shard)
    if workers < 0:
        raise ValueError(f"got workers={workers}; wanted at least 0")
    batches = _TrainBatches(source, batch_size, seed, augment, transform, shard)
    return TrainIterator(batches, workers)


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

    def read(index: int) -> Record:
        record = source[index]
        return record if transform is None else transform(record)

    with ThreadPoolExecutor(max(threads, 1)) as pool:
        for start in range(0, -(-len(source) // count), batch_size):
            chosen = own[start : start + batch_size]
            records = list(pool.map(read, chosen)) if threads else [read(i) for i in chosen]
            mask = (np.arange(batch_size) < len(records)).astype(np.float32)
            filler = records[0] if records else read(0)
            records += [filler] * (batch_size - len(records))
            yield _stack(records) | {"mask": mask}


def _end(running: list[Any]) -> None:
    while running:
        running.pop().close()


class _TrainBatches:
    """Random access to the endless batches of one process.

    All of a batch is made in one call: grain's own chain of shuffle, random_map, map and batch
    gives the same arrays, but its bookkeeping for every example takes longer than cropping one.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seed: int,
        augment: Augment | None,
        transform: Transform | None,
        shard: tuple[int, int],
    ) -> None:
        import grain

        self._source, self._batch_size, self._shard = source, batch_size, shard
        self._augment, self._transform = augment, transform
        # Place in the endless stream of epochs -> place in the source.
        self._order: Any = grain.MapDataset.range(len(source)).seed(seed).shuffle()
        # Of its own, so that augmentation and order do not share their chance.
        self._key = np.random.SeedSequence((seed, 2)).generate_state(1, np.uint32)[0]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        number, count = self._shard
        start = index * self._batch_size * count + number
        places = range(start, start + self._batch_size * count, count)
        records = fetch(self._source, [self._order[place] for place in places])
        if self._augment is not None:
            pairs = zip(records, _generators(self._key, places), strict=True)
            records = [self._augment(record, rng) for record, rng in pairs]
        if self._transform is not None:
            records = [self._transform(record) for record in records]
        return _stack(records) | {"mask": np.ones(len(records), np.float32)}


def _generators(key: np.uint32, places: range) -> Iterator[np.random.Generator]:
    """A generator for each place of the stream, valid until the next one is asked for.

    Philox is a function of a key and a counter: each place has a counter of its own.
    """
    bits = np.random.Philox(key)
    rng, state = np.random.Generator(bits), bits.state
    for place in places:
        state["state"]["counter"][3] = place
        bits.state = state
        yield rng


def _stack(records: Sequence[Record]) -> dict[str, np.ndarray]:
    """Name -> array with a batch axis."""
    batch = {}
    for name in records[0]:
        values = [np.asarray(record[name]) for record in records]
        shapes = sorted({value.shape for value in values})
        if len(shapes) > 1:
            raise ValueError(
                f"got {name!r} of {shapes[0]} and of {shapes[-1]} in one batch; wanted one shape: "
                "crop or resize in augment or transform"
            )
        if values[0].dtype.kind not in "biuf":
            raise ValueError(
                f"got {name!r} of type {values[0].dtype} in a batch; wanted numbers: leave it out "
                "with sources.Fields"
            )
        batch[name] = np.stack(values)
    return batch


def _check(source: Source, batch_size: int, shard: tuple[int, int]) -> None:
    if batch_size < 1:
        raise ValueError(f"got batch_size={batch_size}; wanted at least 1")
    if len(source) == 0:
        raise ValueError("got an empty source; wanted at least one example: check the split's name")
    check_shard(shard)


def check_shard(shard: tuple[int, int]) -> None:
    """Refuses a process that does not exist.

    Args:
      shard: (p, n), number of a process and of all processes.

    Raises:
      ValueError: p is not one of 0, ..., n - 1.

    Example:
      >>> check_shard((0, 1))
    """
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(f"got shard={shard}; wanted (p, n) with 0 <= p < n")
