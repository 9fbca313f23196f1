"""Mean and standard deviation of runs that differ in their seed.

    python -m experiments.common.collect runs/digits-0 runs/digits-1 runs/digits-2

Reads the results.json of every folder.  The table has a column for each model and a row for each
number; a number that some run does not have is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deq_jax.errors import UsageError
from experiments.common import reporting


def read(folder: Path) -> dict[str, Any]:
    """The numbers that a run has written.

    Args:
      folder: workdir of an experiment.

    Returns:
      Its results.json.

    Raises:
      UsageError: there is none, or it cannot be read.
    """
    path = folder / "results.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}")
        return found
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot read {path}: {error}; wanted the workdir of a run that has ended"
        ) from error


def leaves(numbers: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of one model, with their places as names.

    Args:
      numbers: numbers, in mappings and lists.
      name: of the place.

    Yields:
      Name and number.

    Example:
      >>> dict(leaves({"accuracy": {"2": 0.5, "8": 0.75}, "top5": None}))
      {'accuracy 2': 0.5, 'accuracy 8': 0.75}
    """
    if isinstance(numbers, Mapping):
        for key, part in numbers.items():
            yield from leaves(part, f"{name} {key}".strip())
    elif isinstance(numbers, list):
        yield from leaves(dict(enumerate(numbers)), name)
    elif isinstance(numbers, (int, float)):
        yield name, float(numbers)


def collect(folders: Sequence[Path]) -> str:
    """Lays out the numbers of several runs.

    Args:
      folders: their workdirs.

    Returns:
      A Markdown table.

    Raises:
      UsageError: a folder holds no results, or the runs trained different models.
    """
    runs = [read(folder) for folder in folders]
    models = list(runs[0])
    for folder, run in zip(folders, runs, strict=True):
        if list(run) != models:
            raise UsageError(
                f"got {', '.join(run)} in {folder} and {', '.join(models)} in {folders[0]}; wanted "
                "runs of one experiment that trained the same models"
            )
    columns = {model: [dict(leaves(run[model])) for run in runs] for model in models}
    names = dict.fromkeys(name for column in columns.values() for name in column[0])
    rows = []
    for name in names:
        cells = [[part[name] for part in column if name in part] for column in columns.values()]
        if all(len(cell) in (0, len(runs)) for cell in cells):
            rows.append([name, *(reporting.spread(cell, ".4g") if cell else "-" for cell in cells)])
    head = f"mean ± deviation of {len(runs)} runs"
    return reporting.table([head, *(reporting.NAMES.get(m, m) for m in models)], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Tables of several seeds.")
    parser.add_argument("folders", nargs="+", type=Path, help="workdirs of the runs")
    try:
        sys.stdout.write(collect(parser.parse_args().folders))
    except UsageError as error:
        sys.exit(f"error: {error}")
