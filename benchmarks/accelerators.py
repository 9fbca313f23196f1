"""Programs for accelerators, compiled without one and read.

    pip install -e ".[examples,aot]"    # the compiler for TPUs
    python -m benchmarks.accelerators --target=tpu-v5e:2x2
    pip install "jax[cuda13]"           # the compiler for NVIDIA's GPUs
    python -m benchmarks.accelerators --target=h100

XLA compiles for chips that it is only told about: the optimised program shows memory, communication
and, on a GPU, which kernels an iteration launches, but not how long they take.  Nothing is run.
Without a device XLA does not autotune, so that libraries get their default algorithms.

Cases are solvers, the forward solve of "MDEQ" (cifar10_large_jr), and names of presets, whose whole
training step is compiled.  The solvers solve z = tanh(p z + x), whose f is one fused kernel: the
rest of an iteration is the solver's.  "least ms" is no measurement: the time in which the chip
could do the operations, or move operands and results of all kernels to and from its memory, of one
evaluation of f, and of a training step at its full budgets without the penalty's loops; ceilings
are those of `benchmarks.targets`, and what a cache holds takes less.

Writes TARGET.json and TARGET.png (TARGET-bf16 for --precision=bf16, TARGET-sharded for
--shard_above=N) and prints the tables.
"""

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import targets

if __name__ == "__main__":  # before JAX is imported
    targets.prepare()

import jax
import jax.numpy as jnp

import deq_jax as deq
from benchmarks._model import presets
from benchmarks._report import RESULTS, records, write
from benchmarks.programs import LOOPS, collectives, kernels, loops, traffic
from benchmarks.targets import Target
from deq_jax.errors import UsageError

SHAPES = ((32, 1024), (16, 100_000))
SOLVERS: dict[str, Any] = {
    "Picard": deq.Picard(tol=1e-6, max_steps=20),
    "Anderson": deq.Anderson(tol=1e-6, max_steps=30, memory=6),
    "Broyden": deq.Broyden(tol=1e-6, max_steps=30, memory=20),
}
EXPERIMENTS = ("image_classification", "segmentation", "language_modeling", "reasoning")
MDEQ = "cifar10_large_jr"
RIVALS = {
    "cifar10_large_jr": "cifar10_resnet18",
    "cifar10_large": "cifar10_resnet18",
    "imagenet_small_jr": "imagenet_resnet101",
    "wikitext103_jr": "wikitext103_transformer",
    "wikitext103_preln_jr": "wikitext103_transformer",
}
"""Preset of an equilibrium -> that of the explicit network of the same paper."""
DEFAULT = (*SOLVERS, "digits", "prose")
COUNTS = "fusions copies calls others conditionals loops kernels test histories".split()
"""See `benchmarks.programs.Kernels`; "test" is the loop's, "histories" are those written whole."""
MIB = 2.0**20


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line.

    Args:
        arguments: instead of sys.argv.

    Returns:
        The target, the cases, those of them that are presets, examples a device, precision and
        size of sharded arrays, where to keep programs, and the output folder.
    """
    parser = argparse.ArgumentParser(description="Read programs compiled for accelerators.")
    parser.add_argument("--target", required=True, help=targets.FORMS)
    parser.add_argument("--cases", nargs="+", default=DEFAULT, help="solvers, MDEQ, presets")
    parser.add_argument(
        "--per_device", type=int, help="examples of a preset on a device; its own batch if absent"
    )
    parser.add_argument("--precision", choices=("float32", "bf16"), help="of f, in presets")
    parser.add_argument(
        "--shard_above", type=int, help="splits arrays of presets as the experiments' flag does"
    )
    parser.add_argument("--texts", type=Path, help="folder for the texts of the programs")
    parser.add_argument("--out", type=Path, default=RESULTS / "accelerators")
    options = parser.parse_args(arguments)
    for name in ("per_device", "shard_above"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"got --{name}={value}; wanted at least 1")
    options.presets = [name for name in options.cases if name not in (*SOLVERS, "MDEQ")]
    return options


def _compiled(target: Target, function: Callable[..., Any], *operands: Any) -> tuple[Any, float]:
    """A function's program for one chip, and the seconds that XLA took."""
    there = jax.sharding.SingleDeviceSharding(target.devices[0])
    placed = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=there), operands
    )
    lowered = jax.jit(function).lower(*placed)
    start = time.perf_counter()
    return lowered.compile(), time.perf_counter() - start


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


