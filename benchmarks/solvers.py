"""deq_jax beside torchdeq, jaxopt and optimistix: time, cost over f alone, and peak memory.

    pip install -e .[bench]
    python -m benchmarks.solvers
    python -m benchmarks.solvers --device gpu

Every case runs in a process of its own, bound to its number of threads; the cases of one problem
follow one another, so that the libraries meet the same machine. Writes solvers.json and solvers.png
and prints the tables. What is equal among the libraries and what is not: `benchmarks._peers`, and
`benchmarks._gradients` for the part on gradient rules.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import sys
from pathlib import Path

from benchmarks import _gradients
from benchmarks._case import in_process, machine
from benchmarks._peers import FORMULAS, SHAPES, Case

LIBRARIES = ("deq_jax", "deq_jax-last", "torchdeq", "jaxopt", "optimistix")
METHODS = ("picard", "anderson", "broyden")
DIRECTIONS = ("forward", "backward")
PARTS = ("solves", "gradients")
COLUMNS = "library|method|forward ms|backward ms|f x|vjp x|forward MB|backward MB".split("|")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Args:
        arguments: instead of sys.argv.

    Returns:
        The chosen libraries, methods, problems, threads, repeats and the output folder.
    """
    parser = argparse.ArgumentParser(description="Time deq_jax beside its peers.")
    for name, values in (
        ("libraries", LIBRARIES),
        ("methods", METHODS),
        ("problems", tuple(SHAPES)),
        ("directions", DIRECTIONS),
    ):
        parser.add_argument(f"--{name}", nargs="+", choices=values, default=values)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--threads", nargs="+", type=int, help="on a CPU; 1 and 2 if not given")
    parser.add_argument("--repeats", type=int, default=15, help="timed runs; the median is shown")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    options.threads = options.threads or ((1, 2) if options.device == "cpu" else (1,))
    if options.device == "gpu":  # the gradients are measured on a CPU only
        options.parts = [part for part in options.parts if part == "solves"]
    return options


def plan(options: argparse.Namespace) -> list[Case]:
    """The cases that exist, the libraries of one problem next to each other.

    Args:
        options: from `parse`.

    Returns:
        The cases in running order.
    """
    order = itertools.product(
        options.problems, options.threads, options.methods, options.directions, options.libraries
    )
    return [
        Case(library, method, problem, direction, threads, options.device)
        for problem, threads, method, direction, library in order
        if library not in ("optimistix", "deq_jax-last") or method == "picard"
    ]


def run(case: Case, repeats: int) -> dict:
    """Measure a case in a fresh process.

    Args:
        case: what to measure.
        repeats: timed runs.

    Returns:
        The numbers of `benchmarks._case.measure`, or the case and "error".
    """
    fields = dataclasses.asdict(case)
    request = {"case": fields, "repeats": repeats}
    return fields | in_process("benchmarks._case", request)


def tables(rows: list[dict]) -> str:
    """The results as Markdown, one table for each problem and number of threads.

    Args:
        rows: from `run`.

    Returns:
        The text.
    """
    text = []
    for (problem, _), group in _grouped(rows, "problem", "threads"):
        shape = ", ".join(f"{n:,}" for n in SHAPES[problem])
        text += [f"\n{FORMULAS[problem]} at [{shape}], {_place(group[0])}"]
        text += [
            "| " + " | ".join(COLUMNS) + " |",
            "| " + " | ".join(["---"] * len(COLUMNS)) + " |",
        ]
        for (method, library), pair in _grouped(group, "method", "library"):
            way = {row["direction"]: row for row in pair}
            cells = [library, method]
            for key, digits in (("ms", 2 if _on_gpu(pair[0]) else 1), ("ratio", 2), ("peak_mb", 0)):
                for direction in DIRECTIONS:
                    number = way.get(direction, {}).get(key)
                    cells.append("-" if number is None else f"{number:,.{digits}f}")
            text.append("| " + " | ".join(cells) + " |")
        text += [
            f"  {row['library']} {row['method']} {row['direction']} failed: {row['error']}"
            for row in group
            if "error" in row
        ]
    return "\n".join(text)


