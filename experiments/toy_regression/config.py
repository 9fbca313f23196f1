"""Settings of the synthetic task.

`paper` takes every value that the paper states (Bai, Koltun and Kolter, arXiv 2106.14342, section
5.1 and its appendix): 4,096 training and 1,000 test pairs, 50 hidden units, Adam at 1e-3, batches
of 64, penalty on 40 % of the steps with one probe, 6 solver steps forward and 6 backward, gamma in
{0, 1, 2, 4}.  Not stated there and chosen here: the range of x (data/synthetic.py), Broyden's
method both ways, 5,000 steps of training, gradients clipped to norm 1 (without it the RMSE is 0.5
to 0.9 after 4,000 steps: near a fold of z = f(z; x) the implicit gradient is unbounded).

Expect: penalty and plain-iteration steps that fall as gamma grows (seed 0: 0.43 to 0.08 and 17 to
6).  The fit does not follow gamma alone: without a strong penalty some seeds end near a fold (test
RMSE of seeds 0, 1, 2: 0.06, 2.0, 0.3 for gamma 0; 0.14, 0.10, 0.16 for gamma 4; the noise is 0.05).
About 1.5 minutes on 2 CPU cores.
"""

from __future__ import annotations

import dataclasses

from deq_jax.training import (
    BackwardConfig,
    Config,
    EvalConfig,
    JacConfig,
    OptimConfig,
    SolverConfig,
    TrainConfig,
    option,
    require,
)
from experiments.common.families import FamilyConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(FamilyConfig):
    """f(z; x) = W2^T relu(W1 z + U x + b)."""

    hidden: int = option(50, "hidden units")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.hidden >= 1, "hidden", "at least 1", self.hidden)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """y = 1.5 x^3 + x^2 - 5 x + 2 sin(x) - 3 + noise."""

    train_pairs: int = option(4096, "training pairs")
    test_pairs: int = option(1000, "test pairs")
    noise: float = option(0.05, "standard deviation of the noise in y")
    seed: int = option(0, "seed of the training pairs; the test pairs have the next one")

    def __post_init__(self) -> None:
        require(self.train_pairs >= 1, "train_pairs", "at least 1", self.train_pairs)
        require(self.test_pairs >= 1, "test_pairs", "at least 1", self.test_pairs)
        require(self.noise >= 0, "noise", "at least 0", self.noise)
        require(self.seed >= 0, "seed", "at least 0", self.seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig(Config):
    """The whole configuration; jac.gamma is replaced by each of `gammas` in turn."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    gammas: tuple[float, ...] = option(
        (0.0, 1.0, 2.0, 4.0), "weights of the penalty to train with, one after the other"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            len(self.gammas) > 0 and min(self.gammas) >= 0,
            "gammas",
            "at least one number of at least 0",
            self.gammas,
        )


PRESETS = {
    "paper": ToyConfig(
        workdir="runs/toy_regression",
        solver=SolverConfig(name="broyden", max_steps=6, tol=1e-3),
        backward=BackwardConfig(solver="broyden", max_steps=6, tol=1e-3),
        jac=JacConfig(prob=0.4, probes=1),
        optim=OptimConfig(name="adam", lr=1e-3, schedule="constant", clip=1.0),
        train=TrainConfig(steps=5000, batch_size=64, log_every=500, checkpoint_every=2500),
        eval=EvalConfig(max_steps=30, budgets=(1, 2, 3, 4, 6), spectral_batches=1),
    )
}
