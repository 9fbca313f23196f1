"""Puzzles made on the spot: decimal addition, binary addition by columns, 4 x 4 sudoku."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from functools import cache

import numpy as np

from deq_jax.data.records import Record
from deq_jax.training import UsageError
from experiments.common.run import Data, open_batches
from experiments.reasoning.config import DataConfig, ReasoningConfig

PLUS, EQUALS, HIDDEN = 10, 11, 12
"""Words of decimal addition beside the digits."""

EVAL_BATCH = 256
"""Examples in an evaluation batch."""


@dataclasses.dataclass(frozen=True, eq=False)
class Puzzles:
    """A source for `deq_jax.data.pipeline`.

    Attributes:
      words: int32 [N, T], what is read.
      targets: int32 [N, T], the right answer at every position.
      scored: float32 [N, T], 1 where the answer counts.
    """

    words: np.ndarray
    targets: np.ndarray
    scored: np.ndarray

    def __len__(self) -> int:
        """N."""
        return len(self.words)

    def __getitem__(self, index: int) -> Record:
        """The puzzle at a place."""
        return {f.name: getattr(self, f.name)[index] for f in dataclasses.fields(self)}

    def arrays(self) -> dict[str, np.ndarray]:
        """All puzzles as one batch."""
        return {**self[slice(None)], "mask": np.ones(len(self), np.float32)}  # type: ignore


def held_out(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Which pairs of numbers are kept from training: a tenth, the same for (a, b) and (b, a)."""
    mixed = np.minimum(a, b).astype(np.uint64) << np.uint64(32) | np.maximum(a, b).astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ mixed >> np.uint64(shift)) * np.uint64(factor)  # splitmix64
    return (mixed ^ mixed >> np.uint64(31)) % np.uint64(10) == 0


def addition(digits: int, count: int, seed: int, *, test: bool, masked: bool = False) -> Puzzles:
    """Sums "a1 a0 + b1 b0 = s0 s1 s2": numbers most significant digit first, the sum least.

    Args:
      digits: of a and of b; the sum has one more.
      count: N.
      seed: of the draw.
      test: whether to draw from the pairs that are kept from training.
      masked: False: the next word is predicted from all before it, among them the right digits of
        the sum (teacher forcing; as many sums are right in full as where every predicted digit is
        read back, for the two differ only after the first wrong one).  True: the digits of the sum
        are hidden, and predicted together.

    Returns:
      The puzzles.

    Example:
      >>> addition(1, 1, 0, test=False).words.shape
      (1, 5)
    """
    rng, limit = np.random.default_rng(seed), 10**digits
    a, b = rng.integers(0, limit, (2, 20 * count))  # at least a twentieth is of either kind
    chosen = np.flatnonzero(held_out(a, b) == test)[:count]
    if len(chosen) < count:
        raise UsageError(
            f"got {len(chosen)} sums of {digits} digits in {20 * count} draws; wanted {count}: "
            "choose more digits"
        )
    a, b = a[chosen], b[chosen]

    def spell(number: np.ndarray, length: int) -> np.ndarray:
        return number[:, None] // 10 ** np.arange(length) % 10  # least significant first

    def sign(word: int) -> np.ndarray:
        return np.full((count, 1), word)

    prompt = [spell(a, digits)[:, ::-1], sign(PLUS), spell(b, digits)[:, ::-1], sign(EQUALS)]
    text = np.concatenate([*prompt, spell(a + b, digits + 1)], axis=1).astype(np.int32)
    answer = np.zeros(text.shape, np.float32)
    answer[:, -(digits + 1) :] = 1
    if masked:
        return Puzzles(np.where(answer > 0, HIDDEN, text).astype(np.int32), text, answer)
    return Puzzles(text[:, :-1], text[:, 1:], answer[:, 1:])


def carry(bits: int, count: int, seed: int, *, passing: float | None = None) -> Puzzles:
    """Binary addition by columns, least significant first: reads a_i + 2 b_i, answers s_i.

    Args:
      bits: columns T.
      count: N.
      seed: of the draw.
      passing: share of the columns that hand a carry on (a_i + b_i = 1); None draws a share for
        each puzzle, uniform in [0, 1].

    Returns:
      The puzzles.

    Example:
      >>> puzzles = carry(4, 1, 0)
      >>> puzzles.words.shape, puzzles.targets.max() <= 1
      ((1, 4), True)
    """
    rng = np.random.default_rng(seed)
    share = rng.uniform(size=(count, 1)) if passing is None else passing
    a = rng.integers(0, 2, (count, bits))
    b = np.where(rng.uniform(size=a.shape) < share, 1 - a, a)
    sums, carried = np.empty_like(a), np.zeros(count, int)
    for i in range(bits):
        column = a[:, i] + b[:, i] + carried
        sums[:, i], carried = column % 2, column // 2
    words = (a + 2 * b).astype(np.int32)
    return Puzzles(words, sums.astype(np.int32), np.ones(words.shape, np.float32))


