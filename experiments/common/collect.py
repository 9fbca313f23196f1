"""Mean and standard deviation of runs that differ in their seed, or in one more setting.

    python -m experiments.common.collect runs/digits-0 runs/digits-1 runs/digits-2
    python -m experiments.common.collect --curve=accuracy --out=runs/digits runs/digits-*
    python -m experiments.common.collect --by=jac.gamma --out=runs/gamma \
        --plot="accuracy 2" --plot=spectral_radius runs/gamma-*

Reads the results.json of every folder.  The table has a column for each model, or for each value of
the setting ``--by``, which the config.json of a run knows, and a row for each number; a number that
some run does not have is left out.  ``--out`` writes the table and the numbers of all runs as .md
and .json, and a .png: a panel for each ``--plot`` over ``--by``; or, of the measure ``--curve`` at
several budgets, a line over solver steps for each run.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deq_jax.errors import UsageError
from experiments.common import reporting

Columns = dict[str, list[dict[str, float]]]
"""Name of a model, or value of a setting -> the numbers of each run."""


def read(folder: Path, name: str = "results.json") -> dict[str, Any]:
    """What a run has written.

    Args:
      folder: workdir of an experiment.
      name: of the file.

    Returns:
      Its contents.

    Raises:
      UsageError: there is none, or it cannot be read.
    """
    path = folder / name
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


def gather(folders: Sequence[Path], by: str = "") -> Columns:
    """Sorts the numbers of several runs.

    Args:
      folders: their workdirs.
      by: a setting, such as "jac.gamma", whose values are the columns; then each run has trained
        one model.  Empty for a column for each model.

    Returns:
      The columns, those of a setting in rising order.

    Raises:
      UsageError: a folder holds no results, the runs trained different models, or know no such
        setting.
    """
    runs = [read(folder) for folder in folders]
    models = list(runs[0])
    for folder, run in zip(folders, runs, strict=True):
        if list(run) != models:
            raise UsageError(
                f"got {', '.join(run)} in {folder} and {', '.join(models)} in {folders[0]}; wanted "
                "runs of one experiment that trained the same models"
            )
    if not by:
        return {model: [dict(leaves(run[model])) for run in runs] for model in models}
    if len(models) > 1:
        raise UsageError(f"got runs of {len(models)} models; wanted one for --by: --compare=false")
    found: dict[Any, list[dict[str, float]]] = {}
    for folder, run in zip(folders, runs, strict=True):
        found.setdefault(_setting(folder, by), []).append(dict(leaves(run[models[0]])))
    return {str(value): found[value] for value in sorted(found)}


def _setting(folder: Path, by: str) -> Any:
    value: Any = read(folder, "config.json")
    for part in by.split("."):
        if not isinstance(value, dict) or part not in value:
            raise UsageError(f"got --by={by}, which {folder / 'config.json'} does not have")
        value = value[part]
    return value


def table(columns: Columns, by: str = "") -> str:
    """Lays out the numbers of several runs.

    Args:
      columns: of `gather`.
      by: see `gather`.

    Returns:
      A Markdown table.
    """
    runs = sum(map(len, columns.values())) if by else len(next(iter(columns.values())))
    names = dict.fromkeys(name for column in columns.values() for name in column[0])
    rows = []
    for name in names:
        cells = [[run[name] for run in column if name in run] for column in columns.values()]
        counts = zip(cells, columns.values(), strict=True)
        if all(len(cell) in (0, len(column)) for cell, column in counts):
            rows.append([name, *(reporting.spread(cell, ".4g") if cell else "-" for cell in cells)])
    heads = [f"{by} = {value}" if by else reporting.NAMES.get(value, value) for value in columns]
    return reporting.table([f"mean ± deviation of {runs} runs", *heads], rows)


def draw(columns: Columns, by: str, names: Sequence[str], path: Path) -> None:
    """Draws numbers over the values of a setting: their mean, and a dot for each run.

    Where a number of some run is not finite there is no mean.

    Args:
      columns: of `gather`.
      by: the setting.
      names: of the numbers, a panel each.
      path: of the PNG.

    Raises:
      UsageError: the runs have no such number.
    """
    figure, axes = reporting.new_figure(1, len(names), (3.6 * len(names), 3.3))
    for axis, name in zip(axes[0], names, strict=True):
        for place, runs in enumerate(columns.values()):
            if any(name not in run for run in runs):
                known = ", ".join(runs[0])
                raise UsageError(f"got --plot={name!r}; wanted a number of all runs: {known}")
            axis.plot([place] * len(runs), [run[name] for run in runs], ".", color="0.6")
        means = [statistics.fmean(run[name] for run in runs) for runs in columns.values()]
        axis.plot(range(len(means)), means, "o-", color=reporting.COLORS[1])
        axis.set_xticks(range(len(columns)), list(columns))
        axis.set(xlabel=by, title=name)
    reporting.save(figure, path)


def draw_curve(columns: Columns, name: str, path: Path) -> None:
    """Draws a measure over the number of solver steps: a thin line for each run, and their means.

    Args:
      columns: of `gather`.
      name: of the measure, whose numbers are "name budget".
      path: of the PNG.

    Raises:
      UsageError: the runs have no such measure.
    """
    pattern = re.compile(rf"{re.escape(name)} (\d+)")
    shared = set.intersection(*(set(run) for runs in columns.values() for run in runs))
    budgets = sorted(int(found[1]) for key in shared if (found := pattern.fullmatch(key)))
    if not budgets:
        known = ", ".join(key for runs in columns.values() for key in runs[0])
        raise UsageError(f"got --curve={name!r}; wanted a measure at budgets, of {known}")
    figure, ((axis,),) = reporting.new_figure(1, 1, (5.2, 3.8))
    for i, (model, runs) in enumerate(columns.items()):
        label, color = (
            reporting.NAMES.get(model, model),
            reporting.COLORS[i % len(reporting.COLORS)],
        )
        lines = [[run[f"{name} {budget}"] for budget in budgets] for run in runs]
        for line in lines:
            axis.plot(budgets, line, color=color, linewidth=0.8, alpha=0.5)
        means = [statistics.fmean(values) for values in zip(*lines, strict=True)]
        axis.plot(budgets, means, color=color, marker="so^v"[i % 4], label=f"{label}, mean")
    axis.set(xlabel="solver steps (evaluations of f)", ylabel=name, xscale="log")
    axis.set_xticks(budgets, list(map(str, budgets)))
    axis.minorticks_off()
    axis.legend(frameon=False)
    reporting.save(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
      arguments: instead of sys.argv.
    """
    parser = argparse.ArgumentParser(description="Tables of several seeds.")
    parser.add_argument("folders", nargs="+", type=Path, help="workdirs of the runs")
    parser.add_argument("--by", default="", help="a setting whose values are the columns")
    parser.add_argument("--plot", action="append", default=[], help="a number to draw over --by")
    parser.add_argument("--curve", default="", help="a measure to draw over solver steps")
    parser.add_argument("--out", type=Path, help="path of .md, .json and .png, without its suffix")
    options = parser.parse_args(arguments)
    if options.plot and not (options.by and options.out):
        parser.error("got --plot; wanted --by and --out as well")
    if options.curve and (options.plot or not options.out):
        parser.error("got --curve; wanted --out as well, and no --plot")
    columns = gather(options.folders, options.by)
    text = table(columns, options.by)
    sys.stdout.write(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.with_suffix(".md").write_text(text, encoding="utf-8")
        options.out.with_suffix(".json").write_text(json.dumps(columns, indent=1) + "\n", "utf-8")
    if options.plot:
        draw(columns, options.by, options.plot, options.out.with_suffix(".png"))
    if options.curve:
        draw_curve(columns, options.curve, options.out.with_suffix(".png"))


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        sys.exit(f"error: {error}")
