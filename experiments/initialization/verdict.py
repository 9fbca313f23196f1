"""Which models of the sweep count as trained, and when the others came apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from experiments.initialization.config import SweepConfig
from experiments.initialization.sweep import Family

WINDOW = 10
"""Steps over which a loss is averaged before it is compared with the first."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A family's models, judged; arrays ``[scales, seeds]``.

    Attributes:
      accurate: bool, test accuracy within the margin of the best of the whole grid.
      solved: bool, enough of the test set solved at the end.
      diverged: int, first step (from 1) at which an update was left out, the loss had risen or too
        many solves failed; 0 for never.
      cause: which of them: "update", "loss", "solver", or "".
    """

    accurate: np.ndarray
    solved: np.ndarray
    diverged: np.ndarray
    cause: np.ndarray

    @property
    def trained(self) -> np.ndarray:
        """Bool: accurate and solved."""
        return self.accurate & self.solved


def judge(config: SweepConfig, families: Mapping[str, Family]) -> dict[str, Verdict]:
    """Judges all models.

    Args:
      config: the grid and the rules.
      families: name -> what became of its models.

    Returns:
      name -> verdict.
    """
    shape = (len(config.scales), config.seeds)
    best = max(float(np.nanmax(f.end["accuracy"])) for f in families.values())
    verdicts = {}
    for name, family in families.items():
        diverged, cause = first_divergence(config, family.history)
        verdicts[name] = Verdict(
            accurate=(family.end["accuracy"] >= best - config.margin).reshape(shape),
            solved=(family.end["solved"] >= config.solved).reshape(shape),
            diverged=diverged.reshape(shape),
            cause=cause.reshape(shape),
        )
    return verdicts


def first_divergence(
    config: SweepConfig, history: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Finds when models diverged.

    Args:
      config: rise and unsolved are read.
      history: "loss", "skipped" and "unconverged", ``[C, steps]``.

    Returns:
      Step (from 1; 0 for never) and cause, ``[C]`` each.

    Example:
      >>> calm = {"loss": np.ones((1, 3)), "skipped": np.zeros((1, 3))}
      >>> step, cause = first_divergence(SweepConfig(), calm | {"unconverged": np.eye(3)[1:2]})
      >>> step.item(), cause.item()
      (2, 'solver')
    """
    # A loss that was not finite counts as infinite, in every window that it is in.
    loss = np.where(np.isfinite(history["loss"]), history["loss"], np.inf)
    steps = loss.shape[1]
    windows = [loss[:, max(0, k - WINDOW + 1) : k + 1].mean(axis=1) for k in range(steps)]
    signs = {
        "update": history["skipped"] > 0,
        "loss": np.stack(windows, axis=1) > config.rise * loss[:, :1],
        "solver": history["unconverged"] > config.unsolved,  # False for nan: not computed
    }
    never = steps + 1
    firsts = np.stack(
        [np.where(s.any(axis=1), s.argmax(axis=1) + 1, never) for s in signs.values()]
    )
    step, which = firsts.min(axis=0), firsts.argmin(axis=0)
    cause = np.where(step < never, np.array(list(signs))[which], "")
    return np.where(step < never, step, 0), cause


def octaves(scales: tuple[float, ...]) -> np.ndarray:
    """How much of the logarithmic axis every scale of a grid stands for.

    Args:
      scales: rising.

    Returns:
      Octaves ``[S]`` between the midpoints to its neighbours; at the ends as far out as in.

    Example:
      >>> octaves((0.5, 1.0, 4.0)).tolist()
      [1.0, 1.5, 2.0]
    """
    if len(scales) == 1:
        return np.zeros(1)
    gaps = np.diff(np.log2(scales))
    return (np.append(gaps[:1], gaps) + np.append(gaps, gaps[-1:])) / 2


def widths(config: SweepConfig, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many scales of the grid every seed has, and how many octaves they stand for.

    Args:
      config: scales are read.
      chosen: bool ``[scales, seeds]``.

    Returns:
      Number of scales and of octaves, ``[seeds]`` each.
    """
    return chosen.sum(axis=0), (octaves(config.scales)[:, None] * chosen).sum(axis=0)
