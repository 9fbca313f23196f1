"""Measure one case, given as JSON on the command line, and print one line of JSON.

A process for each case makes the number of threads and the peak memory belong to that case alone.
"""

import ctypes
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NEVER = 1e-30
"""A tolerance nobody reaches: all libraries run all their steps."""

PENALTY = 0.4
"""Weight of the Jacobian penalty, one probe, in the case "train with JR"."""


@dataclasses.dataclass(frozen=True)
class Program:
    """What a library hands to the stopwatch.

    Attributes:
        run: one step or one inference; blocks until it is done.
        evaluations: after a run, how many evaluations of f its solver counted, forward.
        peak: on a GPU, gives the most memory in MiB that a call takes beyond what was in use.
    """

    run: Callable[[], Any]
    evaluations: Callable[[], float]
    peak: Callable[[Callable[[], Any]], float]


def in_process(module: str, request: dict) -> dict:
    """Run a module in a fresh process.

    Args:
        module: called with the request, as JSON; it prints one line of JSON.
        request: what it is to do.

    Returns:
        Its answer, or "error".
    """
    child = subprocess.run(
        [sys.executable, "-m", module, json.dumps(request)],
        cwd=Path(__file__).resolve().parents[1],
        env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},  # memory as it is needed
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode:
        lines = child.stderr.strip().splitlines() or [f"exit code {child.returncode}"]
        return {"error": lines[-1]}
    return json.loads(child.stdout.splitlines()[-1])


def limit_threads(threads: int) -> None:
    """Bind the process to `threads` CPUs; to be called before JAX or PyTorch is imported.

    XLA sizes its pools by the CPUs it may run on, PyTorch and BLAS by OMP_NUM_THREADS.

    Args:
        threads: how many.

    Raises:
        ValueError: if the machine has fewer.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if threads > len(allowed):
        raise ValueError(f"{threads} threads wanted, {len(allowed)} CPUs here: lower --threads")
    os.sched_setaffinity(0, allowed[:threads])
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ["JAX_PLATFORMS"] = "cpu"


def machine(device: str) -> str:
    """What the cases ran on.

    Args:
        device: "cpu" or "gpu".

    Returns:
        The GPU's name, or the processor's.
    """
    if device == "gpu":
        import torch  # pyright: ignore[reportMissingImports]

        return torch.cuda.get_device_name()
    return platform.processor() or platform.machine()


def memory_mb(field: str) -> float:
    """VmRSS (now) or VmHWM (the highest since the last reset) of this process.

    Args:
        field: the line's name in /proc/self/status.

    Returns:
        Mebibytes.
    """
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field))


def peak_mb(run) -> float:
    """How far one run lifts the resident memory above what its inputs, libraries and program take.

    Args:
        run: called once, for the first time, so that no pool has been filled before.

    Returns:
        Mebibytes.
    """
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before = memory_mb("VmRSS")
    run()
    return memory_mb("VmHWM") - before


def jax_peak_mb(run) -> float:
    """`peak_mb` on JAX's first device, which is no CPU.

    Args:
        run: called once.

    Returns:
        Mebibytes.
    """
    import jax

    device = jax.devices()[0]
    before = (device.memory_stats() or {}).get("bytes_in_use", 0)
    run()
    return ((device.memory_stats() or {}).get("peak_bytes_in_use", 0) - before) / 2**20


def cuda_peak_mb(run) -> float:
    """`peak_mb` on PyTorch's CUDA device.

    Args:
        run: called once.

    Returns:
        Mebibytes.
    """
    import torch  # pyright: ignore[reportMissingImports]

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def times_ms(runs: list, repeats: int, seconds: float = 6.0) -> list[list[tuple[float, float]]]:
    """Wall times of warm runs, taken in turns so that a disturbance of the machine hits all alike.

    Args:
        runs: what to time; each blocks until done.
        repeats: rounds, unless `seconds` are over and three are done.
        seconds: the budget.

    Returns:
        For each of `runs`, (wall, CPU of all threads) milliseconds of every round.
    """
    for run in runs:
        run()
    times, end = [[] for _ in runs], time.perf_counter() + seconds
    while len(times[0]) < repeats and (len(times[0]) < 3 or time.perf_counter() < end):
        for run, out in zip(runs, times, strict=True):
            start, start_cpu = time.perf_counter(), time.process_time()
            run()
            wall, cpu = time.perf_counter() - start, time.process_time() - start_cpu
            out.append((1e3 * wall, 1e3 * cpu))
    return times


def timed(program: Program, device: str, repeats: int) -> dict:
    """Measure a program.

    Args:
        program: not yet run.
        device: "cpu" or "gpu".
        repeats: timed runs.

    Returns:
        In milliseconds ms (median), best_ms and cpu_ms; peak_mb of the first run; evaluations of f
        in the forward solve.
    """
    peak = (peak_mb if device == "cpu" else program.peak)(program.run)
    (times,) = times_ms([program.run], repeats)
    walls, cpus = zip(*times, strict=True)
    return {
        "ms": statistics.median(walls),
        "best_ms": min(walls),
        "cpu_ms": statistics.median(cpus),
        "peak_mb": peak,
        "evaluations": program.evaluations(),
    }


def measure(fields: dict, repeats: int) -> dict:
    """Build a case and measure it.

    Args:
        fields: of `Case`.
        repeats: timed runs.

    Returns:
        The fields and, in milliseconds, ms and evaluation_ms (medians), best_ms (the quickest
        round) and cpu_ms (median CPU time of all threads), the last two for machines that are not
        idle; ratio, ms over steps * evaluation_ms; peak_mb; check, sums of the answer.
    """
    from benchmarks._peers import Case, build

    case = Case(**fields)
    program = build(case)
    program.evaluate()
    peak = (peak_mb if case.device == "cpu" else program.peak)(program.run)
    runs, evaluations = times_ms([program.run, program.evaluate], repeats)
    walls, cpus = zip(*runs, strict=True)
    ms = statistics.median(walls)
    evaluation_ms = statistics.median(wall for wall, _ in evaluations) / case.steps
    check = [float(abs(a.astype("float64")).sum()) for a in program.answer()]
    return fields | {
        "ms": ms,
        "best_ms": min(walls),
        "cpu_ms": statistics.median(cpus),
        "evaluation_ms": evaluation_ms,
        "ratio": ms / (case.steps * evaluation_ms),
        "peak_mb": peak,
        "check": check,
    }


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    if request["case"]["device"] == "cpu":
        limit_threads(request["case"]["threads"])
    print(json.dumps(measure(request["case"], request["repeats"])))
