"""Trains a segmentation model, with and without Jacobian regularisation where that is asked for.

    python -m experiments.segmentation.main --preset=camvid_small --data.dir=DIR
    python -m experiments.segmentation.main --preset=cityscapes_small --data.dir=DIR \
        --init_from=runs/imagenet_small/model

The workdir gets results.md, results.json and predictions.png, and a folder for each model (jr and
no_jr under --compare, else model) with its checkpoints and metrics.  --init_from=FOLDER takes stem
and equilibrium from a trained or converted ImageNet model of the same trunk; the head starts anew.
"""

from __future__ import annotations

import dataclasses
import sys

import jax

from deq_jax.training import flags, train, workdir
from deq_jax.training.parallel import make_mesh
from experiments.segmentation import report
from experiments.segmentation.config import SegmentationConfig
from experiments.segmentation.data import build_data
from experiments.segmentation.presets import PRESETS
from experiments.segmentation.task import SegmentationTask


def run(config: SegmentationConfig) -> dict[str, report.Trained]:
    """Trains the models and writes the report.

    Args:
      config: the whole configuration.

    Returns:
      name -> trained model: "no_jr" and "jr" for a comparison, else "model".
    """
    data = build_data(config)  # before anything is written: it may be missing
    folder, mesh, start = workdir.claim(config), make_mesh(), data.train.get_state()
    plain = dataclasses.replace(config.jac, gamma=0.0, increment=0.0, warmup_gamma=0.0)
    variants = {"no_jr": plain, "jr": config.jac} if config.compare else {"model": config.jac}
    trained = {}
    for name, jac in variants.items():
        part = dataclasses.replace(config, workdir=str(folder / name), jac=jac, compare=False)
        task = SegmentationTask(part, mesh, names=data.drawing.names, weights=data.weights)
        data.train.set_state(start)
        summarize = task.summarize
        result = train(task, part, data.train, data.eval, mesh=mesh, summarize=summarize)
        trained[name] = report.Trained(task, result)
    sys.stdout.write(report.write(folder, config, trained, data.eval, data.drawing, mesh))
    return trained


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)  # small convolutions use one core each
    flags.run(run, PRESETS, default="camvid_small")
