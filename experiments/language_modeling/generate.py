"""Continues a text, word by word, with a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deq_jax import folders
from deq_jax.data import corpora, text
from deq_jax.models.transformer import DEQTransformer, ExplicitTransformer
from deq_jax.training import UsageError, weights
from deq_jax.training.task import for_phase, has_solver
from experiments.language_modeling import data
from experiments.language_modeling.config import LanguageConfig, SampleConfig
from experiments.language_modeling.task import build_model

LanguageModel = DEQTransformer | ExplicitTransformer

FOLDERS = ("model", "jr", "no_jr")
"""Where the models of a workdir are, the first one that is there is taken."""


def run(config: LanguageConfig) -> str:
    """Loads the weights of a run and continues `config.generate`.

    Words are read and written one at a time: a word's equilibrium depends on the words before it
    alone, whose equilibria the memory holds.

    Args:
      config: the configuration that the model was trained with; sample and generate are read too.

    Returns:
      The continuations, a paragraph each.

    Raises:
      UsageError: there are no weights, or they are of another model.
    """
    try:
        vocabulary = data.open_corpus(config.data).vocabulary
    except ValueError as error:
        raise UsageError(str(error)) from error
    model = build_model(config, None, len(vocabulary))
    params = load(config, model)
    prompt = corpora.words_of(config.generate, lower=config.data.name == "prose")
    known = set(vocabulary.words)
    if strange := [word for word in prompt if word not in known]:
        if text.UNKNOWN not in known:
            raise UsageError(f"the vocabulary has not: {' '.join(strange)}")
        print(f"(read as {text.UNKNOWN}: {' '.join(strange)})")
    numbers = vocabulary.encode([prompt])[:-1]
    if not numbers.size:
        raise UsageError(f"got no word in --generate={config.generate!r}; wanted some text")
    banned = [i for i, word in enumerate(vocabulary.words) if word == text.UNKNOWN]
    drawn = sample(config, model, params, numbers, banned)
    return "\n\n".join(
        " ".join([*prompt, "|", *vocabulary.decode(row)]).replace(f" {text.EOS}", "\n")
        for row in drawn
    )


def load(config: LanguageConfig, model: LanguageModel) -> Any:
    """Reads weights, all of which must fit.

    Args:
      config: init_from and workdir are read.
      model: the network.

    Returns:
      Its parameters.

    Raises:
      UsageError: there are none, or they are of another model.
    """
    workdir = folders.parse(config.workdir)
    found = [workdir / name for name in FOLDERS if (workdir / name / "checkpoints").exists()]
    folder = folders.parse(config.init_from) if config.init_from else (*found, workdir)[0]
    params, _ = weights.load(folder)
    text = jnp.zeros((1, 1), jnp.int32)
    start = partial(model.init, train=False)
    variables = jax.eval_shape(start, jax.random.key(0), text, text, model.empty_memory(1))
    wanted: Any = variables["params"]
    advice = "give the preset, the text and the settings of model that it was trained with"
    weights.require_fit(params, wanted, folder, advice)
    print(f"weights of {folder}")
    return params


def sample(
    config: LanguageConfig,
    model: LanguageModel,
    params: Any,
    prompt: np.ndarray,
    banned: Sequence[int] = (),
) -> np.ndarray:
    """Draws continuations.

    Args:
      config: sample, data.eval_memory and the evaluation's budget are read.
      model: the network.
      params: its parameters.
      prompt: int [P].
      banned: words never drawn.

    Returns:
      int [sample.count, sample.words].
    """
    part = config.sample
    memory = model.empty_memory(part.count, config.data.eval_memory)
    if has_solver(model):
        model = for_phase(model, config, train=False)

    @jax.jit
    def step(params: Any, words: jax.Array, memory: Any, key: jax.Array) -> Any:
        log_probs, memory = model.apply(
            {"params": params}, words[:, None], memory, max_steps=config.eval_steps,
            method="next_word",
        )  # fmt: skip
        allowed = log_probs.at[:, jnp.asarray(banned, jnp.int32)].set(-jnp.inf)
        return choose(allowed, key, part), memory

    key, drawn = jax.random.key(part.seed), []
    given = jnp.broadcast_to(jnp.asarray(prompt)[:, None], (len(prompt), part.count))
    for i in range(len(prompt) + part.words - 1):
        words = given[i] if i < len(prompt) else drawn[-1]
        following, memory = step(params, words, memory, jax.random.fold_in(key, i))
        if i >= len(prompt) - 1:
            drawn.append(following)
    return np.stack(drawn, axis=1)


def choose(log_probs: jax.Array, key: jax.Array, part: SampleConfig) -> jax.Array:
    """Draws a word from the likeliest ones.

    Args:
      log_probs: float [B, V].
      key: PRNG key.
      part: temperature and top are read.

    Returns:
      int [B].
    """
    best, words = jax.lax.top_k(log_probs, min(part.top, log_probs.shape[-1]))  # [B, top]
    if part.temperature == 0:
        return words[:, 0]
    chosen = jax.random.categorical(key, best / part.temperature)
    return jnp.take_along_axis(words, chosen[:, None], axis=1)[:, 0]
