"""Table and pictures of image classification: accuracy, cost and stability of the models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from deq_jax.training import EvalData
from deq_jax.training.distributed import fetch
from deq_jax.training.parallel import pad, place
from deq_jax.training.task import forward, has_solver
from experiments.common import reporting
from experiments.common.reporting import NAMES, STYLES, Trained
from experiments.common.run import Data
from experiments.image_classification.config import ImageConfig


def residual_traces(config: ImageConfig, model: Trained, data: EvalData, mesh: Mesh) -> np.ndarray:
    """Residuals of every test image after every step of its solve.

    Args:
      config: eval is read.
      model: a trained model.
      data: one pass over the test images.
      mesh: the devices.

    Returns:
      float32 ``[eval_steps, images]``, inf after a solve has ended; of an explicit network, which
      solves nothing, ``[0, 0]``.
    """
    if not has_solver(model.task.model):
        return np.zeros((0, 0), np.float32)

    @jax.jit
    def trace(params: Any, extra: Any, batch: Any) -> jax.Array:
        found = forward(model.task, config, params, extra, None, batch)
        assert found.solution is not None and found.solution.stats.trace is not None
        return found.solution.stats.trace[: config.eval_steps]

    parts = []
    for batch in data():
        state = model.result.state
        placed = place(pad(batch, mesh.local_mesh.size), mesh)
        traced, mask = fetch((trace(state.params, state.extra, placed), placed["mask"]))
        parts.append(traced[:, mask > 0])
    return np.concatenate(parts, axis=1)


def measure(config: ImageConfig, model: Trained, traces: np.ndarray) -> dict[str, Any]:
    """The numbers of one column of the table.

    Args:
      config: the whole configuration.
      model: a trained model.
      traces: from `residual_traces`.

    Returns:
      "accuracy" (budget -> share), "converged_accuracy", "top5" (with more than five classes),
      `reporting.training_numbers`, and for an equilibrium "steps_median" and "steps_90"
      (evaluations of f within which half and nine tenths are solved; inf: more than the budget),
      "unconverged" (share), "spectral_radius", "penalty".
    """
    final = model.result.evaluation
    main = final[config.eval_steps]
    numbers = reporting.training_numbers(config, model.result) | {
        "accuracy": {budget: values["accuracy"] for budget, values in final.items()},
        "converged_accuracy": main["accuracy"],
        "top5": main.get("top5"),
    }
    if not traces.size:
        return numbers
    solved = (traces <= config.solver.tol).any(axis=0)
    steps = np.where(solved, np.isfinite(traces).sum(axis=0), np.inf)
    return numbers | {
        "steps_median": float(np.quantile(steps, 0.5, method="higher")),
        "steps_90": float(np.quantile(steps, 0.9, method="higher")),
        "unconverged": float(1 - solved.mean()),
        "spectral_radius": main.get("spectral_radius"),
        "penalty": main.get("penalty"),
    }


def write(
    folder: Path,
    config: ImageConfig,
    trained: Mapping[str, Trained],
    data: Data,
    mesh: Mesh,
) -> str:
    """Writes results.md, results.json and results.png.

    Args:
      folder: of the experiment.
      config: the whole configuration.
      trained: name -> model.
      data: the test images.
      mesh: the devices.

    Returns:
      The table, for the screen.
    """
    traces = {n: residual_traces(config, model, data.eval, mesh) for n, model in trained.items()}
    columns = {n: measure(config, model, traces[n]) for n, model in trained.items()}
    text = make_table(config, columns)
    reporting.write(folder, text, columns)
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

    def steps(label: str, key: str) -> list[str]:
        cells = [c.get(key, math.inf) for c in columns.values()]
        return [label, *(f"{c:.0f}" if np.isfinite(c) else f"> {limit}" for c in cells)]

    solves = all("steps_median" in c for c in columns.values())
    rows = [reporting.row(columns, "accuracy", "converged_accuracy", ".1%")]
    if solves:
        rows = [
            [
                f"accuracy {reporting.at_steps(b)}",
                *(f"{c['accuracy'][b]:.1%}" for c in columns.values()),
            ]
            for b in config.eval_budgets
        ]
        rows += [steps(f"steps to {tol:g}, median image", "steps_median")]
        rows += [steps(f"steps to {tol:g}, 9 in 10 images", "steps_90")]
    rows += [
        reporting.row(columns, f"not at {tol:g} in {limit} steps", "unconverged", ".1%"),
        reporting.row(columns, "top-5 accuracy", "top5", ".1%"),
        *reporting.cost_rows(columns, "images"),
    ]
    text = reporting.table_of(columns, "test set", rows)
    return text + (_explain(config, len(columns) > 1) if solves else "")


def _explain(config: ImageConfig, compared: bool) -> str:
    """What the rows mean."""
    least = config.solver.max_steps + config.jac.budget_low
    most = config.solver.max_steps + config.jac.budget_high
    budget = f"{most}" if least == most else f"{least} to {most}"
    text = (
        f"\nA step is one evaluation of f; in training the budget was {budget} steps forward and "
        f"{config.backward.max_steps} backward.\n"
        "Penalty: norm(df/dz)_F^2 / number of elements of z."
    )
    if compared:
        text += "  Both models had the same seed, data and number of updates."
    if config.jac.gamma:
        text += f"\nJR: gamma {config.jac.gamma:g} on {config.jac.prob:.0%} of the updates."
    return text + (
        "  After 1 step the solver has only measured the\nresidual of its start, z = 0.\n"
    )


def draw(
    path: Path,
    config: ImageConfig,
    trained: Mapping[str, Trained],
    columns: Mapping[str, Mapping[str, Any]],
    traces: Mapping[str, np.ndarray],
) -> None:
    """Draws the training curves and, for equilibria, what the number of solver steps does.

    Args:
      path: of the PNG.
      config: the whole configuration.
      trained: name -> model.
      columns: name -> what `measure` returned.
      traces: name -> what `residual_traces` returned.
    """
    solves = all(trace.size for trace in traces.values())
    count = 4 if solves else 2
    figure, (axes,) = reporting.new_figure(1, count, (4.6 * count, 4.2))
    for name, model in trained.items():
        history = model.result.history
        reporting.draw_history(axes[0], name, history, "train", "loss")
        if solves:
            _draw_traces(axes[2], name, traces[name])
        else:
            reporting.draw_history(axes[1], name, history, "eval", "accuracy", 100)
    axes[0].set(xlabel="training step", ylabel="cross-entropy", yscale="log", title="Training loss")
    axes[1].set(xlabel="training step", ylabel="test accuracy, %", title="Accuracy")
    if solves:
        reporting.draw_budgets(axes[1], config, columns, "accuracy", 100)
        axes[1].set_title("Accuracy when stopped early")
        reporting.label_residual(axes[2], config)
        axes[2].set(xlabel="solver steps (evaluations of f)")
        axes[2].set_title("Residual: median image, and 1st to 9th decile")
        reporting.draw_radius(axes[3], trained)
    for axis in axes:
        axis.legend(frameon=False)
    reporting.save(figure, path)


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
