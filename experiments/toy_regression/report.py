"""Table and picture of the synthetic task: what gamma does to f(z; x) as a function of z."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import deq_jax as deq
from deq_jax.data import synthetic
from deq_jax.models.mlp import ScalarDEQ, ToyCell
from deq_jax.training.distributed import fetch
from experiments.common import reporting
from experiments.common.reporting import Trained
from experiments.toy_regression.config import ToyConfig

INPUTS = (-1.5, 0.0, 1.8)
"""The inputs x for which f(z; x) is drawn."""

PICARD_STEPS = 100
"""Budget of plain iteration in the table."""


def iteration_path(
    solver: Any, f: Callable[[jnp.ndarray], jnp.ndarray], tol: float
) -> tuple[np.ndarray, np.ndarray]:
    """The iterates of one scalar solve from 0, and their images.

    Args:
      solver: a solver of `deq_jax`.
      f: maps [1, 1] to [1, 1].
      tol: the path ends where abs(f(z) - z) / abs(f(z)) falls to this, or after solver.max_steps.

    Returns:
      z_k and f(z_k), both [number of steps].
    """
    z = jnp.zeros((1, 1))
    state, points, images = solver.init(z), [], []
    for _ in range(solver.max_steps):
        image = f(z)
        points.append(float(z[0, 0]))
        images.append(float(image[0, 0]))
        if abs(images[-1] - points[-1]) <= tol * abs(images[-1]):
            break
        z, state = solver.step(z, image, state)
    return np.array(points), np.array(images)


def measure(config: ToyConfig, trained: Trained) -> dict[str, float]:
    """The numbers of one row of the table.

    Args:
      config: the whole configuration.
      trained: one model.

    Returns:
      "rmse" at convergence and "rmse_3" after 3 evaluations of f (where evaluated), "steps" to
      tolerance (mean over the test pairs), "unconverged" (share), "penalty" = mean of (df/dz)^2 at
      z*, "picard_steps" and "picard_unconverged": the same of plain iteration, over a grid of x.
    """
    final = trained.result.evaluation
    main = final[config.eval_steps]
    numbers = {f"rmse_{b}": float(np.sqrt(v["squared_error"])) for b, v in final.items()}
    plain = deq.Picard(tol=config.solver.tol, max_steps=PICARD_STEPS)
    model = ScalarDEQ(solver=plain, hidden=config.model.hidden)
    grid = jnp.linspace(synthetic.LOW, synthetic.HIGH, 400)[:, None]
    params = fetch(trained.result.state.params)
    applied: Any = model.apply({"params": params}, grid, train=False)
    picard = applied[1]
    return numbers | {
        "picard_steps": float(picard.stats.num_steps.mean()),
        "picard_unconverged": float(1 - picard.stats.converged.mean()),
        "rmse": float(np.sqrt(main["squared_error"])),
        "steps": main["fwd_steps"],
        "unconverged": main["unconverged"],
        "penalty": main.get("penalty", float("nan")),
        "spectral_radius": main.get("spectral_radius", float("nan")),
    }


def write(
    folder: Path, config: ToyConfig, trained: Mapping[str, Trained], data: Any, mesh: Any
) -> str:
    """Writes results.md, results.json and fixed_point_map.png.

    Args:
      folder: of the experiment.
      config: the whole configuration.
      trained: name -> model.
      data: not used.
      mesh: not used.

    Returns:
      The table, for the screen.
    """
    del data, mesh
    models = {model.config.jac.gamma: model for model in trained.values()}
    rows = {gamma: measure(config, model) for gamma, model in models.items()}
    few = [b for b in config.eval_budgets if b != config.eval_steps]
    header = ["gamma", "test RMSE", *(f"RMSE at {b}" for b in few)]
    header += ["steps", "not converged", "Picard steps", "not converged", "penalty"]
    cells = [
        [
            f"{gamma:g}",
            f"{row['rmse']:.3f}",
            *(f"{row[f'rmse_{b}']:.3f}" for b in few),
            f"{row['steps']:.2f}",
            f"{row['unconverged']:.1%}",
            f"{row['picard_steps']:.1f}",
            f"{row['picard_unconverged']:.1%}",
            f"{row['penalty']:.3f}",
        ]
        for gamma, row in rows.items()
    ]
    text = (
        reporting.table(header, cells)
        + f"""
Test RMSE at convergence (up to {config.eval_steps} evaluations of f) and stopped hard after
{", ".join(map(str, few))}; the noise alone is {config.data.noise:g}.  Steps: evaluations of f
until abs(f(z) - z) / abs(f(z)) fell to {config.solver.tol:g}, mean over the test pairs; Picard: the
same of plain iteration, at most {PICARD_STEPS}.  Penalty: mean of (df/dz)^2 at z*.
"""
    )
    reporting.write(folder, text, {f"gamma_{gamma:g}": row for gamma, row in rows.items()})
    draw(folder / "fixed_point_map.png", config, models)
    return text


def draw(path: Path, config: ToyConfig, trained: Mapping[float, Trained]) -> None:
    """Draws f(z; x) over z with the path of the solver, one panel for each gamma.

    Args:
      path: of the PNG.
      config: the whole configuration.
      trained: gamma -> model.
    """
    figure, axes = reporting.new_figure(1, len(trained), (3.6 * len(trained), 4.3))
    solver = config.build_eval_solver()
    targets = [float(synthetic.curve(np.asarray(x, np.float64))) for x in INPUTS]
    low, high = min(*targets, 0) - 2.5, max(*targets, 0) + 2.5
    line = np.linspace(low, high, 400, dtype=np.float32)
    cell = ToyCell(config.model.hidden)
    for axis, (gamma, model) in zip(axes[0], trained.items(), strict=True):
        params = fetch(model.result.state.params["equilibrium"]["f"])
        axis.plot(line, line, color="0.55", linewidth=1, linestyle="--")
        for x, target, color in zip(INPUTS, targets, reporting.COLORS, strict=False):

            def f(z: Any, x: float = x, params: Any = params) -> Any:
                return cell.apply({"params": params}, z, jnp.full_like(z, x))

            axis.plot(line, np.asarray(f(line[:, None]))[:, 0], color=color, linewidth=1.6)
            points, images = iteration_path(solver, f, config.solver.tol)
            axis.plot(
                points, images, color=color, linewidth=0.9, marker="o", markersize=4.5,
                markerfacecolor="white", label=f"x = {x:g}: {len(points)} steps",
            )  # fmt: skip
            axis.plot(target, target, color=color, marker="*", markersize=12, linestyle="none")
        axis.set_title(f"gamma = {gamma:g}")
        axis.set_xlabel("z")
        axis.set_xlim(low, high)
        axis.set_ylim(low, high)
        axis.set_aspect("equal")
        axis.legend(fontsize=8, loc="upper left", frameon=False)
    axes[0][0].set_ylabel("f(z; x)")
    figure.suptitle(
        "f(z; x) after training (lines), iterates from z = 0 (circles), targets y(x) (stars); "
        "dashed: f(z) = z",
        fontsize=10,
    )
    reporting.save(figure, path)
