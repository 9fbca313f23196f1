"""Ten training steps of every preset on generated data: none may fail.

    pip install -e .[train]
    python -m benchmarks.presets
    python -m benchmarks.presets --names imagenet_xl --batch 2

The data sets of the published presets are large, and their models want accelerators.  Here each of
them trains on random examples of the right shapes, few at a time and crops no larger than --crop,
on one device of this machine, in a process of its own.  A penalty that a preset applies to few
steps is applied to half of them.  Parameters, the bytes of the training state and the operations of
a step are those of the preset as published; the body of a loop counts once, as one step of a solve.
Memory and time are those of the small batch.  Writes presets.json and prints the table.
"""

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._case import in_process, machine, serve
from benchmarks._model import presets
from benchmarks._report import RESULTS, records, write

MODULE = "benchmarks.presets"
EXPERIMENTS = ("image_classification", "segmentation", "language_modeling")
MIB = 2.0**20


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line.

    Args:
        arguments: instead of sys.argv.

    Returns:
        The options.
    """
    parser = argparse.ArgumentParser(description="Ten steps of every preset on generated data.")
    names = tuple(presets(EXPERIMENTS))
    parser.add_argument("--names", nargs="+", choices=names, default=names)
    parser.add_argument("--batch", type=int, default=2, help="examples that are trained on here")
    parser.add_argument("--crop", type=int, default=64, help="largest side of a scene here")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def measure(request: dict) -> dict:
    """Trains one preset.

    Args:
        request: "preset", "batch", "crop" and "steps".

    Returns:
        Sizes, times and losses.
    """
    import jax

    from deq_jax.training import fields
    from deq_jax.training.parallel import make_mesh
    from experiments.common import dry_run

    experiment, config = presets(EXPERIMENTS)[request["preset"]]
    mesh = make_mesh(jax.devices()[:1])
    published = experiment.build_task(config, mesh, None)
    step, state = dry_run.step_and_state(config, published, mesh)
    flops = step.lower(state, dry_run.batch(config, published, mesh)).cost_analysis()["flops"]
    changes = {"train.batch_size": request["batch"], "jac.prob": max(config.jac.prob, 0.5)}
    if crop := getattr(config.data, "crop", None):
        changes["data.crop"] = tuple(min(side, request["crop"]) for side in crop)
    small = fields.replace(config, changes)
    task = experiment.build_task(small, mesh, None)
    program, _, seconds = dry_run.compile_step(small, task, mesh)
    memory = program.memory_analysis()
    return {
        "parameters": sum(math.prod(a.shape) for a in jax.tree.leaves(state.params)),
        "state_mib": sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(state))
        / MIB,
        "batch": config.train.batch_size,
        "flops": flops,
        "memory_mib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / MIB,
        "compile_s": seconds,
        **_train(program, small, task, mesh, request["steps"]),
    }


def _train(program: Any, config: Any, task: Any, mesh: Any, steps: int) -> dict:
    import jax

    from deq_jax.training import metrics
    from deq_jax.training.optim import make_optimizer
    from deq_jax.training.state import create_state
    from experiments.common import dry_run

    optimizer = make_optimizer(config.optim, config.train.steps)
    state = create_state(task, optimizer, 0, mesh, shard_above=config.shard_above)
    batch = generated(dry_run.batch(config, task, mesh))
    losses, counts, began = [], [], time.perf_counter()
    for _ in range(steps):
        state, means = program(state, batch)
        means = jax.device_get({n: means[n] for n in ("loss", "fwd_steps") if n in means})
        shown = metrics.compute(means)  # without those of a step that was skipped
        losses.append(shown.get("loss", math.nan))
        counts += [shown["fwd_steps"]] if "fwd_steps" in shown else []
    return {
        "step_s": (time.perf_counter() - began) / steps,
        "losses": losses,
        "evaluations": float(np.mean(counts)) if counts else None,
    }


def generated(shapes: dict[str, Any]) -> dict[str, np.ndarray]:
    """Draws one batch.

    Args:
        shapes: name -> `jax.ShapeDtypeStruct`.

    Returns:
        Normal numbers for images; 0 to 9 for labels and words; ones for masks and weights.
    """
    rng = np.random.default_rng(0)

    def draw(leaf: Any) -> np.ndarray:
        if not np.issubdtype(leaf.dtype, np.floating):
            return rng.integers(0, 10, leaf.shape).astype(leaf.dtype)
        if len(leaf.shape) < 4:
            return np.ones(leaf.shape, leaf.dtype)
        return rng.standard_normal(leaf.shape).astype(leaf.dtype)

    return {name: draw(leaf) for name, leaf in shapes.items()}


def tables(rows: Sequence[dict]) -> str:
    """Writes the results as Markdown.

    Args:
        rows: of `measure`, with "preset" and "examples", or with "error".

    Returns:
        The table.
    """
    columns = {
        "preset": "{preset}",
        "parameters": "{parameters:,}",
        "state, MiB": "{state_mib:,.0f}",
        "batch": "{batch}",
        "TFLOPs": lambda row: f"{row['flops'] / 1e12:,.3g}",
        "examples here": "{examples}",
        "memory here, MiB": "{memory_mib:,.0f}",
        "compilation, s": "{compile_s:,.0f}",
        "a step here, s": "{step_s:,.2f}",
        "evaluations of f": lambda row: (
            "-" if row["evaluations"] is None else f"{row['evaluations']:.1f}"
        ),
        "loss": lambda row: f"{row['losses'][0]:.2f} to {row['losses'][-1]:.2f}",
    }
    return records(columns, rows)


def main() -> None:
    """Runs everything and writes the results; exits with 1 if a preset failed."""
    options, rows = parse(), []
    for name in options.names:
        request = {key: getattr(options, key) for key in ("batch", "crop", "steps")}
        found = in_process(MODULE, {"preset": name, **request})
        if not np.isfinite(found.get("losses", 0)).all():
            found = {"error": f"losses {found['losses']}"}
        rows.append({"preset": name, "examples": options.batch, **found})
        print(tables(rows[-1:]), flush=True)
        write(options.out / "presets.json", ("jax", "jaxlib", "flax"), machine=machine(), rows=rows)
    print(tables(rows))
    if failed := [row["preset"] for row in rows if "error" in row]:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    serve(measure, main)
