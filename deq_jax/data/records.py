"""Reading the records of a source, and what is done about those that cannot be read."""

from __future__ import annotations

import dataclasses
import itertools
import operator
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, get_args

import numpy as np

from deq_jax.errors import UsageError

Record = Mapping[str, Any]
"""One example: name -> number or numpy array."""

Transform = Callable[[Record], Record]
"""What is done to every example, in training and in evaluation."""

Augment = Callable[[Record, np.random.Generator], Record]
"""A random change of a training example; all its chance must come from the generator."""

OnCorrupt = Literal["stop", "skip"]
"""What is done about a record that cannot be read: stop with its name, or tell and leave it out."""

_LONGEST = 200  # characters of a reason


class CorruptRecord(UsageError):  # noqa: N818 - named after what was found
    """A record cannot be read, decoded, augmented or transformed; the message says which and why.

    Example:
      >>> try:
      ...     Reader([{"x": 0}], transform=lambda record: record["y"]).one(0)
      ... except CorruptRecord as error:
      ...     print(str(error).split(";")[0])
      record 0 of the source (list) cannot be read (KeyError: 'y')
    """


class Source(Protocol):
    """Random access to the examples of a set.

    One that reads many examples faster than one by one may have ``__getitems__(list of places)``,
    as ``tfds.data_source`` has.  One with a ``name`` is called so in messages.  One with a set
    ``reported`` keeps there which corrupt records were reported, so that many passes over it report
    each of them once; the sources of this package have one.
    """

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def __getitem__(self, index: Any, /) -> Record:
        """The example at a place."""
        ...


class Unreadable:
    """Stands where a record could not be read.

    Example:
      >>> Unreadable("record 3 of digits/test cannot be read (OSError: truncated)").what[:8]
      'record 3'
    """

    def __init__(self, what: str) -> None:
        """Keeps the reason.

        Args:
          what: the record and the error, in words.
        """
        self.what = what


class Reader:
    """Reads examples of a source and changes them.

    Example:
      >>> reader = Reader([{"x": 1}, {}], transform=lambda r: {"x": -r["x"]}, on_corrupt="skip")
      >>> reader.many([0, 1])
      [{'x': -1}, <deq_jax.data.records.Unreadable object at ...>]
    """

    def __init__(
        self,
        source: Source,
        *,
        augment: Augment | None = None,
        transform: Transform | None = None,
        on_corrupt: OnCorrupt = "stop",
    ) -> None:
        """Reads nothing yet.

        Args:
          source: the examples.
          augment: called with the example and a generator.
          transform: applied to every example, after the augmentation.
          on_corrupt: "stop" raises `CorruptRecord` for what cannot be read; "skip" reports it on
            stderr and gives an `Unreadable`.  A record is reported once for a source that has a set
            ``reported``, and once for this reader if the source has none.

        Raises:
          ValueError: another value of `on_corrupt`.
        """
        if on_corrupt not in get_args(OnCorrupt):
            raise ValueError(f'got on_corrupt={on_corrupt!r}; wanted "stop" or "skip"')
        self.source = source
        self.on_corrupt: OnCorrupt = on_corrupt
        self.name = name_of(source) or f"the source ({type(source).__name__})"
        self._augment, self._transform = augment, transform
        found = reported_of(source)
        self._reported: set[int] = set() if found is None else found

    def one(self, index: int) -> Record | Unreadable:
        """Reads and transforms one example.

        Args:
          index: its place.

        Returns:
          The example, or what stands for it under "skip".

        Raises:
          CorruptRecord: it cannot be read, under "stop".
        """
        return self._try(index, lambda: self._change(self.source[index], None))

    def many(
        self, indices: Sequence[int], rngs: Iterable[np.random.Generator] | None = None
    ) -> list[Record | Unreadable]:
        """Reads examples, at once where the source can, augments and transforms them.

        Args:
          indices: their places.
          rngs: a generator for each, which need be valid only until the next one is asked for;
            None for no augmentation.

        Returns:
          For each example itself, or what stands for it under "skip".

        Raises:
          CorruptRecord: one cannot be read, under "stop".
        """
        done = []
        records = self._fetch(indices)
        chances = itertools.repeat(None, len(indices)) if rngs is None else rngs
        for index, record, rng in zip(indices, records, chances, strict=True):
            if not isinstance(record, Unreadable):
                record = self._try(index, self._change, record, rng)
            done.append(record)
        return done

    def first(self) -> Record:
        """The first example that can be read.

        Returns:
          It, transformed.

        Raises:
          CorruptRecord: there is none, or under "stop" it is not the first of all.
          ValueError: the source is empty.
        """
        check_filled(self.source)
        what = ""
        for index in range(len(self.source)):
            record = self.one(index)
            if not isinstance(record, Unreadable):
                return record
            what = record.what
        raise CorruptRecord(
            f"none of the {len(self.source)} records of {self.name} can be read, the last: {what}; "
            "repair the set"
        )

    def _fetch(self, indices: Sequence[int]) -> Sequence[Record | Unreadable]:
        def one_by_one() -> list[Record | Unreadable]:
            return [self._try(i, operator.getitem, self.source, i) for i in indices]

        if not hasattr(self.source, "__getitems__"):
            return one_by_one()
        try:
            return fetch(self.source, indices)
        except MemoryError:
            raise
        except Exception:
            records = one_by_one()
            if self.on_corrupt == "stop":  # each can be read alone: no record is to blame
                raise
            return records

    def _change(self, record: Record, rng: np.random.Generator | None) -> Record:
        if self._augment is not None and rng is not None:
            record = self._augment(record, rng)
        return record if self._transform is None else self._transform(record)

    def _try(self, index: int, make: Callable[..., Any], *args: Any) -> Any:
        """What `make` returns; errors of the machine, not of the record, pass through."""
        try:
            return make(*args)
        except MemoryError:
            raise
        except Exception as error:
            what = f"record {int(index)} of {self.name} cannot be read ({_reason(error)})"
            if isinstance(error, CorruptRecord):  # found before, when the set was read into memory
                what = str(error)
            if self.on_corrupt == "stop":
                raise CorruptRecord(
                    f"{what}; repair the set, or leave such records out with --data.on_corrupt=skip"
                ) from error
        self._report(int(index), what)
        return Unreadable(what)

    def _report(self, index: int, what: str) -> None:
        """Writes what is left out to stderr, the first time."""
        if index not in self._reported:
            self._reported.add(index)
            sys.stderr.write(f"{what}: left out\n")  # one call: other processes write here too


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


