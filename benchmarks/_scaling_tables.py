"""Tables and plot of the scaling benchmark."""

import random
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks._scaling_model import NETWORKS, Sizes, cost_ms, program_ms

TARGET = 256
"""Devices that the tables reckon for."""

CURVE = [2**i for i in range(1, 11)]
DRAWN = "wikitext103_jr"


def good(rows: Sequence[dict]) -> list[dict]:
    """Rows without an error.

    Args:
        rows: from the runner.

    Returns:
        Those that were measured.
    """
    return [row for row in rows if "error" not in row]


def largest(rows: Sequence[dict]) -> list[dict]:
    """Rows of the most devices.

    Args:
        rows: from the runner.

    Returns:
        Those that also counted solver steps.
    """
    return [row for row in good(rows) if row["steps"] is not None]


def short(row: dict) -> dict:
    """A row for the report.

    Args:
        row: from the runner.

    Returns:
        It without lists; what they say is in the tables.
    """
    kept = {key: value for key, value in row.items() if key != "steps"}
    if "collectives" in row:
        kept["collectives"] = {k: v for k, v in row["collectives"].items() if k != "each"}
    return kept


def loops(rows: Sequence[dict]) -> list[dict]:
    """Iterations of every device.

    Args:
        rows: from the runner.

    Returns:
        For each model at the budgets of evaluation and training, for the made one with its examples
        sorted and shuffled: "forward" and "backward" of each device under shard_map; "plain", of
        every device under plain jit; "tests", all-reduces in its loops; "work", iterations of all
        devices over those of plain jit; "longest", the same of the device that takes longest.
    """
    found = []
    for row in largest(rows):
        if row["form"] != "shard_map":
            continue
        steps, name = row["steps"], row["model"]
        size, limit = row["examples"], row["iterations"][0]
        if name == "uneven":
            order = random.Random(0).sample(range(len(steps["forward"])), len(steps["forward"]))
            shuffled = {solve: [all_[i] for i in order] for solve, all_ in steps.items()}
            found.append(_devices(f"{name}, sorted", steps, size))
            found.append(_devices(f"{name}, shuffled", shuffled, size))
            continue
        found.append(_devices(f"{name}, at most {row['budget']} steps", steps, size))
        # A smaller budget changes nothing before it is spent.
        cut = steps | {"forward": [min(k, limit) for k in steps["forward"]]}
        if cut != steps:
            found.append(_devices(f"{name}, at most {limit} steps as in training", cut, size))
    return found


def _devices(name: str, steps: dict[str, list[int]], size: int) -> dict:
    each = {
        solve: [max(all_[i : i + size]) for i in range(0, len(all_), size)]
        for solve, all_ in steps.items()
    }
    plain = {solve: max(all_) for solve, all_ in steps.items()}
    sums, whole = [sum(both) for both in zip(*each.values(), strict=True)], sum(plain.values())
    shares = {"work": statistics.mean(sums) / whole, "longest": max(sums) / whole}
    return {"inputs": name, **each, "plain": plain, "tests": whole + 2, **shares}


def programs(rows: Sequence[dict]) -> list[dict]:
    """Collectives of the compiled programs, and what they would cost on `TARGET` devices.

    Args:
        rows: from the runner.

    Returns:
        One for each model and form.
    """
    keys = ("in_loops", "loop_bytes", "once", "once_bytes", "branch_bytes", "executed")
    return [
        {"model": row["model"], "form": row["form"], "least": 4 * row["parameters"]}
        | {key: row["collectives"][key] for key in keys}
        | {"ms": {name: program_ms(row["collectives"]["each"], name, TARGET) for name in NETWORKS}}
        for row in largest(rows)
    ]


