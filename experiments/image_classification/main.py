"""Trains an image classifier, with and without Jacobian regularisation where that is asked for.

    python -m experiments.image_classification.main --preset=digits --workdir=runs/digits
    python -m experiments.image_classification.main --preset=cifar10_large_jr --data.dir=DIR

The workdir gets results.md, results.json and results.png, and a folder for each model (jr and no_jr
under --compare, else model) with its checkpoints and metrics.  --init_from=PATH starts from the
weights of another run, or from converted ones (deq_jax.convert.mdeq).
"""

from __future__ import annotations

import jax

from deq_jax.training import flags
from experiments.common.run import Experiment
from experiments.image_classification import report
from experiments.image_classification.data import open_data
from experiments.image_classification.presets import PRESETS
from experiments.image_classification.task import build_task

EXPERIMENT = Experiment(open_data=open_data, build_task=build_task, write_report=report.write)
run = EXPERIMENT.run

if __name__ == "__main__":
    # Two devices on a CPU, whatever its cores: small convolutions use one core each, and the same
    # number everywhere gives the same figures everywhere.  Accelerators are not touched by it.
    jax.config.update("jax_num_cpu_devices", 2)
    flags.run(run, PRESETS, default="digits")
