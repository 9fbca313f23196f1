"""Model and loss of language modelling."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from deq_jax.models.embeddings import AdaptiveEmbedding
from deq_jax.models.transformer import DEQTransformer, ExplicitTransformer
from deq_jax.models.transformer_cell import Memory, TransformerCell
from deq_jax.training import Batch, Mean, Output, UsageError, metrics
from deq_jax.training.parallel import make_fixed_point, sharded_map
from deq_jax.training.placement import require_even
from deq_jax.training.task import CARRY
from experiments.language_modeling.config import LanguageConfig


class LanguageTask:
    """Mean negative log-likelihood of the next word, with a memory that is carried on.

    Attributes:
      x_axes: which operands of a solve are split by streams, for `sharded_fixed_point`.
    """

    x_axes = TransformerCell.x_axes

    def __init__(self, config: LanguageConfig, mesh: Mesh | None, words: int) -> None:
        """Wires the model.

        Args:
          config: all but optim is read.
          mesh: the devices over which solve and softmax are split; None for one device.
          words: size of the vocabulary.

        Raises:
          UsageError: a batch does not divide by the devices.
        """
        devices = 1 if mesh is None else mesh.size
        sizes = {
            "train.batch_size": config.train.batch_size,
            "data.eval_batch_size": config.data.eval_batch_size,
        }
        for name, size in sizes.items():
            require_even(name, size, devices)
        self._config = config
        self.model = build_model(config, mesh, words)

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Draws the initial weights; see `deq_jax.training.Task`."""
        # One word in every stream; the weights do not depend on the solve.
        text = jnp.zeros((self._config.train.batch_size, 1), jnp.int32)
        memory = self.model.empty_memory(len(text), 0)
        variables: Any = self.model.init(key, text, text, memory, train=False, max_steps=0)
        return variables["params"], {}

    def carry(self, *, train: bool) -> Memory:
        """An empty memory; see `deq_jax.training.task.Carrying`."""
        data = self._config.data
        if train:
            return self.model.empty_memory(self._config.train.batch_size)
        return self.model.empty_memory(data.eval_batch_size, data.eval_memory)

    def forward(
        self,
        params: Any,
        extra: Any,
        batch: Batch,
        *,
        key: jax.Array | None,
        train: bool,
        warmup: bool,
        max_steps: int | jax.Array,
        probe: Any,
    ) -> Output:
        """Loss of a batch of segments; see `deq_jax.training.Task`."""
        memory = extra[CARRY]
        memory = dataclasses.replace(memory, filled=jnp.where(batch["fresh"] > 0, 0, memory.filled))
        model = self._config.in_phase(self.model, train=train, warmup=warmup)
        applied: Any = model.apply(
            {"params": params},
            batch["words"],
            batch["targets"],
            memory,
            train=train,
            max_steps=max_steps,
            probe=probe,
            rngs={"dropout": key} if key is not None else None,
        )
        nll, reading = applied
        weight = batch["weight"]
        count = weight.sum()
        return Output(
            loss=(nll * weight).sum() / jnp.maximum(count, 1),
            sums={"count": count},
            extra={CARRY: reading.memory},
            solution=reading.solution,
        )

    def summarize(self, sums: Mapping[str, Mean]) -> dict[str, float]:
        """Means, and the perplexity that goes with the loss."""
        values = metrics.compute(sums)
        if "loss" in values:  # not where every update was left out
            values["perplexity"] = math.exp(min(values["loss"], 100))
        return values


def build_model(
    config: LanguageConfig, mesh: Mesh | None, words: int
) -> DEQTransformer | ExplicitTransformer:
    """The network that the configuration names.

    Args:
      config: all but optim is read.
      mesh: the devices over which solve and softmax are split; None for one device.
      words: size of the vocabulary.

    Returns:
      A Linen module.

    Raises:
      UsageError: the cutoffs do not fit the vocabulary.
    """
    part = config.model
    init = nn.initializers.normal(part.init_std)
    split: dict[str, Any] = {} if mesh is None else {"per_device": sharded_map(mesh)}
    try:
        vocab = AdaptiveEmbedding(
            vocab=words,
            features=part.features,
            embed=part.embed,
            cutoffs=part.cutoffs,
            div_val=part.div_val,
            init_weights=init,
            **split,
        )
    except ValueError as error:
        raise UsageError(f"{error}: set model.cutoffs, model.embed and model.div_val") from error
    cell = TransformerCell(
        features=part.features,
        heads=part.heads,
        hidden=part.hidden,
        pre_norm=part.pre_norm,
        window=part.window,
        dropout=part.dropout,
        attention_dropout=part.attention_dropout,
        weights=part.build_weights(),
    )
    common: Any = {
        "vocab": vocab,
        "cell": cell,
        "memory": part.memory,
        "dropout": part.dropout,
        "init_weights": init,
    }
    if part.name == "explicit":
        return ExplicitTransformer(layers=part.layers, tied=part.tied, **common)
    return DEQTransformer(
        solver=config.build_solver(),
        adjoint=config.backward.build_adjoint(),
        keep=config.solver.keep,
        fixed_point=make_fixed_point(config, mesh, LanguageTask.x_axes),
        **common,
    )