def published(sizes: dict[str, dict]) -> list[dict]:
    """What the published presets would spend on communication on `TARGET` devices.

    Args:
        sizes: preset -> fields of `Sizes`.

    Returns:
        One for each preset.
    """
    return [
        {"preset": name, **fields, "bytes": 4 * fields["params"]}
        | {"ms": {network: cost_ms(Sizes(**fields), network, TARGET) for network in NETWORKS}}
        for name, fields in sizes.items()
    ]


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table.

    Args:
        heads: of the columns.
        lines: cells.

    Returns:
        Its text.
    """
    rule = "|" + " --- |" * len(heads)
    first, *rest = ["| " + " | ".join(line) + " |" for line in (heads, *lines)]
    return "\n".join([first, rule, *rest])


def text(report: dict) -> str:
    """All tables.

    Args:
        report: "rows", "loops", "programs" and "published".

    Returns:
        Markdown.
    """
    parts = [
        f"Training step on simulated devices ({report['machine']})\n\n" + times(report["rows"]),
        "Solver iterations, min / mean / max over the devices under shard_map; all-reduces in the "
        "loops, shard_map and plain jit; forward + backward iterations of all devices, and of the "
        "one that takes longest, over those of plain jit\n\n" + _loops(report["loops"]),
        "Collectives of the compiled steps, on the most devices\n\n" + _programs(report),
        f"The same on {TARGET} devices, by the model, ms of a step\n\n" + _costs(report),
    ]
    if report["published"]:
        head = f"Published presets on {TARGET} devices, by the model, ms of a step\n\n"
        parts.append(head + _published(report["published"]))
    return "\n" + "\n\n".join(parts)


def times(rows: Sequence[dict]) -> str:
    """The measured times.

    Args:
        rows: from the runner.

    Returns:
        Markdown.
    """
    lines = []
    for row in rows:
        size = row["devices"] * row["examples"]
        label = [row["model"], str(row["devices"]), str(size)]
        if "error" in row:
            lines.append([*label, f"failed: {row['error']}"])
            continue
        ms, cpu = row["ms"], row["cpu_ms"]
        cells = [f"{ms:,.1f}", f"{ms / size:.3f}", f"{cpu / size:.3f}"]
        lines.append([*label, row["form"], *cells])
    heads = ("model", "devices", "batch", "solves", "ms", "ms an example", "CPU ms an example")
    return table(heads, lines)


def _loops(rows: Sequence[dict]) -> str:
    def spread(steps: Sequence[int]) -> str:
        return f"{min(steps)} / {statistics.mean(steps):.1f} / {max(steps)}"

    lines = [
        [row["inputs"], spread(row["forward"]), spread(row["backward"])]
        + [f"{row['plain']['forward']} + {row['plain']['backward']}", f"0, {row['tests']}"]
        + [f"{row['work']:.0%}", f"{row['longest']:.0%}"]
        for row in rows
    ]
    heads = ("inputs", "forward", "backward", "plain jit, every device")
    heads += ("all-reduces in loops", "work of all devices", "longest device")
    return table(heads, lines)


def _programs(report: dict) -> str:
    lines = [
        [row["model"], row["form"], f"{row['in_loops']} ({row['loop_bytes']} B)"]
        + [
            f"{row['once']} ({row['once_bytes'] / 1e3:,.0f} kB)",
            f"{row['branch_bytes'] / 1e3:,.0f}",
        ]
        + [f"{row['least'] / 1e3:,.0f}", f"{row['once_bytes'] / row['least']:.2f}"]
        + [str(row["executed"])]
        for row in report["programs"]
    ]
    heads = ("model", "solves", "in loops, an iteration of both", "outside")
    heads += ("of it for the penalty, kB", "4 B x parameters, kB", "ratio")
    return table((*heads, "collectives run in a step"), lines)


def _costs(report: dict) -> str:
    lines = [
        [row["model"], row["form"]] + [f"{ms:.2f}" for name in NETWORKS for ms in row["ms"][name]]
        for row in report["programs"]
    ]
    heads = [f"{name}: {part}" for name in NETWORKS for part in ("outside loops", "in loops")]
    return table(("model", "solves", *heads), lines)


def _published(rows: Sequence[dict]) -> str:
    lines = [
        [row["preset"], f"{row['params'] / 1e6:.1f} M", f"{row['bytes'] / 1e6:,.0f}"]
        + [f"{row['forward']} + {row['backward']}"]
        + [f"{ms:.2f}" for name in NETWORKS for ms in row["ms"][name].values()]
        for row in rows
    ]
    parts = ("gradients", "batch norm", "plain jit's loops")
    heads = [f"{name}: {part}" for name in NETWORKS for part in parts]
    return table(("preset", "parameters", "MB", "solver steps", *heads), lines)


def plot(rows: Sequence[dict], sizes: dict[str, dict], path: Path) -> None:
    """Time of an example against simulated devices; communication against real ones.

    Args:
        rows: from the runner.
        sizes: preset -> fields of `Sizes`.
        path: of the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5))
    styles = {"shard_map": "o-", "plain jit": "s--"}
    for i, model in enumerate(dict.fromkeys(row["model"] for row in good(rows))):
        for form, style in styles.items():
            chosen = [r for r in good(rows) if (r["model"], r["form"]) == (model, form)]
            counts = [r["devices"] for r in chosen]
            each = [r["ms"] / (r["devices"] * r["examples"]) for r in chosen]
            left.plot(counts, each, style, color=f"C{i}", label=f"{model}, {form}")
    left.set_title("measured: simulated devices sharing the machine's cores", fontsize=9)
    left.set_ylabel("ms of a training step for each example")
    if DRAWN in sizes:
        for i, network in enumerate(NETWORKS):
            costs = [cost_ms(Sizes(**sizes[DRAWN]), network, n) for n in CURVE]
            least = [c["gradients"] + c["norms"] for c in costs]
            plain = [a + c["loops"] for a, c in zip(least, costs, strict=True)]
            right.plot(
                CURVE, least, styles["shard_map"], color=f"C{i}", label=f"{network}, shard_map"
            )
            right.plot(
                CURVE, plain, styles["plain jit"], color=f"C{i}", label=f"{network}, plain jit"
            )
        right.set_title(f"by a model: {DRAWN}", fontsize=9)
    right.set_ylabel("ms of communication in a training step")
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:.0f}")
        ax.set_xlabel("devices")
        ax.set_ylim(bottom=0) if ax is right else ax.set_yscale("log")
        if ax.lines:
            ax.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
