"""What the text of a compiled program says: its collectives, and the kernels of its loops.

Kernels are read from a program that was compiled for a GPU, where each instruction outside a fusion
is one launch; collectives from any.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

LOOPS = ("body", "condition")

_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
# Instructions that launch nothing themselves, and those that only run other computations.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")
_FREE += ("after-all", "add-dependency", "opt-barrier")
_RUNS = ("while", "conditional", "call", "async-start", "async-done", "async-update")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(")
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+) "
    r"(?P<kind>[a-z][\w\-]*)\((?P<operands>[^)]*)"
)
_CALLS = {
    "body": re.compile(r"\bbody=%?([\w.\-]+)"),
    "condition": re.compile(r"\bcondition=%?([\w.\-]+)"),
    "branch": re.compile(
        r"\b(?:branch_computations|true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)"
    ),
    "": re.compile(r"\b(?:calls|to_apply)=%?([\w.\-]+)"),
}


@dataclasses.dataclass(frozen=True)
class Kernels:
    """What one run of a computation launches on a GPU, with all that it calls.

    Each branch of a conditional and one iteration of each inner loop are counted.

    Attributes:
        fusions: kernels that XLA wrote.
        copies: of arrays.
        calls: of libraries: convolutions, matrix products, triangular solves.
        others: sorts, reductions and the like that stand alone.
        conditionals: the host waits for the device at each.
        loops: inner loops.
        written: bytes of the largest array that each kernel writes whole; a kernel that updates a
            slice in place does not count.
    """

    fusions: int
    copies: int
    calls: int
    others: int
    conditionals: int
    loops: int
    written: tuple[int, ...]

    @property
    def total(self) -> int:
        """Number of launches."""
        return self.fusions + self.copies + self.calls + self.others


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction that communicates.

    Attributes:
        kind: its name in the program, such as "all-reduce".
        bytes: of its result, all members of a tuple counted.
        place: "body" or "condition" of a loop, "branch" of a conditional, or "once".
    """

    kind: str
    bytes: int
    place: str


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


def collectives(text: str, *, every_branch: bool = True) -> list[Collective]:
    """All collectives of a program, or those that a run meets.

    Args:
        text: of a compiled program.
        every_branch: False: of each conditional only the branch that communicates most.

    Returns:
        One for each instruction and each call of the computation that it stands in.
    """
    parts, entry = _computations(text)
    return list(_walk(parts, entry, "once", every_branch))


def _computations(text: str) -> tuple[dict[str, str], str]:
    """Text of each computation by name, and the name of the first one to run."""
    parts, entry = {}, ""
    for part in re.split(r"\n(?=(?:ENTRY )?%?[\w.\-]+ \([^\n]*\{\n)", text):
        if head := _HEAD.match(part):
            parts[head[2]] = part
            entry = head[2] if head[1] else entry
    if not entry:
        raise ValueError("got a text without ENTRY; wanted that of a compiled program")
    return parts, entry


def _walk(parts: dict[str, str], name: str, place: str, every_branch: bool) -> Iterator[Collective]:
    for instruction in _instructions(parts[name]):
        kind = instruction["kind"].removesuffix("-start")
        if kind in _COLLECTIVES:
            yield Collective(kind, _result_bytes(instruction), place)
        branches = []
        for where, called in _called(instruction.string, parts):
            # A branch of a loop still runs with the loop.
            stays = not where or (where == "branch" and place in LOOPS)
            found = list(_walk(parts, called, place if stays else where, every_branch))
            if where == "branch" and not every_branch:
                branches.append(found)
            else:
                yield from found
        yield from max(branches, key=lambda found: sum(c.bytes for c in found), default=[])


def kernels(text: str) -> Kernels:
    """All kernels of a program.

    Args:
        text: of a program compiled for a GPU.

    Returns:
        The counts; a loop counts as one iteration of its body and condition.
    """
    parts, entry = _computations(text)
    return _count(parts, entry)


