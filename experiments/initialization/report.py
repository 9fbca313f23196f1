"""Tables of all modes, and their numbers as JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import deq_jax as deq
from experiments.common import reporting
from experiments.common.reporting import spread
from experiments.initialization import draw
from experiments.initialization.config import FAMILIES, InitConfig, TheoryConfig
from experiments.initialization.sweep import Family
from experiments.initialization.theory import SOLVERS, predicted_picard
from experiments.initialization.verdict import WINDOW, Verdict, judge, widths


def write_theory(folder: Path, config: InitConfig, records: Sequence[dict[str, Any]]) -> str:
    """Writes results.md, results.json and theory.png.

    Args:
      folder: of the experiment.
      config: theory is read.
      records: from `theory.measure`.

    Returns:
      The tables.
    """
    part = config.theory
    largest = [r for r in records if r["size"] == max(part.sizes)]
    text = f"N = {max(part.sizes)}, mean and standard deviation of {part.seeds} matrices\n\n"
    text += _gain_table(part, largest) + "\n" + _size_table(records)
    text += f"""
L1 = tr(R R^T) / N and L2 = tr((R R^T)^2) / N, R = (I - W)^-1; predicted for N to infinity, from
which measured ones depart by terms in 1 / N that grow towards the critical scale.  Gain:
norm(z)^2 / norm(x)^2 of z = W z + x with Gaussian x, which L1 predicts.  Steps: evaluations of f to
a relative residual of {part.tol:g}, mean over {part.inputs} x, at most {part.max_steps};
a percentage: the share that got there.  The second table: measured over predicted.
"""
    reporting.write(folder, text, {"records": [r | _predictions(part, r) for r in records]})
    draw.theory(folder / "theory.png", part, records)
    return text


def _predictions(config: TheoryConfig, record: Mapping[str, Any]) -> dict[str, Any]:
    family, scale = record["family"], record["scale"]
    first, second = deq.init.predicted_gain(family, scale)
    radius, norm = deq.init.predicted_norms(family, scale)
    steps = predicted_picard(family, scale, config.tol)
    found = {"L1": first, "L2": second, "radius": radius, "norm": norm, "picard_steps": steps}
    return {f"predicted_{name}": value for name, value in found.items()}


def _gain_table(config: TheoryConfig, records: Sequence[dict[str, Any]]) -> str:
    header = ["family", "s", "s/critical", "L1", "predicted", "gain", "L2", "predicted"]
    header += ["Picard", "predicted", *(name.capitalize() for name in list(SOLVERS)[1:])]
    rows = []
    for record in records:
        p = _predictions(config, record)
        steps = {}
        for name in SOLVERS:
            share = np.mean(record[f"{name}_solved"])
            steps[name] = spread(record[f"{name}_steps"]) + (
                "" if share == 1 else f" ({share:.0%})"
            )
        rows.append(
            [
                record["family"],
                f"{record['scale']:.4g}",
                f"{record['fraction']:g}",
                spread(record["L1"], ".4g"),
                f"{p['predicted_L1']:.4g}",
                spread(record["gain"]),
                spread(record["L2"], ".4g"),
                f"{p['predicted_L2']:.4g}",
                steps.pop("picard"),
                str(p["predicted_picard_steps"]),
                *steps.values(),
            ]
        )
    return reporting.table(header, rows)


def _size_table(records: Sequence[dict[str, Any]]) -> str:
    """Measured over predicted by N: radius and norm at any scale, gains at three."""
    fractions = sorted({r["fraction"] for r in records})
    chosen = sorted({fractions[len(fractions) // 2 - 1], *fractions[-2:]})
    header = ["family", "N", "spectral radius", "operator norm"]
    header += [f"{name} at {f:g}" for name in ("L1", "L2") for f in chosen]
    rows = []
    for family in FAMILIES:
        for size in sorted({r["size"] for r in records}):
            own = {r["fraction"]: r for r in records if (r["family"], r["size"]) == (family, size)}
            first = own[fractions[0]]
            norms = deq.init.predicted_norms(family, first["scale"])
            cells = [np.array(first[n]) / p for n, p in zip(("radius", "norm"), norms, strict=True)]
            for i, name in enumerate(("L1", "L2")):
                for f in chosen:
                    wanted = deq.init.predicted_gain(family, own[f]["scale"])[i]
                    cells.append(np.array(own[f][name]) / wanted)
            rows.append([family, str(size), *(spread(c) for c in cells)])
    return reporting.table(header, rows)


def write_sweep(
    folder: Path,
    config: InitConfig,
    families: Mapping[str, Family],
    compiled: Mapping[str, int],
) -> str:
    """Writes results.md, results.json and sweep.png.

    Args:
      folder: of the experiment.
      config: the whole configuration.
      families: name -> what became of its models.
      compiled: what -> number of programs.

    Returns:
      The tables.
    """
    sweep, verdicts = config.sweep, judge(config.sweep, families)
    text = f"{config.data.name}, width {config.model.width}, {config.model.activation}, "
    text += f"{config.train.steps} steps, {sweep.seeds} seeds\n\n" + _width_table(config, verdicts)
    text += "\n" + "\n".join(_differences(config, verdicts)) + "\n"
    for name in families:
        text += "\n" + _family_table(config, name, families[name], verdicts[name])
    solver, seconds = config.solver, sum(f.seconds for f in families.values())
    text += f"""
