"""What the reports of all experiments share: tables, and figures without a display."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deq_jax.training import Config, Task, TrainResult, distributed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# One colour per model, the same in every panel; told apart by colour-blind readers too.
COLORS = ("#c0504d", "#2a6fb0", "#3f9b56", "#8a5bb0")

NAMES = {"no_jr": "without JR", "jr": "with JR", "model": "model"}
"""Names of the models' folders (`compare.variants`) -> heads of the tables' columns."""


Columns = Mapping[str, Mapping[str, Any]]
"""Name of a model -> its numbers."""

STYLES = {
    "model": {"color": COLORS[1], "marker": "o", "linestyle": "-"},
    "no_jr": {"color": COLORS[0], "marker": "s", "linestyle": "--"},
    "jr": {"color": COLORS[1], "marker": "o", "linestyle": "-"},
}
"""Likewise -> how its lines are drawn."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """A configuration, its task, and the result of its training."""

    config: Any
    task: Task
    result: TrainResult


def training_numbers(config: Config, result: TrainResult) -> dict[str, float | None]:
    """What training cost.

    Args:
      config: train is read.
      result: of the run.

    Returns:
      "train_steps" and "backward_steps" (mean number in the last line of training metrics),
      "seconds_per_step" and "per_second", examples (medians after the warm-up phase); None for what
      was not measured.
    """
    logged = [r for r in result.history if r["kind"] == "train"]
    solving = [r for r in logged if r["step"] > config.train.warmup_steps] or logged
    speeds = [r["steps_per_second"] for r in solving if "steps_per_second" in r]
    speed = statistics.median(speeds) if speeds else None
    return {
        "train_steps": logged[-1].get("fwd_steps") if logged else None,
        "backward_steps": logged[-1].get("bwd_steps") if logged else None,
        "seconds_per_step": 1 / speed if speed else None,
        "per_second": config.train.batch_size * speed if speed else None,
    }


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lays out a Markdown table that is also readable as plain text.

    Args:
      header: the columns' names.
      rows: cells as text, one sequence for each row; the first column is flush left.

    Returns:
      The table, ending in a newline.

    Raises:
      ValueError: a row of another length than the header.

    Example:
      >>> print(table(["model", "steps"], [["a", "12"]]), end="")
      | model | steps |
      | :---- | ----: |
      | a     |    12 |
    """
    if any(len(row) != len(header) for row in rows):
        raise ValueError(f"got rows of {[len(r) for r in rows]} cells; wanted {len(header)} each")
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    widths = [max(width, 2) for width in widths]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0])]
        padded += [c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join(padded) + " |\n"

    rule = [":" + "-" * (widths[0] - 1)] + ["-" * (w - 1) + ":" for w in widths[1:]]
    return line(header) + line(rule) + "".join(line(row) for row in rows)


def spread(values: Iterable[float], form: str = ".3g") -> str:
    """Mean and sample standard deviation of what is finite, in words.

    Args:
      values: one for each seed.
      form: of the mean, as `format` takes it; of the deviation too if its places are fixed, else
        two digits are shown.

    Returns:
      The mean alone for one seed; how many are not finite, if some are.

    Example:
      >>> spread([1.0, 2.0, 3.0]), spread([8.0, float("inf")])
      ('2 ± 1', '8, and 1 of 2 not finite')
    """
    values = [float(value) for value in values]
    known = [value for value in values if math.isfinite(value)]
    text = format(statistics.fmean(known), form) if known else "-"
    if len(known) > 1:
        deviation = statistics.stdev(known)
        short = f"{float(f'{deviation:.2g}'):g}"
        text += f" ± {format(deviation, form) if form.endswith('f') else short}"
    lost = len(values) - len(known)
    return f"{text}, and {lost} of {len(values)} not finite" if lost else text


def row(columns: Columns, label: str, key: str, form: str) -> list[str]:
    """One row of a table of models.

    Args:
      columns: name of a model -> its numbers.
      label: first cell.
      key: which number.
      form: as `format` takes it.

    Returns:
      The cells, "-" for what was not measured; no cell at all if no model has it.

    Example:
      >>> row({"jr": {"radius": 0.25}, "no_jr": {}}, "radius", "radius", ".1f")
      ['radius', '0.2', '-']
    """
    cells = [numbers.get(key) for numbers in columns.values()]
    if all(cell is None for cell in cells):
        return []
    return [label, *("-" if cell is None else format(cell, form) for cell in cells)]


def cost_rows(columns: Columns, unit: str) -> list[list[str]]:
    """The rows that end every table: stability of the solves, and what training cost.

    Args:
      columns: name of a model -> its numbers, those of `training_numbers` among them.
      unit: plural of what "per_second" counts.

    Returns:
      Rows, also empty ones.
    """
    return [
        row(columns, "spectral radius of df/dz", "spectral_radius", ".2f"),
        row(columns, "penalty", "penalty", ".4f"),
        row(columns, "steps forward in training (NFE)", "train_steps", ".1f"),
        row(columns, "steps backward in training", "backward_steps", ".1f"),
        row(columns, "seconds per training step", "seconds_per_step", ".4f"),
        row(columns, f"{unit} per second in training", "per_second", ",.0f"),
    ]


def at_steps(budget: int) -> str:
    """A budget in words.

    Example:
      >>> at_steps(1), at_steps(2)
      ('at 1 step', 'at 2 steps')
    """
    return f"at {budget} step{'s' * (budget != 1)}"


def table_of(columns: Columns, head: str, rows: Sequence[Sequence[str]]) -> str:
    """A table with a column for each model.

    Args:
      columns: name of a model -> its numbers.
      head: of the first column.
      rows: from `row`; empty ones are left out.

    Returns:
      The table, see `table`.
    """
    return table([head, *(NAMES[name] for name in columns)], [r for r in rows if r])


def new_figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    """Makes a figure that draws without a display and leaves pyplot's global state alone.

    Args:
      rows: rows of panels.
      columns: columns of panels.
      size: of the figure, in inches.

    Returns:
      The figure and its axes, an array ``[rows, columns]``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.7)
    return figure, axes


def draw_history(
    axis: Any,
    name: str,
    history: Sequence[Mapping[str, Any]],
    kind: str,
    metric: str,
    factor: float = 1,
) -> None:
    """Draws one metric over the training steps; of evaluations, that at the largest budget.

    Args:
      axis: where.
      name: of the model's folder.
      history: of a `TrainResult`.
      kind: "train" or "eval".
      metric: its name.
      factor: what it is multiplied by.
    """
    records = [r for r in history if r["kind"] == kind and metric in r]
    if kind == "eval":
        largest = max((r["budget"] for r in records), default=0)
        records = [r for r in records if r["budget"] == largest]
    values = [factor * r[metric] for r in records]
    style = STYLES[name] | {"markersize": 3}
    axis.plot([r["step"] for r in records], values, label=NAMES[name], **style)


def draw_budgets(axis: Any, config: Config, columns: Columns, key: str, factor: float = 1) -> None:
    """Draws a measure against the number of solver steps.

    Args:
      axis: where.
      config: the evaluation's budgets and training's are read.
      columns: name of a model -> its numbers.
      key: of the measure, budget -> value.
      factor: what it is multiplied by.
    """
    for name, numbers in columns.items():
        budgets = sorted(numbers[key])
        values = [factor * numbers[key][b] for b in budgets]
        axis.plot(budgets, values, label=NAMES[name], **STYLES[name])
    axis.set(xlabel="solver steps (evaluations of f)", xscale="log")
    axis.set_xticks(config.eval_budgets, [str(b) for b in config.eval_budgets])
    axis.minorticks_off()
    axis.axvline(config.solver.max_steps, color="0.4", linewidth=1, linestyle=":")
    axis.annotate(
        "budget in training ", (config.solver.max_steps, 0.02), ha="right", fontsize=8, color="0.3",
        xycoords=("data", "axes fraction"),
    )  # fmt: skip


def draw_radius(axis: Any, trained: Mapping[str, Trained]) -> None:
    """Draws the spectral radius over training."""
    for name, model in trained.items():
        draw_history(axis, name, model.result.history, "eval", "spectral_radius")
    axis.axhline(1, color="0.4", linewidth=1, linestyle=":")
    axis.set(xlabel="training step", ylabel="spectral radius of df/dz at z*")
    axis.set_ylim(bottom=0)
    axis.set_title("Stability over training")


def label_residual(axis: Any, config: Config) -> None:
    """Labels an axis of residuals, and marks the tolerance."""
    axis.axhline(config.solver.tol, color="0.4", linewidth=1, linestyle=":", label="tolerance")
    axis.set(yscale="log")
    axis.set_ylabel("relative residual" if config.solver.stop == "rel" else "residual")


def show(text: str) -> None:
    """Writes to stdout, once for all processes of a run.

    Args:
      text: with its final newline.
    """
    if distributed.is_first():
        sys.stdout.write(text)


def save(figure: Figure, path: Path) -> None:
    """Writes a picture, once for all processes of a run.

    Args:
      figure: from `new_figure`.
      path: of the PNG.
    """
    if distributed.is_first():
        with path.open("wb") as file:
            figure.savefig(file, format=path.suffix[1:])


def write(folder: Path, text: str, numbers: Mapping[str, Any]) -> None:
    """Writes the results of an experiment, results.md and results.json, once for all processes.

    Args:
      folder: an existing folder.
      text: the tables.
      numbers: the same and more, as JSON holds it.
    """
    if not distributed.is_first():
        return
    (folder / "results.md").write_text(text, encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
