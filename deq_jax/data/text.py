"""Text as numbers: vocabularies, corpora kept in a cache, and streams of segments.

A corpus has the splits "train", "valid" and "test".  Its words are what stands between single
spaces, and every line ends with ``<eos>``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from deq_jax.data.pipeline import TrainIterator, check_shard

EOS, UNKNOWN = "<eos>", "<unk>"
SPLITS = ("train", "valid", "test")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The words of a corpus in order of frequency.

    Args:
      words: word of every number; the first one is ``<eos>``.

    Example:
      >>> vocabulary = Vocabulary.of([["b", "a"], ["b"]])
      >>> vocabulary.words, vocabulary.encode([["a", "b"]]).tolist()
      (('<eos>', 'b', 'a'), [2, 1, 0])
    """

    words: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.words)

    @classmethod
    def of(cls, lines: Iterable[Sequence[str]]) -> Vocabulary:
        """Counts words.

        ``<eos>`` comes first, then words from the most frequent on, equally frequent ones in the
        order in which they first appear: the order of the published code, so that published weights
        find their words.

        Args:
          lines: the words of each line.

        Returns:
          The vocabulary.
        """
        counts: Counter[str] = Counter()
        for line in lines:
            counts.update(line)
        del counts[EOS]
        return cls((EOS, *(word for word, _ in counts.most_common())))

    def encode(self, lines: Iterable[Sequence[str]]) -> np.ndarray:
        """Turns words into numbers, ``<eos>`` after each line.

        Args:
          lines: the words of each line.

        Returns:
          int32 [N].

        Raises:
          ValueError: for a word that the vocabulary has not, if it has no ``<unk>`` either.
        """
        number = {word: i for i, word in enumerate(self.words)}
        unknown = number.get(UNKNOWN)

        def numbers() -> Iterator[int]:
            for i, line in enumerate(lines, 1):
                for word in line:
                    found = number.get(word, unknown)
                    if found is None:
                        raise ValueError(
                            f"got the word {word!r} in line {i}; wanted words of the training "
                            f"split, or {UNKNOWN} in their place and in the training split"
                        )
                    yield found
                yield 0

        return np.fromiter(numbers(), np.int32)

    def decode(self, numbers: Iterable[int]) -> list[str]:
        """Turns numbers into words.

        Args:
          numbers: in [0, len(vocabulary)).

        Returns:
          The words.
        """
        return [self.words[int(i)] for i in numbers]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A text as numbers.

    Attributes:
      vocabulary: of the training split.
      splits: "train", "valid", "test" -> int32 [N].
    """

    vocabulary: Vocabulary
    splits: Mapping[str, np.ndarray]


def lines_of(text: bytes, name: str) -> list[str]:
    r"""Decodes a split, which must be whole.

    Args:
      text: the split.
      name: of the split or its file, for messages.

    Returns:
      Its lines, without their ends.

    Raises:
      ValueError: it is empty, not UTF-8, or ends within a line.

    Example:
      >>> lines_of(b"one line\n\n", "train")
      ['one line', '']
    """
    if not text.strip():
        raise ValueError(f"{name} is empty; wanted text, one sentence or paragraph a line")
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8 text (byte {error.start:,} of {len(text):,}); wanted the file as "
            "it was published, unpacked"
        ) from error
    if not decoded.endswith("\n"):
        raise ValueError(
            f"{name} ends within a line after {len(text):,} bytes: it is truncated; copy or unpack "
            "it again"
        )
    return decoded.removesuffix("\n").split("\n")  # str.splitlines would split at other characters


def corpus(
    texts: Mapping[str, bytes], cache: Path | None = None, say: Callable[[str], None] = print
) -> Corpus:
    r"""Encodes a corpus, or takes it from the cache, where it lies under the checksum of its text.

    Args:
      texts: "train", "valid", "test" -> the text, UTF-8.
      cache: folder for encoded corpora; None for none.
      say: called with what the user should know of the cache.

    Returns:
      The corpus; arrays of the cache are mapped into memory, not read.

    Raises:
      ValueError: a text is empty, truncated or not UTF-8.

    Example:
      >>> found = corpus({"train": b"a b a\n", "valid": b"b\n", "test": b"a\n"})
      >>> found.vocabulary.words, found.splits["train"].tolist()
      (('<eos>', 'a', 'b'), [1, 2, 1, 0])
    """
    digest = hashlib.sha256()
    for name in SPLITS:
        digest.update(hashlib.sha256(texts[name]).digest())
    folder = None if cache is None else Path(cache) / f"text-{digest.hexdigest()[:20]}"
    if folder is not None and folder.exists():
        found = _cached(folder)
        if found is not None:
            return found
        say(f"{folder} is damaged; encoding the text again")
        shutil.rmtree(folder, ignore_errors=True)
    words = {name: [line.split() for line in lines_of(texts[name], name)] for name in SPLITS}
    vocabulary = Vocabulary.of(words["train"])
    result = Corpus(vocabulary, {name: vocabulary.encode(words[name]) for name in SPLITS})
    if folder is not None:
        try:
            _store(folder, result)
        except OSError as error:
            say(f"the encoded text is not kept: cannot write {folder}: {error.strerror}")
    return result


def _store(folder: Path, found: Corpus) -> None:
    """Writes into a folder of its own first: another process may do the same."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".text-", dir=folder.parent))
    try:
        for name, numbers in found.splits.items():
            np.save(part / f"{name}.npy", numbers)
        words = "\n".join(found.vocabulary.words) + "\n"
        (part / "vocabulary.txt").write_text(words, encoding="utf-8", newline="\n")
        sums = {path.name: _checksum(path) for path in sorted(part.iterdir())}
        (part / "checksums.json").write_text(json.dumps(sums, indent=1) + "\n")
        os.rename(part, folder)
    except OSError:
        if not folder.exists():
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _cached(folder: Path) -> Corpus | None:
    """What `_store` wrote; None if anything of it is missing or different."""
    try:
        sums = json.loads((folder / "checksums.json").read_text())
        if sums.keys() != {"vocabulary.txt", *(f"{name}.npy" for name in SPLITS)}:
            return None
        if any(_checksum(folder / name) != value for name, value in sums.items()):
            return None
        words = (folder / "vocabulary.txt").read_text(encoding="utf-8")
        splits = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in SPLITS}
        return Corpus(Vocabulary(tuple(words.removesuffix("\n").split("\n"))), splits)
    except (OSError, ValueError):
        return None


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unigram_perplexity(train: np.ndarray, test: np.ndarray, words: int) -> float:
    """Perplexity of guessing every word by its frequency alone, one count added to each.

    Args:
      train: int [N], whose words are counted.
      test: int [M], whose second to last word are predicted, as a language model's are.
      words: size of the vocabulary.

    Returns:
      exp of the mean of -log((count + 1) / (N + words)).

    Example:
      >>> round(unigram_perplexity(np.array([0, 1, 1]), np.array([0, 1]), 2), 3)  # 5 / 3
      1.667
    """
    counts = np.bincount(train, minlength=words) + 1.0
    return float(np.exp(-np.log(counts / counts.sum())[test[1:]].mean()))