Trains: test accuracy within {sweep.margin:.0%} of the best of the grid, and at least
{sweep.solved:.0%} of the test set solved at the end.  Solved: a relative residual of {solver.tol:g}
within {config.eval_steps} {solver.name} steps from z = 0.  Octaves: the part of the logarithmic
axis that these scales of the grid stand for.  Diverged: the first step, median over the seeds it
befell, with an update left out (loss or gradient not finite), a {WINDOW}-step mean loss
above {sweep.rise:g} times the first loss, or more than {sweep.unsolved:.0%} of a batch not solved;
models may recover from the last two.  Radius: mean spectral radius of df/dz at the solution.
Programs compiled: {", ".join(f"{n} for {what}" for what, n in compiled.items())};
{seconds:.0f} s in all.
"""
    reporting.write(folder, text, _sweep_numbers(config, families, verdicts, compiled))
    draw.sweep(folder / "sweep.png", config, families, verdicts)
    return text


def _width_table(config: InitConfig, verdicts: Mapping[str, Verdict]) -> str:
    sweep = config.sweep
    count = len(sweep.scales)
    header = [
        "family",
        f"scales that train, of {count}",
        "octaves",
        "accurate",
        "solved at the end",
    ]
    header += ["all seeds train at", "most seeds train at"]
    rows = []
    for name, verdict in verdicts.items():
        number, range_ = widths(sweep, verdict.trained)
        share = verdict.trained.mean(axis=1)
        rows.append(
            [
                name,
                spread(number),
                spread(range_),
                spread(widths(sweep, verdict.accurate)[0]),
                spread(widths(sweep, verdict.solved)[0]),
                *(_list(sweep.scales, chosen) for chosen in (share == 1, share > 0.5)),
            ]
        )
    return reporting.table(header, rows)


def _list(scales: Sequence[float], chosen: np.ndarray) -> str:
    return ", ".join(f"{s:g}" for s, yes in zip(scales, chosen, strict=True) if yes) or "none"


def _differences(config: InitConfig, verdicts: Mapping[str, Verdict]) -> list[str]:
    """The paper's claim, seed by seed."""
    if "gaussian" not in verdicts:
        return []
    lines = []
    base = widths(config.sweep, verdicts["gaussian"].trained)[0]
    for name in verdicts:
        if name != "gaussian":
            more = widths(config.sweep, verdicts[name].trained)[0] - base
            error = more.std(ddof=1) / math.sqrt(len(more))
            word = "wider than" if more.mean() > 2 * error else "narrower than"
            word = "not told apart from" if abs(more.mean()) <= 2 * error else word
            lines.append(
                f"{name}: {word} gaussian, by {more.mean():+.2g} ± {error:.1g} scales "
                "(same seeds; standard error).  The paper expects wider."
            )
    return lines


def _family_table(config: InitConfig, name: str, family: Family, verdict: Verdict) -> str:
    sweep = config.sweep
    shape = (len(sweep.scales), sweep.seeds)
    start, end = ({n: v.reshape(shape) for n, v in d.items()} for d in (family.start, family.end))
    header = [name, "train", "accuracy", "loss", "solved at start", "at end", "radius at start"]
    header += ["at end", "diverged"]
    rows = []
    for i, scale in enumerate(sweep.scales):
        rows.append(
            [
                f"s = {scale:g}",
                f"{verdict.trained[i].sum()} of {sweep.seeds}",
                spread(end["accuracy"][i]),
                spread(end["loss"][i]),
                f"{start['solved'][i].mean():.0%}",
                f"{end['solved'][i].mean():.0%}",
                f"{start['radius'][i].mean():.2f}",
                f"{end['radius'][i].mean():.2f}",
                _divergence(verdict.diverged[i], verdict.cause[i]),
            ]
        )
    return reporting.table(header, rows)


