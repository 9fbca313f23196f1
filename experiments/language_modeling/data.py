"""Opens the text that a configuration names."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import jax

from deq_jax import folders
from deq_jax.data import corpora, text
from deq_jax.training import DataIterator, EvalData, UsageError
from experiments.language_modeling.config import DataConfig, LanguageConfig


@dataclasses.dataclass(frozen=True)
class Texts:
    """A corpus, cut for this process.

    Attributes:
      corpus: the whole.
      train: endless training segments.
      eval: one pass over what of the validation split is read in training.
      valid: one pass over the validation split.
      test: one pass over the test split.
    """

    corpus: text.Corpus
    train: DataIterator
    eval: EvalData
    valid: EvalData
    test: EvalData


def open_data(config: LanguageConfig) -> Texts:
    """Opens a corpus.

    Args:
      config: data and train are read.

    Returns:
      The texts.

    Raises:
      MissingData: the text is not there.
      UsageError: a file is not what it should be, or the batch does not fit it.
    """
    data, shard = config.data, (jax.process_index(), jax.process_count())
    try:
        found = open_corpus(data)
        train = text.segments(
            found.splits["train"],
            batch_size=config.train.batch_size,
            length=data.length,
            seed=config.train.seed,
            shard=shard,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error

    def held_out(split: str, words: int | None = None) -> EvalData:
        return lambda: text.eval_segments(
            found.splits[split][:words],
            batch_size=data.eval_batch_size,
            length=data.eval_length,
            shard=shard,
        )

    watched = held_out("valid", data.watched)
    return Texts(found, train, watched, held_out("valid"), held_out("test"))


def count_words(data: DataConfig) -> int:
    """Size of the vocabulary, of Wikipedia's without opening it.

    Args:
      data: see `open_corpus`.

    Returns:
      Words.

    Raises:
      MissingData: the text is not there.
    """
    known = {"wikitext-2": 33_278, "wikitext-103": 267_735}.get(data.name)
    return known or len(open_corpus(data).vocabulary)


def open_corpus(data: DataConfig) -> text.Corpus:
    """Reads a corpus from files, from a prepared TFDS set, or from Python itself.

    Args:
      data: name, dir and cache are read.

    Returns:
      The corpus.

    Raises:
      MissingData: it is not there.
      ValueError: a file is not what it should be.
    """
    if data.name == "prose":
        return text.corpus(corpora.prose())
    if data.name == "text" or any(folders.parse(data.dir or "/nowhere").glob("wiki.*.tokens")):
        texts = corpora.wiki_files(data.dir, "" if data.name == "text" else data.name)
    else:
        texts = corpora.wiki_tfds(data.name, data.dir)
    cache = {"": folders.cache(), "none": None}.get(data.cache, Path(data.cache).expanduser())
    return text.corpus(texts, cache, say=lambda line: print(line, file=sys.stderr))
