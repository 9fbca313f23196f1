"""Trains looped models of one block and examines them at more loops than they were trained with.

    python -m experiments.reasoning.main --preset=addition

One folder of the workdir for each model (checkpoints, metrics); results.md, results.json and
reasoning.png beside them.
"""

from __future__ import annotations

import jax

from deq_jax.training import flags
from experiments.common.run import Experiment
from experiments.reasoning import data, report, task
from experiments.reasoning.config import PRESETS, variants

EXPERIMENT = Experiment(
    open_data=data.open_data,
    build_task=task.build_task,
    write_report=report.write,
    variants=variants,
)
run = EXPERIMENT.run

if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)  # each trains on half of a batch, on one core
    flags.run(run, PRESETS, default="addition")
