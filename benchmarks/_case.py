"""Runs a case in a process of its own and measures it there.

A process for each case makes the number of threads and the peak memory belong to that case alone.
A benchmark is one module: without a request its `main` runs, with one it measures a single case.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

NEVER = 1e-30
"""A tolerance that no solver reaches: all libraries run all their steps."""

PENALTY = 0.4
"""Weight of the Jacobian penalty, one probe, in the case "train with JR"."""


def measured(module: str, case: dict, repeats: int) -> dict:
    """Measures a case in a fresh process and reports it on stderr.

    Args:
        module: of the benchmark; it calls `serve`.
        case: what the process is to measure.
        repeats: timed runs.

    Returns:
        The case and its measurements, or the case and "error".
    """
    row = case | in_process(module, {"case": case, "repeats": repeats})
    shown = "{ms:.1f} ms, {peak_mb:.0f} MB".format(**row) if "ms" in row else row["error"]
    print(f"{' '.join(map(str, case.values()))}: {shown}", file=sys.stderr, flush=True)
    return row


def in_process(module: str, request: dict) -> dict:
    """Runs a module in a fresh process.

    Args:
        module: it calls `serve`.
        request: what it gets, as JSON.

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


def serve(measure: Callable[[dict], dict], main: Callable[[], None]) -> None:
    """Answers the request of `in_process`; without one, runs the benchmark.

    Args:
        measure: takes the request; its answer is printed as JSON.  The threads that the case of
            the request names are all that it gets.
        main: the benchmark.

    Raises:
        ValueError: if the case wants more threads than there are CPUs.
    """
    if len(sys.argv) != 2 or not sys.argv[1].startswith("{"):
        return main()
    request = json.loads(sys.argv[1])
    case = request.get("case", {})
    if "compare" in request:
        os.environ["JAX_PLATFORMS"] = "cpu"
    if "threads" in case and case.get("device", "cpu") == "cpu":
        _limit_threads(case["threads"])
    print(json.dumps(measure(request)))


def same_networks(module: str, names: Sequence[str]) -> list[dict]:
    """Compares deq_jax's networks with PyTorch's: other networks would be another benchmark.

    Args:
        module: it calls `serve`, and answers {"compare": name} with relative differences as floats.
        names: of the networks.

    Returns:
        The answers.  A difference above 1e-4 ends the program.
    """
    answers = [in_process(module, {"compare": name}) for name in names]
    print(f"same weights in both libraries: {answers}", file=sys.stderr, flush=True)
    for answer in answers:
        differences = [n for n in answer.values() if isinstance(n, float)]
        if "error" in answer or not all(n <= 1e-4 for n in differences):
            sys.exit(f"the two networks differ: {answer}")
    return answers


def _limit_threads(threads: int) -> None:
    """XLA sizes its pools by the CPUs it may run on, PyTorch and BLAS by OMP_NUM_THREADS."""
    allowed = sorted(os.sched_getaffinity(0))
    if threads > len(allowed):
        raise ValueError(f"got {threads} threads; {len(allowed)} CPUs are here: lower --threads")
    os.sched_setaffinity(0, allowed[:threads])
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ["JAX_PLATFORMS"] = "cpu"


def machine(device: str = "cpu") -> str:
    """Names what the cases ran on.

    Args:
        device: "cpu" or "gpu".

    Returns:
        The GPU's name, or the processor's.
    """
    if device == "gpu":
        import torch  # pyright: ignore[reportMissingImports]

        return torch.cuda.get_device_name()
    return platform.processor() or platform.machine()


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program of JAX, and the only operands that it gets; a call blocks until it is done."""

    program: Any
    operands: tuple

    def __call__(self) -> Any:
        """Runs it."""
        import jax

        return jax.block_until_ready(self.program(*self.operands))

    @property
    def mb(self) -> float:
        """MiB that a run takes above its operands.

        The compiler has laid them out; a GPU's allocator would count the choice of kernels too.
        """
        memory = self.program.memory_analysis()
        return (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 2**20


def compiled(function: Callable[..., Any], *operands: Any) -> Compiled:
    """Compiles a function of JAX.

    Args:
        function: of arrays.
        operands: the only ones that it will get.

    Returns:
        What runs it, and blocks until it is done.
    """
    import jax

    return Compiled(jax.jit(function).lower(*operands).compile(), operands)


def timed(
    run: Callable[[], Any],
    repeats: int,
    device: str = "cpu",
    seconds: float = 6.0,
    beside: Sequence[Callable[[], Any]] = (),
) -> dict:
    """Measures a program that has not run yet.

    Args:
        run: runs it once, and blocks until it is done.
        repeats: timed runs, fewer if `seconds` are over and three are done.
        device: "cpu" or "gpu".
        seconds: the budget.
        beside: other programs, timed in turns with it: a disturbance of the machine hits all alike.

    Returns:
        "ms", the median; "best_ms" and "cpu_ms" (median CPU time of all threads), for machines
        that are not idle; "peak_mb", how far the first run lifts the memory above what inputs,
        libraries and program take; "beside_ms", medians of the others, if there are any.
    """
    peak = _peak_mb(run, device)
    first, *others = _times_ms([run, *beside], repeats, seconds)
    walls, cpus = zip(*first, strict=True)
    found = {
        "ms": statistics.median(walls),
        "best_ms": min(walls),
        "cpu_ms": statistics.median(cpus),
        "peak_mb": peak,
    }
    if others:
        found["beside_ms"] = [statistics.median(wall for wall, _ in times) for times in others]
    return found


def _times_ms(runs: list, repeats: int, seconds: float) -> list[list[tuple[float, float]]]:
    """For each of `runs`, warm, the (wall, CPU of all threads) milliseconds of every round."""
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


def _peak_mb(run: Callable[[], Any], device: str) -> float:
    """The resident memory of the process; on a GPU, what the program or PyTorch takes; in MiB."""
    if device == "cpu":
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")
        before = _resident_mb("VmRSS")
        run()
        return _resident_mb("VmHWM") - before
    if isinstance(run, Compiled):
        return run.mb
    import torch  # pyright: ignore[reportMissingImports]

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _resident_mb(field: str) -> float:
    """VmRSS (now) or VmHWM (the highest since the last reset) of this process."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field))
