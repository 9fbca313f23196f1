"""From a random-access source to batches: shuffled to train, exact and padded to evaluate.

A source is anything with ``len(source)`` and ``source[i] -> record``, a dict of numbers and numpy
arrays: an in-memory set such as `deq_jax.data.images.digits`, or a ``tfds.data_source``.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from deq_jax.data.prefetch import Batches, prefetched
from deq_jax.data.records import (
    Augment,
    CorruptRecord,
    OnCorrupt,
    Reader,
    Record,
    Source,
    Transform,
    Unreadable,
    check_filled,
)

TRIES = 32
"""How many records in a row may be corrupt before training stops all the same."""


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
        try:
            batch = next(self._running[0])
        except Exception:
            self.close()  # after an error grain goes on with the batch of another worker
            raise
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
    on_corrupt: OnCorrupt = "stop",
) -> TrainIterator:
    """An endless iterator of shuffled, augmented batches that can be put back where it was.

    Every epoch is a new permutation.  Order and augmentation depend on (seed, epoch, index) alone,
    so two iterators with equal arguments and equal states give equal batches, with any number of
    workers.  Of every batch that one process would give, process p of n gives the p-th part.

    Args:
      source: the examples.
      batch_size: examples in a batch of this process; a batch may run over the end of an epoch.
      seed: of order and augmentation, in [0, 2^32).
      transform: applied to every example, after the augmentation.
      augment: called with the example and a generator of its own.
      shard: (p, n), number of this process and of all processes.
      workers: processes that read, augment and transform; 0 for a thread of this one.  They import
        the main module again: its work must stand under ``if __name__ == "__main__"``.
      on_corrupt: what is done about a record that cannot be read, augmented or transformed.
        "stop": ``next(it)`` raises `CorruptRecord`, which names it, at the batch that holds it.
        "skip": it is told on stderr, and the example that stands at the same place of the next
        epoch is taken instead, or of the one after that; after ``TRIES`` of them in a row
        ``next(it)`` raises `CorruptRecord`.

    Returns:
      ``next(it)`` gives name -> array ``[batch_size, ...]``, among them "mask", float32 ones, and
      under "skip" also "corrupt", float32, 1 where an example was taken instead of another;
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
    reader = Reader(source, augment=augment, transform=transform, on_corrupt=on_corrupt)
    batches = _TrainBatches(reader, batch_size, seed, shard, augmented=augment is not None)
    return TrainIterator(batches, workers)


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    transform: Transform | None = None,
    shard: tuple[int, int] = (0, 1),
    threads: int = 0,
    on_corrupt: OnCorrupt = "stop",
) -> Iterator[dict[str, np.ndarray]]:
    """One pass over a set, in order, in batches of one shape, with every example counted once.

    Of every batch that one process would give, process p of n gives the p-th part.

    Args:
      source: the examples.
      batch_size: examples in a batch of this process.  A batch that is not full is filled up with
        copies of an example, whose mask is 0: padding is a valid input that counts for nothing.
      transform: applied to every example.
      shard: (p, n), number of this process and of all processes.
      threads: how many read and transform; 0 for none beside the caller's.
      on_corrupt: what is done about a record that cannot be read or transformed: "stop" raises
        `CorruptRecord`, which names it; "skip" tells of it on stderr and puts padding in its place.

    Yields:
      name -> array ``[batch_size, ...]``, among them "mask", float32, 1 for examples, 0 for
      padding, and under "skip" also "corrupt", float32, 1 where a record could not be read.

    Raises:
      ValueError: an empty source, a batch size below 1, a shard that does not exist.
      CorruptRecord: see ``on_corrupt``; under "skip" if no record at all can be read.

    Example:
      >>> squares = [{"x": np.float32(i * i)} for i in range(5)]
      >>> [batch["mask"].tolist() for batch in eval_batches(squares, batch_size=3)]
      [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]
    """
    _check(source, batch_size, shard)
    number, count = shard
    reader = Reader(source, transform=transform, on_corrupt=on_corrupt)
    filler: Record | None = None
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        for whole in range(0, len(source), count * batch_size):
            start = whole + number * batch_size
            chosen = range(start, max(start, min(start + batch_size, len(source))))
            found = list(pool.map(reader.one, chosen) if threads else map(reader.one, chosen))
            good = [record for record in found if not isinstance(record, Unreadable)]
            # A batch without an example of its own is filled with one of another batch.
            filler = good[0] if good else filler
            if filler is None:
                filler = reader.first()
            absent = batch_size - len(found)
            records = [filler if isinstance(r, Unreadable) else r for r in found]
            corrupt = [isinstance(r, Unreadable) for r in found] + [False] * absent
            mask = (np.arange(batch_size) < len(found)) & ~np.asarray(corrupt)
            batch = _stack(records + [filler] * absent) | {"mask": mask.astype(np.float32)}
            yield _marked(batch, corrupt, on_corrupt)


