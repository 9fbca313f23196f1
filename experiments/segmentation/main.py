"""Trains a segmentation model, with and without Jacobian regularisation where that is asked for.

    python -m experiments.segmentation.main --preset=camvid_small --data.dir=DIR
    python -m experiments.segmentation.main --preset=cityscapes_small --init_from=RUN

The workdir gets results.md, results.json and predictions.png, and a folder for each model (jr and
no_jr under --compare, else model) with its checkpoints and metrics.  --init_from takes stem and
equilibrium from such a folder of an ImageNet model of the same trunk, or from converted weights
(deq_jax.convert.mdeq); the head starts anew.
"""

from __future__ import annotations

import jax

from deq_jax.training import flags
from experiments.common.run import Experiment
from experiments.segmentation import report
from experiments.segmentation.data import open_data
from experiments.segmentation.presets import PRESETS
from experiments.segmentation.task import build_task

EXPERIMENT = Experiment(open_data=open_data, build_task=build_task, write_report=report.write)
run = EXPERIMENT.run

if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)  # small convolutions use one core each
    flags.run(run, PRESETS, default="camvid_small")
