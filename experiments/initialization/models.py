"""Trains the small language model and the two-branch multiscale DEQ from every family.

Their own presets, without penalty, for fewer updates; `model.init` and `model.init_scale` change.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from deq_jax.training import Config, Diverged, JacConfig, fields, train
from deq_jax.training.metrics import compute
from experiments.image_classification import data as image_data
from experiments.image_classification.presets import PRESETS as IMAGE_PRESETS
from experiments.image_classification.task import ImageTask
from experiments.initialization.config import ModelsConfig
from experiments.language_modeling import data as language_data
from experiments.language_modeling.presets import PRESETS as LANGUAGE_PRESETS
from experiments.language_modeling.task import LanguageTask


@dataclasses.dataclass(frozen=True)
class Rival:
    """A model to train from several weights.

    Attributes:
      config: its preset, shortened.
      build: configuration -> task, training data, evaluation data.
      score: name of the metric that is compared.
    """

    config: Any
    build: Callable[[Any], tuple[Any, Any, Any]]
    score: str


def rivals(config: ModelsConfig, mesh: Mesh) -> dict[str, Rival]:
    """The two models.

    Args:
      config: names and steps are read.
      mesh: the devices.

    Returns:
      Name of the preset -> model.
    """

    def prose(part: Any) -> tuple[Any, Any, Any]:
        texts = language_data.build_data(part)
        words = len(texts.corpus.vocabulary)
        return LanguageTask(part, mesh, words), texts.train, texts.watched

    def digits(part: Any) -> tuple[Any, Any, Any]:
        return ImageTask(part, mesh), *image_data.build_data(part)

    known = {
        "prose": Rival(_short(LANGUAGE_PRESETS["prose"], config.steps), prose, "perplexity"),
        "digits": Rival(_short(IMAGE_PRESETS["digits"], config.steps), digits, "accuracy"),
    }
    return {name: known[name] for name in config.names}


def choices(config: ModelsConfig) -> list[tuple[str, float]]:
    """Family and scale of every training, the published weights first.

    Args:
      config: families and scales are read.

    Returns:
      Pairs.

    Example:
      >>> choices(ModelsConfig(families=("goe",), scales=(0.5,)))
      [('published', 1.0), ('goe', 0.5)]
    """
    return [("published", 1.0), *((f, s) for f in config.families for s in config.scales)]


def measure(config: ModelsConfig, folder: Path, mesh: Mesh, seed: int = 0) -> list[dict[str, Any]]:
    """Trains all of them, each in a folder of its own, where a second call finds it trained.

    Args:
      config: what to train.
      folder: of the experiment.
      mesh: the devices.
      seed: the first one.

    Returns:
      A record for each model, family and scale: "model", "family", "scale", "metric" (name of the
      score), and lists with one number for each seed, None for what there is none of: "score",
      "start_unsolved" and "end_unsolved" (share of examples not solved: in the first steps of
      training with its budget; of the evaluation, with the larger one), "radius", "diverged" (1 if
      training was ended by losses that were not finite).
    """
    records = []
    for name, rival in rivals(config, mesh).items():
        for family, scale in choices(config):
            runs = []
            for k in range(seed, seed + config.seeds):
                sys.stderr.write(f"{name}, {family} {scale:g}, seed {k}\n")
                changed = {"model.init": family, "model.init_scale": scale, "train.seed": k}
                changed["model.init_centre"] = config.centre and family == "gaussian"
                changed["workdir"] = str(folder / name / f"{family}_{scale:g}_seed{k}")
                runs.append(_train(rival, fields.replace(rival.config, changed), mesh))
            record = {"model": name, "family": family, "scale": scale, "metric": rival.score}
            records.append(record | {key: [run[key] for run in runs] for key in runs[0]})
    return records


def _train(rival: Rival, config: Any, mesh: Mesh) -> dict[str, float | None]:
    """The numbers of one training."""
    task, train_data, eval_data = rival.build(config)
    summarize = getattr(task, "summarize", compute)
    names = ("score", "start_unsolved", "end_unsolved", "radius")
    try:
        result = train(task, config, train_data, eval_data, mesh=mesh, summarize=summarize)
    except Diverged as error:
        sys.stderr.write(f"{error}\n")
        return dict.fromkeys(names) | {"diverged": 1.0}
    first = next(r for r in result.history if r["kind"] == "train")
    final = result.evaluation[config.eval_steps]
    values = (
        final.get(rival.score),
        first.get("unconverged"),
        final.get("unconverged"),
        final.get("spectral_radius"),
    )
    found = dict(zip(names, values, strict=True)) | {"diverged": 0.0}
    return {n: v if v is not None and math.isfinite(v) else None for n, v in found.items()}


def _short(config: Config, steps: int) -> Any:
    """A preset without penalty and comparison, for fewer updates and one evaluation at the end."""
    every = max(1, steps // 10)
    length = {"steps": steps, "log_every": every, "eval_every": 0, "checkpoint_every": steps}
    evaluation = dataclasses.replace(config.eval, budgets=(), spectral_batches=1)
    jac = JacConfig(budget_low=config.jac.budget_low, budget_on="all")
    return dataclasses.replace(
        config,
        compare=False,
        jac=jac,
        train=dataclasses.replace(config.train, warmup_steps=0, **length),
        eval=evaluation,
    )
