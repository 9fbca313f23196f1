"""The multiscale DEQ beside an equal one in PyTorch with torchdeq, and beside ResNet-101.

    pip install -e .[bench,train]
    python -m benchmarks.vision
    python -m benchmarks.vision --device gpu

Loss and gradients of one training step, without and with the Jacobian penalty (one probe), and
inference by six evaluations of f; float32, Broyden both ways, equal evaluations, no dropout, no
optimiser.  First both networks get the same weights and are compared.  Every case runs in a process
of its own.  Writes vision.json and vision.png and prints the table.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import sys
from pathlib import Path

from benchmarks._case import in_process, machine
from benchmarks._vision_case import MODELS, STOPPED, Case

TASKS = ("train", "train with JR", "infer")
FORMS = {
    "cpu": {"deq_jax": ("1 device", "2 devices"), "torchdeq": ("channels_last", "NCHW")},
    "gpu": {"deq_jax": ("1 device",), "torchdeq": ("channels_last", "NCHW", "compiled")},
}
BATCHES = {
    "cpu": {"cifar10_tiny": 16, "cifar10_large": 4},
    "gpu": {"cifar10_tiny": 64, "cifar10_large": 96},
}
RIVAL = "resnet101"
RUNNER = "benchmarks._vision_case"
COLUMNS = ("task", "network", "library", "form", "ms", "ms an image", "MB", "of the best PyTorch")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Args:
        arguments: instead of sys.argv.

    Returns:
        The chosen models, tasks, batches, device, threads, repeats and the output folder.
    """
    parser = argparse.ArgumentParser(description="Time the multiscale DEQ beside its peers.")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--batch", nargs="+", type=int, help="one for each of --models")
    parser.add_argument("--forms", nargs="+", choices=names_of(FORMS), help="all if not given")
    parser.add_argument("--steps", type=int, default=5, help="timed runs; the median is shown")
    parser.add_argument("--device", choices=tuple(FORMS), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    if options.batch is None:
        options.batch = [BATCHES[options.device][name] for name in options.models]
    if len(options.batch) != len(options.models):
        parser.error(f"--batch: got {len(options.batch)} for {len(options.models)} models")
    return options


def plan(options: argparse.Namespace) -> list[Case]:
    """The cases, those that are compared next to each other.

    Args:
        options: from `parse`.

    Returns:
        The cases in running order; ResNet-101 follows the inference of each model.
    """
    forms, cases = forms_of(FORMS[options.device], options.forms), []
    for name, images in zip(options.models, options.batch, strict=True):
        for task in options.tasks:
            pairs = [(name, library, form) for library in forms for form in forms[library]]
            if task == "infer":
                pairs += [(RIVAL, "deq_jax", form) for form in forms["deq_jax"]]
            cases += [
                Case(network, library, form, task, images, options.threads, options.device)
                for network, library, form in pairs
            ]
    return cases


def forms_of(forms: dict[str, tuple[str, ...]], names: list[str] | None) -> dict[str, list[str]]:
    """Those forms of the libraries that were asked for.

    Args:
        forms: library -> all of its forms.
        names: of forms; None for all.

    Returns:
        library -> forms.
    """
    return {
        library: [form for form in known if names is None or form in names]
        for library, known in forms.items()
    }


def names_of(forms: dict[str, dict[str, tuple[str, ...]]]) -> list[str]:
    """All forms of all libraries on all devices.

    Args:
        forms: device -> library -> forms.

    Returns:
        Every name once.
    """
    names = [form for known in forms.values() for form in itertools.chain(*known.values())]
    return list(dict.fromkeys(names))


def groups(rows: list[dict]) -> dict[tuple[str, int], list[dict]]:
    """Rows of one table.

    Args:
        rows: the cases in running order; those of ResNet-101 follow the model they stand beside.

    Returns:
        (model, batch) -> rows.
    """
    found: dict[tuple[str, int], list[dict]] = {}
    model = ""
    for row in rows:
        model = model if row["model"] == RIVAL else row["model"]
        found.setdefault((model, row["batch"]), []).append(row)
    return found


def tables(rows: list[dict]) -> str:
    """The results as Markdown, one table for each model.

    Args:
        rows: from the runner, each with the fields of its case.

    Returns:
        The text.
    """
    text = []
    for (model, images), group in groups(rows).items():
        text += [f"\n{model}, {images} images; " + evaluations(model)]
        text += ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
        for row in group:
            label = [row["task"], row["model"], row["library"], row["form"]]
            if "error" in row:
                text.append("| " + " | ".join([*label, f"failed: {row['error']}"]) + " |")
                continue
            peers = [
                r["ms"]
                for r in group
                if (r["library"], r["task"]) == ("torchdeq", row["task"]) and "error" not in r
            ]
            ratio = f"{row['ms'] / min(peers):.2f}" if peers else "-"
            each = f"{row['ms'] / images:,.1f}"
            cells = [f"{row['ms']:,.1f}", each, f"{row['peak_mb']:,.0f}", ratio]
            text.append("| " + " | ".join(label + cells) + " |")
    return "\n".join(text)


def evaluations(model: str) -> str:
    """How often f is evaluated, in words.

    Args:
        model: of `MODELS`.

    Returns:
        Half a sentence.
    """
    sizes = MODELS[model]
    return f"evaluations {sizes.forward} + {sizes.backward} in training, {STOPPED} in inference"


def plot(rows: list[dict], path: Path) -> None:
    """Bars of time and memory, a column of panels for each model.

    Args:
        rows: as for `tables`.
        path: of the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = groups([row for row in rows if "error" not in row])
    size = (6 * max(len(found), 1), 8)
    figure, axes = plt.subplots(2, max(len(found), 1), figsize=size, squeeze=False)
    for column, ((model, images), group) in enumerate(found.items()):
        lines = list(dict.fromkeys((r["model"], r["library"], r["form"]) for r in group))
        for line, (key, unit) in enumerate((("ms", "ms"), ("peak_mb", "MB"))):
            ax = axes[line][column]
            for i, task in enumerate(TASKS):
                bars = {
                    (r["model"], r["library"], r["form"]): r for r in group if r["task"] == task
                }
                places = [lines.index(name) + 0.27 * (i - 1) for name in bars]
                heights = [row[key] for row in bars.values()]
                ax.bar(places, heights, width=0.27, label=task)
            names = [
                f"{name if name == RIVAL else library}\n{form}" for name, library, form in lines
            ]
            ax.set_xticks(range(len(lines)), names, fontsize=7)
            ax.set_ylabel(unit)
            if line == 0:
                ax.set_title(f"{model}, {images} images", fontsize=9)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="upper right")
    figure.suptitle("float32, equal evaluations of f; less is better")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run everything and write the results."""
    options = parse()
    needed = ("torch", "torchdeq", "optax", "matplotlib")
    if absent := [name for name in needed if importlib.util.find_spec(name) is None]:
        sys.exit(f"not installed: {', '.join(absent)}; pip install -e .[bench,train]")
    same = [in_process(RUNNER, {"compare": name}) for name in options.models]
    print(f"same weights in both libraries: {same}", file=sys.stderr, flush=True)
    # Another network would be another benchmark.
    if wrong := [one for one in same if "error" in one or max(one["f"], one["logits"]) > 1e-4]:
        sys.exit(f"the two networks differ: {wrong}")
    rows = []
    for case in plan(options):
        fields = dataclasses.asdict(case)
        rows.append(fields | in_process(RUNNER, {"case": fields, "repeats": options.steps}))
        shown = rows[-1].get("error") or "{ms:.1f} ms, {peak_mb:.0f} MB".format(**rows[-1])
        label = f"{case.model} {case.batch} {case.task}, {case.library} {case.form}"
        print(f"{label}: {shown}", file=sys.stderr, flush=True)
    packages = ("jax", "jaxlib", "flax", "torch", "torchdeq")
    report = {
        "date": datetime.date.today().isoformat(),
        "device": options.device,
        "machine": machine(options.device),
        "threads": options.threads,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "compared": same,
        "rows": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "vision.json").write_text(json.dumps(report, indent=1) + "\n")
    plot(rows, options.out / "vision.png")
    print(tables(rows))
    print(f"\nwritten: {options.out}/vision.json, {options.out}/vision.png")


if __name__ == "__main__":
    main()