def gradient_rows(options: argparse.Namespace) -> list[dict]:
    """Measures the gradient rules, each in a fresh process.

    Args:
        options: from `parse`.

    Returns:
        The numbers of `benchmarks._gradients.measure`, or the case and "error".
    """
    rows = []
    for threads in options.threads:
        for library in options.libraries:
            for rule in _gradients.RULES.get(library, ()):
                fields = {"library": library, "rule": rule, "threads": threads}
                request = {"case": fields, "repeats": options.repeats}
                rows.append(fields | in_process("benchmarks._gradients", request))
                print(f"gradient {threads} {library} {rule}", file=sys.stderr, flush=True)
    return rows


def gradient_table(rows: list[dict]) -> str:
    """The gradient rules as Markdown, one table for each number of threads.

    Args:
        rows: from `gradient_rows`.

    Returns:
        The text.
    """
    text = []
    for _, group in _grouped(rows, "threads"):
        text += [f"\nvalue and gradient, {_place(group[0])}"]
        text += ["| library | rule | ms | MB | relative error | cosine |"]
        text += ["| --- | --- | --- | --- | --- | --- |"]
        text += [
            "| {library} | {rule} | {ms:.1f} | {peak_mb:.0f} | {error:.1e} | {cosine:.4f} |".format(
                **row
            )
            if "ms" in row
            else "| {library} | {rule} | failed: {error} | | | |".format(**row)
            for row in group
        ]
    return "\n".join(text)


def _on_gpu(row: dict) -> bool:
    """Whether a case ran on a GPU; gradients and earlier results have no device."""
    return row.get("device") == "gpu"


def _place(row: dict) -> str:
    """What a case ran on, in words."""
    return "GPU" if _on_gpu(row) else f"{row['threads']} thread{'s'[: row['threads'] - 1]}"


def _grouped(rows: list[dict], *keys: str) -> list[tuple[tuple, list[dict]]]:
    """Rows by the values of some keys, in the order of their first appearance."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(groups.items())


def plot(rows: list[dict], path: Path) -> None:
    """Bars of time and memory, one panel for each problem and method.

    Args:
        rows: from `run`; the largest number of threads is shown.
        path: of the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    threads = max(row["threads"] for row in rows)
    rows = [row for row in rows if row["threads"] == threads and "error" not in row]
    panels = _grouped(rows, "problem", "method")
    figure, axes = plt.subplots(
        2, max(len(panels), 1), figsize=(3 * max(len(panels), 1), 6), squeeze=False
    )
    for column, ((problem, method), group) in enumerate(panels):
        libraries = list(dict.fromkeys(row["library"] for row in group))
        for line, (key, unit) in enumerate((("ms", "ms"), ("peak_mb", "MB"))):
            ax = axes[line][column]
            for offset, direction in enumerate(DIRECTIONS):
                bars = {row["library"]: row[key] for row in group if row["direction"] == direction}
                places = [libraries.index(name) + 0.4 * offset - 0.2 for name in bars]
                ax.bar(places, bars.values(), width=0.4, label=direction)
            ax.set_xticks(range(len(libraries)), libraries, rotation=45, ha="right")
            ax.set_ylabel(unit)
            if line == 0:
                size = "x".join(map(str, SHAPES[problem]))
                ax.set_title(f"{method}, {problem} [{size}]", fontsize=9)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="upper right")
    place = _place(rows[0]) if rows else ""
    figure.suptitle(f"20 steps, float32, {place}; less is better")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run everything and write the results."""
    options = parse()
    packages = {name.split("-")[0]: None for name in options.libraries}
    wanted = {name: importlib.util.find_spec(name) is not None for name in packages}
    if absent := [name for name, found in wanted.items() if not found]:
        sys.exit(f"not installed: {', '.join(absent)}; pip install -e .[bench] or use --libraries")
    rows = []
    for case in plan(options) if "solves" in options.parts else ():
        rows.append(run(case, options.repeats))
        shown = rows[-1].get("error") or "{ms:.1f} ms, {peak_mb:.0f} MB".format(**rows[-1])
        label = f"{case.problem} {case.threads} {case.method} {case.direction} {case.library}"
        print(f"{label}: {shown}", file=sys.stderr, flush=True)
    gradients = gradient_rows(options) if "gradients" in options.parts else []
    packages = (*packages, "jax", *(["torch"] if "torchdeq" in packages else []))
    report = {
        "machine": machine(options.device),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "rows": rows,
        "gradients": gradients,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "solvers.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {options.out}/solvers.json")
    if rows:
        plot(rows, options.out / "solvers.png")
        print(f"written: {options.out}/solvers.png")
    print(tables(rows))
    print(gradient_table(gradients))


if __name__ == "__main__":
    main()
