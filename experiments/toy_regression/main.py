"""Trains the synthetic task for every gamma, then writes a table and a picture.

    python -m experiments.toy_regression.main --preset=paper

One folder of the workdir for each gamma (checkpoints, metrics); results.md, results.json and
fixed_point_map.png beside them.  About 1.5 minutes on 2 CPU cores.
"""

from __future__ import annotations

from deq_jax.training import flags
from experiments.common.run import Experiment
from experiments.toy_regression import report, task
from experiments.toy_regression.config import PRESETS

EXPERIMENT = Experiment(
    open_data=task.open_data,
    build_task=task.build_task,
    write_report=report.write,
    variants=task.variants,
)
run = EXPERIMENT.run

if __name__ == "__main__":
    flags.run(run, PRESETS, default="paper")
