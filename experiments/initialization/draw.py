"""Pictures of all modes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import deq_jax as deq
from experiments.common import reporting
from experiments.initialization.config import FAMILIES, InitConfig, TheoryConfig
from experiments.initialization.sweep import Family
from experiments.initialization.theory import predicted_picard
from experiments.initialization.verdict import Verdict

_COLORS: dict[str, str] = dict(zip(FAMILIES, reporting.COLORS, strict=False))
_MARKERS = {"gaussian": "o", "orthogonal": "s", "goe": "^"}
_DASHES = {"picard": ":", "anderson": "-", "broyden": "--"}


def theory(path: Path, config: TheoryConfig, records: Sequence[Mapping[str, Any]]) -> None:
    """Draws predictions as lines, and what was measured as points with error bars.

    Args:
      path: of the PNG.
      config: fractions, sizes and tol are read.
      records: from `theory.measure`; the largest size is drawn.
    """
    figure, (axes,) = reporting.new_figure(1, 4, (18.4, 4.4))
    size = max(config.sizes)
    for family in FAMILIES:
        own = [r for r in records if (r["family"], r["size"]) == (family, size)]
        own = sorted(own, key=lambda r: r["fraction"])
        _draw_gains(axes[0], axes[1], config, family, own)
        _draw_norms(axes[2], family, own)
        for name, dashes in _DASHES.items():
            style = {"color": _COLORS[family], "linestyle": dashes, "linewidth": 1.2}
            style |= {"marker": _MARKERS[family], "markersize": 4, "label": f"{family}, {name}"}
            _points(axes[3], [r["fraction"] for r in own], [r[f"{name}_steps"] for r in own], style)
    for axis, name in zip(axes, ("L1", "L2"), strict=False):
        axis.set(xlabel="scale / critical scale", ylabel=name, yscale="log")
    axes[0].set_title(f"Mean gain, N = {size}")
    axes[1].set_title("Its fluctuation")
    axes[2].set(xlabel="scale", ylabel="spectral radius (full), operator norm (open)")
    axes[2].set_title("Norms: lines predicted, points measured")
    axes[3].set(xlabel="scale / critical scale", ylabel="evaluations of f", yscale="log")
    axes[3].set_title(f"Steps to {config.tol:g}; thick: Picard, predicted")
    for family in FAMILIES:
        fractions = np.linspace(config.fractions[0], config.fractions[-1], 60)
        scales = fractions * deq.init.critical_scale(family)
        steps = [predicted_picard(family, s, config.tol) for s in scales]
        axes[3].plot(fractions, steps, color=_COLORS[family], linewidth=4, alpha=0.25)
    for axis in axes:
        axis.legend(frameon=False, fontsize=7)
    reporting.save(figure, path)


def _points(axis: Any, x: Sequence[float], values: Sequence[Any], style: dict[str, Any]) -> None:
    mean = np.array([np.mean(v) for v in values])
    deviation = np.array([np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in values])
    # On a logarithmic axis a bar must not reach 0.
    low = np.minimum(deviation, 0.9 * mean)
    axis.errorbar(x, mean, yerr=[low, deviation], capsize=2, **style)


def _draw_gains(
    first: Any, second: Any, config: TheoryConfig, family: str, own: Sequence[Mapping[str, Any]]
) -> None:
    fractions = np.linspace(config.fractions[0], config.fractions[-1], 100)
    scales = fractions * deq.init.critical_scale(family)
    lines = np.array([deq.init.predicted_gain(family, s) for s in scales])
    style = {"color": _COLORS[family], "marker": _MARKERS[family], "markersize": 4}
    for i, axis in enumerate((first, second)):
        axis.plot(fractions, lines[:, i], color=_COLORS[family], label=f"{family}, predicted")
        values = [r[f"L{i + 1}"] for r in own]
        _points(axis, [r["fraction"] for r in own], values, style | {"linestyle": "none"})


def _draw_norms(axis: Any, family: str, own: Sequence[Mapping[str, Any]]) -> None:
    scales = [r["scale"] for r in own]
    lines = np.array([deq.init.predicted_norms(family, s) for s in scales])
    for i, name in enumerate(("radius", "norm")):
        dashes = ("-", "--")[i]
        axis.plot(scales, lines[:, i], color=_COLORS[family], linestyle=dashes, linewidth=1)
        style = {"color": _COLORS[family], "marker": _MARKERS[family], "linestyle": "none"}
        style |= {"markersize": (4, 8)[i], "label": family if i == 0 else None}
        style["markerfacecolor"] = (_COLORS[family], "none")[i]
        _points(axis, scales, [r[name] for r in own], style)


def sweep(
    path: Path,
    config: InitConfig,
    families: Mapping[str, Family],
    verdicts: Mapping[str, Verdict],
) -> None:
    """Draws the grid of every family: test accuracy, and the share of the test set solved.

    Args:
      path: of the PNG.
      config: the whole configuration.
      families: name -> what became of its models.
      verdicts: name -> what counts as trained.
    """
    scales, seeds = config.sweep.scales, config.sweep.seeds
    figure, axes = reporting.new_figure(2, len(families), (4.6 * len(families) + 1, 5.6))
    titles = {"accuracy": "test accuracy", "solved": "solved at the end"}
    for row, (metric, label) in enumerate(titles.items()):
        images = []
        for axis, (name, family) in zip(axes[row], families.items(), strict=True):
            values = family.end[metric].reshape(len(scales), seeds).T  # [seeds, scales]
            image = axis.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            images.append(image)
            failed = np.argwhere(~verdicts[name].trained.T)
            axis.plot(failed[:, 1], failed[:, 0], "x", color="white", markersize=7)
            axis.set_xticks(range(len(scales)), [f"{s:g}" for s in scales], fontsize=8)
            axis.set_yticks(range(seeds), [str(config.train.seed + i) for i in range(seeds)])
            axis.grid(visible=False)
            axis.set(xlabel="scale s; entry variance s² / N", ylabel="seed")
            axis.set_title(f"{name}: {label}", fontsize=10)
        figure.colorbar(images[0], ax=list(axes[row]))
    budget = f"{config.eval_steps} {config.solver.name} steps"
    figure.suptitle(
        f"{config.data.name}, {config.model.activation}, {config.train.steps} steps of training, "
        f"solves of {budget}; crosses: does not count as trained",
        fontsize=10,
    )
    reporting.save(figure, path)


def models(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Draws score, share not solved and spectral radius over the scale, a row for each model.

    Args:
      path: of the PNG.
      records: from `models.measure`.
    """
    names = list(dict.fromkeys(r["model"] for r in records))
    scales = sorted({r["scale"] for r in records if r["family"] != "published"})
    figure, axes = reporting.new_figure(len(names), 3, (13, 3.6 * len(names)))
    for row, name in zip(axes, names, strict=True):
        own = [r for r in records if r["model"] == name]
        panels = (("score", own[0]["metric"]), ("end_unsolved", "not solved"), ("radius", "radius"))
        for axis, (key, label) in zip(row, panels, strict=True):
            for family in FAMILIES:
                points = [(r["scale"], _known(r[key])) for r in own if r["family"] == family]
                points = [(x, values) for x, values in points if values]
                style = {"color": _COLORS[family], "marker": _MARKERS[family], "label": family}
                if points:
                    places, values = zip(*points, strict=True)
                    _points(axis, places, values, style)
            published = [_known(r[key]) for r in own if r["family"] == "published"]
            for values in filter(None, published):
                style = {"color": "0.4", "linestyle": "--", "linewidth": 1, "label": "published"}
                axis.axhline(np.mean(values), **style)
            axis.set(title=name, xlabel="scale s", ylabel=label, xscale="log")
            axis.set_xticks(scales, [f"{s:g}" for s in scales], minor=False)
            axis.minorticks_off()
            if key == "radius":
                axis.set_yscale("log")
            elif key == "end_unsolved" or label == "accuracy":
                axis.set_ylim(-0.03, 1.03)
        row[0].legend(frameon=False, fontsize=8)
    reporting.save(figure, path)


def _known(values: Sequence[float | None]) -> list[float]:
    return [v for v in values if v is not None]
