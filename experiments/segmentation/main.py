"""Trains a segmentation model, with and without Jacobian regularisation where that is asked for.

    python -m experiments.segmentation.main --preset=camvid_small --data.dir=DIR
    python -m experiments.segmentation.main --preset=cityscapes_small --init_from=RUN

The workdir gets results.md, results.json and predictions.png, and a folder for each model (jr and
no_jr under --compare, else model) with its checkpoints and metrics.  --init_from takes stem and
equilibrium from such a folder of an ImageNet model of the same trunk, or from converted weights
(deq_jax.convert.mdeq); the head starts anew.
"""

from __future__ import annotations

from functools import partial

import jax
import numpy as np

from deq_jax.training import flags
from deq_jax.training.parallel import make_mesh
from experiments import diagnose, dry_run
from experiments import report as shared
from experiments.segmentation import data, presets, report
from experiments.segmentation.config import SegmentationConfig
from experiments.segmentation.task import SegmentationTask
from experiments.variants import parts, train_all


def run(config: SegmentationConfig) -> dict[str, report.Trained]:
    """Trains "no_jr" and "jr" for a comparison, else "model"; writes the report."""
    mesh, names = make_mesh(), data.choose_classes(config).names
    make_task = partial(SegmentationTask, mesh=mesh, names=names)
    if config.dry_run:
        equal = partial(make_task, weights=np.ones(len(names)))
        shared.show(dry_run.run(parts(config), equal, data.shapes(config), mesh))
        return {}
    sets = data.build_data(config)  # before anything is written: it may be missing
    make_task = partial(make_task, weights=sets.weights)
    if config.diagnose:
        shared.show(diagnose.run(parts(config), make_task, sets.train, mesh))
        return {}
    folder, trained = train_all(config, make_task, sets.train, sets.eval, mesh)
    shared.show(report.write(folder, config, trained, sets, mesh))
    return trained


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)  # small convolutions use one core each
    flags.run(run, presets.PRESETS, default="camvid_small")