def _found(name: str) -> tuple[Any, Any]:
    """A preset's experiment and configuration."""
    found = presets(EXPERIMENTS)
    if name not in found:
        sys.exit(f"got --cases {name}; wanted {', '.join(SOLVERS)}, MDEQ, or a preset")
    return found[name]


def _on_cpu(experiment: Any, config: Any) -> tuple[Any, Any, Any, Any]:
    """A preset's task on one device of this machine; its step, the step's state and its batch."""
    from deq_jax.training.parallel import make_mesh
    from experiments.common import dry_run

    mesh = make_mesh(jax.devices("cpu")[:1])
    task = experiment.build_task(config, mesh, None)
    return task, *dry_run.step_and_state(config, task, mesh), dry_run.batch(config, task, mesh)


def _equation(config: Any, task: Any, state: Any, batch: Any) -> list[tuple[Any, tuple]]:
    """A model's forward solve in training, and f, each with its operands as shapes."""
    from deq_jax.training.task import forward

    task = dataclasses.replace(task, model=task.model.clone(fixed_point=deq.fixed_point))
    key = jax.eval_shape(lambda: jax.random.PRNGKey(0))
    operands = (state.params, state.extra, state.carry, batch, key)
    parts: dict[str, Any] = {}

    def solve(params: Any, extra: Any, carry: Any, batch: Any, key: Any) -> Any:
        steps = config.solver.max_steps
        found: Any = forward(
            task, config, params, extra, carry, batch, key=key, train=True, max_steps=steps
        )
        parts["f"], *inside = found.solution.at
        return found.solution.value, inside

    _, inside = jax.eval_shape(solve, *operands)
    return [(lambda *a: solve(*a)[0], operands), (parts["f"], tuple(inside))]


def _flops(lowered: Any) -> float:
    """Operations of a program as it was written: XLA counts none inside a GPU's libraries."""
    return lowered.cost_analysis()["flops"]


def _mdeq() -> tuple[dict[str, tuple[Any, Any]], int, str]:
    """The preset `MDEQ` in training and its f alone, bytes of a history, and a state's shape."""
    experiment, config = _found(MDEQ)
    task, _, *given = _on_cpu(experiment, config)
    solve, (f, inside) = _equation(config, task, *given)
    state = jax.tree.leaves(inside[1])
    batch = state[0].shape[0]
    shortest = _history_bytes(config.solver.build(), max(a.size for a in state))
    shape = f"{batch}, {sum(a.size for a in state) // batch:,}"
    return {"MDEQ LARGE": solve, "its f alone": (f, inside)}, shortest, shape


