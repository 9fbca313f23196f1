"""Measure one language case, given as JSON on the command line, and print one line of JSON."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable

import numpy as np

from benchmarks._case import Program, limit_threads, timed

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
        task: see `benchmarks.language.TASKS`.
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
class Step(Program):
    """A program that may solve backward too.

    Attributes:
        products: after a run, how many products with the Jacobian its backward solver counted.
    """

    products: Callable[[], float]


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


def segment(size: Size, batch: int) -> Segment:
    """Random words after a full memory.

    Args:
        size: of the model.
        batch: streams.

    Returns:
        One segment of every stream.
    """
    rng = np.random.default_rng(0)
    words, targets = rng.integers(0, size.words, (2, batch, size.length)).astype(np.int32)
    remembered = rng.standard_normal((batch, size.memory, 3 * size.features), dtype=np.float32)
    z, u = np.split(remembered, [size.features], axis=2)
    return Segment(words, targets, z, u)


def measure(case: Case, repeats: int) -> dict:
    """Build a case and measure it.

    Args:
        case: what to measure.
        repeats: timed runs.

    Returns:
        The fields of the case and, in milliseconds, ms (median), best_ms and cpu_ms; tokens_s,
        tokens per second; peak_mb of the first run of this size; evaluations of f in the forward
        solve and products with its Jacobian in the backward one, 0 where there is none.
    """
    if case.library == "deq_jax":
        from benchmarks._language_jax import build
    else:
        from benchmarks._language_torch import build
    if case.device == "cpu":
        # Code and threads that a library loads at its first run are no memory of the case's.
        build(dataclasses.replace(case, size="toy", batch=2)).run()
    program = build(case)
    found = timed(program, case.device, repeats)
    return (
        dataclasses.asdict(case)
        | found
        | {
            "tokens_s": 1e3 * case.batch * SIZES[case.size].length / found["ms"],
            "products": program.products(),
        }
    )


def difference(name: str) -> dict:
    """The same weights in both libraries, at a random state and memory.

    Args:
        name: of `SIZES`.

    Returns:
        size; f and nll, the largest difference over the largest value; parameters.
    """
    from benchmarks import _language_jax, _language_torch

    return {"size": name} | _language_jax.compare(name, *_language_torch.reference(name))


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    if "compare" in request:
        os.environ["JAX_PLATFORMS"] = "cpu"
        print(json.dumps(difference(request["compare"])))
    else:
        chosen = Case(**request["case"])
        if chosen.device == "cpu":
            limit_threads(chosen.threads)
        print(json.dumps(measure(chosen, request["repeats"])))
