"""Trains an image classifier, with and without Jacobian regularisation where that is asked for.

    python -m experiments.image_classification.main --preset=digits --workdir=runs/digits
    python -m experiments.image_classification.main --preset=cifar10_large_jr --data.dir=DIR

The workdir gets results.md, results.json and results.png, and a folder for each model (jr and no_jr
under --compare, else model) with its checkpoints and metrics.  --init_from=FOLDER starts from the
weights of another run, or from converted ones (deq_jax.convert.mdeq).
"""

from __future__ import annotations

from functools import partial

import jax

from deq_jax.training import flags
from deq_jax.training.parallel import make_mesh
from experiments import diagnose, dry_run
from experiments import report as shared
from experiments.image_classification import report
from experiments.image_classification.config import ImageConfig
from experiments.image_classification.data import build_data, shapes
from experiments.image_classification.presets import PRESETS
from experiments.image_classification.task import ImageTask
from experiments.variants import parts, train_all


def run(config: ImageConfig) -> dict[str, report.Trained]:
    """Trains "no_jr" and "jr" for a comparison, else "model"; writes the report."""
    mesh = make_mesh()
    make_task = partial(ImageTask, mesh=mesh)
    if config.dry_run:
        shared.show(dry_run.run(parts(config), make_task, shapes(config), mesh))
        return {}
    train_data, eval_data = build_data(config)  # before anything is written: it may be missing
    if config.diagnose:
        shared.show(diagnose.run(parts(config), make_task, train_data, mesh))
        return {}
    folder, trained = train_all(config, make_task, train_data, eval_data, mesh)
    shared.show(report.write(folder, config, trained, eval_data, mesh))
    return trained


if __name__ == "__main__":
    # Two devices on a CPU, whatever its cores: small convolutions use one core each, and the same
    # number everywhere gives the same figures everywhere.  Accelerators are not touched by it.
    jax.config.update("jax_num_cpu_devices", 2)
    flags.run(run, PRESETS, default="digits")
