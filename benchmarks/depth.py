"""Memory of a training step against depth: an equilibrium beside explicit layers.

    pip install -e ".[aot]"
    python -m benchmarks.depth --target=h100

At published sizes: the DEQ-Transformer of `wikitext103_jr` with 4 to 32 evaluations of f forward
and as many backward, as it is and with its feed-forward layer in 16 parts, and the Transformer-XL
of `wikitext103_transformer` with as many layers.  All are compiled for one chip that need not be
here (see `benchmarks.accelerators`); solvers keep the last 12 steps.  Beside it the same comparison
as it was measured on a CPU, by `benchmarks.language --parts flat`.  Writes depth.json and depth.png
and prints the table.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import targets

if __name__ == "__main__":  # before JAX is imported
    targets.prepare()

import jax

from benchmarks._report import RESULTS, groups, records, write
from benchmarks.language import LABELS

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "deq": ("wikitext103_jr", {}),
    "parts": ("wikitext103_jr", {"model.hidden_parts": 16}),
    "explicit": ("wikitext103_transformer", {}),
}
LOOKS = {
    "deq": (LABELS["deq"], "oC0-"),
    "parts": (f"{LABELS['deq']}, layer in 16 parts", "dC2-"),
    "explicit": (LABELS["explicit"], "sC1-"),
}
HISTORY = 12
MIB = 2.0**20


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line.

    Args:
        arguments: instead of sys.argv.

    Returns:
        The options.
    """
    parser = argparse.ArgumentParser(description="Memory of a training step against depth.")
    parser.add_argument("--target", default="h100", help=targets.FORMS)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=tuple(NETWORKS))
    parser.add_argument("--depths", nargs="+", type=int, default=(4, 8, 16, 32))
    parser.add_argument("--batch", type=int, default=56, help="streams of text")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if min(options.depths) < 1:
        parser.error(f"got --depths with {min(options.depths)}; wanted at least 1")
    return options


def compiled(network: str, depth: int, batch: int, target: targets.Target) -> dict:
    """Compiles one training step.

    Args:
        network: key of `NETWORKS`.
        depth: evaluations of f, as many backward as forward; or layers.
        batch: streams of text.
        target: the chip.

    Returns:
        The case, "arguments" and "temporaries" in bytes, and the "seconds" that it took.
    """
    from deq_jax.training import fields
    from deq_jax.training.parallel import make_mesh
    from experiments.common import dry_run
    from experiments.language_modeling.main import EXPERIMENT, PRESETS

    preset, values = NETWORKS[network]
    values = values | {"train.batch_size": batch, "data.eval_batch_size": batch}
    if network != "explicit":
        for part in ("solver", "backward"):
            values |= {f"{part}.max_steps": depth, f"{part}.memory": min(HISTORY, depth)}
    else:
        values["model.layers"] = depth
    config, mesh = fields.replace(PRESETS[preset], values), make_mesh(target.devices[:1])
    began = time.perf_counter()
    program, *_ = dry_run.compile_step(config, EXPERIMENT.build_task(config, mesh, None), mesh)
    memory = program.memory_analysis()
    return {
        "network": network,
        "depth": depth,
        "batch": batch,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "seconds": time.perf_counter() - began,
    }


def tables(rows: Sequence[dict]) -> str:
    """Lays out the results.

    Args:
        rows: of `compiled`.

    Returns:
        A Markdown table.
    """
    columns = {
        "network": "{network}",
        "evaluations or layers": "{depth}",
        "streams": "{batch}",
        "state and batch, MiB": lambda row: f"{row['arguments'] / MIB:,.0f}",
        "while it runs, MiB": lambda row: f"{row['temporaries'] / MIB:,.0f}",
        "compilation, s": "{seconds:.0f}",
    }
    return records(columns, rows)


def draw(path: Path, target: str, rows: Sequence[dict], measured: Sequence[dict]) -> None:
    """Draws memory over depth, and time as well where it was measured.

    Args:
        path: of the PNG.
        target: name of the chip.
        rows: of `compiled`.
        measured: rows "flat" of `benchmarks.language`.
    """
    from experiments.common import reporting

    own = [row | {"mib": row["temporaries"] / MIB} for row in rows]
    panels = [
        (f"{target}, published sizes: memory while a step runs, MiB", "mib", own),
        ("CPU, small model: peak memory of a step, MB", "peak_mb", measured),
        ("CPU, small model: time of a step, ms", "ms", measured),
    ]
    panels = [panel for panel in panels if panel[2]]
    figure, (axes,) = reporting.new_figure(1, len(panels), (4.4 * len(panels), 3.8))
    for axis, (title, key, cases) in zip(axes, panels, strict=True):
        for (network,), chosen in groups(cases, "network").items():
            depths, heights = ([row[k] for row in chosen] for k in ("depth", key))
            label, style = LOOKS[network]
            axis.plot(depths, heights, style, label=label)
        axis.set(xlabel="evaluations of f each way, or layers", ylim=(0, None))
        axis.set_title(title, fontsize=9)
        axis.set_xticks(depths)
        axis.legend(frameon=False)
    reporting.save(figure, path)


def main() -> None:
    """Compiles everything and writes the results."""
    options = parse()
    jax.config.update("jax_enable_compilation_cache", False)
    target, rows = targets.find(options.target), []
    for network in options.networks:
        for depth in options.depths:
            rows.append(compiled(network, depth, options.batch, target))
            print(f"compiled: {network}, {depth}", file=sys.stderr, flush=True)
    device = f"{target.devices[0].device_kind}: compiled, not run"
    write(
        options.out / "depth.json",
        ("jax", "jaxlib", target.compiler, "flax"),
        device=device,
        rows=rows,
    )
    print(tables(rows))
    flat = RESULTS / "language.json"
    measured = json.loads(flat.read_text())["flat"] if flat.exists() else []
    draw(options.out / "depth.png", target.name, rows, measured)


if __name__ == "__main__":
    main()
