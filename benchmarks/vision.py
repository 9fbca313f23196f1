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
from functools import partial
from typing import Any

import numpy as np

from benchmarks._case import NEVER, serve, timed
from benchmarks._model import build, compare, measure_all, read
from benchmarks._report import of_the_best_peer, plot_bars, records

MODULE = "benchmarks.vision"
PACKAGES = ("jax", "jaxlib", "flax", "torch", "torchdeq")
FORMS = {
    "cpu": {"deq_jax": ("1 device", "2 devices"), "torchdeq": ("channels_last", "NCHW")},
    "gpu": {"deq_jax": ("1 device",), "torchdeq": ("channels_last", "NCHW", "compiled")},
}
BATCHES = {
    "cpu": {"cifar10_tiny": 16, "cifar10_large": 4},
    "gpu": {"cifar10_tiny": 64, "cifar10_large": 96},
}
RIVAL = "resnet101"
MODELS = {
    "cifar10_tiny": "cifar10_tiny",
    "cifar10_large": "cifar10_large_jr",
    RIVAL: "cifar10_resnet18",  # but for its depth
}
"""Network -> the preset of image classification whose sizes and evaluations it has."""

STOPPED = 6
"""Evaluations of f in inference."""


parse = partial(
    read,
    about="Time the multiscale DEQ beside its peers.",
    name="models",
    default=tuple(BATCHES["cpu"]),
    forms=FORMS,
    batches=BATCHES,
)


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
        config = _config(model, images)
        training = f"{config.solver.max_steps} + {config.backward.max_steps} in training"
        text.append(f"\n{model}, {images} images; evaluations {training}, {STOPPED} in inference\n")
        columns = {
            "task": "{task}",
            "network": "{model}",
            "library": "{library}",
            "form": "{form}",
            "ms": "{ms:,.1f}",
            "ms an image": lambda row: f"{row['ms'] / row['batch']:,.1f}",
            "MB": "{peak_mb:,.0f}",
            "of the best PyTorch": partial(of_the_best_peer, group=group),
        }
        text.append(records(columns, group))
    return "\n".join(text)


def _config(model: str, images: int) -> Any:
    """The preset at equal evaluations and without dropout."""
    from deq_jax.training import fields
    from experiments.image_classification.presets import PRESETS

    preset = PRESETS[MODELS[model]]
    values = {"train.batch_size": images, "model.dropout": 0.0, "jac.budget_high": 0}
    values |= {"solver.tol": NEVER, "backward.tol": NEVER}
    values |= {"eval.max_steps": STOPPED, "eval.budgets": (preset.solver.max_steps,)}
    if model == RIVAL:
        values["model.name"] = RIVAL
    return fields.replace(preset, values)


def measure(request: dict) -> dict:
    """Answers one process.

    Args:
        request: "case", fields of `Case`, and "repeats"; or "compare", a model.

    Returns:
        What `benchmarks._case.timed` says, and "evaluations" of f in the forward solve; or the
        differences of the two networks.
    """
    if "compare" in request:
        return _compare(request["compare"])
    case = Case(**request["case"])
    if case.library == "deq_jax":
        run, counts = build(case, partial(_task, case.model, case.batch))
    else:
        from benchmarks import _vision_torch

        config = _config(case.model, case.batch)
        run, counts = _vision_torch.build(case, config, _batch(case.batch))
    found = timed(run, request["repeats"], case.device)
    return found | {"evaluations": counts()["evaluations"]}


def _batch(images: int) -> dict[str, np.ndarray]:
    """Random images [B, 32, 32, 3] and labels [B]; all of them count."""
    rng = np.random.default_rng(0)
    return {
        "image": rng.standard_normal((images, 32, 32, 3), dtype=np.float32),
        "label": rng.integers(0, 10, images).astype(np.int32),
        "mask": np.ones(images, np.float32),
    }


def _task(model: str, images: int, mesh: Any) -> tuple[Any, Any, dict, None]:
    """What `benchmarks._model` runs."""
    from experiments.image_classification.task import build_task

    config = _config(model, images)
    return build_task(config, mesh), config, _batch(images), None


def _compare(model: str) -> dict:
    """Differences of f and of the logits, at PyTorch's weights and a random state."""
    from benchmarks import _vision_torch
    from deq_jax.convert.mdeq import convert_state

    state, z, image, logits = _vision_torch.reference(_config(model, 2).model, _batch(2))

    def head(net, z):
        return net.head(z, train=False)

    make = partial(_task, model, 2)
    differences = compare(make, convert_state(state), tuple(z), image, head, logits)
    return {"model": model} | dict(zip(("f", "logits", "parameters"), differences, strict=True))


def main() -> None:
    """Runs everything and writes the results."""
    options = parse()
    parts = {"rows": plan(options)}
    rows = measure_all(MODULE, options, PACKAGES, options.models, parts)["rows"]
    print(tables(rows))
    panels = {f"{model}, {size} images": own for (model, size), own in _groups(rows).items()}
    plot_bars(options.out / "vision.png", panels, _bar, "task")


def _bar(row: dict) -> str:
    return "\n".join((RIVAL if row["model"] == RIVAL else row["library"], *row["form"].split(" ")))


if __name__ == "__main__":
    serve(measure, main)
