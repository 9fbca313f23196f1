"""Accelerators that XLA compiles for without having one, and what their chips do at most."""

import dataclasses
import math
import os
import sys
from typing import Any

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024
  thread_dim_limit_z: 64 device_vendor: "NVIDIA Corporation" name: "NVIDIA H100 80GB HBM3"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.12.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Chip:
    """Ceilings from the maker's data sheet.

    Attributes:
        flops: matrix operations a second on float32 arrays at JAX's default precision: TF32 on a
            GPU, one pass of bfloat16 on a TPU; without sparsity.
        bf16_flops: the same on bfloat16 arrays.
        bandwidth: bytes a second between chip and its memory.
    """

    flops: float
    bf16_flops: float
    bandwidth: float

    def least_seconds(self, flops: float, moved: float, precision: str = "float32") -> float:
        """The time below which no program of this size can run.

        Args:
            flops: floating-point operations.
            moved: bytes read and written.
            precision: "float32", or "bf16" where some of the operations are on bfloat16 arrays.

        Returns:
            Seconds: a bound, not a measurement.
        """
        rate = self.bf16_flops if precision == "bf16" else self.flops
        return max(flops / rate, moved / self.bandwidth)


CHIPS = {
    "h100": Chip(495e12, 990e12, 3.35e12),
    "v4": Chip(275e12, 275e12, 1.228e12),
    "v5e": Chip(197e12, 197e12, 0.819e12),
    "v5p": Chip(459e12, 459e12, 2.765e12),
    "v6e": Chip(918e12, 918e12, 1.64e12),
}
FORMS = "h100, h100:8 (so many on one host), or tpu-KIND:SHAPE such as tpu-v5e:2x2"


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices that need not exist.

    Attributes:
        name: as it was given.
        chip: what one of them does at most.
        devices: for a mesh or a sharding.
    """

    name: str
    chip: Chip
    devices: list[Any]

    @property
    def is_gpu(self) -> bool:
        """Whether a program's instructions are kernels."""
        return self.name.startswith("h100")

    @property
    def compiler(self) -> str:
        """The package that compiles for it, as it is installed."""
        return "jax-cuda13-plugin" if self.is_gpu else "libtpu"


def prepare() -> None:
    """Keeps JAX from looking for the devices; to be called before it is imported."""
    os.environ.update(
        JAX_PLATFORMS="cpu",
        CUDA_VISIBLE_DEVICES="-1",
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_WORKER_ID="0",
    )


def find(name: str) -> Target:
    """Looks up a target, or ends the program in one sentence.

    Args:
        name: see `FORMS`.

    Returns:
        The target.
    """
    from jax.experimental import topologies

    kind, _, shape = name.removeprefix("tpu-").partition(":")
    on_tpu = name.startswith("tpu-")
    sides = shape.split("x") if shape else []
    fits = bool(sides) if on_tpu else len(sides) < 2
    if (
        kind not in CHIPS
        or on_tpu == (kind == "h100")
        or not fits
        or not all(map(str.isdigit, sides))
    ):
        sys.exit(f"got --target={name}; wanted {FORMS}, of {', '.join(CHIPS)}")
    try:
        if on_tpu:
            found = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}")
        else:
            size = {"topology": f"1x{math.prod(map(int, sides))}x1", "target_config": H100}
            found = topologies.get_topology_desc(platform="cuda", topology_name=kind, **size)
    except Exception as error:  # XLA's own error, of no public type
        install = 'pip install -e ".[aot]"' if on_tpu else 'pip install "jax[cuda13]"'
        sys.exit(f"no compiler for {name} here: {install} ({error})")
    return Target(name, CHIPS[kind], list(found.devices))
