"""What the reports of all benchmarks share: JSON, tables and bars."""

import datetime
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path("benchmarks/results")


def require(packages: Iterable[str], advice: str) -> None:
    """Ends the program if a package is missing.

    Args:
        packages: names, as they are imported.
        advice: how to install them.
    """
    if absent := [name for name in packages if importlib.util.find_spec(name) is None]:
        sys.exit(f"not installed: {', '.join(absent)}; {advice}")


def write(path: Path, packages: Iterable[str], **contents: Any) -> None:
    """Writes results as JSON, with the date and the versions of packages.

    Args:
        path: of the file; its folder is made.
        packages: names, as they are installed.
        contents: the results.
    """
    report = {
        "date": datetime.date.today().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        **contents,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {path}")


def groups(rows: Iterable[dict], *keys: str) -> dict[tuple, list[dict]]:
    """Sorts rows by the values of some keys, in the order of their first appearance.

    Args:
        rows: with all of the keys.
        keys: what the rows of one group share.

    Returns:
        Values of the keys -> rows.

    Example:
        >>> groups([{"n": 1, "ms": 3}, {"n": 2, "ms": 4}, {"n": 1, "ms": 5}], "n")[1,]
        [{'n': 1, 'ms': 3}, {'n': 1, 'ms': 5}]
    """
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Lays out a Markdown table.

    Args:
        columns: their names.
        lines: cells; the short line of a failed case ends in empty cells.

    Returns:
        The table, ending in a newline.
    """
    from experiments.common import reporting  # imports JAX, which a measured process does later

    full = [[*line, *[""] * (len(columns) - len(line))] for line in lines]
    return reporting.table(columns, full)


def records(columns: Mapping[str, str | Callable[[dict], str]], rows: Iterable[dict]) -> str:
    """Lays out a Markdown table with a line for each record.

    Args:
        columns: name -> what makes its cell of a record: a format of the record's keys, or a
            function.
        rows: records; a line ends in "failed" where that of a failed case lacks a key.

    Returns:
        The table, ending in a newline.
    """

    def line(row: dict) -> list[str]:
        cells = []
        for form in columns.values():
            try:
                cells.append(form.format(**row) if isinstance(form, str) else form(row))
            except KeyError:
                if "error" not in row:
                    raise
                return [*cells, "failed"]
        return cells

    return table(tuple(columns), map(line, rows))


def of_the_best_peer(row: dict, group: Iterable[dict]) -> str:
    """Compares a time with that of PyTorch.

    Args:
        row: a measured case.
        group: the rows of its table.

    Returns:
        The time over that of torchdeq's quickest form in the same task; "-" without one.
    """
    peers = [
        peer["ms"]
        for peer in group
        if (peer["library"], peer["task"]) == ("torchdeq", row["task"]) and "error" not in peer
    ]
    return f"{row['ms'] / min(peers):.2f}" if peers else "-"


def draw_bars(
    axis: Any, rows: Iterable[dict], key: str, name: Callable[[dict], str], kind: str
) -> None:
    """Draws a bar for each row without an error.

    Args:
        axis: where.
        rows: measured cases.
        key: of the heights.
        name: gives the label below a bar; bars of one label stand together.
        kind: key of the colours.
    """
    good = [row for row in rows if "error" not in row]
    names = list(dict.fromkeys(map(name, good)))
    kinds = groups(good, kind)
    width = 0.8 / max(len(kinds), 1)
    for i, ((label,), chosen) in enumerate(kinds.items()):
        shift = width * (i - (len(kinds) - 1) / 2)
        places = [names.index(name(row)) + shift for row in chosen]
        axis.bar(places, [row[key] for row in chosen], width=width, label=label)
    axis.set_xticks(range(len(names)), names, fontsize=7)
    axis.legend(fontsize=7)


def plot_bars(
    path: Path, panels: Mapping[str, list[dict]], name: Callable[[dict], str], kind: str
) -> None:
    """Draws time and memory, a column for each panel.

    Args:
        path: of the PNG.
        panels: title -> rows.
        name: see `draw_bars`.
        kind: see `draw_bars`.
    """
    if not panels:
        return
    from experiments.common.reporting import new_figure

    figure, axes = new_figure(2, len(panels), (4 * len(panels), 7))
    for column, (title, rows) in enumerate(panels.items()):
        for line, (key, unit) in enumerate((("ms", "ms"), ("peak_mb", "MB"))):
            draw_bars(axes[line, column], rows, key, name, kind)
            axes[line, column].set_ylabel(unit)
        axes[0, column].set_title(title, fontsize=9)
    figure.savefig(path)
    print(f"written: {path}")
