"""Kernels in one iteration of a solve on an H100, read from programs compiled without one.

    pip install "jax[cuda13]" -e .[train]
    python -m benchmarks.accelerators

XLA compiles for a GPU that it is only told about: the optimised program shows which kernels an
iteration launches, but not how long they take.  Nothing is run.  Without a device XLA does not
autotune, so that libraries get their default algorithms.

The small cases solve z = tanh(p z + x), whose f is one fused kernel: the rest of an iteration is
the solver's.  Writes accelerators.json and prints the table.
"""

import argparse
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before JAX is imported
    os.environ.update(JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="-1")

import jax
import jax.numpy as jnp

import deq_jax as deq
from benchmarks._report import RESULTS, table, write
from benchmarks.programs import kernels, loops

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

SHAPES = ((32, 1024), (16, 100_000))
SOLVERS: dict[str, Any] = {
    "Picard": deq.Picard(tol=1e-6, max_steps=20),
    "Anderson": deq.Anderson(tol=1e-6, max_steps=30, memory=6),
    "Broyden": deq.Broyden(tol=1e-6, max_steps=30, memory=20),
}
PRESET = "cifar10_large_jr"
COUNTS = "fusions copies calls others conditionals loops kernels test histories".split()
"""See `benchmarks.programs.Kernels`; "test" is the loop's, "histories" are those written whole."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line.

    Args:
        arguments: instead of sys.argv.

    Returns:
        The chosen cases, where to keep the programs, and the output folder.
    """
    parser = argparse.ArgumentParser(description="Count the kernels of solves compiled for H100.")
    names = (*SOLVERS, "MDEQ")
    parser.add_argument("--cases", nargs="+", choices=names, default=names)
    parser.add_argument("--texts", type=Path, help="folder for the texts of the programs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


@functools.cache
def _sharding() -> Any:
    """Where arrays of a program for one H100 lie; the device need not exist."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", topology="1x1x1", target_config=H100
    )
    return jax.sharding.SingleDeviceSharding(topology.devices[0])


def _compiled(function: Callable[..., Any], *operands: Any) -> tuple[str, float]:
    """The text of a function's program for one H100, and the seconds that XLA took."""
    there = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=_sharding()), operands
    )
    lowered = jax.jit(function).lower(*there)
    start = time.perf_counter()
    program = lowered.compile()
    return program.as_text() or "", time.perf_counter() - start


def _small(name: str, shape: tuple[int, int]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A solve of z = tanh(p z + x), and its operands."""

    def f(p: jax.Array, z: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.tanh(p * z + x)

    def run(p: jax.Array, x: jax.Array) -> Any:
        return deq.fixed_point(f, p, jnp.zeros_like(x), x, solver=SOLVERS[name])

    return run, tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, shape[1]), shape))


def _history_bytes(solver: Any, size: int) -> int:
    """The least that a solver's history takes, for `size` numbers in a state."""
    # It need not have room for the last two evaluations of the budget.
    return 4 * size * max(min(getattr(solver, "memory", None) or 0, solver.max_steps) - 2, 0)


def _mdeq() -> tuple[dict[str, tuple[Callable[..., Any], tuple[Any, ...]]], int, str]:
    """The preset `PRESET` in training and its f alone, bytes of a history, and a state's shape."""
    from deq_jax.training.parallel import make_mesh
    from experiments.image_classification.presets import PRESETS
    from experiments.image_classification.task import build_model

    config = PRESETS[PRESET]
    size, batch = config.data.size, config.train.batch_size
    model: Any = build_model(config, make_mesh(jax.devices("cpu")[:1]))
    model = model.clone(fixed_point=deq.fixed_point)
    images = jax.ShapeDtypeStruct((batch, size, size, config.data.colors), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.PRNGKey(0))

    def solve(variables: Any, images: jax.Array, key: jax.Array) -> Any:
        streams = {"dropout": key}
        return model.apply(variables, images, train=True, mutable=["batch_stats"], rngs=streams)[0]

    def init(key: jax.Array, images: jax.Array) -> Any:
        return model.init(key, images, train=False, max_steps=0)

    variables = jax.eval_shape(init, key, images)
    parts: dict[str, Any] = {}

    def equation(*operands: Any) -> Any:
        f, *found = solve(*operands)[1].at
        parts["f"] = f
        return found

    operands = jax.eval_shape(equation, variables, images, key)
    cases = {
        "MDEQ LARGE": (solve, (variables, images, key)),
        "its f alone": (lambda *inside: parts["f"](*inside), tuple(operands)),
    }
    state = jax.tree.leaves(operands[1])
    floats = sum(a.size for a in state) // batch
    shortest = _history_bytes(model.solver, max(a.size for a in state))
    return cases, shortest, f"{batch}, {floats:,}"


def _row(case: str, state: str, text: str, seconds: float, history: int) -> dict:
    """What a program says: its largest loop is the solve; without a loop all of it counts."""
    solves = loops(text)
    if solves:
        body, test = max(solves, key=lambda pair: pair[0].total)
    else:
        body, test = kernels(text), None
    counts = dataclasses.asdict(body)
    written = sum(size >= history > 0 for size in counts.pop("written"))
    found = {"kernels": body.total, "test": test.total if test else 0, "histories": written}
    return {"case": case, "state": state} | counts | found | {"seconds": seconds}


def _measure(options: argparse.Namespace) -> list[dict]:
    """Compiles and reads all cases, a row for each program."""
    rows = []

    def add(case: str, state: str, history: int, function: Any, operands: Any) -> None:
        text, seconds = _compiled(function, *operands)
        if options.texts:
            options.texts.mkdir(parents=True, exist_ok=True)
            (options.texts / f"{case} {state}.txt".replace(" ", "_")).write_text(text)
        rows.append(_row(case, state, text, seconds, history))
        print(f"{case} [{state}]: {rows[-1]['kernels']} kernels", file=sys.stderr, flush=True)

    _compiled(jnp.tanh, jax.ShapeDtypeStruct((8,), jnp.float32))  # loads what the first one loads
    for shape in SHAPES:
        for name in [name for name in SOLVERS if name in options.cases]:
            history = _history_bytes(SOLVERS[name], shape[0] * shape[1])
            add(name, f"{shape[0]}, {shape[1]:,}", history, *_small(name, shape))
    if "MDEQ" in options.cases:
        cases, history, state = _mdeq()
        for name, (function, operands) in cases.items():
            add(name, state, history, function, operands)
    return rows


def main() -> None:
    """Compiles everything and writes the results."""
    options = parse()
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        _sharding()
    except Exception as error:  # XLA's own error, of no public type
        sys.exit(f'no compiler for H100 here: pip install "jax[cuda13]" ({error})')
    rows = _measure(options)
    write(
        options.out / "accelerators.json",
        ("jax", "jaxlib", "jax-cuda13-plugin", "flax"),
        device="NVIDIA H100 80GB: compiled, not run",
        rows=rows,
    )
    lines = [
        [row["case"], f"[{row['state']}]"]
        + [str(row[key]) for key in COUNTS]
        + [f"{row['seconds']:.1f}"]
        for row in rows
    ]
    print(table(("case", "state", *COUNTS, "compile s"), lines))


if __name__ == "__main__":
    main()