def _step(target: Target, name: str, options: argparse.Namespace) -> tuple[str, dict]:
    """The text of a preset's training step, and its row."""
    from deq_jax.training import fields
    from deq_jax.training.parallel import make_mesh, require_even
    from deq_jax.training.task import has_solver
    from experiments.common import dry_run

    experiment, config = _found(name)
    mesh = make_mesh(target.devices)

    def of_batch(size: int) -> Any:
        values = {"train.batch_size": size}
        if hasattr(config.data, "eval_batch_size"):  # of no program here, but it must divide too
            values["data.eval_batch_size"] = size
        return fields.replace(config, values)

    if options.precision and name not in RIVALS.values():  # there it is always float32
        config = fields.replace(config, {"precision": options.precision})
    if options.shard_above:
        config = fields.replace(config, {"shard_above": options.shard_above})
    config = of_batch((options.per_device or 0) * mesh.size or config.train.batch_size)
    require_even("train.batch_size", config.train.batch_size, mesh.size)
    program, _, seconds = dry_run.compile_step(
        config, experiment.build_task(config, mesh, None), mesh
    )
    text, memory = program.as_text() or "", program.memory_analysis()
    inside = [c for c in collectives(text) if c.place in LOOPS]
    once = [c for c in collectives(text, every_branch=False) if c.place not in LOOPS]
    row = {
        "case": name,
        "examples": config.train.batch_size,
        "devices": mesh.size,
        "precision": config.precision,
        "shard_above": config.shard_above,
        "seconds": seconds,
        "loops": [body.total for body, _ in loops(text)] if target.is_gpu else None,
        "collectives_inside": len(inside),
        "bytes_inside": sum(c.bytes for c in inside),
        "collectives_once": len(once),
        "bytes_once": sum(c.bytes for c in once),
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "bytes": traffic(text),
    }
    one = of_batch(config.train.batch_size // mesh.size)
    task, step, *given = _on_cpu(experiment, one)
    row["flops"] = _flops(step.lower(*given))
    least = functools.partial(target.chip.least_seconds, precision=config.precision)
    row["least_step"] = least(row["flops"], row["bytes"])
    if has_solver(task.model):
        _, (f, inside) = _equation(one, task, *given)

        def product(params: Any, z: Any, x: Any, v: Any) -> Any:
            return jax.vjp(lambda z: f(params, z, x), z)[1](v)

        for key, function, operands in (
            ("f", f, inside),
            ("product", product, (*inside, inside[1])),
        ):
            flops = _flops(jax.jit(function).lower(*operands))
            moved = traffic(_compiled(target, function, *operands)[0].as_text() or "")
            row |= {f"flops_{key}": flops, f"bytes_{key}": moved}
            row[f"least_{key}"] = least(flops, moved)
        # The program counts the body of each loop once.  A product comes with an evaluation of f,
        # which the backward solve does not repeat.
        row["least_step"] += (config.solver.max_steps - 1) * row["least_f"]
        backward = max(row["least_product"] - row["least_f"], 0)
        row["least_step"] += (config.backward.max_steps - 1) * backward
    return text, row


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


def _measure(options: argparse.Namespace, target: Target) -> tuple[list[dict], list[dict]]:
    """Compiles and reads all cases; returns the rows of solves and those of training steps."""
    solves, steps = [], []

    def keep(name: str, text: str) -> None:
        if options.texts:
            options.texts.mkdir(parents=True, exist_ok=True)
            (options.texts / f"{name}.txt".replace(" ", "_")).write_text(text)
        print(f"compiled: {name}", file=sys.stderr, flush=True)

    def add(case: str, state: str, history: int, function: Any, operands: Any) -> None:
        program, seconds = _compiled(target, function, *operands)
        text = program.as_text() or ""
        solves.append(_row(case, state, text, seconds, history))
        keep(f"{case} {state}", text)

    # It loads what the first program loads.
    _compiled(target, jnp.tanh, jax.ShapeDtypeStruct((8,), jnp.float32))
    for shape in SHAPES:
        for name in [name for name in SOLVERS if name in options.cases]:
            history = _history_bytes(SOLVERS[name], shape[0] * shape[1])
            add(name, f"{shape[0]}, {shape[1]:,}", history, *_small(name, shape))
    if "MDEQ" in options.cases:
        cases, history, state = _mdeq()
        for name, (function, operands) in cases.items():
            add(name, state, history, function, operands)
    for name in options.presets:
        text, row = _step(target, name, options)
        steps.append(row)
        keep(name, text)
    return solves, steps


def tables(solves: list[dict], steps: list[dict]) -> str:
    """Lays out the results.

    Args:
        solves: rows of solvers.
        steps: rows of training steps.

    Returns:
        Markdown tables of those that there are.
    """
    text = []
    if solves:
        counts = {name: f"{{{name}}}" for name in COUNTS}
        columns = {"case": "{case}", "state": "[{state}]", **counts, "compile s": "{seconds:.1f}"}
        text.append(records(columns, solves))
    if steps:
        text.append(records(_columns(steps), steps))
    return "\n".join(text)


def _columns(rows: list[dict]) -> dict[str, Any]:
    """Of the table of training steps, as `records` takes them."""

    def scaled(key: str, unit: float, form: str) -> Callable[[dict], str]:
        return lambda row: format(row[key] / unit, form) if key in row else "-"

    def of_the_explicit(row: dict) -> str:
        rival = [_held(r) for r in rows if r["case"] == RIVALS.get(row["case"])]
        return f"{_held(row) / rival[0]:.2f}" if rival else "-"

    return {
        "preset": "{case}",
        "examples": "{examples}",
        "devices": "{devices}",
        "precision": lambda row: row.get("precision", "float32"),
        "compile s": "{seconds:.0f}",
        "kernels of its loops": lambda row: " / ".join(map(str, row["loops"] or "-")),
        "messages in loops": "{collectives_inside}",
        "outside": "{collectives_once}",
        "MiB": scaled("bytes_once", MIB, ".1f"),
        "arguments MiB": scaled("arguments", MIB, ",.0f"),
        "temporaries MiB": scaled("temporaries", MIB, ",.0f"),
        "of the explicit": of_the_explicit,
        "GFLOPs of f": scaled("flops_f", 1e9, ".2f"),
        "MB of f": scaled("bytes_f", 1e6, ",.1f"),
        "least ms of f": scaled("least_f", 1e-3, ".3f"),
        "of a step": scaled("least_step", 1e-3, ".2f"),
    }


def _held(row: dict) -> float:
    return row["arguments"] + row["temporaries"]


def draw(path: Path, target: Target, solves: list[dict], steps: list[dict]) -> None:
    """Draws the kernels of solves, and the memory of training steps.

    Args:
        path: of the PNG.
        target: for the title.
        solves: rows of solvers.
        steps: rows of training steps.
    """
    from experiments.common import reporting

    figure, ((left, right),) = reporting.new_figure(1, 2, (12, 4.5))
    names = [f"{row['case']}\n[{row['state']}]" for row in solves]
    _stack(left, names, solves, ("fusions", "copies", "calls", "others", "test"), 1)
    left.set(title="One iteration", ylabel="kernels" if target.is_gpu else "instructions")
    names = [f"{row['case']}\n{row['examples']} examples" for row in steps]
    _stack(right, names, steps, ("arguments", "temporaries"), MIB)
    right.set(title="Memory of a training step on a device", ylabel="MiB")
    figure.suptitle(f"{target.name}: compiled, not run")
    reporting.save(figure, path)


def _stack(axis: Any, names: list, rows: list[dict], kinds: Sequence[str], unit: float) -> None:
    """A bar for each row, of parts that stand on one another; without rows nothing at all."""
    bottom = [0.0] * len(rows)
    for kind in kinds:
        heights = [row[kind] / unit for row in rows]
        axis.bar(names, heights, bottom=bottom, label=kind)
        bottom = [b + height for b, height in zip(bottom, heights, strict=True)]
    axis.tick_params(axis="x", labelsize=7)
    if rows:
        axis.legend(fontsize=8, frameon=False)
    else:
        axis.set_axis_off()


def main() -> None:
    """Compiles everything and writes the results."""
    options = parse()
    jax.config.update("jax_enable_compilation_cache", False)
    target = targets.find(options.target)
    for name in options.presets:  # before minutes of compiling
        _found(name)
    try:
        solves, steps = _measure(options, target)
    except UsageError as error:
        sys.exit(f"error: {error}")
    name = target.name.replace(":", "-") + ("-bf16" if options.precision == "bf16" else "")
    name += "-sharded" if options.shard_above else ""
    write(
        options.out / f"{name}.json",
        ("jax", "jaxlib", target.compiler, "flax"),
        device=f"{len(target.devices)} of {target.devices[0].device_kind}: compiled, not run",
        solves=solves,
        steps=steps,
    )
    draw(options.out / f"{name}.png", target, solves, steps)
    print(tables(solves, steps))


if __name__ == "__main__":
    main()
