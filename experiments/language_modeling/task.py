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
from deq_jax.training import Batch, Mean, Task, UsageError, metrics
from deq_jax.training.parallel import ShardedMap, require_even
from deq_jax.training.solving import solve_options
from experiments.language_modeling.config import LanguageConfig
from experiments.language_modeling.data import Texts, count_words


def build_task(config: LanguageConfig, mesh: Mesh, data: Texts | None = None) -> Task:
    """Mean negative log-likelihood of the next word, with a memory that is carried on.

    Args:
      config: the whole configuration.
      mesh: the devices over which solve and softmax are split.
      data: the texts, whose vocabulary is read; None to count its words without opening Wikipedia.

    Returns:
      The task.

    Raises:
      UsageError: an evaluation batch does not divide by the devices; the cutoffs do not fit the
        vocabulary.
    """
    part, streams = config.data, config.train.batch_size
    require_even("data.eval_batch_size", part.eval_batch_size, mesh.size)
    words = count_words(part) if data is None else len(data.corpus.vocabulary)
    model = build_model(config, mesh, words)

    def carry(train: bool) -> Memory:
        if train:
            return model.empty_memory(streams)
        return model.empty_memory(part.eval_batch_size, part.eval_memory)

    def inputs(batch: Batch, memory: Memory) -> tuple[Any, ...]:
        filled = jnp.where(batch["fresh"] > 0, 0, memory.filled)
        return batch["words"], batch["targets"], dataclasses.replace(memory, filled=filled)

    def loss(output: tuple[jax.Array, Memory], batch: Batch) -> dict[str, Mean]:
        return {"loss": Mean((output[0] * batch["weight"]).sum(), batch["weight"].sum())}

    whole = (streams, part.length)
    return Task(
        model=model,
        inputs=inputs,
        loss=loss,
        sample={
            "words": jax.ShapeDtypeStruct(whole, jnp.int32),
            "targets": jax.ShapeDtypeStruct(whole, jnp.int32),
            "weight": jax.ShapeDtypeStruct(whole, jnp.float32),
            "fresh": jax.ShapeDtypeStruct((streams,), jnp.float32),
        },
        carry=carry,
        leave=lambda output: output[1],
        x_axes=TransformerCell.x_axes,
        summarize=summarize,
    )


def summarize(means: Mapping[str, Mean]) -> dict[str, float]:
    """Means, and the perplexity that goes with the loss."""
    values = metrics.compute(means)
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
    split: dict[str, Any] = {} if mesh is None else {"per_device": ShardedMap(mesh)}
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
        hidden_parts=part.hidden_parts,
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
        **solve_options(config, mesh, TransformerCell.x_axes),
        **common,
    )