@cache
def grids() -> np.ndarray:
    """All 288 sudoku grids of size 4: int8 [288, 16], numbers 1 to 4."""
    lines = np.array(list(itertools.permutations((1, 2, 3, 4))), np.int8)

    def grow(partial: list[np.ndarray]) -> list[np.ndarray]:
        grown = []
        for grid in partial:
            for line in lines:
                whole = np.vstack([grid, line])
                columns = all(len(set(column)) == len(column) for column in whole.T)
                boxes = len(whole) % 2 == 1 or all(
                    len(set(whole[-2:, i : i + 2].ravel())) == 4 for i in (0, 2)
                )
                if columns and boxes:
                    grown.append(whole)
        return grown

    found = [np.empty((0, 4), np.int8)]
    for _ in range(4):
        found = grow(found)
    return np.stack(found).reshape(-1, 16)


def sudoku4(count: int, seed: int, *, test: bool, clues: Sequence[int] = range(4, 9)) -> Puzzles:
    """4 x 4 sudokus with one solution: reads 16 cells, 0 where empty, answers 16 numbers.

    Args:
      count: N.
      seed: of the draw.
      test: whether to draw from the grids that are kept from training, a ninth of them.
      clues: numbers of given cells to draw from.

    Returns:
      The puzzles; the empty cells are scored.

    Example:
      >>> sudoku4(2, 0, test=True).words.shape
      (2, 16)
    """
    rng, solutions = np.random.default_rng(seed), grids()
    order = np.random.default_rng(0).permutation(len(solutions))  # the same split for every seed
    chosen = order[:32] if test else order[32:]
    words, targets = [], []
    while len(words) < count:
        grid = solutions[rng.choice(chosen)]
        given = rng.permutation(16)[: rng.choice(clues)]
        if (solutions[:, given] == grid[given]).all(axis=1).sum() == 1:
            words.append(np.zeros(16, np.int32))
            words[-1][given] = grid[given]
            targets.append(grid)
    read, right = np.stack(words), np.stack(targets).astype(np.int32)
    return Puzzles(read, right, (read == 0).astype(np.float32))


def reveal(record: Record, rng: np.random.Generator) -> Record:
    """Chooses a random part of the answer that training with `data.denoise` shows.

    Each position stays hidden with probability cos(pi u / 2), u uniform in [0, 1], one for the
    puzzle; at least one stays hidden.

    Args:
      record: a puzzle.
      rng: the source of chance.

    Returns:
      The puzzle with "shown", float32 [T].

    Reference: Cameron et al., arXiv 2604.18839.
    """
    scored = record["scored"] > 0
    shown = scored & (rng.uniform(size=scored.shape) >= np.cos(np.pi / 2 * rng.uniform()))
    if (shown == scored).all():
        shown[rng.choice(np.flatnonzero(scored))] = False
    return {**record, "shown": shown.astype(np.float32)}


def test_sets(config: DataConfig) -> dict[str, Puzzles]:
    """The sets that a model is examined on, name -> puzzles; the first is that of training's kind.

    Args:
      config: the data.

    Returns:
      The sets, which no training draws from.
    """
    count, seed = config.test_examples, config.seed + 1
    first = _draw(config, count, seed, test=True)
    match config.name:
        case "addition":
            return {f"{config.size} digits": first}
        case "carry":
            long = carry(config.test_size, count, seed, passing=config.passing)
            return {f"{config.size} bits": first, f"{config.test_size} bits": long}
    return {"sudoku": first}


def training_set(config: DataConfig) -> Puzzles:
    """What a model learns from.

    Args:
      config: the data.

    Returns:
      The puzzles.
    """
    return _draw(config, config.examples, config.seed, test=False)


def _draw(config: DataConfig, count: int, seed: int, *, test: bool) -> Puzzles:
    match config.name:
        case "addition":
            return addition(config.size, count, seed, test=test, masked=config.masked)
        case "carry":
            return carry(config.size, count, seed)
    return sudoku4(count, seed, test=test)


def open_data(config: ReasoningConfig) -> Data:
    """Draws the puzzles.

    Args:
      config: data and train are read.

    Returns:
      Training batches, and the first of the test sets.

    Raises:
      UsageError: a batch does not divide by the processes.
    """
    first, *_ = test_sets(config.data).values()
    augment = reveal if config.data.hidden else None
    return open_batches(
        config, training_set(config.data), first, eval_batch=EVAL_BATCH, augment=augment
    )
