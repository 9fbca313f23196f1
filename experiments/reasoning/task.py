"""Model and loss of looped reasoning."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from deq_jax.models.looped import LoopedCell, LoopedTransformer
from deq_jax.training import Batch, Mean, Task
from deq_jax.training.solving import solve_options
from experiments.reasoning.config import DataConfig, ReasoningConfig


def build_task(config: ReasoningConfig, mesh: Mesh, data: Any = None) -> Task:
    """Cross-entropy of the answers; a puzzle counts as solved if all of it is right.

    Args:
      config: the whole configuration.
      mesh: the devices over which the solve is split.
      data: not used.

    Returns:
      The task.
    """
    del data
    part = config.model
    words, outputs, length, embedded = _sizes(config.data)
    denoise = config.data.denoise
    model = LoopedTransformer(
        cell=LoopedCell(
            part.features,
            heads=part.heads,
            hidden=part.hidden,
            norm=part.norm,
            recall=part.recall,
            causal=config.data.name == "addition" and not config.data.masked,
            window=part.window,
            parent=None,
        ),
        words=words,
        outputs=outputs,
        length=length if embedded else 0,
        start=part.start,
        **solve_options(config, mesh),
    )
    shape = (config.train.batch_size, length)
    return Task(
        model=model,
        inputs=lambda batch, carry: (shown(batch)["words"] if denoise else batch["words"],),
        loss=lambda scores, batch: cross_entropy(scores, shown(batch) if denoise else batch),
        sample={
            "words": jax.ShapeDtypeStruct(shape, jnp.int32),
            "targets": jax.ShapeDtypeStruct(shape, jnp.int32),
            "scored": jax.ShapeDtypeStruct(shape, jnp.float32),
        },
    )


def shown(batch: Batch) -> Batch:
    """Puts the shown part of the answers into the input, and scores the rest.

    Args:
      batch: puzzles; "shown" float [B, T] if it is there.

    Returns:
      The batch with other "words" and "scored".
    """
    if "shown" not in batch:
        return batch
    words = jnp.where(batch["shown"] > 0, batch["targets"], batch["words"])
    return {**batch, "words": words, "scored": batch["scored"] * (1 - batch["shown"])}


def _sizes(data: DataConfig) -> tuple[int, int, int, bool]:
    """Words, answers, positions in training, and whether positions are embedded."""
    match data.name:
        case "addition":
            return 13, 10, 3 * data.size + 2 + data.masked, True
        case "carry":
            return 4, 2, data.size, False
    return 5, 5, 16, True


def cross_entropy(scores: jax.Array, batch: Batch) -> dict[str, Mean]:
    """The loss and the accuracies of a batch.

    Args:
      scores: float [B, T, outputs].
      batch: "targets" int [B, T], "scored" [B, T], and "mask".

    Returns:
      "loss", the mean over the scored positions of every puzzle; "words", the share of right
      answers; "accuracy", the share of puzzles without a wrong one.
    """
    scored, mask = batch["scored"], batch["mask"]
    targets = jnp.where(scored > 0, batch["targets"], 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, targets)
    wrong = (jnp.argmax(scores, axis=-1) != targets) * scored
    share = 1 / jnp.maximum(scored.sum(axis=1), 1)
    each = {
        "loss": (losses * scored).sum(axis=1) * share,
        "words": 1 - wrong.sum(axis=1) * share,
        "accuracy": wrong.sum(axis=1) == 0,
    }
    return {name: Mean((value * mask).sum(), mask.sum()) for name, value in each.items()}
