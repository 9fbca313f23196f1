"""Settings of the study of initial weights.

Agarwala and Schoenholz (arXiv 2207.09432) compare families of random matrices at equal entry
variance scale^2 / N.  Chosen here, not there: the grids, the sizes, digits as the default data,
Adam at 3e-3 for 300 steps, a budget of 20 Anderson steps both ways.  All of it was fixed before
families were compared, but for the learning rate's cosine and the margin of "trained", which was
3 %: at a constant rate, the final accuracies of all families scattered by as much between
neighbouring small scales; under the cosine the best model is still 2 % above the mean of the four
smallest scales.  At a margin of 3 % the counts on digits with tanh are 5 +- 1, 5.4 +- .9 and
3.4 +- .9 scales (gaussian, orthogonal, goe), at 5 % they are 6, 6 and 4.6 +- .5.

Found: on digits, gaussian and orthogonal weights train up to s = 1.2 (tanh), 0.7 (relu) and 0.5
(identity), symmetric ones up to 1, 0.5 and 0.25: at equal entry variance a narrower range, in units
of the critical scale (1, 1, 1/2) a wider or equal one.  The optimiser decides more than the family:
SGD at 0.1 mends solves that Adam leaves broken, and there the share solved at the end is largest
from symmetric weights, then orthogonal ones, at every large scale.  On the multiscale DEQ without
penalty (--mode=models) orthogonal weights are the better ones by accuracy as well.

`digits` needs nothing but scikit-learn; `mnist` wants a TFDS folder (--data.dir) and takes twice as
many steps of a state twice as wide.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Literal

from deq_jax.training import (
    BackwardConfig,
    Config,
    OptimConfig,
    SolverConfig,
    TrainConfig,
    option,
    require,
)
from experiments.common import families

FAMILIES = tuple(families.FAMILIES)


def _rises(numbers: tuple[float, ...]) -> bool:
    return len(numbers) > 0 and all(a < b for a, b in pairwise(numbers))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """z = phi(W z + U x + b), then a linear readout."""

    width: int = option(64, "size of the state z")
    activation: Literal["tanh", "relu", "hard_tanh", "identity"] = option("tanh", "phi")

    def __post_init__(self) -> None:
        require(self.width >= 2, "width", "at least 2", self.width)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images to classify, flattened and standardised."""

    name: str = option("digits", "digits (scikit-learn's 8 x 8 scans), or a TFDS set such as mnist")
    dir: str = option(
        "", "folder of TFDS sets; empty for TFDS' own default (~/tensorflow_datasets)",
        may_change=True,
    )  # fmt: skip
    train_split: str = option("train", "split to train on, as TFDS writes it: train[:90%]")
    eval_split: str = option("test", "split to evaluate on; test[:1000] for a quick look")
    eval_batch_size: int = option(120, "examples in an evaluation batch")

    def __post_init__(self) -> None:
        require(bool(self.name), "name", "the name of a set", self.name)
        require(self.eval_batch_size >= 1, "eval_batch_size", "at least 1", self.eval_batch_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TheoryConfig:
    """Random matrices measured beside their predictions (--mode=theory)."""

    sizes: tuple[int, ...] = option((128, 256, 512, 1024), "sizes N of the matrices")
    fractions: tuple[float, ...] = option(
        (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95), "scales, as fractions of the critical one"
    )
    seeds: int = option(4, "matrices of each family and size")
    inputs: int = option(8, "Gaussian inputs x that z = W z + x is solved for, for each matrix")
    tol: float = option(1e-4, "relative residual at which a solve has ended")
    max_steps: int = option(400, "budget of a solve")

    def __post_init__(self) -> None:
        require(len(self.sizes) > 0 and min(self.sizes) >= 8, "sizes", "at least 8", self.sizes)
        require(
            _rises(self.fractions) and 0 < self.fractions[0] and self.fractions[-1] < 1,
            "fractions",
            "rising numbers above 0 and below 1",
            self.fractions,
        )
        require(self.seeds >= 2, "seeds", "at least 2, for a deviation", self.seeds)
        for name in ("inputs", "max_steps"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        require(0 < self.tol < 1, "tol", "in (0, 1)", self.tol)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """The grid of trained models, and when one counts as trained (--mode=sweep)."""

    families: tuple[str, ...] = option(FAMILIES, "families of matrices")
    scales: tuple[float, ...] = option(
        (0.25, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 2.5, 3.0),
        "scales s of all families: the entries of W have variance s^2 / width",
    )
    seeds: int = option(5, "initial weights for each scale; all see the same batches")
    together: int = option(
        5, "models trained at once, by vmap; groups of so many follow each other in one program",
        may_change=True,
    )  # fmt: skip
    margin: float = option(0.05, "trained: test accuracy within this of the best of the grid, and")
    solved: float = option(0.9, "at least this share of the test set solved at the end")
    rise: float = option(2.0, "diverged: 10-step mean loss above so many times the first loss, or")
    unsolved: float = option(0.5, "more than this share of a batch not solved")

    def __post_init__(self) -> None:
        known = set(self.families) <= set(FAMILIES) and len(set(self.families)) == len(
            self.families
        )
        require(known and len(self.families) > 0, "families", f"some of {FAMILIES}", self.families)
        require(
            _rises(self.scales) and self.scales[0] > 0,
            "scales",
            "rising numbers above 0",
            self.scales,
        )
        require(self.seeds >= 2, "seeds", "at least 2, for a deviation", self.seeds)
        require(self.together >= 1, "together", "at least 1", self.together)
        for name in ("margin", "solved", "unsolved"):
            require(0 <= getattr(self, name) <= 1, name, "in [0, 1]", getattr(self, name))
        require(self.rise > 1, "rise", "above 1", self.rise)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelsConfig:
    """Other models trained from these weights (--mode=models)."""

    names: tuple[str, ...] = option(("prose", "digits"), "presets: prose, digits, or both")
    families: tuple[str, ...] = option(FAMILIES, "families of matrices, beside published weights")
    scales: tuple[float, ...] = option((0.5, 1.0, 2.0), "scales of all families")
    seeds: int = option(3, "trainings for each family and scale, with train.seed and the next ones")
    centre: bool = option(False, "gaussian kernels at the centre tap only, like the others'")
    steps: int = option(200, "updates of every model")

    def __post_init__(self) -> None:
        known = ("prose", "digits")
        require(
            len(self.names) > 0 and set(self.names) <= set(known),
            "names",
            f"of {known}",
            self.names,
        )
        require(set(self.families) <= set(FAMILIES), "families", f"of {FAMILIES}", self.families)
        require(
            _rises(self.scales) and self.scales[0] > 0, "scales", "rising, above 0", self.scales
        )
        require(self.seeds >= 1, "seeds", "at least 1", self.seeds)
        require(self.steps >= 10, "steps", "at least 10", self.steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig(Config):
    """The whole configuration."""

    mode: Literal["theory", "sweep", "models"] = option(
        "theory",
        "theory: measure matrices; sweep: train from them; models: train a language model and a "
        "multiscale DEQ from them; each in a folder of its own",
    )
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    theory: TheoryConfig = TheoryConfig()
    sweep: SweepConfig = SweepConfig()
    models: ModelsConfig = ModelsConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        train = self.train
        require(train.steps >= 1, "train.steps", "at least 1 here", train.steps)
        require(
            train.steps % train.log_every == 0,
            "train.steps",
            f"a multiple of train.log_every = {train.log_every}, as one program trains that many",
            train.steps,
        )
        # What the sweep has no use for is refused, not ignored.
        require(train.warmup_steps == 0, "train.warmup_steps", "0 here", train.warmup_steps)
        require(not self.init_from, "init_from", "empty here: weights are drawn", self.init_from)
        require(not self.eval.budgets, "eval.budgets", "empty here", self.eval.budgets)
        require(self.shard_above is None, "shard_above", "none here", self.shard_above)


_DIGITS = InitConfig(
    workdir="runs/initialization",
    solver=SolverConfig(name="anderson", max_steps=20, tol=1e-3, memory=4),
    backward=BackwardConfig(solver="anderson", max_steps=20, tol=1e-3, memory=4),
    optim=OptimConfig(name="adam", lr=3e-3, schedule="cosine"),
    train=TrainConfig(steps=300, batch_size=64, log_every=100),
)

PRESETS = {
    "digits": _DIGITS,
    "mnist": dataclasses.replace(
        _DIGITS,
        workdir="runs/initialization_mnist",
        model=ModelConfig(width=128),
        data=DataConfig(name="mnist", eval_batch_size=500),
        train=TrainConfig(steps=600, batch_size=64, log_every=100),
    ),
}
