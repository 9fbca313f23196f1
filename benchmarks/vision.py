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
import itertools
import os
from collections.abc import Callable, Sequence
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
from benchmarks._report import RESULTS, of_the_best_peer, plot_bars, require, table, write

MODULE = "benchmarks.vision"
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
COLUMNS = ("task", "network", "library", "form", "ms", "ms an image", "MB", "of the best PyTorch")

STOPPED = 6
"""Evaluations of f in inference."""


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes of a multiscale DEQ and its evaluations of f in training."""

    channels: tuple[int, ...]
    head: tuple[int, ...]
    final: int
    forward: int
    backward: int
    expansion: int = 5
    classes: int = 10


MODELS = {
    "cifar10_tiny": Model((24, 24), (8, 16), 200, 18, 20),
    # Evaluations of the preset cifar10_large_jr.
    "cifar10_large": Model((32, 64, 128, 256), (14, 28, 56, 112), 1680, 8, 7),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: a network of a library in one of its forms, what it does, on how many images."""

    model: str
    library: str
    form: str
    task: str
    batch: int
    threads: int = 2
    device: str = "cpu"


def read(
    arguments: Sequence[str] | None,
    about: str,
    name: str,
    default: Sequence[str],
    forms: dict[str, dict[str, tuple[str, ...]]],
    batches: dict[str, dict[str, int]],
    parts: Sequence[str] = (),
) -> argparse.Namespace:
    """Reads the command line of the vision or of the language benchmark.

    Args:
        arguments: instead of sys.argv.
        about: what the benchmark does.
        name: of the flag that chooses networks.
        default: networks, if none are chosen.
        forms: device -> library -> how it can run.
        batches: device -> network -> batch.
        parts: choices of the flag --parts, if there is one.

    Returns:
        The options; "batch" is network -> batch, "forms" is library -> forms.
    """
    parser = argparse.ArgumentParser(description=about)
    known = itertools.chain(*(own for one in forms.values() for own in one.values()))
    parser.add_argument(f"--{name}", nargs="+", choices=tuple(batches["cpu"]), default=default)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--batch", nargs="+", type=int, help=f"one for each of --{name}")
    parser.add_argument("--forms", nargs="+", choices=tuple(dict.fromkeys(known)))
    parser.add_argument("--steps", type=int, default=5, help="timed runs; the median is shown")
    parser.add_argument("--device", choices=tuple(forms), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU")
    parser.add_argument("--out", type=Path, default=RESULTS)
    if parts:
        parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    options = parser.parse_args(arguments)
    names = getattr(options, name)
    sizes = options.batch or [batches[options.device][one] for one in names]
    if len(sizes) != len(names):
        parser.error(f"--batch: got {len(sizes)} for {len(names)} {name}; give one for each")
    options.batch = dict(zip(names, sizes, strict=True))
    options.forms = {
        library: [form for form in own if options.forms is None or form in options.forms]
        for library, own in forms[options.device].items()
    }
    return options


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line.

    Args:
        arguments: instead of sys.argv.

    Returns:
        From `read`.
    """
    about = "Time the multiscale DEQ beside its peers."
    return read(arguments, about, "models", tuple(MODELS), FORMS, BATCHES)


def plan(options: argparse.Namespace) -> list[Case]:
    """Lists the cases, those that are compared next to each other.

    Args:
        options: from `parse`.

    Returns:
        The cases in running order; ResNet-101 follows the inference of each model.
    """
    cases = []
    for (model, images), task in itertools.product(options.batch.items(), options.tasks):
        pairs = [(model, library, form) for library, own in options.forms.items() for form in own]
        if task == "infer":
            pairs += [(RIVAL, "deq_jax", form) for form in options.forms["deq_jax"]]
        place = (task, images, options.threads, options.device)
        cases += [Case(*pair, *place) for pair in pairs]
    return cases


def _groups(rows: list[dict]) -> dict[tuple[str, int], list[dict]]:
    """(model, batch) -> rows; those of ResNet-101 follow the model they stand beside."""
    found: dict[tuple[str, int], list[dict]] = {}
    model = ""
    for row in rows:
        model = model if row["model"] == RIVAL else row["model"]
        found.setdefault((model, row["batch"]), []).append(row)
    return found


def tables(rows: list[dict]) -> str:
    """Writes the results as Markdown, one table for each model.

    Args:
        rows: each with the fields of its case.

    Returns:
        The text.
    """
    text = []
    for (model, images), group in _groups(rows).items():
        sizes = MODELS[model]
        counts = f"{sizes.forward} + {sizes.backward} in training, {STOPPED} in inference"
        lines = []
        for row in group:
            label = [row["task"], row["model"], row["library"], row["form"]]
            if "error" in row:
                lines.append([*label, "failed"])
                continue
            each = f"{row['ms'] / images:,.1f}"
            cells = [f"{row['ms']:,.1f}", each, f"{row['peak_mb']:,.0f}"]
            lines.append([*label, *cells, of_the_best_peer(row, group)])
        text += [f"\n{model}, {images} images; evaluations {counts}\n", table(COLUMNS, lines)]
    return "\n".join(text)


def _batch(images: int) -> tuple[np.ndarray, np.ndarray]:
    """Random images [B, 32, 32, 3] and labels [B]."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((images, 32, 32, 3), dtype=np.float32)
    return x, rng.integers(0, 10, images).astype(np.int32)


def measure(request: dict) -> dict:
    """Answers one process.

    Args:
        request: "case", fields of `Case`, and "repeats"; or "compare", of `MODELS`.

    Returns:
        What `benchmarks._case.timed` says, and "evaluations" of f in the forward solve; or the
        differences of the two networks.
    """
    if "compare" in request:
        return _compare(request["compare"])
    case = Case(**request["case"])
    if case.library == "deq_jax":
        run, counts = _build(case)
    else:
        from benchmarks import _vision_torch

        model = MODELS[case.model]
        run, counts = _vision_torch.build(case, model, STOPPED, *_batch(case.batch))
    return timed(run, request["repeats"], case.device, case.library) | counts()


def _build(case: Case) -> tuple[Callable[[], Any], Callable[[], dict]]:
    """The path of a training run, compiled; the form says over how many devices it is split."""
    import jax

    devices = int(case.form.split()[0])
    if case.device == "cpu":
        jax.config.update("jax_num_cpu_devices", devices)
    from deq_jax.models.resnet import ResNet
    from deq_jax.training.parallel import batch_sharding, make_mesh, replicated

    mesh = make_mesh(jax.devices()[:devices])
    if case.model == RIVAL:
        model = ResNet(classes=10, depth=101, stem="cifar")
    else:
        model = _mdeq(MODELS[case.model], mesh)
    images, labels = (jax.device_put(a, batch_sharding(mesh)) for a in _batch(case.batch))
    start = jax.jit(lambda key: model.init(key, images, train=False))
    variables = jax.device_put(start(jax.random.key(0)), replicated(mesh))
    step = _inference(model) if case.task == "infer" else _training(model, case.task)
    operands = (variables, images, labels, jax.random.key(1))
    program = jax.jit(step).lower(*operands).compile()

    def counts() -> dict:
        return {"evaluations": float(np.mean(program(*operands)[0]))}

    return lambda: jax.block_until_ready(program(*operands)), counts


def _mdeq(sizes: Model, mesh: Any) -> Any:
    """The multiscale DEQ as the experiments wire it, without dropout."""
    import deq_jax as deq
    from deq_jax.models.heads import ClassificationHead
    from deq_jax.models.mdeq import MDEQ
    from deq_jax.models.mdeq_cell import MDEQCell
    from deq_jax.training.parallel import sharded_fixed_point

    return MDEQ(
        cell=MDEQCell(channels=sizes.channels, expansion=sizes.expansion),
        head=ClassificationHead(sizes.classes, sizes.head, sizes.final),
        solver=deq.Broyden(tol=NEVER, max_steps=sizes.forward),
        adjoint=deq.Implicit(deq.Broyden(tol=NEVER, max_steps=sizes.backward)),
        fixed_point=sharded_fixed_point(mesh),
    )


def _inference(model: Any) -> Callable:
    """Gives evaluations of f and logits."""
    from deq_jax.models.mdeq import MDEQ

    def run(variables, images, labels, key):
        del labels, key
        if not isinstance(model, MDEQ):
            return 0.0, model.apply(variables, images, train=False)
        result: Any = model.apply(variables, images, train=False, max_steps=STOPPED)
        logits, solution = result
        return solution.stats.num_steps, logits

    return run


def _training(model: Any, task: str) -> Callable:
    """Gives evaluations of f, loss, gradients and batch statistics."""
    import jax
    import optax

    import deq_jax as deq

    def run(variables, images, labels, key):
        def objective(params):
            (logits, solution), updated = model.apply(
                {**variables, "params": params},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            if task == "train with JR":
                loss = loss + PENALTY * deq.frobenius_penalty(*solution.at, key=key)
            return loss, (solution.stats.num_steps, updated)

        gradient = jax.value_and_grad(objective, has_aux=True)
        (loss, (count, updated)), grads = gradient(variables["params"])
        return count, loss, grads, updated

    return run


def _compare(name: str) -> dict:
    """Differences of f and of the logits, at PyTorch's weights and a random state."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    from benchmarks import _vision_torch
    from deq_jax.convert.mdeq import convert_state
    from deq_jax.models.mdeq_cell import WEIGHT_NORM
    from deq_jax.training.parallel import make_mesh

    state, z, x, image, logits = _vision_torch.reference(MODELS[name])
    model = _mdeq(MODELS[name], make_mesh(jax.devices()[:1]))
    converted = convert_state(state)
    params, stats = converted.params, converted.batch_stats
    f = {"params": WEIGHT_NORM.merge(params["equilibrium"]["f"])}
    ours = jax.jit(model.cell.apply)(f, tuple(z), x)
    head = {"params": params["head"], "batch_stats": stats["head"]}
    scores = jax.jit(lambda v, z: model.head.apply(v, z, train=False))(head, tuple(z))
    return {
        "model": name,
        "f": max(map(relative_difference, ours, image)),
        "logits": relative_difference(scores, logits),
        "parameters": sum(np.size(a) for a in jax.tree.leaves(params)),
    }


def main() -> None:
    """Runs everything and writes the results."""
    options = parse()
    require(("torch", "torchdeq", "optax", "matplotlib"), "pip install -e .[bench,train]")
    same = same_networks(MODULE, options.models)
    rows = [measured(MODULE, dataclasses.asdict(case), options.steps) for case in plan(options)]
    write(
        options.out / "vision.json",
        ("jax", "jaxlib", "flax", "torch", "torchdeq"),
        device=options.device,
        machine=machine(options.device),
        threads=options.threads,
        compared=same,
        rows=rows,
    )
    print(tables(rows))
    panels = {f"{model}, {size} images": own for (model, size), own in _groups(rows).items()}
    plot_bars(options.out / "vision.png", panels, _bar, "task")


def _bar(row: dict) -> str:
    return "\n".join((RIVAL if row["model"] == RIVAL else row["library"], *row["form"].split(" ")))


if __name__ == "__main__":
    serve(measure, main)
