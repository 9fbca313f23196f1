"""Table and pictures of image classification: what Jacobian regularisation buys."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from deq_jax.training import EvalData, TrainResult
from deq_jax.training.placement import place
from experiments import report as shared
from experiments.image_classification.config import ImageConfig
from experiments.image_classification.task import ImageTask

NAMES = {"no_jr": "without JR", "jr": "with JR"}
STYLES = {
    "no_jr": {"color": shared.COLORS[0], "marker": "s", "linestyle": "--"},
    "jr": {"color": shared.COLORS[1], "marker": "o", "linestyle": "-"},
}


@dataclasses.dataclass(frozen=True)
class Trained:
    """A task and what its training left."""

    task: ImageTask
    result: TrainResult


def residual_traces(config: ImageConfig, model: Trained, data: EvalData, mesh: Mesh) -> np.ndarray:
    """Residuals of every test image after every step of its solve.

    Args:
      config: eval is read.
      model: a trained model.
      data: one pass over the test images.
      mesh: the devices.

    Returns:
      float32 ``[eval_steps, images]``, inf after a solve has ended.
    """

    @jax.jit
    def trace(params: Any, batch: Any) -> jax.Array:
        budget = jnp.int32(config.eval_steps)
        output = model.task.forward(
            params, {}, batch, key=None, train=False, warmup=False, max_steps=budget, probe=None
        )
        assert output.solution is not None
        return output.solution.stats.trace[: config.eval_steps]

    parts = []
    for batch in data():
        traced = np.asarray(trace(model.result.state.params, place(batch, mesh)))
        parts.append(traced[:, batch["mask"] > 0])
    return np.concatenate(parts, axis=1)


def measure(config: ImageConfig, model: Trained, traces: np.ndarray) -> dict[str, Any]:
    """The numbers of one column of the table.

    Args:
      config: the whole configuration.
      model: a trained model.
      traces: from `residual_traces`.

    Returns:
      "accuracy" (budget -> share), "converged_accuracy", "steps_median" and "steps_90" (evaluations
      of f within which half and nine tenths of the test images are solved; inf: more than the
      budget), "unconverged" (share), "spectral_radius", "penalty", "seconds_per_step".
    """
    final = model.result.evaluation
    main = final[config.eval_steps]
    solved = (traces <= config.solver.tol).any(axis=0)
    steps = np.where(solved, np.isfinite(traces).sum(axis=0), np.inf)
    speeds = [r["steps_per_second"] for r in model.result.history if "steps_per_second" in r]
    return {
        "accuracy": {budget: values["accuracy"] for budget, values in final.items()},
        "converged_accuracy": main["accuracy"],
        "steps_median": float(np.quantile(steps, 0.5, method="higher")),
        "steps_90": float(np.quantile(steps, 0.9, method="higher")),
        "unconverged": float(1 - solved.mean()),
        "spectral_radius": main.get("spectral_radius"),
        "penalty": main.get("penalty"),
        "seconds_per_step": 1 / statistics.median(speeds) if speeds else None,
    }


def write(
    folder: Path,
    config: ImageConfig,
    trained: Mapping[str, Trained],
    data: EvalData,
    mesh: Mesh,
) -> str:
    """Writes results.md, results.json and results.png.

    Args:
      folder: of the experiment.
      config: the whole configuration.
      trained: name -> model.
      data: one pass over the test images.
      mesh: the devices.

    Returns:
      The table, for the screen.
    """
    traces = {n: residual_traces(config, model, data, mesh) for n, model in trained.items()}
    columns = {n: measure(config, model, traces[n]) for n, model in trained.items()}
    text = make_table(config, columns)
    shared.write(folder, text, columns)
    draw(folder / "results.png", config, trained, columns, traces)
    return text


def make_table(config: ImageConfig, columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Lays out the comparison, one column for each model.

    Args:
      config: the whole configuration.
      columns: name -> what `measure` returned.

    Returns:
      A Markdown table with its explanation.
    """
    limit, tol = config.eval_steps, config.solver.tol

    def row(label: str, key: str, form: str) -> list[str]:
        cells = [c[key] for c in columns.values()]
        return [label, *("-" if c is None else format(c, form) for c in cells)]

    def steps(key: str) -> list[str]:
        cells = [c[key] for c in columns.values()]
        return [f"{c:.0f}" if np.isfinite(c) else f"> {limit}" for c in cells]

    least = config.solver.max_steps + config.jac.budget_low
    most = config.solver.max_steps + config.jac.budget_high
    budget = f"{most}" if least == most else f"{least} to {most}"
    rows = [
        [
            f"accuracy at {b} step{'s' * (b > 1)}",
            *(f"{c['accuracy'][b]:.1%}" for c in columns.values()),
        ]
        for b in config.eval_budgets
    ]
    rows += [
        [f"steps to {tol:g}, median image", *steps("steps_median")],
        [f"steps to {tol:g}, 9 in 10 images", *steps("steps_90")],
        row(f"not at {tol:g} in {limit} steps", "unconverged", ".1%"),
        row("spectral radius of df/dz", "spectral_radius", ".2f"),
        row("penalty", "penalty", ".4f"),
        row("seconds per training step", "seconds_per_step", ".4f"),
    ]
    return shared.table(["test set", *(NAMES[n] for n in columns)], rows) + (
        "\nA step is one evaluation of f; both models were trained from one seed with the same "
        f"data, budget\n({budget} steps forward, {config.backward.max_steps} backward) and "
        "number of updates.  Penalty: norm(df/dz)_F^2 / number of\nelements of z.  "
        f"JR: gamma {config.jac.gamma:g} on {config.jac.prob:.0%} of the updates.  After 1 step "
        "the\nsolver has only measured the residual of its start, a guess that no model was "
        "trained on.\n"
    )


