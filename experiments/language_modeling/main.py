r"""Trains a language model, with and without Jacobian regularisation where that is asked for.

    python -m experiments.language_modeling.main --preset=prose --workdir=runs/prose
    python -m experiments.language_modeling.main --preset=prose --workdir=runs/prose \
        --generate="The function returns"
    python -m experiments.language_modeling.main --preset=wikitext2_small --data.dir=DIR

The workdir gets results.md, results.json and results.png, and a folder for each model (jr and no_jr
under --compare, else model) with its checkpoints and metrics.  --init_from=FOLDER starts from the
weights of another run, or from converted ones (deq_jax.convert.transformer).
"""

from __future__ import annotations

import sys
from functools import partial

import jax

from deq_jax.training import flags
from deq_jax.training.parallel import make_mesh
from experiments import diagnose, dry_run
from experiments import report as shared
from experiments.language_modeling import generate, report
from experiments.language_modeling.config import LanguageConfig
from experiments.language_modeling.data import build_data, count_words, shapes
from experiments.language_modeling.presets import PRESETS
from experiments.language_modeling.task import LanguageTask
from experiments.variants import parts, train_all


def run(config: LanguageConfig) -> dict[str, report.Trained]:
    """Trains "no_jr" and "jr" for a comparison, else "model", or continues a text."""
    if config.generate:
        sys.stdout.write(generate.run(config) + "\n")
        return {}
    mesh = make_mesh()
    if config.dry_run:
        make_task = partial(LanguageTask, mesh=mesh, words=count_words(config.data))
        shared.show(dry_run.run(parts(config), make_task, shapes(config), mesh))
        return {}
    texts = build_data(config)  # before anything is written: it may be missing
    make_task = partial(LanguageTask, mesh=mesh, words=len(texts.corpus.vocabulary))
    if config.diagnose:
        shared.show(diagnose.run(parts(config), make_task, texts.train, mesh, LanguageTask.x_axes))
        return {}
    folder, trained = train_all(config, make_task, texts.train, texts.watched, mesh)
    shared.show(report.write(folder, config, trained, texts, mesh))
    return trained


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)  # each solves half of the streams, on one core
    flags.run(run, PRESETS, default="prose")
