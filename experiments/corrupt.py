"""Records that cannot be read, in the words that a command line shows."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from deq_jax.data.pipeline import TrainIterator
from deq_jax.data.records import CorruptRecord, OnCorrupt, Reader, Record, Source, Unreadable
from deq_jax.training import Batch, EvalData, UsageError


@contextlib.contextmanager
def in_words() -> Iterator[None]:
    """Turns a `CorruptRecord` into a `UsageError`; as a decorator likewise.

    Example:
      >>> with in_words():
      ...     raise CorruptRecord("record 3 of cifar10/train cannot be read")
      Traceback (most recent call last):
      deq_jax.training.errors.UsageError: record 3 of cifar10/train cannot be read
    """
    try:
        yield
    except CorruptRecord as error:
        raise UsageError(str(error)) from error


@dataclasses.dataclass(frozen=True, eq=False)
class Training:
    """Training batches whose `CorruptRecord` is a `UsageError`.

    Attributes:
      batches: the batches.
    """

    batches: TrainIterator

    def __iter__(self) -> Training:
        """The iterator itself."""
        return self

    def __next__(self) -> Batch:
        """The next batch."""
        with in_words():
            return next(self.batches)

    def get_state(self) -> dict[str, int]:
        """The position before the next batch."""
        return self.batches.get_state()

    def set_state(self, state: Mapping[str, int]) -> None:
        """Returns to a position.

        Args:
          state: from `get_state`.
        """
        self.batches.set_state(state)

    def close(self) -> None:
        """Ends the thread or the worker processes."""
        self.batches.close()


def passes(one_pass: Callable[[], Iterator[Batch]]) -> EvalData:
    """Evaluation batches whose `CorruptRecord` is a `UsageError`.

    Args:
      one_pass: gives the batches of one pass.

    Returns:
      The same, in words.
    """

    def told() -> Iterator[Batch]:
        with in_words():
            yield from one_pass()

    return told


@dataclasses.dataclass(frozen=True, eq=False)
class Readable:
    """A source that gives the next example in the place of one that cannot be read.

    Attributes:
      source: the examples.
      on_corrupt: "stop" raises `UsageError` instead.

    Example:
      >>> from deq_jax.data.sources import Fields
      >>> broken = Fields([{"x": 0}, {}, {"x": 2}], {"x": "x"})
      >>> Readable(broken, "skip")[1]
      {'x': 2}
    """

    source: Source
    on_corrupt: OnCorrupt

    def __len__(self) -> int:
        """Number of examples, those included that cannot be read."""
        return len(self.source)

    def __getitem__(self, index: Any) -> Record:
        """The example at a place, or the next one that can be read."""
        reader = Reader(self.source, on_corrupt=self.on_corrupt)
        with in_words():
            for place in range(index, len(self)):
                record = reader.one(place)
                if not isinstance(record, Unreadable):
                    return record
            return reader.first()