def draw(
    path: Path,
    config: ImageConfig,
    trained: Mapping[str, Trained],
    columns: Mapping[str, Mapping[str, Any]],
    traces: Mapping[str, np.ndarray],
) -> None:
    """Draws accuracy against steps, residuals against steps, and the spectral radius over training.

    Args:
      path: of the PNG.
      config: the whole configuration.
      trained: name -> model.
      columns: name -> what `measure` returned.
      traces: name -> what `residual_traces` returned.
    """
    figure, ((accuracy, residual, radius),) = shared.new_figure(1, 3, (14, 4.2))
    for name, column in columns.items():
        budgets = sorted(column["accuracy"])
        values = [100 * column["accuracy"][b] for b in budgets]
        accuracy.plot(budgets, values, label=NAMES[name], **STYLES[name])
        _draw_traces(residual, name, traces[name])
        records = [r for r in trained[name].result.history if "spectral_radius" in r]
        steps = [r["step"] for r in records]
        radius.plot(
            steps, [r["spectral_radius"] for r in records], label=NAMES[name], **STYLES[name]
        )
    accuracy.set(xlabel="solver steps (evaluations of f)", ylabel="test accuracy, %", xscale="log")
    accuracy.set_xticks(config.eval_budgets, [str(b) for b in config.eval_budgets])
    accuracy.minorticks_off()
    accuracy.axvline(config.solver.max_steps, color="0.4", linewidth=1, linestyle=":")
    accuracy.annotate(
        "budget in training ", (config.solver.max_steps, 0.02), ha="right", fontsize=8, color="0.3",
        xycoords=("data", "axes fraction"),
    )  # fmt: skip
    accuracy.set_title("Accuracy when stopped early")
    residual.axhline(config.solver.tol, color="0.4", linewidth=1, linestyle=":")
    residual.annotate("tolerance", (1, config.solver.tol), va="bottom", fontsize=8, color="0.3")
    residual.set(xlabel="solver steps (evaluations of f)", yscale="log")
    residual.set_ylabel("relative residual")
    residual.set_title("Residual: median image, and 1st to 9th decile")
    radius.axhline(1, color="0.4", linewidth=1, linestyle=":")
    radius.set(xlabel="training step", ylabel="spectral radius of df/dz at z*")
    radius.set_ylim(bottom=0)
    radius.set_title("Stability over training")
    for axis in (accuracy, residual, radius):
        axis.legend(frameon=False)
    figure.savefig(path)


def _draw_traces(axis: Any, name: str, traces: np.ndarray) -> None:
    """Deciles of the residual; an image that is solved keeps its last residual."""
    filled = traces.copy()
    for k in range(1, len(filled)):
        filled[k] = np.where(np.isfinite(filled[k]), filled[k], filled[k - 1])
    low, middle, high = np.quantile(filled, [0.1, 0.5, 0.9], axis=1)
    steps = np.arange(1, len(filled) + 1)
    color, dashes = STYLES[name]["color"], STYLES[name]["linestyle"]
    axis.plot(steps, middle, color=color, linestyle=dashes, label=NAMES[name])
    axis.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
