r"""Trains a language model, with and without Jacobian regularisation where that is asked for.

    python -m experiments.language_modeling.main --preset=prose --workdir=runs/prose
    python -m experiments.language_modeling.main --preset=prose --workdir=runs/prose \
        --generate="The function returns"
    python -m experiments.language_modeling.main --preset=wikitext2_small --data.dir=DIR

The workdir gets results.md, results.json and results.png, and a folder for each model (jr and no_jr
under --compare, else model) with its checkpoints and metrics.  --init_from=PATH starts from the
weights of another run, or from converted ones (deq_jax.convert.transformer).
"""

from __future__ import annotations

import sys

import jax

from deq_jax.training import flags
from experiments.common.reporting import Trained
from experiments.common.run import Experiment
from experiments.language_modeling import generate, report
from experiments.language_modeling.config import LanguageConfig
from experiments.language_modeling.data import open_data
from experiments.language_modeling.presets import PRESETS
from experiments.language_modeling.task import build_task

EXPERIMENT = Experiment(open_data=open_data, build_task=build_task, write_report=report.write)


def run(config: LanguageConfig) -> dict[str, Trained]:
    """Continues a text, or runs the experiment."""
    if config.generate:
        sys.stdout.write(generate.run(config) + "\n")
        return {}
    return EXPERIMENT.run(config)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)  # each solves half of the streams, on one core
    flags.run(run, PRESETS, default="prose")
