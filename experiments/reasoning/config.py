"""Settings of looped reasoning, the arms of its comparison, and its presets.

From the papers: the penalty's weight of 0.1 in the blend (1 - gamma) loss + gamma penalty, the
post-sandwich block without recall, one log-normal loop count a batch (STARS: Yang et al., arXiv
2605.26733, who train 4-digit addition at 512 features); recall (Bansal et al., arXiv 2202.05826);
the Poisson count of a log-normal mean (Geiping et al., arXiv 2502.05171); masking at a cosine rate
and the least confident masked again (Cameron et al., arXiv 2604.18839).  Chosen here: sizes, steps,
learning rate, and a penalty that begins at half of the steps, when the sums are learnt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from deq_jax.models.looped import Norm, Start
from deq_jax.training import (
    BackwardConfig,
    Config,
    EvalConfig,
    OptimConfig,
    SolverConfig,
    TrainConfig,
    option,
    require,
)
from experiments.common import compare


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The looped block."""

    features: int = option(64, "size of the state at a position")
    heads: int = option(4, "attention heads")
    hidden: int = option(128, "units of the mlp")
    norm: Norm = option("sandwich", "where the block normalises")
    recall: bool = option(False, "whether the input is added before every loop")
    window: int | None = option(None, "positions attended to, itself and those before; none: all")
    start: Start = option("input", "where the loop begins")

    def __post_init__(self) -> None:
        require(self.heads >= 1, "heads", "at least 1", self.heads)
        divides = self.features >= 1 and self.features % self.heads == 0
        require(divides, "features", f"a multiple of heads = {self.heads}", self.features)
        require(self.hidden >= 1, "hidden", "at least 1", self.hidden)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Puzzles made on the spot."""

    name: Literal["addition", "carry", "sudoku4"] = option(
        "addition", "decimal sums, binary sums by columns, or 4 x 4 sudokus"
    )
    size: int = option(2, "digits of addition, or bits of carry, in training")
    test_size: int = option(64, "bits of carry in the second test set")
    passing: float = option(0.9, "share of the columns there that hand a carry on")
    masked: bool = option(
        False, "addition: hide the sum and predict its digits together, instead of one by one"
    )
    denoise: bool = option(False, "show a random part of the answer in training")
    examples: int = option(50_000, "training puzzles")
    test_examples: int = option(1000, "puzzles in a test set")
    seed: int = option(0, "seed of the training puzzles; the test puzzles have the next one")

    def __post_init__(self) -> None:
        require(1 <= self.size <= 1000, "size", "at least 1", self.size)
        if self.name == "addition":
            require(self.size <= 9, "size", "at most 9 digits for addition", self.size)
        if self.denoise:
            wanted = "false where no answer is hidden (carry, and addition without masked)"
            require(self.hidden, "denoise", wanted, self.denoise)
        require(self.test_size >= 1, "test_size", "at least 1", self.test_size)
        require(0 <= self.passing <= 1, "passing", "in [0, 1]", self.passing)
        require(self.examples >= 1, "examples", "at least 1", self.examples)
        require(self.test_examples >= 1, "test_examples", "at least 1", self.test_examples)
        require(self.seed >= 0, "seed", "at least 0", self.seed)

    @property
    def hidden(self) -> bool:
        """Whether the input has places for the answer."""
        return self.name == "sudoku4" or (self.name == "addition" and self.masked)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What is measured of every trained model."""

    loops: tuple[int, ...] = option((1, 2, 4, 8, 16, 32, 64, 128), "numbers of loops to test")
    at: int = option(32, "loops of the tables of residuals and starts")
    starts: int = option(8, "noisy starts, of which the one of the least residual answers")
    rounds: tuple[int, ...] = option(
        (1, 2, 4, 8), "rounds of predicting and hiding again, where answers are hidden"
    )
    radius_examples: int = option(32, "puzzles on which the spectral radius is measured")
    radius_iters: int = option(40, "power iterations of the spectral radius")

    def __post_init__(self) -> None:
        positive = len(self.loops) > 0 and min(self.loops) >= 1
        require(positive, "loops", "at least one number of at least 1", self.loops)
        require(min(self.rounds, default=1) >= 1, "rounds", "at least 1 each", self.rounds)
        for name in ("at", "starts", "radius_examples"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        require(self.radius_iters >= 2, "radius_iters", "at least 2", self.radius_iters)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReasoningConfig(Config):
    """The whole configuration, which is that of the arm "fixed"; each arm changes it."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    report: ReportConfig = ReportConfig()
    arms: tuple[str, ...] = option(
        (),
        "models to train, each named by words joined with underscores; empty for one, as "
        "configured.  fixed: as configured; random, uniform, poisson: random loop counts, "
        "log-normal if not said; sequence: one count a sequence; recall; penalty; deq: implicit "
        "gradient and recall; unroll, shine, reversible: another gradient of it; pre, post: "
        "another norm; denoise",
    )
    seeds: tuple[int, ...] = option((0,), "values of train.seed, each of which trains every arm")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.seeds) > 0 and min(self.seeds) >= 0, "seeds", "at least one", self.seeds)
        for arm in self.arms:
            unknown = [word for word in arm.split("_") if word not in WORDS]
            known = ", ".join(WORDS)
            require(not unknown, "arms", f"words of {known}, joined by underscores", arm)


Change = Callable[[ReasoningConfig], Mapping[str, Any]]


def _replace(part: str, **changes: Any) -> Change:
    return lambda config: {part: dataclasses.replace(getattr(config, part), **changes)}


def _counts(**jac: Any) -> Change:
    """Random counts up to twice the configured number of loops."""

    def change(config: ReasoningConfig) -> Mapping[str, Any]:
        largest = 2 * config.solver.max_steps
        low = {"budget_low": 1 - largest} if jac["budget_draw"] == "uniform" else {}
        return {
            "solver": dataclasses.replace(config.solver, max_steps=largest),
            "jac": dataclasses.replace(config.jac, budget_on="all", **jac, **low),
        }

    return change


def _deq(config: ReasoningConfig) -> Mapping[str, Any]:
    steps = 2 * config.solver.max_steps
    solver = SolverConfig(name="anderson", tol=1e-3, max_steps=steps)
    return {
        "model": dataclasses.replace(config.model, recall=True),
        "solver": solver,
        "backward": BackwardConfig(solver="anderson", tol=1e-3, max_steps=12),
    }


def _shine(config: ReasoningConfig) -> Mapping[str, Any]:
    solver = dataclasses.replace(config.solver, name="broyden", keep="best")
    return {"solver": solver, "backward": BackwardConfig(name="shine", max_steps=2)}


def _reversible(config: ReasoningConfig) -> Mapping[str, Any]:
    solver = dataclasses.replace(config.solver, name="picard", keep="last")
    return {"solver": solver, "backward": BackwardConfig(name="reversible", damping=0.8)}


WORDS: dict[str, Change] = {
    "fixed": lambda config: {},
    "random": _counts(budget_draw="lognormal"),
    "uniform": _counts(budget_draw="uniform"),
    "poisson": _counts(budget_draw="poisson"),
    "sequence": _replace("jac", budget_per="example"),
    "deq": _deq,
    "recall": _replace("model", recall=True),
    "penalty": _replace("jac", gamma=0.1, start=0.5, blend=True),
    "unroll": _replace("backward", name="unroll", max_steps=4),
    "shine": _shine,
    "reversible": _reversible,
    "pre": _replace("model", norm="pre"),
    "post": _replace("model", norm="post"),
    "denoise": _replace("data", denoise=True),
}
"""Word of an arm's name -> what it changes of the configuration."""


def variants(config: ReasoningConfig) -> dict[str, ReasoningConfig]:
    """The configuration of every model that a command trains.

    Args:
      config: the whole configuration.

    Returns:
      "ARM-SEED" -> configuration, the folder of that name as its workdir; "model" without arms.

    Example:
      >>> list(variants(ReasoningConfig(arms=("fixed", "deq"), seeds=(0, 1))))
      ['fixed-0', 'fixed-1', 'deq-0', 'deq-1']
    """
    if not config.arms:
        return {"model": compare.in_folder(config, "model")}
    found = {}
    for arm in config.arms:
        for seed in config.seeds:
            part = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
            for word in arm.split("_"):
                part = dataclasses.replace(part, **WORDS[word](part))
            name = f"{arm}-{seed}"
            found[name] = compare.in_folder(part, name, arms=(), seeds=(0,))
    return found


_ADDITION = ReasoningConfig(
    arms=("fixed", "fixed_recall", "random_recall_penalty", "deq"),
    solver=SolverConfig(name="picard", tol=1e-12, max_steps=8, keep="last"),
    backward=BackwardConfig(name="backprop"),
    optim=OptimConfig(
        name="adamw", lr=2e-3, b2=0.99, weight_decay=0.01, clip=1.0, warmup_steps=150, end_lr=4e-5
    ),
    train=TrainConfig(steps=1500, batch_size=128, log_every=100, checkpoint_every=1500),
    eval=EvalConfig(),
)

_CARRY = dataclasses.replace(
    _ADDITION,
    arms=("fixed", "fixed_recall", "random", "random_recall", "deq", "deq_unroll"),
    model=ModelConfig(features=32, heads=4, hidden=64, window=3),
    data=DataConfig(name="carry", size=16, test_examples=250),
    optim=dataclasses.replace(_ADDITION.optim, lr=3e-3, end_lr=6e-5),
    train=dataclasses.replace(_ADDITION.train, steps=1000, batch_size=64, checkpoint_every=1000),
)

PRESETS = compare.in_runs(
    addition=_ADDITION,
    addition_grid=dataclasses.replace(
        _ADDITION,
        arms=(
            "fixed",
            "fixed_penalty",
            "fixed_recall",
            "fixed_recall_penalty",
            "random",
            "random_penalty",
            "random_recall",
            "random_recall_penalty",
            "fixed_pre",
            "deq",
            "deq_penalty",
            "deq_unroll",
            "deq_shine",
            "deq_reversible",
        ),  # fmt: skip
        seeds=(0, 1, 2),
    ),
    carry=_CARRY,
    sudoku4=dataclasses.replace(
        _ADDITION,
        arms=("fixed", "fixed_recall", "random_recall", "deq"),
        data=DataConfig(name="sudoku4"),
    ),
    denoising=dataclasses.replace(
        _ADDITION,
        arms=("fixed_recall", "fixed_recall_denoise"),
        data=DataConfig(name="sudoku4"),
        solver=dataclasses.replace(_ADDITION.solver, max_steps=6),
    ),
)
