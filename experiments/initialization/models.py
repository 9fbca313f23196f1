"""Trains the small language model and the two-branch multiscale DEQ from every family.

Their own presets, without penalty, for fewer updates; `model.init` and `model.init_scale` change.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from deq_jax.training import Config, JacConfig, fields, train
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


def measure(config: ModelsConfig, folder: Path, mesh: Mesh) -> list[dict[str, Any]]:
    """Trains all of them, each in a folder of its own, where a second call finds it trained.

    Args:
      config: what to train.
      folder: of the experiment.
      mesh: the devices.

    Returns:
      A record for each, of "model", "family", "scale", "metric" (its name), "score",
      "start_unsolved" and "end_unsolved" (share of examples not solved: in the first steps of
      training with its budget; of the evaluation, with the larger one), "radius", "skipped" (share
      of updates left out).
    """
    records = []
    for name, rival in rivals(config, mesh).items():
        for family, scale in choices(config):
            sys.stderr.write(f"{name}, {family} {scale:g}\n")
            changed = {"model.init": family, "model.init_scale": scale}
            changed["workdir"] = str(folder / name / f"{family}_{scale:g}")
            part = fields.replace(rival.config, changed)
            task, train_data, eval_data = rival.build(part)
            summarize = getattr(task, "summarize", compute)
            result = train(task, part, train_data, eval_data, mesh=mesh, summarize=summarize)
            logged = [r for r in result.history if r["kind"] == "train"]
            final = result.evaluation[part.eval_steps]
            records.append(
                {
                    "model": name,
                    "family": family,
                    "scale": scale,
                    "metric": rival.score,
                    "score": final.get(rival.score),
                    "start_unsolved": logged[0].get("unconverged"),
                    "end_unsolved": final.get("unconverged"),
                    "radius": final.get("spectral_radius"),
                    "skipped": _mean(r.get("skipped", 0.0) for r in logged),
                }
            )
    return records


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


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
