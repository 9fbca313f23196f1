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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks._case import NEVER, serve, timed
from benchmarks._model import build, compare, measure_all, read
from benchmarks._report import draw_bars, groups, of_the_best_peer, records

MODULE = "benchmarks.language"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "matplotlib", "torch", "torchdeq")
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

LABELS = {"deq": "DEQ", "explicit": "explicit layers"}
"""Networks in the legends of figures."""

HISTORY = 6
"""Iterates that Anderson keeps, in both libraries."""


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of a model, of the segment that it reads and of its memory."""

    features: int
    heads: int
    hidden: int
    length: int = 64
    memory: int = 64
    words: int = 8000


SIZES = {
    "small": Size(128, 4, 512),
    "medium": Size(256, 8, 1024),
    # To see whether everything runs, and to let the libraries load what they need.
    "toy": Size(16, 2, 32, length=8, memory=12, words=50),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: a network of a library in one of its forms, and what it does.

    Attributes:
        size: of `SIZES`.
        network: "deq", or "explicit" for untied layers.
        library: "deq_jax" or "torchdeq".
        form: over how many devices the batch is split, or how PyTorch runs f.
        task: see `benchmarks._model.TASKS`.
        depth: evaluations of f, as many backward as forward; or the number of layers.
        history: steps that the backward solver keeps; None for all.
        batch: streams of text.
        threads: on a CPU.
        device: "cpu" or "gpu".
    """

    size: str
    network: str
    library: str
    form: str
    task: str
    depth: int
    history: int | None
    batch: int
    threads: int = 2
    device: str = "cpu"


parse = partial(
    read,
    about="Time the DEQ-Transformer beside its peers; the part flat takes the first of --sizes.",
    name="sizes",
    default=("small", "medium"),
    forms=FORMS,
    batches=BATCHES,
    parts=PARTS,
)


def plan(options: argparse.Namespace) -> dict[str, list[Case]]:
    """Lists the cases of each part, those that are compared next to each other.

    Args:
        options: from `parse`.

    Returns:
        part -> cases in running order.
    """
    place = (options.threads, options.device)
    peers = [
        Case(size, "deq", library, form, task, DEPTH, None, streams, *place)
        for size, streams in options.batch.items()
        for task in options.tasks
        for library, forms in options.forms.items()
        for form in forms
    ]
    size, streams = next(iter(options.batch.items()))
    flat = [
        Case(size, name, "deq_jax", "1 device", "train", depth, HISTORY, streams, *place)
        for name in ("deq", "explicit")
        for depth in DEPTHS
    ]
    both = {"peers": peers, "flat": flat}
    return {part: both[part] for part in PARTS if part in options.parts}


def tables(parts: dict[str, list[dict]]) -> str:
    """Writes the results as Markdown, one table for each part and size.

    Args:
        parts: part -> rows, each with the fields of its case.

    Returns:
        The text.
    """
    text = []
    for part, rows in parts.items():
        for (size, streams), group in groups(rows, "size", "batch").items():
            measured = {"ms": "{ms:,.1f}", "tokens/s": "{tokens_s:,.0f}", "MB": "{peak_mb:,.0f}"}
            if part == "peers":
                about = _counted(group)
                labels = {"task": "{task}", "library": "{library}", "form": "{form}"}
                last = {"of the best PyTorch": partial(of_the_best_peer, group=group)}
            else:
                about = "training, deq_jax on 1 device"
                labels, last = {"network": "{network}", "evaluations, layers": "{depth}"}, {}
            text += [f"\n{size}, {streams} streams of {SIZES[size].length} tokens; {about}\n"]
            text += [records({**labels, **measured, **last}, group)]
    return "\n".join(text)


def _counted(rows: list[dict]) -> str:
    """How often f was evaluated, as the libraries counted it; all counts if they differ."""
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


def _plot(parts: dict[str, list[dict]], path: Path) -> None:
    """Times of the peers, and time and memory against evaluations and layers."""
    from experiments.common.reporting import new_figure

    good = {part: [r for r in rows if "error" not in r] for part, rows in parts.items()}
    good = {part: rows for part, rows in good.items() if rows}
    if not good:
        return
    figure, axes = new_figure(1, len(good), (6.5 * len(good), 5))
    for axis, (part, rows) in zip(axes[0], good.items(), strict=True):
        if part == "flat":
            _draw_depths(axis, rows)
            continue
        draw_bars(axis, rows, "ms", lambda r: f"{r['size']}\n{r['library']}\n{r['form']}", "task")
        axis.set_ylabel("ms")
        axis.set_title(_counted(rows), fontsize=9)
    figure.savefig(path)
    print(f"written: {path}")


def _draw_depths(axis: Any, rows: list[dict]) -> None:
    """Time and memory against the depth."""
    right = axis.twinx()
    for i, ((network,), chosen) in enumerate(groups(rows, "network").items()):
        depths, color = [r["depth"] for r in chosen], f"C{i}"
        for side, style, key, unit in ((axis, "o-", "ms", "ms"), (right, "s--", "peak_mb", "MB")):
            heights = [r[key] for r in chosen]
            side.plot(depths, heights, style, color=color, label=f"{LABELS[network]}: {unit}")
    axis.set_xlabel("evaluations of f each way, or layers")
    axis.set_ylabel("ms of a training step (solid)")
    right.set_ylabel("peak memory, MB (dashed)")
    axis.set_xticks(DEPTHS)
    for side in (axis, right):  # room for the legend
        side.set_ylim(0, 1.3 * side.get_ylim()[1])
    axis.legend(handles=[*axis.get_lines(), *right.get_lines()], loc="upper left", ncols=2)
    axis.set_title(f"{rows[0]['size']}, deq_jax on 1 device", fontsize=9)


