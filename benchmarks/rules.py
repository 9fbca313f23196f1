"""Every gradient rule on the preset `digits`: accuracy, time and memory of a step, evaluations.

    python -m benchmarks.rules

Each rule trains with and without Jacobian regularisation, once for every seed, by the command of
the experiment; runs that are already in --work are not repeated.  Then the training steps of all
rules are compiled in one process and timed in turns.  Writes rules.json and prints the table.
"""

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks._case import in_process, machine, serve, timed
from benchmarks._report import RESULTS, table, write

RULES: dict[str, dict[str, Any]] = {
    "implicit": {},
    "neumann": {"backward.name": "neumann"},
    "unroll": {"backward.name": "unroll", "backward.max_steps": 1},
    "backprop": {"backward.name": "backprop"},
    "reversible": {
        "backward.name": "reversible",
        "backward.damping": 0.5,
        "solver.name": "picard",
        "solver.keep": "last",
    },
    "shine": {"backward.name": "shine", "backward.max_steps": 0},
    "shine-2": {"backward.name": "shine", "backward.max_steps": 2},
}
"""Name -> flags; all others are the preset's: Broyden, 8 steps forward, 8 products backward."""

BUDGETS = ("8", "30")
PENALTY = {"jr": {}, "no_jr": {"jac.gamma": 0}}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line.

    Args:
        arguments: instead of sys.argv.

    Returns:
        The chosen rules, seeds, training steps, folders and number of timed steps.
    """
    parser = argparse.ArgumentParser(description="Train digits by every gradient rule.")
    parser.add_argument("--rules", nargs="+", choices=tuple(RULES), default=tuple(RULES))
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--steps", type=int, default=300, help="training steps of a run")
    parser.add_argument("--work", type=Path, default=Path("runs/rules"), help="folder of the runs")
    parser.add_argument("--repeats", type=int, default=15, help="timed steps; the median is shown")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def _train(rule: str, penalty: str, seed: int, steps: int, work: Path) -> dict:
    """What the experiment writes about the model, trained unless it has been; or "error"."""
    folder = work / f"{rule}_{penalty}_{seed}_{steps}"
    if not (folder / "results.json").exists():
        flags = RULES[rule] | PENALTY[penalty]
        flags |= {
            "train.seed": seed,
            "train.steps": steps,
            "train.eval_every": 0,
            "preset": "digits",
        }
        command = [sys.executable, "-m", "experiments.image_classification.main", "--nocompare"]
        ended = subprocess.run(
            [*command, f"--workdir={folder}", *(f"--{name}={flags[name]}" for name in flags)],
            capture_output=True,
            text=True,
            check=False,
        )
        if ended.returncode:
            return {"error": ended.stderr.strip().splitlines()[-1]}
    return json.loads((folder / "results.json").read_text())["model"]


def _measure(request: dict) -> dict[str, dict]:
    """Milliseconds and temporary MiB of a training step of every rule, with a penalty in each."""
    import jax

    jax.config.update("jax_num_cpu_devices", 2)
    from deq_jax.training import fields
    from deq_jax.training.optim import make_optimizer
    from deq_jax.training.parallel import make_mesh, place
    from deq_jax.training.state import create_state
    from deq_jax.training.step import make_train_step
    from experiments.image_classification.data import open_data
    from experiments.image_classification.presets import PRESETS
    from experiments.image_classification.task import build_task

    mesh = make_mesh()
    runs, memory = [], {}
    for rule in request["rules"]:
        config = fields.replace(PRESETS["digits"], RULES[rule] | {"jac.prob": 1.0})
        task = build_task(config, mesh)
        optimizer = make_optimizer(config.optim, config.train.steps)
        state = create_state(task, optimizer, 0, mesh)
        batch = place(next(open_data(config).train), mesh)
        step: Any = make_train_step(task, config, optimizer, mesh)
        program = step.lower(state, batch).compile()
        memory[rule] = program.memory_analysis().temp_size_in_bytes / 2**20
        box = [state]

        def run(program: Any = program, box: list = box, batch: Any = batch) -> None:
            box[0], measured = program(box[0], batch)
            jax.block_until_ready(measured)

        runs.append(run)
    found = timed(runs[0], request["repeats"], seconds=120.0, beside=runs[1:])
    times = [found["ms"], *found.get("beside_ms", [])]
    return {r: {"ms": ms, "mib": memory[r]} for r, ms in zip(memory, times, strict=True)}


def tables(runs: list[dict], steps: dict[str, dict]) -> str:
    """Writes the results as Markdown.

    Args:
        runs: one for each rule, penalty and seed.
        steps: rule -> time and memory of a training step.

    Returns:
        The text: mean and range over the seeds; times and memory relative to the first rule's.
    """
    heads = [f"{name} at {b}, %" for name in ("JR", "no JR") for b in BUDGETS]
    base, lines = next(iter(steps.values())), []
    for rule, own in steps.items():
        used = [row for row in runs if row["rule"] == rule and "accuracy" in row]
        cells = []
        for penalty, budget in itertools.product(PENALTY, BUDGETS):
            values = [100 * r["accuracy"][budget] for r in used if r["model"] == penalty]
            spread = f" ({min(values):.1f} to {max(values):.1f})" if values else ""
            cells.append(f"{statistics.mean(values or [math.nan]):.1f}{spread}")
        for key in ("train_steps", "backward_steps"):
            cells.append(f"{statistics.mean([r.get(key) or 0 for r in used] or [math.nan]):.1f}")
        lines.append([rule, *cells, *(f"{own[key] / base[key]:.2f}" for key in ("ms", "mib"))])
    return table(("rule", *heads, "steps forward", "backward", "time", "memory"), lines)


def main() -> None:
    """Runs everything and writes the results."""
    options = parse()
    runs = []
    for seed, rule, penalty in itertools.product(options.seeds, options.rules, PENALTY):
        row = _train(rule, penalty, seed, options.steps, options.work)
        runs.append(row | {"rule": rule, "model": penalty, "seed": seed})
        shown = row.get("error") or row["accuracy"]
        print(f"{rule} {penalty} {seed}: {shown}", file=sys.stderr, flush=True)
    steps = in_process("benchmarks.rules", {"rules": options.rules, "repeats": options.repeats})
    if "error" in steps:
        sys.exit(f"the steps were not timed: {steps['error']}")
    contents: dict = {"train_steps": options.steps, "runs": runs, "steps": steps}
    write(options.out / "rules.json", ("jax", "jaxlib", "flax"), machine=machine(), **contents)
    print(tables(runs, steps))


if __name__ == "__main__":
    serve(_measure, main)
