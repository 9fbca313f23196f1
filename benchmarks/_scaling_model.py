"""What all-reduces cost on many devices, by a model; nothing here is measured.

    seconds = latency(n) + bytes * 2 (n - 1) / n / bandwidth(n)

GPUs: nodes of 8 H100 with NVLink and 8 x 400 Gb/s InfiniBand.  Latency is what NCCL reckons with to
choose its algorithm (src/graph/tuning.cc as of 2025: baseLat and hwLat of a tree, in microseconds),
for g GPUs in each of m nodes:

    base + 2 ((g - 1) nvlink + log2(m) net)

in the quicker of two protocols: LL, with 1 / 3.8 of the bandwidth, and Simple.  Bandwidth: 450 GB/s
of NVLink within a node (H100 data sheet, 900 in both directions), 8 x 50 GB/s between nodes.

TPU v4: a torus of three axes, as equal as powers of two can be (4 x 8 x 8 for 256).  A hop takes a
microsecond, 9e10 bytes/s leave a chip along every axis that is a ring ("How to Scale Your Model",
jax-ml.github.io/scaling-book, parts 2 and 3; there 3 hops of small arrays that should take 3
microseconds are measured at 8).  An all-reduce is a reduce-scatter and an all-gather, each of half
an axis' length in hops on every axis.  Axes shorter than 4 are no rings and have half of it.

Left out: that gradients can be summed while the backward pass goes on, jitter, congestion.  Other
collectives are taken for all-reduces of their result.
"""

import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Iterable

GPUS_PER_NODE = 8
NVLINK_BANDWIDTH = 450e9
NET_BANDWIDTH = GPUS_PER_NODE * 400e9 / 8


@dataclasses.dataclass(frozen=True)
class Protocol:
    """One of NCCL's protocols: latencies in seconds, and its share of the bandwidth."""

    base: float
    nvlink: float
    net: float
    share: float


PROTOCOLS = (Protocol(6.8e-6, 0.6e-6, 5.0e-6, 1 / 3.8), Protocol(8.4e-6, 4.0e-6, 14.0e-6, 1.0))

TPU_HOP = 1e-6
TPU_AXIS_BANDWIDTH = 9e10
TPU_AXES = 3
TPU_RING = 4

BATCH_NORM = 4
"""Collectives that XLA makes of a batch normalisation over a split batch: sum and sum of squares,
and as many backward.  The program of the digits preset has 44 for 12 of them, some merged."""


def gpu_seconds(size: float, devices: int) -> float:
    """One all-reduce over H100s.

    Args:
        size: bytes.
        devices: a power of two.

    Returns:
        Seconds.
    """
    if devices == 1:
        return 0.0
    local = min(devices, GPUS_PER_NODE)
    nodes = devices // local
    bandwidth = NVLINK_BANDWIDTH if nodes == 1 else min(NVLINK_BANDWIDTH, NET_BANDWIDTH)
    sent = 2 * (devices - 1) / devices * size
    return min(
        p.base
        + 2 * ((local - 1) * p.nvlink + math.log2(nodes) * p.net)
        + sent / (p.share * bandwidth)
        for p in PROTOCOLS
    )


def torus(devices: int) -> tuple[int, ...]:
    """Sides of a TPU slice.

    Args:
        devices: a power of two.

    Returns:
        Powers of two, as equal as can be.
    """
    power = round(math.log2(devices))
    return tuple(2 ** ((power + i) // TPU_AXES) for i in range(TPU_AXES))


def tpu_seconds(size: float, devices: int) -> float:
    """One all-reduce over TPU v4 chips.

    Args:
        size: bytes.
        devices: a power of two.

    Returns:
        Seconds.
    """
    sides = [side for side in torus(devices) if side > 1]
    if not sides:
        return 0.0
    hops = 2 * sum(side // 2 if side >= TPU_RING else side - 1 for side in sides)
    bandwidth = sum(TPU_AXIS_BANDWIDTH / (1 if side >= TPU_RING else 2) for side in sides)
    return hops * TPU_HOP + 2 * (devices - 1) / devices * size / bandwidth


NETWORKS: dict[str, Callable[[float, int], float]] = {
    "TPU v4": tpu_seconds,
    "H100, InfiniBand": gpu_seconds,
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the model has to know of a preset.

    Attributes:
        params: number of parameters, all float32.
        norms: batch normalisations, whose statistics are those of the whole batch.
        forward: largest number of evaluations of f in a training step.
        backward: of products with its Jacobian.
    """

    params: int
    norms: int
    forward: int
    backward: int


def cost_ms(sizes: Sizes, network: str, devices: int) -> dict[str, float]:
    """Communication of one training step.

    Args:
        sizes: of the preset.
        network: of `NETWORKS`.
        devices: a power of two.

    Returns:
        Milliseconds: "gradients", one all-reduce; "norms", tiny ones; "loops", those that plain
        jit adds, one for each test of whether all samples have converged.
    """
    seconds = NETWORKS[network]
    tests = sizes.forward + 1 + sizes.backward + 1
    return {
        "gradients": 1e3 * seconds(4.0 * sizes.params, devices),
        "norms": 1e3 * BATCH_NORM * sizes.norms * seconds(256.0, devices),
        "loops": 1e3 * tests * seconds(1.0, devices),
    }


def program_ms(each: Iterable[tuple[int, int, bool]], network: str, devices: int) -> list[float]:
    """Communication of a program that was compiled for fewer devices.

    Args:
        each: bytes of a collective, how often a step runs it, and whether in a loop.
        network: of `NETWORKS`.
        devices: a power of two.

    Returns:
        Milliseconds outside the loops, and in them.
    """
    total = [0.0, 0.0]
    for size, runs, in_loop in each:
        total[in_loop] += 1e3 * runs * NETWORKS[network](size, devices)
    return total


def published(name: str) -> Sizes:
    """Sizes of a preset, from shapes alone: no weights are made.

    Args:
        name: of an image classifier or of a language model on WikiText-103.

    Returns:
        What `cost_ms` wants.
    """
    import jax

    from deq_jax.training.parallel import make_mesh
    from experiments.image_classification.presets import PRESETS as IMAGE_PRESETS
    from experiments.image_classification.task import ImageTask
    from experiments.language_modeling.presets import PRESETS as LANGUAGE_PRESETS
    from experiments.language_modeling.task import LanguageTask

    if name in IMAGE_PRESETS:
        config = IMAGE_PRESETS[name]
        task = ImageTask(config, make_mesh())
    else:
        from benchmarks.softmax import WORDS

        config = LANGUAGE_PRESETS[name]
        task = LanguageTask(config, make_mesh(), WORDS)
    params, extra = jax.eval_shape(task.init, jax.random.key(0))
    return Sizes(
        params=sum(leaf.size for leaf in jax.tree.leaves(params)),
        norms=len(jax.tree.leaves(extra.get("batch_stats", {}))) // 2,
        forward=config.solver.max_steps,
        backward=config.backward.max_steps,
    )


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    names = json.loads(sys.argv[1])["presets"]
    print(json.dumps({name: dataclasses.asdict(published(name)) for name in names}))
