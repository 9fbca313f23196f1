"""Separates two spirals with a fully connected DEQ: a whole experiment in one file.

    python -m experiments.spirals.main --workdir=runs/spirals

The workdir gets results.md, results.json and boundary.png, and a folder for each model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import deq_jax as deq
from deq_jax.models import MLPDEQ
from deq_jax.training import (
    EvalConfig,
    JacConfig,
    OptimConfig,
    SolverConfig,
    Task,
    TrainConfig,
    distributed,
    flags,
    option,
    require,
)
from deq_jax.training.solving import solve_options
from deq_jax.training.task import forward
from experiments.common import reporting
from experiments.common.compare import ComparedConfig
from experiments.common.reporting import NAMES, Trained
from experiments.common.run import Data, Experiment, open_batches
from experiments.image_classification.task import cross_entropy


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpiralsConfig(ComparedConfig):
    """The whole configuration."""

    width: int = option(64, "units of the DEQ")
    turns: float = option(1.0, "turns of a spiral")
    noise: float = option(0.03, "standard deviation of the noise in both coordinates")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.width >= 1, "width", "at least 1", self.width)


PRESETS = {
    "spirals": SpiralsConfig(
        workdir="runs/spirals",
        compare=True,
        solver=SolverConfig(max_steps=16),
        jac=JacConfig(gamma=0.3),
        optim=OptimConfig(lr=3e-3, clip=1.0),
        train=TrainConfig(steps=1500, batch_size=128, log_every=250, eval_every=500),
        eval=EvalConfig(max_steps=30, budgets=(2, 4, 8), spectral_batches=1),
    )
}


def spirals(config: SpiralsConfig, count: int, seed: int) -> list[Any]:
    """Points of two spirals, alternately: "x" float32 [2] within -1..1, "label" 0 or 1."""
    rng = np.random.default_rng(seed)
    label = np.arange(count) % 2
    radius = np.sqrt(rng.uniform(0.02, 1, count))
    angle = 2 * np.pi * config.turns * radius + np.pi * label
    x = radius * np.stack([np.cos(angle), np.sin(angle)]) + config.noise * rng.normal(
        size=(2, count)
    )
    return [{"x": p, "label": c} for p, c in zip(x.T.astype(np.float32), label, strict=True)]


def open_data(config: SpiralsConfig) -> Data:
    """Draws the points."""
    train, test = spirals(config, 4096, 0), spirals(config, 1024, 1)
    return open_batches(config, train, test, eval_batch=config.train.batch_size)


def build_task(config: SpiralsConfig, mesh: Mesh, data: Any) -> Task:
    """Cross-entropy of two scores."""
    model = MLPDEQ(
        outputs=2,
        width=config.width,
        activation=jnp.tanh,
        kernel_init=deq.init.orthogonal(0.8),
        **solve_options(config, mesh),
    )
    size = config.train.batch_size
    return Task(
        model=model,
        inputs=lambda batch, carry: (batch["x"],),
        loss=cross_entropy,
        sample={
            "x": jax.ShapeDtypeStruct((size, 2), jnp.float32),
            "label": jax.ShapeDtypeStruct((size,), jnp.int32),
        },
    )


def write_report(
    folder: Path, config: SpiralsConfig, trained: Mapping[str, Trained], data: Any, mesh: Mesh
) -> str:
    """Writes results.md, results.json and boundary.png; returns the table."""
    final = {name: model.result.evaluation for name, model in trained.items()}
    rows = [
        [f"accuracy at {b} steps", *(f"{values[b]['accuracy']:.1%}" for values in final.values())]
        for b in config.eval_budgets
    ]
    for name in ("fwd_steps", "spectral_radius"):
        rows.append(
            [name, *(f"{values[config.eval_steps][name]:.2f}" for values in final.values())]
        )
    text = reporting.table(["1,024 test points", *(NAMES[name] for name in final)], rows)
    reporting.write(folder, text, final)
    ticks = np.linspace(-1.2, 1.2, 120, dtype=np.float32)
    grid = np.stack(np.meshgrid(ticks, ticks), -1).reshape(-1, 2)
    x, label = (np.stack([r[key] for r in spirals(config, 400, 1)]) for key in ("x", "label"))
    figure, (axes,) = reporting.new_figure(1, len(trained), (4.2 * len(trained), 4.2))
    for axis, (name, model) in zip(axes, trained.items(), strict=True):
        state = distributed.fetch(model.result.state)
        batch = {"x": grid, "label": np.zeros(len(grid), int), "mask": np.ones(len(grid))}
        run = jax.jit(partial(forward, model.task, config))
        scores = run(state.params, state.extra, None, batch).output
        axis.contourf(ticks, ticks, (scores[:, 1] > scores[:, 0]).reshape(120, 120), alpha=0.3)
        axis.scatter(*x.T, c=label, s=6)
        axis.set_title(NAMES[name])
    reporting.save(figure, folder / "boundary.png")
    return text


EXPERIMENT = Experiment(open_data=open_data, build_task=build_task, write_report=write_report)
run = EXPERIMENT.run

if __name__ == "__main__":
    flags.run(run, PRESETS, default="spirals")