def name_of(source: Any) -> str:
    """What a source is called in messages.

    Args:
      source: the examples.

    Returns:
      For an opened TFDS set "cifar10/train" and the like; else the source's ``name``, or that of
      the ``source`` that it wraps; "" if there is none.

    Example:
      >>> name_of([])
      ''
    """
    info, name = getattr(source, "dataset_info", None), getattr(source, "name", "")
    if info is not None:
        parts = info.name, getattr(info, "config_name", ""), getattr(source, "split", "")
        return "/".join(str(part) for part in parts if part)
    if isinstance(name, str) and name:
        return name
    inner = getattr(source, "source", None)
    return "" if inner is None else name_of(inner)


def reported_of(source: Any) -> set[int] | None:
    """Which corrupt records of a source were reported.

    Args:
      source: the examples.

    Returns:
      The source's set ``reported``, or that of the ``source`` that it wraps; None without one.

    Example:
      >>> reported_of([]) is None
      True
    """
    while source is not None:
        found = getattr(source, "reported", None)
        if isinstance(found, set):
            return found
        source = getattr(source, "source", None)
    return None


def check_filled(source: Source) -> None:
    """Refuses a source without examples.

    Args:
      source: the examples.

    Raises:
      ValueError: there is none.

    Example:
      >>> check_filled([{"x": 0}])
    """
    if len(source) == 0:
        raise ValueError("got an empty source; wanted at least one example: check the split's name")


def _reason(error: Exception) -> str:
    """One line, without the addresses that differ from process to process."""
    text = re.sub(r" at 0x[0-9a-f]+>", ">", " ".join(str(error).split()))
    text = text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@dataclasses.dataclass(frozen=True, eq=False)
class Readable:
    """A source that gives the next example in the place of one that cannot be read.

    Attributes:
      source: the examples.
      on_corrupt: "stop" raises `CorruptRecord` instead.

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
        for place in range(index, len(self)):
            record = reader.one(place)
            if not isinstance(record, Unreadable):
                return record
        return reader.first()
