"""Tables and the picture of looped reasoning."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deq_jax.training.distributed import fetch
from experiments.common import reporting
from experiments.common.reporting import Trained
from experiments.reasoning.config import ReasoningConfig
from experiments.reasoning.data import test_sets
from experiments.reasoning.measure import LONG, STARTS, Examination, Numbers

Arms = Mapping[str, Sequence[Numbers]]
"""Arm -> the numbers of every seed, on one test set."""


def write(
    folder: Path, config: ReasoningConfig, trained: Mapping[str, Trained], data: Any, mesh: Any
) -> str:
    """Writes results.md, results.json and reasoning.png.

    Args:
      folder: of the experiment.
      config: the whole configuration.
      trained: "ARM-SEED" -> model.
      data: not used.
      mesh: not used.

    Returns:
      The tables, for the screen.
    """
    del data, mesh
    sets = test_sets(config.data)
    found: dict[str, dict[str, Numbers]] = {name: {} for name in sets}
    for name, model in trained.items():
        params = fetch(model.result.state.params)
        examine = Examination(model.task.model, params, model.config)
        for kind, puzzles in sets.items():
            found[kind][name] = examine(puzzles, hidden=config.data.hidden)
    by_arm = {kind: _by_arm(models) for kind, models in found.items()}
    text = "\n".join(tables(config, kind, arms) for kind, arms in by_arm.items())
    reporting.write(folder, text, found)
    *_, (kind, hardest) = by_arm.items()
    draw(folder / "reasoning.png", config, kind, hardest)
    return text


def _by_arm(models: Mapping[str, Numbers]) -> dict[str, list[Numbers]]:
    arms: dict[str, list[Numbers]] = {}
    for name, numbers in models.items():
        arms.setdefault(name.rpartition("-")[0] or name, []).append(numbers)
    return arms


def tables(config: ReasoningConfig, kind: str, arms: Arms) -> str:
    """All tables of one test set.

    Args:
      config: the whole configuration.
      kind: name of the test set.
      arms: the numbers of every arm.

    Returns:
      Markdown.
    """
    seeds = max(map(len, arms.values()))
    spread = f", mean ± standard deviation of {seeds} seeds" if seeds > 1 else ""
    loops = [str(n) for n in config.report.loops]

    def by_loops(title: str, key: str, show: Callable[[Sequence[float]], str]) -> str:
        rows = [
            [arm, *(show([n[key][count] for n in runs]) for count in config.report.loops)]
            for arm, runs in arms.items()
            if all(key in n for n in runs)
        ]
        return f"\n{title}\n\n{reporting.table(['loops', *loops], rows)}" if rows else ""

    at, starts = config.report.at, config.report.starts
    text = f"# {kind}: {config.data.test_examples:,} puzzles{spread}\n"
    text += by_loops("Solved (%), last iterate:", "last", _percent)
    text += by_loops("Solved (%), iterate of the least residual:", "best", _percent)
    text += by_loops("Root mean square of the state:", "rms", _number)
    text += by_loops("Relative residual of the last iterate:", "residual", _power)
    text += by_loops("Spectral radius of df/dz there:", "radius", _number)

    quarters = [f"quarter {i}" for i in range(1, 5)]
    rows = [
        [
            arm,
            _percent([n["own"]["accuracy"] for n in runs]),
            _number([n["own"]["steps"] for n in runs]),
            *(_percent([n["quarters"][i] for n in runs]) for i in range(4)),
        ]
        for arm, runs in arms.items()
    ]
    text += f"""
Solved (%) where the model's own solver stops, after so many steps; and by quarter of the residual
at {at} loops, least first:

{reporting.table(["", "own stop", "steps", *quarters], rows)}"""

    drawn = ("one", "least residual", "any")
    header = ["", "one start", f"best of {starts}", "any"]
    header += [f"{name}, {n}" for name in STARTS for n in LONG]
    rows = [
        [
            arm,
            *(_percent([n["best_of"][key] for n in runs]) for key in drawn),
            *(_percent([n["starts"][s][k] for n in runs]) for s in STARTS for k in LONG),
        ]
        for arm, runs in arms.items()
    ]
    text += f"""