def segments(
    numbers: np.ndarray,
    *,
    batch_size: int,
    length: int,
    seed: int,
    shard: tuple[int, int] = (0, 1),
) -> TrainIterator:
    """Endless training batches: a text cut into parallel streams, read a segment at a time.

    Stream s of B is the s-th part of the text; row s of a batch continues row s of the one before.
    Every epoch begins again at the start of the streams, at an offset below ``length`` drawn from
    (seed, epoch), so that segments are not cut at the same places again.  Process p of n has the
    p-th part of the streams.

    Args:
      numbers: int [N], the text.
      batch_size: B, streams of all processes together.
      length: T, words in a segment.
      seed: of the offsets.
      shard: (p, n), number of this process and of all processes; n divides B.

    Returns:
      ``next(it)`` gives "words" and "targets" int32 [B / n, T], the latter one place ahead;
      "weight" float32 [B / n, T], ones; "fresh" float32 [B / n], 1 where a stream begins anew;
      "mask" float32 [B / n], ones.  ``it.get_state()`` and ``it.set_state(state)`` hold the
      position.

    Raises:
      ValueError: settings out of range, or a text too short for one segment in every stream.

    Example:
      >>> batch = next(segments(np.arange(20), batch_size=2, length=4, seed=0))
      >>> bool((batch["targets"] == batch["words"] + 1).all())
      True
    """
    return TrainIterator(_Segments(numbers, batch_size, length, seed, shard), workers=0)