def _end(running: list[Any]) -> None:
    while running:
        running.pop().close()


class _TrainBatches:
    """Random access to the endless batches of one process.

    All of a batch is made in one call: grain's own chain of shuffle, random_map, map and batch
    gives the same arrays, but its bookkeeping for every example takes longer than cropping one.
    """

    def __init__(
        self, reader: Reader, batch_size: int, seed: int, shard: tuple[int, int], *, augmented: bool
    ) -> None:
        import grain

        self._reader, self._batch_size, self._shard = reader, batch_size, shard
        self._augmented, self._size = augmented, len(reader.source)
        # Place in the endless stream of epochs -> place in the source.
        self._order: Any = grain.MapDataset.range(self._size).seed(seed).shuffle()
        # Of its own, so that augmentation and order do not share their chance.
        self._key = np.random.SeedSequence((seed, 2)).generate_state(1, np.uint32)[0]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        number, count = self._shard
        start = (index * count + number) * self._batch_size
        places = range(start, start + self._batch_size)
        found = self._read(places)
        corrupt = [isinstance(record, Unreadable) for record in found]
        records = [
            self._another(place) if isinstance(record, Unreadable) else record
            for place, record in zip(places, found, strict=True)
        ]
        batch = _stack(records) | {"mask": np.ones(len(records), np.float32)}
        return _marked(batch, corrupt, self._reader.on_corrupt)

    def _read(self, places: Sequence[int], turn: int = 0) -> list[Record | Unreadable]:
        """What stands at some places of the stream, or `turn` epochs later."""
        indices = [self._order[place + turn * self._size] for place in places]
        rngs = _generators(self._key, places, turn) if self._augmented else None
        return self._reader.many(indices, rngs)

    def _another(self, place: int) -> Record:
        """Instead of what cannot be read at a place: a choice that hangs on the place alone."""
        what = ""
        for turn in range(1, TRIES):
            (record,) = self._read([place], turn)
            if not isinstance(record, Unreadable):
                return record
            what = record.what
        raise CorruptRecord(
            f"{TRIES} records in a row of {self._reader.name} cannot be read, the last: {what}; "
            "repair the set"
        )


def _generators(key: np.uint32, places: Sequence[int], turn: int) -> Iterator[np.random.Generator]:
    """A generator for each place of the stream, valid until the next one is asked for.

    Philox is a function of a key and a counter: each place and turn has a counter of its own.
    """
    bits = np.random.Philox(key)
    rng, state = np.random.Generator(bits), bits.state
    for place in places:
        state["state"]["counter"][2:] = turn, place
        bits.state = state
        yield rng


def _marked(
    batch: dict[str, np.ndarray], corrupt: list[bool], on_corrupt: OnCorrupt
) -> dict[str, np.ndarray]:
    """Under "skip" with the marks always, so that all batches hold the same arrays."""
    return batch if on_corrupt == "stop" else batch | {"corrupt": np.asarray(corrupt, np.float32)}


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
    check_filled(source)
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