Solved (%) from noise after {at} loops: from one start, from the one of the least residual of
{starts}, from any of them; and from other starts after {LONG[0]} and {LONG[1]} loops:

{reporting.table(header, rows)}"""
    if all("rounds" in n for runs in arms.values() for n in runs):
        rows = [
            [arm, *(_percent([n["rounds"][k] for n in runs]) for k in config.report.rounds)]
            for arm, runs in arms.items()
        ]
        rounds = [str(k) for k in config.report.rounds]
        text += f"\nSolved (%) after rounds of {at} loops, the least confident hidden again:\n\n"
        text += reporting.table(["rounds", *rounds], rows)
    return text


def _percent(values: Sequence[float]) -> str:
    return reporting.spread([100 * v for v in values], ".1f")


def _number(values: Sequence[float]) -> str:
    return reporting.spread(values, ".2f")


def _power(values: Sequence[float]) -> str:
    return f"{_geometric(values):.0e}"


def _geometric(values: Sequence[float]) -> float:
    return statistics.geometric_mean([max(v, 1e-12) for v in values])


def draw(path: Path, config: ReasoningConfig, kind: str, arms: Arms) -> None:
    """Draws the measures against the loops, six panels.

    Args:
      path: of the PNG.
      config: the whole configuration.
      kind: name of the test set.
      arms: the numbers of every arm; lines are means over the seeds, of residuals geometric ones.
    """
    from matplotlib import colormaps

    figure, axes = reporting.new_figure(2, 3, (14, 7.5))
    palette = colormaps["tab20" if len(arms) > 10 else "tab10"]
    colors = [palette(i) for i in range(len(arms))]
    panels = {
        "last": ("solved", "Last iterate", "linear"),
        "best": ("solved", "Iterate of the least residual", "linear"),
        "rms": ("root mean square of the state", "Size of the state", "log"),
        "residual": ("relative residual", "Distance to a fixed point", "log"),
        "radius": ("spectral radius of df/dz", "Stability at the last iterate", "linear"),
    }
    loops = config.report.loops
    for axis, (key, (label, title, scale)) in zip(axes.flat, panels.items(), strict=False):
        for color, (arm, runs) in zip(colors, arms.items(), strict=True):
            lines = [[n[key][count] for count in loops] for n in runs]
            if len(lines) > 1:
                low, high = (list(map(best, zip(*lines, strict=True))) for best in (min, max))
                axis.fill_between(loops, low, high, color=color, alpha=0.12, linewidth=0)
            average = _geometric if key == "residual" else statistics.fmean
            mean = [average(values) for values in zip(*lines, strict=True)]
            axis.plot(loops, mean, color=color, marker="o", markersize=3, label=arm)
        axis.set(xscale="log", yscale=scale, xlabel="loops", ylabel=label, title=title)
        axis.set_xticks(loops, [str(n) for n in loops])
        axis.xaxis.minorticks_off()
        if key == "rms":
            low, high = axis.get_ylim()
            axis.set_ylim(min(low, 0.5), max(high, 2))
        if scale == "linear" and label == "solved":
            axis.set_ylim(-0.03, 1.03)
    axes[0][0].axvline(config.solver.max_steps, color="0.4", linewidth=1, linestyle=":")
    axes[1][1].axhline(1, color="0.4", linewidth=1, linestyle=":")
    quarters = axes[1][2]
    for color, runs in zip(colors, arms.values(), strict=True):
        values = [statistics.fmean(n["quarters"][i] for n in runs) for i in range(4)]
        quarters.plot((1, 2, 3, 4), values, color=color, marker="o", markersize=3)
    quarters.set(xlabel="quarter of the residual, least first", ylabel="solved")
    quarters.set(title=f"Does the residual tell? ({config.report.at} loops)", ylim=(-0.03, 1.03))
    quarters.set_xticks((1, 2, 3, 4))
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False
    )
    figure.suptitle(f"{kind}; dotted: loops of the fixed arms in training, and radius 1")
    reporting.save(figure, path)
