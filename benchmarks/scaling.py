"""How the training step scales: measured on simulated devices, reckoned for real ones.

    pip install -e .[train]
    python -m benchmarks.scaling

Measured, on 1, 2, 4 and 8 simulated CPU devices, a process for each: training steps of the presets
digits (scanned digits, the penalty in every step) and prose (words drawn by Zipf's law), and of a
made map whose examples differ in difficulty.  The examples on each device stay the same, so the
batch grows with the devices.  Every step is compiled twice, with the solves inside `jax.shard_map`
as the experiments have them, and by plain jit (`fixed_point=deq.fixed_point`); the two take turns.

Simulated devices share the machine's cores: beyond their number nothing gets faster, and with 2
cores a step on 8 devices takes at best 4 times as long as one on 2.  What can be read off is the
time of an example, which stays constant from 2 devices on if splitting costs nothing; CPU time of
all threads says the same with waiting left out.  Nothing here says how fast a network is.

In digits and prose every solve takes all of its 8 + 8 steps (tolerance 1e-30), so that both forms
do equal work.  In the made map each device stops when its own examples have converged.  They are
sorted by difficulty over the devices, which favours shard_map most ("shuffled" says what is left
without), and a device that has finished leaves the machine's cores to the others, which makes time
of it.  On real devices it does not: at the end of a step all wait for the slowest device.  What is
gained there is that no iteration has to be agreed on, and no more than "longest device" says.
Solver steps are counted sample by sample, after some training; a device takes as many as its
slowest sample (in `tests/test_cost.py` a callback counts them).

Read from the compiled programs: their collectives, in and outside of loops, and their bytes (as XLA
for CPUs compiles them).  Reckoned from them by the model in `_scaling_model.py`, which states its
sources: milliseconds on many devices; also for the published presets, whose shapes are enough.
Writes scaling.json and scaling.png and prints the tables.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import os
import sys
from pathlib import Path

from benchmarks import _scaling_tables as tables
from benchmarks._case import in_process
from benchmarks._scaling_case import MODELS, Case

PUBLISHED = (
    "cifar10_large",
    "cifar10_large_jr",
    "imagenet_small_jr",
    "imagenet_xl",
    "wikitext103",
    "wikitext103_jr",
)
RUNNER = "benchmarks._scaling_case"
TRAINED = {"digits": 40, "prose": 40, "uneven": 0}
"""Training steps before solver steps are counted."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Args:
        arguments: instead of sys.argv.

    Returns:
        The chosen models, devices, examples, presets, threads, repeats and the output folder.
    """
    parser = argparse.ArgumentParser(description="Scaling of the training step over devices.")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 2, 4, 8], help="simulated")
    text = "on each device, one number for each of --models"
    parser.add_argument("--examples", nargs="+", type=int, help=text)
    parser.add_argument("--published", nargs="*", default=list(PUBLISHED), help="presets to reckon")
    parser.add_argument("--steps", type=int, default=7, help="timed steps; the median is shown")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    if options.examples is None:
        options.examples = [MODELS[name] for name in options.models]
    if len(options.examples) != len(options.models):
        parser.error(f"--examples: got {len(options.examples)} for {len(options.models)} models")
    return options


def plan(options: argparse.Namespace) -> list[Case]:
    """The cases; solver steps are counted on the most devices only.

    Args:
        options: from `parse`.

    Returns:
        The cases in running order.
    """
    most = max(options.devices)
    return [
        Case(name, n, examples, options.threads, TRAINED[name] if n == most else None)
        for name, examples in zip(options.models, options.examples, strict=True)
        for n in options.devices
    ]


def measured(case: Case, repeats: int) -> list[dict]:
    """Run one case and say what came of it.

    Args:
        case: what to run.
        repeats: timed steps.

    Returns:
        A row for each form, or one with "error".
    """
    fields = dataclasses.asdict(case)
    found = in_process(RUNNER, {"case": fields, "repeats": repeats})
    rows = found.get("rows") or [fields | found]
    shown = found.get("error") or ", ".join(f"{row['form']} {row['ms']:.1f} ms" for row in rows)
    print(f"{case.model}, {case.devices} devices: {shown}", file=sys.stderr, flush=True)
    return rows


def processor() -> str:
    """The model of this machine's CPU and the number of its cores that may be used.

    Returns:
        For instance "AMD EPYC, 2 cores".
    """
    with open("/proc/cpuinfo") as lines:
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{(names or ['unknown'])[0]}, {len(os.sched_getaffinity(0))} cores"


def main() -> None:
    """Run everything and write the results."""
    options = parse()
    needed = ("optax", "sklearn", "matplotlib")
    if absent := [name for name in needed if importlib.util.find_spec(name) is None]:
        sys.exit(f"not installed: {', '.join(absent)}; pip install -e .[train]")
    rows = [row for case in plan(options) for row in measured(case, options.steps)]
    sizes = {}
    if options.published:
        sizes = in_process("benchmarks._scaling_model", {"presets": options.published})
        if "error" in sizes:
            sys.exit(f"no sizes of {options.published}: {sizes['error']}")
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": processor(),
        "threads": options.threads,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
        "rows": [tables.short(row) for row in rows],
        "loops": tables.loops(rows),
        "programs": tables.programs(rows),
        "published": tables.published(sizes),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "scaling.json").write_text(json.dumps(report, indent=1) + "\n")
    tables.plot(rows, sizes, options.out / "scaling.png")
    print(tables.text(report))
    print(f"\nwritten: {options.out}/scaling.json, {options.out}/scaling.png")


if __name__ == "__main__":
    main()