def traffic(text: str) -> int:
    """Bytes that the kernels of a program read and write, as if no cache held any.

    Args:
        text: of a compiled program.

    Returns:
        Sizes of operands and results of each kernel; a loop counts as one iteration.
    """
    parts, entry = _computations(text)
    total = 0
    for part in _reached(parts, entry):
        sizes = {found["name"]: _result_bytes(found) for found in _instructions(part)}
        for found in filter(_is_kernel, _instructions(part)):
            operands = re.findall(r"%([\w.\-]+)", found["operands"])
            total += sizes[found["name"]] + sum(sizes.get(name, 0) for name in operands)
    return total


def loops(text: str) -> list[tuple[Kernels, Kernels]]:
    """Kernels of each loop that does not stand in another loop.

    Args:
        text: of a program compiled for a GPU.

    Returns:
        For each loop the kernels of its body and those of its condition, in the program's order.
    """
    parts, entry = _computations(text)
    return [
        (_count(parts, body), _count(parts, condition))
        for condition, body in _outer_loops(parts, entry)
    ]


def _outer_loops(parts: dict[str, str], name: str) -> Iterator[tuple[str, str]]:
    for found in _instructions(parts[name]):
        called = _called(found.string, parts)
        if found["kind"] == "while":
            (condition,), (body,) = (
                [name for where, name in called if where == wanted]
                for wanted in ("condition", "body")
            )
            yield condition, body
        elif found["kind"] in _RUNS:
            for _, inner in called:
                yield from _outer_loops(parts, inner)


def _instructions(part: str) -> Iterator[re.Match[str]]:
    """Groups "name", "shape", "kind" and "operands" of each line; `string` is the line."""
    return (found for line in part.splitlines() if (found := _INSTRUCTION.match(line)))


def _result_bytes(found: re.Match[str]) -> int:
    shape = found["shape"]
    if found["kind"].endswith("-start"):  # as on a GPU: operands first, the result last
        shape = re.sub(r"^\(\(.*?\), ", "(", shape)
    return shape_bytes(shape)


def _reached(parts: dict[str, str], name: str) -> Iterator[str]:
    """Texts of a computation and of all that it runs, but for the insides of kernels."""
    queue = [name]
    while queue:
        part = parts[queue.pop()]
        yield part
        for found in _instructions(part):
            if found["kind"] in _RUNS:
                queue += [inner for _, inner in _called(found.string, parts)]


def _is_kernel(found: re.Match[str]) -> bool:
    kind = found["kind"]
    return kind not in _RUNS and kind not in _FREE and not kind.endswith("-done")


def _called(line: str, parts: dict[str, str]) -> list[tuple[str, str]]:
    return [
        (where, name)
        for where, pattern in _CALLS.items()
        for group in pattern.findall(line)
        for name in re.findall(r"[\w.\-]+", group)
        if name in parts
    ]


def _count(parts: dict[str, str], name: str) -> Kernels:
    counts: collections.Counter[str] = collections.Counter()
    written: list[int] = []
    kinds = {"fusion": "fusions", "copy": "copies", "copy-start": "copies"}
    kinds |= {"custom-call": "calls", "convolution": "calls", "dot": "calls"}
    for part in _reached(parts, name):
        for found in _instructions(part):
            kind, line = found["kind"], found.string
            counts["conditionals"] += kind == "conditional"
            counts["loops"] += kind == "while"
            if _is_kernel(found):
                counts[kinds.get(kind, "others")] += 1
                texts = (line, *(parts[inner] for _, inner in _called(line, parts)))
                if not any("dynamic-update-slice(" in text for text in texts):
                    arrays = re.findall(r"\w+\[[\d,]*\]", found["shape"])
                    written += [max(map(shape_bytes, arrays))]
    fields = [field.name for field in dataclasses.fields(Kernels)[:-1]]
    return Kernels(**{field: counts[field] for field in fields}, written=tuple(sorted(written)))
