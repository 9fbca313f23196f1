"""Trains an image classifier with and without Jacobian regularisation and compares the two.

    python -m experiments.image_classification.main --preset=digits --workdir=runs/digits

Two folders of the workdir, jr and no_jr (checkpoints, metrics); results.md, results.json and
results.png beside them.  `digits`: about 1.5 minutes on 2 CPU cores, nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import sys

import jax

from deq_jax.training import flags, train, workdir
from deq_jax.training.parallel import make_mesh
from experiments.image_classification import report
from experiments.image_classification.config import PRESETS, ImageConfig
from experiments.image_classification.task import ImageTask, build_data


def run(config: ImageConfig) -> dict[str, report.Trained]:
    """Trains the models and writes the report.

    Args:
      config: the whole configuration.

    Returns:
      name -> trained model: "jr" and, where a comparison is asked for, "no_jr".
    """
    folder, mesh = workdir.claim(config), make_mesh()
    plain = dataclasses.replace(config.jac, gamma=0.0, increment=0.0, warmup_gamma=0.0)
    variants = {"no_jr": plain, "jr": config.jac} if config.compare else {"jr": config.jac}
    trained = {}
    for name, jac in variants.items():
        part = dataclasses.replace(config, workdir=str(folder / name), jac=jac)
        task = ImageTask(part, mesh)
        trained[name] = report.Trained(task, train(task, part, *build_data(part), mesh=mesh))
    sys.stdout.write(report.write(folder, config, trained, build_data(config)[1], mesh))
    return trained


if __name__ == "__main__":
    # Two devices on a CPU, whatever its cores: small convolutions use one core each, and the same
    # number everywhere gives the same figures everywhere.  Accelerators are not touched by it.
    jax.config.update("jax_num_cpu_devices", 2)
    flags.run(run, PRESETS, default="digits")
