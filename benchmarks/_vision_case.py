"""Measure one vision case, given as JSON on the command line, and print one line of JSON."""

import dataclasses
import json
import os
import sys

import numpy as np

from benchmarks._case import limit_threads, timed

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


def batch(images: int) -> tuple[np.ndarray, np.ndarray]:
    """Random images and labels.

    Args:
        images: how many.

    Returns:
        float32 [B, 32, 32, 3] and int32 [B].
    """
    rng = np.random.default_rng(0)
    x = rng.standard_normal((images, 32, 32, 3), dtype=np.float32)
    return x, rng.integers(0, 10, images).astype(np.int32)


def measure(case: Case, repeats: int) -> dict:
    """Build a case and measure it.

    Args:
        case: what to measure.
        repeats: timed runs.

    Returns:
        The fields of the case and, in milliseconds, ms (median), best_ms and cpu_ms; peak_mb of
        the first run; evaluations of f in the forward solve.
    """
    if case.library == "deq_jax":
        from benchmarks._vision_jax import build
    else:
        from benchmarks._vision_torch import build
    program = build(case)
    return dataclasses.asdict(case) | timed(program, case.device, repeats)


def difference(name: str) -> dict:
    """The same weights in both libraries, at a random state.

    Args:
        name: of `MODELS`.

    Returns:
        model; f and logits, the largest difference over the largest value; parameters.
    """
    from benchmarks import _vision_jax, _vision_torch

    return {"model": name} | _vision_jax.compare(name, *_vision_torch.reference(name))


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