class _Segments:
    """Random access to the endless batches of one process."""

    def __init__(
        self, numbers: np.ndarray, batch_size: int, length: int, seed: int, shard: tuple[int, int]
    ) -> None:
        self._rows = _rows(batch_size, length, shard)
        self._numbers, self._length, self._seed = numbers, length, seed
        self._part = (len(numbers) - 1) // batch_size  # predictions in a stream
        self._count = (self._part - (length - 1)) // length
        if self._count < 1:
            raise ValueError(
                f"got {len(numbers):,} words for {batch_size} streams; wanted at least "
                f"{batch_size * (2 * length - 1) + 1:,}, two segments of {length} in each: take "
                "fewer streams or shorter segments"
            )

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        epoch, place = divmod(index, self._count)
        offset = np.random.default_rng((self._seed, 3, epoch)).integers(self._length)
        starts = self._part * np.asarray(self._rows) + offset + place * self._length
        places = starts[:, None] + np.arange(self._length + 1)[None]
        taken = np.asarray(self._numbers[places], np.int32)
        rows = len(self._rows)
        return {
            "words": taken[:, :-1],
            "targets": taken[:, 1:],
            "weight": np.ones((rows, self._length), np.float32),
            "fresh": np.full(rows, place == 0, np.float32),
            "mask": np.ones(rows, np.float32),
        }


def eval_segments(
    numbers: np.ndarray, *, batch_size: int, length: int, shard: tuple[int, int] = (0, 1)
) -> Iterator[dict[str, np.ndarray]]:
    """One pass over a text in which every word but the first is predicted once.

    Args:
      numbers: int [N], the text.
      batch_size: B, streams of all processes together; all but the first begin without the words
        before them.
      length: T, words in a segment.
      shard: (p, n), number of this process and of all processes; n divides B.

    Yields:
      As `segments`; "weight" and "mask" are 0 where a stream has ended.

    Raises:
      ValueError: settings out of range, or a text of fewer than two words.

    Example:
      >>> batches = list(eval_segments(np.arange(12), batch_size=2, length=4))
      >>> len(batches), sum(batch["weight"].sum() for batch in batches)
      (2, np.float32(11.0))
    """
    rows = _rows(batch_size, length, shard)
    predictions = len(numbers) - 1
    if predictions < 1:
        raise ValueError(f"got a text of {len(numbers)} words; wanted at least 2")
    part = -(-predictions // batch_size)
    for begin in range(0, part, length):
        inside = begin + np.arange(length + 1)[None]  # [1, T + 1]
        places = part * np.asarray(rows)[:, None] + inside
        weight = (inside[:, :-1] < part) & (places[:, :-1] < predictions)
        taken = np.asarray(numbers[np.minimum(places, predictions)], np.int32)
        yield {
            "words": taken[:, :-1],
            "targets": taken[:, 1:],
            "weight": weight.astype(np.float32),
            "fresh": np.full(len(rows), begin == 0, np.float32),
            "mask": np.asarray(weight.any(axis=1), np.float32),
        }


def _rows(batch_size: int, length: int, shard: tuple[int, int]) -> range:
    """The streams of a process."""
    if batch_size < 1 or length < 1:
        raise ValueError(f"got batch_size={batch_size} and length={length}; wanted at least 1 each")
    check_shard(shard)
    number, count = shard
    if batch_size % count:
        raise ValueError(
            f"got {batch_size} streams for {count} processes; wanted a multiple: choose another "
            "batch size"
        )
    own = batch_size // count
    return range(number * own, (number + 1) * own)
