"""Trains the synthetic task for every gamma, then writes a table and a picture.

    python -m experiments.toy_regression.main --preset=paper

One folder of the workdir for each gamma (checkpoints, metrics); results.md, results.json and
fixed_point_map.png beside them.  About 1.5 minutes on 2 CPU cores.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np

from deq_jax.training import flags, folders, train, workdir
from deq_jax.training.parallel import make_mesh
from experiments import diagnose, dry_run
from experiments import report as shared
from experiments.toy_regression import report
from experiments.toy_regression.config import PRESETS, ToyConfig
from experiments.toy_regression.task import ToyTask, build_data


def run(config: ToyConfig) -> dict[float, report.Trained]:
    """Trains all models, gamma -> model, and writes the report."""
    mesh, folder, parts = make_mesh(), folders.parse(config.workdir), {}
    for gamma in config.gammas:
        jac, name = dataclasses.replace(config.jac, gamma=gamma), f"gamma_{gamma:g}"
        parts[gamma] = dataclasses.replace(config, workdir=str(folder / name), jac=jac)
    named = {f"gamma = {gamma:g}": part for gamma, part in parts.items()}
    if config.dry_run:
        one = (config.train.batch_size, 1)
        batch = {name: (one, np.float32) for name in ("x", "y")}
        shared.show(dry_run.run(named, partial(ToyTask, mesh=mesh), batch, mesh))
        return {}
    if config.diagnose:
        data, _ = build_data(config)
        shared.show(diagnose.run(named, partial(ToyTask, mesh=mesh), data, mesh))
        return {}
    trained = {}
    with workdir.claimed(config) as folder:
        for gamma, part in parts.items():
            task = ToyTask(part, mesh)
            trained[gamma] = report.Trained(task, train(task, part, *build_data(part), mesh=mesh))
        shared.show(report.write(folder, config, trained))
    return trained


if __name__ == "__main__":
    flags.run(run, PRESETS, default="paper")
