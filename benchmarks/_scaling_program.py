"""Collectives of a compiled program: how large they are, and how often they run.

Read from `compiled.as_text()` on CPUs, where collectives are synchronous (no -start and -done).
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
LOOPS = ("body", "condition")

_COLLECTIVE = re.compile(rf" = (\(.*?\)|\S+) ({'|'.join(KINDS)})\(")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(")
_CALLS = {
    "body": re.compile(r"\bbody=%?([\w.\-]+)"),
    "condition": re.compile(r"\bcondition=%?([\w.\-]+)"),
    "branch": re.compile(
        r"\b(?:branch_computations|true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)"
    ),
    "": re.compile(r"\b(?:calls|to_apply)=%?([\w.\-]+)"),
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction that communicates.

    Attributes:
        kind: of `KINDS`.
        bytes: of its result, all members of a tuple counted.
        place: "body" or "condition" of a loop, "branch" of a conditional, or "once".
        backward: whether it comes from a derivative.
    """

    kind: str
    bytes: int
    place: str
    backward: bool


def shape_bytes(shape: str) -> int:
    """Size of an array, or of a tuple of arrays.

    Args:
        shape: as in a program: "f32[16,3]{1,0}" or "(f32[16]{0}, pred[])".

    Returns:
        Bytes.
    """
    total = 0
    for bits, sides in re.findall(r"[a-z]+(\d*)\w*\[([\d,]*)\]", shape):
        width = (int(bits or 8) + 7) // 8  # pred has no number
        total += width * math.prod(int(side) for side in sides.split(",") if side)
    return total


def collectives(text: str) -> list[Collective]:
    """All collectives that a run of a program meets.

    Args:
        text: of a compiled program.

    Returns:
        One for each instruction and each call of the computation that it stands in.
    """
    parts, entry = {}, ""
    for part in re.split(r"\n(?=(?:ENTRY )?%?[\w.\-]+ \([^\n]*\{\n)", text):
        if head := _HEAD.match(part):
            parts[head[2]] = part
            entry = head[2] if head[1] else entry
    if not entry:
        raise ValueError("got a text without ENTRY; wanted that of a compiled program")
    return list(_walk(parts, entry, "once"))


def _walk(parts: dict[str, str], name: str, place: str) -> Iterator[Collective]:
    for line in parts[name].splitlines():
        if found := _COLLECTIVE.search(line):
            source = re.search(r'op_name="([^"]*)"', line)
            backward = source is not None and "transpose(" in source[1]
            yield Collective(found[2], shape_bytes(found[1]), place, backward)
        for where, pattern in _CALLS.items():
            # A branch of a loop still runs with the loop.
            inner = place if not where or (where == "branch" and place in LOOPS) else where
            for group in pattern.findall(line):
                for called in re.findall(r"[\w.\-]+", group):
                    if called in parts:
                        yield from _walk(parts, called, inner)


def runs(collective: Collective, forward: int, backward: int) -> int:
    """How often a step runs a collective, if it takes all branches that have one.

    Args:
        collective: from `collectives`.
        forward: iterations of the forward solve.
        backward: iterations of the backward solve.

    Returns:
        The number; a loop tests its condition once more than it runs its body.
    """
    steps = backward if collective.backward else forward
    return {"body": steps, "condition": steps + 1}.get(collective.place, 1)


def summary(found: Iterable[Collective], forward: int, backward: int) -> dict:
    """Numbers for a table.

    Args:
        found: from `collectives`.
        forward: iterations of the forward solve.
        backward: iterations of the backward solve.

    Returns:
        "in_loops": collectives for each iteration of both solves; "loop_bytes": their bytes;
        "once", "once_bytes": those outside the loops; "branch_bytes": those of them in a branch;
        "executed", "executed_bytes": of a whole step; "each": [bytes, runs, in a loop] of all.
    """
    found = list(found)
    loops = [c for c in found if c.place in LOOPS]
    rest = [c for c in found if c.place not in LOOPS]
    counts = [(c, runs(c, forward, backward)) for c in found]
    return {
        "in_loops": len(loops),
        "loop_bytes": sum(c.bytes for c in loops),
        "once": len(rest),
        "once_bytes": sum(c.bytes for c in rest),
        "branch_bytes": sum(c.bytes for c in rest if c.place == "branch"),
        "executed": sum(n for _, n in counts),
        "executed_bytes": sum(c.bytes * n for c, n in counts),
        "each": [[c.bytes, n, c.place in LOOPS] for c, n in counts],
    }
