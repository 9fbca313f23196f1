"""What can be set in language modelling; the presets are in `presets.py`."""

from __future__ import annotations

import dataclasses
from typing import Literal

from deq_jax.models.transformer_cell import check_cell
from deq_jax.training import option, require
from experiments.common.compare import ComparedConfig
from experiments.common.families import FamilyConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(FamilyConfig):
    """A DEQ-Transformer, or the explicit network it is compared with."""

    name: Literal["deq", "explicit"] = option(
        "deq", "deq: an equilibrium; explicit: `layers` layers of the same kind"
    )
    features: int = option(128, "size of the state at every position")
    heads: int = option(4, "attention heads; they divide features")
    hidden: int = option(512, "width of the feed-forward layer")
    hidden_parts: int = option(
        1, "parts in which the feed-forward layer is computed, and again in gradients; more take "
        "less memory and more time", may_change=True,
    )  # fmt: skip
    pre_norm: bool = option(False, "normalise before attention and feed-forward, not after")
    window: int | None = option(None, "positions attended to, one's own included; none for all")
    memory: int = option(32, "remembered positions before a training segment")
    embed: int | None = option(None, "size of frequent words' vectors; none for features")
    cutoffs: tuple[int, ...] = option((), "words before each tail of the vocabulary; empty for one")
    div_val: int = option(1, "vectors of every tail are so many times shorter")
    dropout: float = option(0.0, "variational dropout, one mask for all positions of a segment")
    attention_dropout: float = option(0.0, "dropout of attention weights, one mask for a solve")
    init_std: float = option(0.01, "deviation of the first word vectors and injection weights")
    layers: int = option(12, "layers of the explicit network")
    tied: bool = option(False, "whether the layers of the explicit network share their weights")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_cell(self)
        require(self.memory >= 0, "memory", "at least 0", self.memory)
        require(self.init_std > 0, "init_std", "above 0", self.init_std)
        require(self.layers >= 1, "layers", "at least 1", self.layers)
        require(0 <= self.dropout < 1, "dropout", "in [0, 1)", self.dropout)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text, and how it is cut."""

    name: Literal["prose", "wikitext-2", "wikitext-103", "text"] = option(
        "prose",
        "prose: the documentation that comes with Python; wikitext-2 and -103: Wikipedia articles; "
        "text: any text in wiki.{train,valid,test}.tokens, words between spaces",
    )
    dir: str = option(
        "", "folder of wiki.{train,valid,test}.tokens or of TFDS sets; empty for TFDS' default",
        may_change=True,
    )  # fmt: skip
    cache: str = option(
        "", "folder for encoded texts; empty for ~/.cache/deq_jax, none for no cache",
        may_change=True,
    )  # fmt: skip
    length: int = option(32, "words in a training segment")
    eval_length: int = option(32, "words in an evaluation segment")
    eval_memory: int = option(32, "remembered positions before an evaluation segment")
    eval_batch_size: int = option(8, "streams that a text is evaluated in, over all devices")
    watched: int | None = option(
        None, "words of the validation text read by evaluations in training; none for all; the "
        "report reads all in any case",
        may_change=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("length", "eval_length", "eval_batch_size"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        require(self.eval_memory >= 0, "eval_memory", "at least 0", self.eval_memory)
        if self.watched is not None:
            require(self.watched >= 2, "watched", "at least 2, or none", self.watched)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How a text is continued under --generate."""

    words: int = option(60, "words to generate", may_change=True)
    count: int = option(2, "continuations", may_change=True)
    temperature: float = option(0.8, "divides the scores; 0 takes the likeliest", may_change=True)
    top: int = option(40, "chooses from so many likeliest words", may_change=True)
    seed: int = option(0, "of the choice", may_change=True)

    def __post_init__(self) -> None:
        for name in ("words", "count", "top"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        require(self.temperature >= 0, "temperature", "at least 0", self.temperature)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageConfig(ComparedConfig):
    """The whole configuration."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    sample: SampleConfig = SampleConfig()
    generate: str = option(
        "", "instead of training, continue this text with the model in workdir, or in init_from",
        may_change=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.name == "explicit" and (
            self.jac.gamma > 0 or self.jac.increment > 0 or self.jac.warmup_gamma > 0
        ):
            raise ValueError(
                "jac.gamma must be 0 for an explicit network, which has no equilibrium, got "
                f"{self.jac.gamma}"
            )
        if self.model.name == "explicit" and self.precision != "float32":
            raise ValueError(f"precision must be float32 without a solve, got {self.precision}")
