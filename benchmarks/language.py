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
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._case import (
    NEVER,
    PENALTY,
    machine,
    measured,
    relative_difference,
    same_networks,
    serve,
    timed,
)
from benchmarks._report import draw_bars, groups, of_the_best_peer, require, table, write
from benchmarks.vision import read

MODULE = "benchmarks.language"
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

HISTORY = 6
"""Iterates that Anderson keeps, in both libraries."""

COLUMNS = {
    "peers": ("task", "library", "form", "ms", "tokens/s", "MB", "of the best PyTorch"),
    "flat": ("network", "evaluations, layers", "ms", "tokens/s", "MB"),
}


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
        task: see `benchmarks.vision.TASKS`.
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


@dataclasses.dataclass(frozen=True)
class Segment:
    """What the models read, the same in both libraries.

    Attributes:
        words: int32 [B, T].
        targets: int32 [B, T].
        z: float32 [B, M, C], remembered states.
        u: float32 [B, M, 2C], remembered injections into keys and values.
    """

    words: np.ndarray
    targets: np.ndarray
    z: np.ndarray
    u: np.ndarray


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line.

    Args:
        arguments: instead of sys.argv.

    Returns:
        From `benchmarks.vision.read`.
    """
    about = "Time the DEQ-Transformer beside its peers; the part flat takes the first of --sizes."
    return read(arguments, about, "sizes", ("small", "medium"), FORMS, BATCHES, PARTS)


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
            about = _counted(group) if part == "peers" else "training, deq_jax on 1 device"
            text += [f"\n{size}, {streams} streams of {SIZES[size].length} tokens; {about}\n"]
            text += [table(COLUMNS[part], [_cells(part, row, group) for row in group])]
    return "\n".join(text)


def _cells(part: str, row: dict, group: list[dict]) -> list[str]:
    names = ("task", "library", "form") if part == "peers" else ("network", "depth")
    label = [str(row[name]) for name in names]
    if "error" in row:
        return [*label, "failed"]
    cells = [f"{row['ms']:,.1f}", f"{row['tokens_s']:,.0f}", f"{row['peak_mb']:,.0f}"]
    return [*label, *cells, *([of_the_best_peer(row, group)] if part == "peers" else [])]


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
    labels = {"deq": "DEQ", "explicit": "explicit layers"}
    for i, ((network,), chosen) in enumerate(groups(rows, "network").items()):
        depths, color = [r["depth"] for r in chosen], f"C{i}"
        for side, style, key, unit in ((axis, "o-", "ms", "ms"), (right, "s--", "peak_mb", "MB")):
            heights = [r[key] for r in chosen]
            side.plot(depths, heights, style, color=color, label=f"{labels[network]}: {unit}")
    axis.set_xlabel("evaluations of f each way, or layers")
    axis.set_ylabel("ms of a training step (solid)")
    right.set_ylabel("peak memory, MB (dashed)")
    axis.set_xticks(DEPTHS)
    for side in (axis, right):  # room for the legend
        side.set_ylim(0, 1.3 * side.get_ylim()[1])
    axis.legend(handles=[*axis.get_lines(), *right.get_lines()], loc="upper left", ncols=2)
    axis.set_title(f"{rows[0]['size']}, deq_jax on 1 device", fontsize=9)


def _segment(size: Size, batch: int) -> Segment:
    """Words of every stream after a full memory."""
    rng = np.random.default_rng(0)
    words, targets = rng.integers(0, size.words, (2, batch, size.length)).astype(np.int32)
    remembered = rng.standard_normal((batch, size.memory, 3 * size.features), dtype=np.float32)
    z, u = np.split(remembered, [size.features], axis=2)
    return Segment(words, targets, z, u)


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
    found = timed(run, request["repeats"], case.device, case.library)
    tokens = case.batch * SIZES[case.size].length
    return found | {"tokens_s": 1e3 * tokens / found["ms"]} | counts()


def _build(case: Case) -> tuple[Callable[[], Any], Callable[[], dict]]:
    """The path of a training run, compiled; the form says over how many devices it is split."""
    size = SIZES[case.size]
    text = _segment(size, case.batch)
    if case.library == "torchdeq":
        from benchmarks import _language_torch

        return _language_torch.build(case, size, HISTORY, text)
    import jax

    devices = int(case.form.split()[0])
    if case.device == "cpu":
        jax.config.update("jax_num_cpu_devices", devices)
    from deq_jax.training.parallel import batch_sharding, make_mesh, replicated

    mesh = make_mesh(jax.devices()[:devices])
    model = _network(case, mesh)
    inputs = (text.words, text.targets, _full_memory(model, text))
    inputs = jax.device_put(inputs, batch_sharding(mesh))
    start = jax.jit(lambda key: model.init(key, *inputs, train=False))
    variables = jax.device_put(start(jax.random.key(0)), replicated(mesh))
    step = _inference(model) if case.task == "infer" else _training(model, case.task)
    operands = (variables, *inputs, jax.random.key(1))
    program = jax.jit(step).lower(*operands).compile()

    def counts() -> dict:
        evaluations, products, *_ = program(*operands)
        return {"evaluations": float(np.mean(evaluations)), "products": float(np.mean(products))}

    return lambda: jax.block_until_ready(program(*operands)), counts


def _network(case: Case, mesh: Any) -> Any:
    """The model as the experiment wires it, without dropout."""
    import deq_jax as deq
    from deq_jax.models.embeddings import AdaptiveEmbedding
    from deq_jax.models.transformer import DEQTransformer, ExplicitTransformer, TransformerCell
    from deq_jax.training.parallel import sharded_fixed_point, sharded_map

    size = SIZES[case.size]
    common: Any = {
        "vocab": AdaptiveEmbedding(size.words, size.features, per_device=sharded_map(mesh)),
        "cell": TransformerCell(size.features, size.heads, size.hidden, pre_norm=False),
        "memory": size.memory,
    }
    if case.network == "explicit":
        return ExplicitTransformer(layers=case.depth, tied=False, **common)
    backward = deq.Broyden(tol=NEVER, max_steps=case.depth, memory=case.history or case.depth)
    return DEQTransformer(
        solver=deq.Anderson(tol=NEVER, max_steps=case.depth, memory=HISTORY),
        adjoint=deq.Implicit(backward),
        fixed_point=sharded_fixed_point(mesh, TransformerCell.x_axes),
        **common,
    )


def _full_memory(model: Any, text: Segment) -> Any:
    """A memory in which nothing is empty; every explicit layer remembers the same states."""
    batch, length = text.z.shape[:2]
    empty = model.empty_memory(batch)
    z = text.z if empty.z.ndim == 3 else text.z[:, None]
    return empty.replace(
        z=np.broadcast_to(z, empty.z.shape),
        u=text.u,
        filled=np.full(batch, length, np.int32),
    )


def _inference(model: Any) -> Callable:
    """Gives evaluations of f, 0 products, likelihoods and the next memory."""

    def run(variables, words, targets, memory, key):
        del key
        (nll, memory), solution = _apply(model, variables, words, targets, memory, train=False)
        return _evaluations(solution), 0.0, nll, memory

    return run


def _training(model: Any, task: str) -> Callable:
    """Gives evaluations of f, products with its Jacobian, loss, gradients and the next memory."""
    import jax

    import deq_jax as deq

    def run(variables, words, targets, memory, key):
        def objective(params, probe):
            (nll, after), solution = _apply(
                model,
                {"params": params},
                words,
                targets,
                memory,
                train=True,
                rngs={"dropout": key},
                probe=probe,
            )
            loss = nll.mean()
            if task == "train with JR":
                loss = loss + PENALTY * deq.frobenius_penalty(*solution.at, key=key)
            return loss, (after, solution)

        gradient = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
        # What comes out for the probe are the statistics of the backward solve.
        probe = deq.backward_probe(memory.u)
        (loss, (after, solution)), (grads, stats) = gradient(variables["params"], probe)
        return _evaluations(solution), stats.num_steps, loss, grads, after

    return run


def _apply(model: Any, *operands: Any, probe: Any = None, **options: Any) -> tuple[Any, Any]:
    """(nll, memory) and the solution, None of an explicit network."""
    if not hasattr(model, "solver"):
        return model.apply(*operands, **options), None
    return model.apply(*operands, probe=probe, **options)


def _evaluations(solution: Any) -> Any:
    """Evaluations of f for every stream; 0 without a solve."""
    return 0.0 if solution is None else solution.stats.num_steps


def _compare(name: str) -> dict:
    """Differences of f and of the softmax, at PyTorch's weights, a random state and memory."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    from flax import linen as nn

    import deq_jax as deq
    from benchmarks import _language_torch
    from deq_jax.convert.transformer import convert_state
    from deq_jax.linen import once
    from deq_jax.models.transformer_cell import Injection, positions
    from deq_jax.training.parallel import make_mesh

    size = SIZES[name]
    text = _segment(size, 2)
    state, z, image, nll = _language_torch.reference(size, text)
    case = Case(name, "deq", "deq_jax", "1 device", "infer", 1, None, 2)
    model = _network(case, make_mesh(jax.devices()[:1]))
    params: Any = convert_state(state).params

    def evaluate(params, z):
        vocab = {"params": params["vocab"]}
        embedded = model.vocab.apply(vocab, text.words)
        inject = {"params": params["inject"]}
        u: Any = nn.Dense(3 * size.features).apply(inject, embedded)
        places = positions(size.memory + size.length, size.features)
        x = Injection(u=u, memory=_full_memory(model, text), positions=places)
        f = {"params": deq.weight_norm.merge(params["equilibrium"]["f"])}
        image = model.cell.apply(f, z, x, method=once)
        return image, model.vocab.apply(vocab, z, text.targets, method="nll")

    ours = jax.jit(evaluate)(params, z)
    return {
        "size": name,
        "f": relative_difference(ours[0], image),
        "nll": relative_difference(ours[1], nll),
        "parameters": sum(np.size(a) for a in jax.tree.leaves(params)),
    }


def main() -> None:
    """Runs everything and writes the results."""
    options = parse()
    packages = ("jax", "jaxlib", "flax", "optax", "matplotlib", "torch", "torchdeq")
    require(packages, "pip install -e .[bench,train]")
    same = same_networks(MODULE, options.sizes) if "peers" in options.parts else []
    parts = {
        part: [measured(MODULE, dataclasses.asdict(case), options.steps) for case in cases]
        for part, cases in plan(options).items()
    }
    write(
        options.out / "language.json",
        packages,
        device=options.device,
        machine=machine(options.device),
        threads=options.threads,
        compared=same,
        **parts,
    )
    print(tables(parts))
    _plot(parts, options.out / "language.png")


if __name__ == "__main__":
    serve(measure, main)
