"""The DEQ-Transformer beside an equal one in PyTorch with torchdeq, and beside explicit layers.

    pip install -e .[bench,train]
    python -m benchmarks.language
    python -m benchmarks.language --parts flat
    python -m benchmarks.language --device gpu

Part "peers": loss and gradients of one training step, without and with the Jacobian penalty (one
probe), and inference; Anderson forward and Broyden backward, 12 evaluations of f each.  First both
networks get the same weights and are compared.  Part "flat": a training step of deq_jax's model
with 4 to 32 evaluations each way, beside one of a network with as many untied layers; the solvers'
histories do not grow with the evaluations.

float32, no dropout, no optimiser; the memory of earlier positions is full.  Every case runs in a
process of its own.  Writes language.json and language.png and prints the tables.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks._case import in_process, machine
from benchmarks._language_case import HISTORY, SIZES, Case
from benchmarks.vision import TASKS, forms_of, names_of

PARTS = ("peers", "flat")
FORMS = {
    "cpu": {"deq_jax": ("1 device", "2 devices"), "torchdeq": ("eager", "eager, 1 thread")},
    "gpu": {"deq_jax": ("1 device",), "torchdeq": ("eager", "compiled")},
}
BATCHES = {
    "cpu": {"small": 8, "medium": 8, "toy": 2},
    "gpu": {"small": 64, "medium": 64, "toy": 2},
}
DEPTH = 12
"""Evaluations of f each way in the part "peers"."""

DEPTHS = (4, 8, 16, 32)
"""Evaluations each way, and layers, in the part "flat"."""

RUNNER = "benchmarks._language_case"
COLUMNS = {
    "peers": ("task", "library", "form", "ms", "tokens/s", "MB", "of the best PyTorch"),
    "flat": ("network", "evaluations, layers", "ms", "tokens/s", "MB"),
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Args:
        arguments: instead of sys.argv.

    Returns:
        The chosen parts, sizes, tasks, batches, device, threads, repeats and the output folder.
    """
    parser = argparse.ArgumentParser(description="Time the DEQ-Transformer beside its peers.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    text = "small and medium if not given; the part flat takes the first"
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small", "medium"], help=text)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="of peers")
    parser.add_argument("--batch", nargs="+", type=int, help="streams, one for each of --sizes")
    parser.add_argument("--forms", nargs="+", choices=names_of(FORMS), help="all if not given")
    parser.add_argument("--steps", type=int, default=5, help="timed runs; the median is shown")
    parser.add_argument("--device", choices=tuple(FORMS), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    if options.batch is None:
        options.batch = [BATCHES[options.device][name] for name in options.sizes]
    if len(options.batch) != len(options.sizes):
        parser.error(f"--batch: got {len(options.batch)} for {len(options.sizes)} sizes")
    return options


def plan(options: argparse.Namespace) -> dict[str, list[Case]]:
    """The cases of each part, those that are compared next to each other.

    Args:
        options: from `parse`.

    Returns:
        part -> cases in running order.
    """
    forms, place = forms_of(FORMS[options.device], options.forms), (options.threads, options.device)
    sizes = list(zip(options.sizes, options.batch, strict=True))
    peers = [
        Case(size, "deq", library, form, task, DEPTH, None, streams, *place)
        for size, streams in sizes
        for task in options.tasks
        for library in forms
        for form in forms[library]
    ]
    size, streams = sizes[0]
    flat = [
        Case(size, name, "deq_jax", "1 device", "train", depth, HISTORY, streams, *place)
        for name in ("deq", "explicit")
        for depth in DEPTHS
    ]
    both = {"peers": peers, "flat": flat}
    return {part: both[part] for part in PARTS if part in options.parts}


def groups(rows: list[dict]) -> dict[tuple[str, int], list[dict]]:
    """Rows of one table.

    Args:
        rows: of one part.

    Returns:
        (size, batch) -> rows.
    """
    found: dict[tuple[str, int], list[dict]] = {}
    for row in rows:
        found.setdefault((row["size"], row["batch"]), []).append(row)
    return found


def tables(parts: dict[str, list[dict]]) -> str:
    """The results as Markdown, one table for each part and size.

    Args:
        parts: part -> rows from the runner, each with the fields of its case.

    Returns:
        The text.
    """
    text = []
    for part, rows in parts.items():
        for (size, streams), group in groups(rows).items():
            about = counted(group) if part == "peers" else "training, deq_jax on 1 device"
            text += [f"\n{size}, {streams} streams of {SIZES[size].length} tokens; {about}"]
            text += ["| " + " | ".join(COLUMNS[part]) + " |", "|" + " --- |" * len(COLUMNS[part])]
            for row in group:
                names = ("task", "library", "form") if part == "peers" else ("network", "depth")
                label = [str(row[name]) for name in names]
                text.append("| " + " | ".join(label + cells(part, row, group)) + " |")
    return "\n".join(text)


def cells(part: str, row: dict, group: list[dict]) -> list[str]:
    """What a table says of a case.

    Args:
        part: of `PARTS`.
        row: the case.
        group: the rows of its table.

    Returns:
        The cells after its label.
    """
    if "error" in row:
        return [f"failed: {row['error']}"]
    found = [f"{row['ms']:,.1f}", f"{row['tokens_s']:,.0f}", f"{row['peak_mb']:,.0f}"]
    if part == "flat":
        return found
    alike = [r for r in group if (r["library"], r["task"]) == ("torchdeq", row["task"])]
    peers = [r["ms"] for r in alike if "error" not in r]
    return [*found, f"{row['ms'] / min(peers):.2f}" if peers else "-"]


def counted(rows: list[dict]) -> str:
    """How often f was evaluated, as the libraries counted it.

    Args:
        rows: of one table.

    Returns:
        Half a sentence; all counts, where they are not equal.
    """
    good = [row for row in rows if "error" not in row]
    train = [row for row in good if row["task"] != "infer"]
    infer = [row for row in good if row["task"] == "infer"]

    def counts(chosen: list[dict], key: str) -> str:
        return " or ".join(f"{n:g}" for n in sorted({row[key] for row in chosen}))

    parts = []
    if train:
        parts.append(f"{counts(train, 'evaluations')} + {counts(train, 'products')} in training")
    if infer:
        parts.append(f"{counts(infer, 'evaluations')} in inference")
    return "evaluations " + ", ".join(parts or ["unknown"])


def plot(parts: dict[str, list[dict]], path: Path) -> None:
    """Times of the peers; time and memory against evaluations and layers.

    Args:
        parts: as for `tables`.
        path: of the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    good = {part: [r for r in rows if "error" not in r] for part, rows in parts.items()}
    figure, axes = plt.subplots(1, 2, figsize=(13, 5))
    for ax, (part, draw) in zip(axes, (("peers", bars), ("flat", lines)), strict=True):
        if good.get(part):
            draw(ax, good[part])
        else:
            ax.set_axis_off()
    figure.suptitle("float32, full memory; less is better")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def bars(ax: Any, rows: list[dict]) -> None:
    """Time of every task, library and form.

    Args:
        ax: where to draw.
        rows: of the part "peers".
    """
    names = list(dict.fromkeys((r["size"], r["library"], r["form"]) for r in rows))
    for i, task in enumerate(TASKS):
        chosen = [r for r in rows if r["task"] == task]
        places = [names.index((r["size"], r["library"], r["form"])) for r in chosen]
        heights = [r["ms"] for r in chosen]
        ax.bar([p + 0.27 * (i - 1) for p in places], heights, width=0.27, label=task)
    ax.set_xticks(range(len(names)), ["\n".join(name) for name in names], fontsize=7)
    ax.set_ylabel("ms")
    ax.set_title(counted(rows), fontsize=9)
    ax.legend()


def lines(ax: Any, rows: list[dict]) -> None:
    """Time and memory against the depth.

    Args:
        ax: where to draw.
        rows: of the part "flat".
    """
    right = ax.twinx()
    labels = {"deq": "DEQ", "explicit": "explicit layers"}
    for i, (network, label) in enumerate(labels.items()):
        chosen = [r for r in rows if r["network"] == network]
        depths, color = [r["depth"] for r in chosen], f"C{i}"
        ax.plot(depths, [r["ms"] for r in chosen], "o-", color=color, label=f"{label}: ms")
        peaks = [r["peak_mb"] for r in chosen]
        right.plot(depths, peaks, "s--", color=color, label=f"{label}: MB")
    ax.set_xlabel("evaluations of f each way, or layers")
    ax.set_ylabel("ms of a training step (solid)")
    right.set_ylabel("peak memory, MB (dashed)")
    ax.set_xticks(DEPTHS)
    for side in (ax, right):  # room for the legend
        side.set_ylim(0, 1.3 * side.get_ylim()[1])
    ax.legend(handles=[*ax.get_lines(), *right.get_lines()], loc="upper left", ncols=2)
    ax.set_title(f"{rows[0]['size']}, deq_jax on 1 device", fontsize=9)


def measured(case: Case, repeats: int) -> dict:
    """Run one case and say what came of it.

    Args:
        case: what to run.
        repeats: timed runs.

    Returns:
        Its fields and measurements, or "error".
    """
    fields = dataclasses.asdict(case)
    row = fields | in_process(RUNNER, {"case": fields, "repeats": repeats})
    shown = row.get("error") or (
        "{ms:.1f} ms, {peak_mb:.0f} MB, evaluations {evaluations:g} + {products:g}".format(**row)
    )
    label = f"{case.size} {case.network} {case.depth} {case.task}, {case.library} {case.form}"
    print(f"{label}: {shown}", file=sys.stderr, flush=True)
    return row


def main() -> None:
    """Run everything and write the results."""
    options = parse()
    packages = ("jax", "jaxlib", "flax", "optax", "matplotlib", "torch", "torchdeq")
    if absent := [name for name in packages if importlib.util.find_spec(name) is None]:
        sys.exit(f"not installed: {', '.join(absent)}; pip install -e .[bench,train]")
    same = []
    if "peers" in options.parts:
        same = [in_process(RUNNER, {"compare": name}) for name in options.sizes]
        print(f"same weights in both libraries: {same}", file=sys.stderr, flush=True)
    # Another network would be another benchmark.
    if wrong := [one for one in same if "error" in one or max(one["f"], one["nll"]) > 1e-4]:
        sys.exit(f"the two networks differ: {wrong}")
    parts = {
        part: [measured(case, options.steps) for case in cases]
        for part, cases in plan(options).items()
    }
    report = {
        "date": datetime.date.today().isoformat(),
        "device": options.device,
        "machine": machine(options.device),
        "threads": options.threads,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "compared": same,
        **parts,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "language.json").write_text(json.dumps(report, indent=1) + "\n")
    plot(parts, options.out / "language.png")
    print(tables(parts))
    print(f"\nwritten: {options.out}/language.json, {options.out}/language.png")


if __name__ == "__main__":
    main()
