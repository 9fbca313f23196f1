"""Trains the small language model and the two-branch multiscale DEQ from every family.

Their own presets, without penalty, for fewer updates; `model.init` and `model.init_scale` change.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from deq_jax.training import Config, Diverged, JacConfig, fields, train
from experiments.common.run import Experiment
from experiments.image_classification import main as images
from experiments.initialization.config import ModelsConfig
from experiments.language_modeling import main as language


@dataclasses.dataclass(frozen=True)
class Rival:
    """A model to train from several weights.

    Attributes:
      config: its preset, shortened.
      experiment: of the preset.
      score: name of the metric that is compared.
    """

    config: Any
    experiment: Experiment
    score: str


def rivals(config: ModelsConfig) -> dict[str, Rival]:
    """The two models.

    Args:
      config: names and steps are read.

    Returns:
      Name of the preset -> model.
    """
    known = {
        "prose": Rival(language.PRESETS["prose"], language.EXPERIMENT, "perplexity"),
        "digits": Rival(images.PRESETS["digits"], images.EXPERIMENT, "accuracy"),
    }
    return {
        name: dataclasses.replace(known[name], config=_short(known[name].config, config.steps))
        for name in config.names
    }


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
    for name, rival in rivals(config).items():
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
    data = rival.experiment.open_data(config)
    task = rival.experiment.build_task(config, mesh, data)
    names = ("score", "start_unsolved", "end_unsolved", "radius")
    try:
        result = train(task, config, data.train, data.eval, mesh=mesh)
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