def _batch(size: Size, streams: int) -> dict[str, np.ndarray]:
    """Random words [B, T] and their targets; all of them count, and every stream goes on."""
    rng = np.random.default_rng(0)
    words, targets = rng.integers(0, size.words, (2, streams, size.length)).astype(np.int32)
    ones = np.ones(words.shape, np.float32)
    batch = {"words": words, "targets": targets, "weight": ones, "mask": ones[:, 0]}
    return batch | {"fresh": np.zeros(streams, np.float32)}


def _remembered(size: Size, streams: int) -> list[np.ndarray]:
    """Random states [B, M, C], and injections into keys and values [B, M, 2C]."""
    rng = np.random.default_rng(1)
    shape = (streams, size.memory, 3 * size.features)
    return np.split(rng.standard_normal(shape, dtype=np.float32), [size.features], axis=2)


def measure(request: dict) -> dict:
    """Answers one process.

    Args:
        request: "case", fields of `Case`, and "repeats"; or "compare", of `SIZES`.

    Returns:
        What `benchmarks._case.timed` says; "tokens_s", tokens per second; "evaluations" of f in the
        forward solve and "products" with its Jacobian in the backward one, 0 where there is none;
        or the differences of the two networks.
    """
    if "compare" in request:
        return _compare(request["compare"])
    case = Case(**request["case"])
    if case.device == "cpu":
        # Code and threads that a library loads at its first run are no memory of the case's.
        _build(dataclasses.replace(case, size="toy", batch=2))[0]()
    run, counts = _build(case)
    found = timed(run, request["repeats"], case.device)
    tokens = case.batch * SIZES[case.size].length
    return found | {"tokens_s": 1e3 * tokens / found["ms"]} | counts()


def _build(case: Case) -> tuple[Callable[[], Any], Callable[[], dict]]:
    """The path of a training run, compiled; the form says over how many devices it is split."""
    if case.library == "deq_jax":
        return build(case, partial(_task, case))
    from benchmarks import _language_torch

    size = SIZES[case.size]
    inputs = _batch(size, case.batch), _remembered(size, case.batch)
    return _language_torch.build(case, size, HISTORY, *inputs)


def _task(case: Case, mesh: Any) -> tuple[Any, Any, dict, Any]:
    """What `benchmarks._model` runs; nothing in the memory is empty."""
    from deq_jax.training import BackwardConfig, SolverConfig, TrainConfig
    from experiments.language_modeling.config import DataConfig, LanguageConfig, ModelConfig
    from experiments.language_modeling.task import build_task

    size, steps, kept = SIZES[case.size], case.depth, case.history or case.depth
    network: Any = case.network
    config = LanguageConfig(
        model=ModelConfig(
            name=network,
            features=size.features,
            heads=size.heads,
            hidden=size.hidden,
            memory=size.memory,
            layers=case.depth,
        ),
        data=DataConfig(length=size.length),
        solver=SolverConfig(name="anderson", tol=NEVER, max_steps=steps, memory=HISTORY),
        backward=BackwardConfig(solver="broyden", tol=NEVER, max_steps=steps, memory=kept),
        train=TrainConfig(batch_size=case.batch),
    )
    # Of the texts, the task reads how many words there are.
    texts: Any = SimpleNamespace(corpus=SimpleNamespace(vocabulary=range(size.words)))
    task = build_task(config, mesh, texts)
    z, u = _remembered(size, case.batch)
    empty = task.first_carry(train=True)
    if empty.z.ndim > z.ndim:  # every explicit layer remembers the same states
        z = np.broadcast_to(z[:, None], empty.z.shape)
    memory = empty.replace(z=z, u=u, filled=np.full(case.batch, size.memory, np.int32))
    return task, config, _batch(size, case.batch), memory


def _compare(name: str) -> dict:
    """Differences of f and of the softmax, at PyTorch's weights, a random state and memory."""
    from benchmarks import _language_torch
    from deq_jax.convert.transformer import convert_state

    size, case = SIZES[name], Case(name, "deq", "deq_jax", "1 device", "infer", 1, None, 2)
    batch = _batch(size, case.batch)
    state, z, image, nll = _language_torch.reference(size, batch, _remembered(size, case.batch))

    def head(net, z):
        return net.vocab.nll(z, batch["targets"])

    differences = compare(partial(_task, case), convert_state(state), z, image, head, nll)
    return {"size": name} | dict(zip(("f", "nll", "parameters"), differences, strict=True))


def main() -> None:
    """Runs everything and writes the results."""
    options = parse()
    compared = options.sizes if "peers" in options.parts else []
    parts = measure_all(MODULE, options, PACKAGES, compared, plan(options))
    print(tables(parts))
    _plot(parts, options.out / "language.png")


if __name__ == "__main__":
    serve(measure, main)