def _divergence(steps: np.ndarray, causes: np.ndarray) -> str:
    counts = Counter(c for c in causes.tolist() if c)
    found = [
        f"{count} {cause} at {np.median(steps[causes == cause]):g}"
        for cause, count in counts.items()
    ]
    return ", ".join(found) or "-"


def _sweep_numbers(
    config: InitConfig,
    families: Mapping[str, Family],
    verdicts: Mapping[str, Verdict],
    compiled: Mapping[str, int],
) -> dict[str, Any]:
    """All that is in the tables, by family and cell; "training" is the mean of the last steps."""
    scales, seeds = config.sweep.scales, config.sweep.seeds
    numbers: dict[str, Any] = {"compiled": dict(compiled)}
    for name, family in families.items():
        verdict = verdicts[name]
        cells = []
        for i in range(len(scales) * seeds):
            row, column = divmod(i, seeds)
            cell: dict[str, Any] = {"scale": scales[row], "seed": config.train.seed + column}
            for when in ("start", "end"):
                found = {n: float(v[i]) for n, v in getattr(family, when).items()}
                cell[when] = {n: v if math.isfinite(v) else None for n, v in found.items()}
            cell["trained"] = bool(verdict.trained[row, column])
            cell["diverged"] = int(verdict.diverged[row, column])
            cell["cause"] = str(verdict.cause[row, column])
            cell["skipped"] = int(family.history["skipped"][i].sum())
            last = {n: v[i, -WINDOW:] for n, v in family.history.items() if n != "skipped"}
            last = {n: v[np.isfinite(v)] for n, v in last.items()}
            cell["training"] = {n: float(v.mean()) if v.size else None for n, v in last.items()}
            cells.append(cell)
        number, range_ = widths(config.sweep, verdict.trained)
        numbers[name] = {
            "width_scales": number.tolist(),
            "width_octaves": range_.tolist(),
            "seconds": family.seconds,
            "cells": cells,
        }
    return numbers


def write_models(folder: Path, config: InitConfig, records: Sequence[Mapping[str, Any]]) -> str:
    """Writes results.md, results.json and models.png.

    Args:
      folder: of the experiment.
      config: models is read.
      records: from `models.measure`.

    Returns:
      The table.
    """

    def cell(values: Sequence[float | None], unit: float = 1.0) -> str:
        return spread([unit * v for v in values if v is not None])

    header = ["model", "weights", "scale", "score", "% not solved, start", "end", "radius"]
    header += ["diverged"]
    rows = []
    for r in records:
        percent = r["metric"] == "accuracy"
        score = cell(r["score"], 100 if percent else 1)
        scale = "-" if r["family"] == "published" else f"{r['scale']:g}"
        metric = f"{r['metric']}{' in %' if percent else ''}"
        rows.append([r["model"], r["family"], scale, f"{metric} {score}"])
        rows[-1] += [cell(r[n], 100) for n in ("start_unsolved", "end_unsolved")]
        rows[-1] += [cell(r["radius"]), f"{sum(r['diverged']):g} of {len(r['diverged'])}"]
    text = reporting.table(header, rows) + "".join(f"\n{line}" for line in _paired(records)) + "\n"
    text += f"""
{config.models.steps} updates without penalty; mean and standard deviation over
{config.models.seeds} seeds.  Not solved: examples of the first updates, within training's budget;
of the evaluation, within its larger one.  Radius: spectral, of df/dz, at the end.  Diverged: ended
by losses that were not finite, and left out of the means.
"""
    reporting.write(folder, text, {"records": records})
    draw.models(folder / "models.png", records)
    return text


def _paired(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The paper's claim on other models: scores over all scales, seed by seed."""
    lines = []
    for model in dict.fromkeys(r["model"] for r in records):
        own = [r for r in records if r["model"] == model and not any(r["diverged"])]
        unit = 100 if own and own[0]["metric"] == "accuracy" else 1
        scores = {
            f: {r["scale"]: unit * np.array(r["score"]) for r in own if r["family"] == f}
            for f in FAMILIES
        }
        for name in FAMILIES[1:]:
            both = scores["gaussian"].keys() & scores[name].keys()
            more = np.array([scores[name][s] - scores["gaussian"][s] for s in sorted(both)])
            if more.size and more.shape[1] > 1:
                seeds = more.mean(axis=0)
                error = seeds.std(ddof=1) / math.sqrt(len(seeds))
                lines.append(
                    f"{model}: {name} minus gaussian {seeds.mean():+.2g} ± {error:.1g} "
                    f"({own[0]['metric']}{' in %' if unit == 100 else ''}, mean over {len(both)} "
                    "scales, same seeds; standard error)"
                )
    return lines
