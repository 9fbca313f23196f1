"""The configuration that all experiments share: nested, frozen, validated dataclasses.

An experiment adds its own parts by inheriting from `Config`:

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class DigitsConfig(Config):
        model: ModelConfig = ModelConfig()
        data: DataConfig = DataConfig()

    PRESETS = {"digits": DigitsConfig(workdir="runs/digits", solver=SolverConfig(max_steps=12))}

Every field is written with `option(default, "what it does")`, which `flags.py` shows under
``--helpshort``.  Values are checked where they are stored (``__post_init__``), so a configuration
that exists is a valid one, whether it came from a preset, from flags or from a config.json.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, Literal, get_args

import deq_jax as deq
from deq_jax.solvers.base import Keep, StopMode

SolverName = Literal["picard", "anderson", "broyden"]
BudgetDraw = Literal["uniform", "lognormal", "poisson"]
RuleName = Literal["implicit", "neumann", "unroll", "backprop", "reversible", "shine"]


def option(default: Any, description: str, *, may_change: bool = False) -> Any:
    """A dataclass field with a one-line description for the command line.

    Args:
      default: the field's default value.
      description: one line, shown by ``--helpshort``.
      may_change: whether a run may be resumed with another value of this field.  Only for fields
        that do not influence the parameters which the run ends with.

    Returns:
      What `dataclasses.field` returns.

    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class ModelConfig:
      ...     width: int = option(64, "units of the hidden layer")
      >>> ModelConfig().width
      64
    """
    return dataclasses.field(
        default=default, metadata={"help": description, "may_change": may_change}
    )


def require(condition: bool, name: str, wanted: str, got: object) -> None:
    """Refuses a value: ValueError("name must be wanted, got got") unless the condition holds.

    Args:
      condition: what must be true.
      name: the field, as the user writes it.
      wanted: what it must be, for instance "at least 1".
      got: the value.

    Raises:
      ValueError: the condition does not hold.

    Example:
      >>> require(3 > 0, "steps", "at least 1", 3)
    """
    if not condition:
        raise ValueError(f"{name} must be {wanted}, got {got!r}")


def build_method(name: SolverName, config: SolverConfig | BackwardConfig, max_steps: int) -> Any:
    """The solver that a part of the configuration describes.

    Args:
      name: the method.
      config: its settings.
      max_steps: its budget.

    Returns:
      `deq.Picard`, `deq.Anderson` or `deq.Broyden`.
    """
    common: Any = {"tol": config.tol, "max_steps": max_steps, "stop": config.stop}
    if config.memory is not None:
        common["memory"] = config.memory
    methods = {"picard": deq.Picard, "anderson": deq.Anderson, "broyden": deq.Broyden}
    return methods[name](damping=config.damping, **common)


def _check_method(name: SolverName, config: SolverConfig | BackwardConfig) -> None:
    require(0 < config.tol < math.inf, "tol", "above 0 and finite", config.tol)
    require(0 < config.damping <= 1, "damping", "in (0, 1]", config.damping)
    if config.memory is not None:
        require(config.memory >= 1, "memory", "at least 1, or none", config.memory)
        if name == "picard":
            raise ValueError(
                f"memory must be none for picard, which keeps no history, got {config.memory}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SolverConfig:
    """The forward solver."""

    name: SolverName = option("anderson", "the method")
    tol: float = option(1e-3, "residual below which a sample counts as solved")
    max_steps: int = option(30, "budget: evaluations of f for each solve")
    stop: StopMode = option("rel", "residual: relative to the norm of f(z), or absolute")
    memory: int | None = option(None, "rows of history kept; none for the method's own default")
    damping: float = option(1.0, "step length, in (0, 1]")
    keep: Keep = option("best", "iterate that is returned: that of the smallest residual, or last")

    def __post_init__(self) -> None:
        require(self.max_steps >= 1, "max_steps", "at least 1", self.max_steps)
        _check_method(self.name, self)

    def build(self, max_steps: int | None = None) -> deq.Picard | deq.Anderson | deq.Broyden:
        """The solver that these values describe.

        Args:
          max_steps: another budget, for a solver whose budget is cut at run time.

        Returns:
          `deq.Picard`, `deq.Anderson` or `deq.Broyden`.

        Example:
          >>> SolverConfig(name="picard", max_steps=7).build().max_steps
          7
        """
        return build_method(self.name, self, self.max_steps if max_steps is None else max_steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackwardConfig:
    """The gradient rule, and the solver of its linear system."""

    name: RuleName = option(
        "implicit",
        "the gradient rule. implicit: solve the backward system; neumann: its series of max_steps "
        "products; unroll: differentiate max_steps steps, damped by damping, from the solution "
        "(1 step: Jacobian-free gradient; several: phantom gradient); backprop: differentiate the "
        "solver's own steps; reversible: the same for an iteration damped by damping that runs "
        "backward (solver.name=picard solver.keep=last); shine: Broyden's forward factors, refined "
        "by max_steps products (solver.name=broyden)",
    )
    solver: SolverName = option("anderson", "the method for the backward system of implicit")
    tol: float = option(1e-4, "residual below which a sample's backward system counts as solved")
    max_steps: int = option(30, "budget of implicit: products with the Jacobian; see name")
    stop: StopMode = option("rel", "residual: relative to the norm of the image, or absolute")
    memory: int | None = option(None, "rows of history kept; none for the method's own default")
    damping: float = option(1.0, "step length, in (0, 1]")
    segments: int = option(1, "backprop: stretches of steps of which only the first is stored")

    def __post_init__(self) -> None:
        rules = get_args(RuleName)
        require(self.name in rules, "name", f"one of {', '.join(rules)}", self.name)
        least = 0 if self.name == "shine" else 1
        require(self.max_steps >= least, "max_steps", f"at least {least}", self.max_steps)
        require(self.segments >= 1, "segments", "at least 1", self.segments)
        _check_method(self.solver, self)
        self.build_adjoint()

    def build_adjoint(self) -> deq.Adjoint:
        """The gradient rule that these values describe, for ``deq.fixed_point(adjoint=...)``.

        Returns:
          A gradient rule, for instance `deq_jax.Implicit`.

        Example:
          >>> BackwardConfig(name="unroll", max_steps=5, damping=0.5).build_adjoint()
          Unroll(steps=5, damping=0.5)
        """
        match self.name:
            case "implicit":
                return deq.Implicit(build_method(self.solver, self, self.max_steps))
            case "neumann":
                series = deq.Picard(tol=self.tol, max_steps=self.max_steps, stop=self.stop)
                return deq.Implicit(series, keep="last")
            case "unroll":
                return deq.Unroll(self.max_steps, damping=self.damping)
            case "backprop":
                return deq.Backprop(self.segments)
            case "reversible":
                return deq.Reversible(self.damping)
        return deq.Shine(self.max_steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JacConfig:
    """Jacobian regularisation, and the random step budget that goes with it."""

    gamma: float = option(0.0, "weight of the penalty after the warm-up phase; 0 for none")
    prob: float = option(1.0, "share of the training steps that compute the penalty")
    probes: int = option(1, "Gaussian probes for each estimate")
    increment: float = option(0.0, "added to gamma every increment_every steps")
    increment_every: int = option(1, "steps between two increments, counted after the warm-up")
    start: float = option(0.0, "share of the training steps before the penalty begins")
    stop_step: int | None = option(None, "step from which the penalty is off; none for never")
    warmup_gamma: float = option(0.0, "weight of the penalty during the warm-up phase")
    blend: bool = option(
        False, "minimise (1 - gamma) loss + gamma penalty instead of loss + gamma penalty"
    )
    budget_low: int = option(0, "random step budget: solver.max_steps plus low..high, low <= 0")
    budget_high: int = option(0, "random step budget: solver.max_steps plus low..high, high >= 0")
    budget_on: Literal["penalty", "all"] = option(
        "penalty", "steps that draw a random budget: those with a penalty, or all"
    )
    budget_draw: BudgetDraw = option(
        "uniform",
        "uniform: solver.max_steps plus low..high; lognormal: exp(N(budget_mu, budget_sigma^2)), "
        "rounded; poisson: 1 plus a Poisson number whose mean is lognormal; both are cut off at 1 "
        "and solver.max_steps",
    )
    budget_mu: float = option(1.6, "mean of the logarithm of a lognormal or poisson budget")
    budget_sigma: float = option(0.5, "standard deviation of that logarithm")
    budget_per: Literal["batch", "example"] = option(
        "batch", "whether the examples of a batch share a random budget, or have one each"
    )

    def __post_init__(self) -> None:
        require(0 <= self.gamma < math.inf, "gamma", "at least 0 and finite", self.gamma)
        require(0 <= self.prob <= 1, "prob", "in [0, 1]", self.prob)
        require(self.probes >= 1, "probes", "at least 1", self.probes)
        require(self.increment >= 0, "increment", "at least 0", self.increment)
        require(self.increment_every >= 1, "increment_every", "at least 1", self.increment_every)
        require(self.warmup_gamma >= 0, "warmup_gamma", "at least 0", self.warmup_gamma)
        require(self.budget_low <= 0, "budget_low", "at most 0", self.budget_low)
        require(self.budget_high >= 0, "budget_high", "at least 0", self.budget_high)
        draws = get_args(BudgetDraw)
        wanted = f"one of {', '.join(draws)}"
        require(self.budget_draw in draws, "budget_draw", wanted, self.budget_draw)
        require(self.budget_sigma >= 0, "budget_sigma", "at least 0", self.budget_sigma)
        require(0 <= self.start <= 1, "start", "in [0, 1]", self.start)
        if self.blend:
            require(self.gamma <= 1, "gamma", "at most 1 with blend", self.gamma)
        if self.stop_step is not None:
            require(self.stop_step >= 0, "stop_step", "at least 0, or none", self.stop_step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser and learning-rate schedule."""

    name: Literal["adam", "adamw", "sgd", "radam"] = option("adam", "the optimiser")
    lr: float = option(1e-3, "peak learning rate")
    schedule: Literal["constant", "cosine", "inverse_sqrt"] = option(
        "cosine", "learning rate after its warm-up"
    )
    warmup_steps: int = option(0, "steps in which the learning rate rises linearly from 0")
    end_lr: float = option(0.0, "learning rate at the last step of the cosine")
    weight_decay: float = option(0.0, "decoupled for adamw, added to the gradient for the others")
    clip: float | None = option(None, "largest global norm of the gradient; none for no clipping")
    momentum: float = option(0.9, "momentum of sgd")
    nesterov: bool = option(False, "nesterov momentum of sgd")
    b1: float = option(0.9, "decay of the first moment (adam, adamw, radam)")
    b2: float = option(0.999, "decay of the second moment (adam, adamw, radam)")
    eps: float = option(1e-8, "added to the root of the second moment (adam, adamw, radam)")

    def __post_init__(self) -> None:
        require(0 < self.lr < math.inf, "lr", "above 0 and finite", self.lr)
        require(self.warmup_steps >= 0, "warmup_steps", "at least 0", self.warmup_steps)
        require(0 <= self.end_lr <= self.lr, "end_lr", f"in [0, lr = {self.lr}]", self.end_lr)
        require(self.weight_decay >= 0, "weight_decay", "at least 0", self.weight_decay)
        require(0 <= self.momentum < 1, "momentum", "in [0, 1)", self.momentum)
        require(0 <= self.b1 < 1, "b1", "in [0, 1)", self.b1)
        require(0 <= self.b2 < 1, "b2", "in [0, 1)", self.b2)
        require(self.eps > 0, "eps", "above 0", self.eps)
        if self.clip is not None:
            require(self.clip > 0, "clip", "above 0, or none", self.clip)
        if self.schedule == "inverse_sqrt":
            require(
                self.warmup_steps >= 1,
                "warmup_steps",
                "at least 1 for inverse_sqrt",
                self.warmup_steps,
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length and rhythm of the training run."""

    steps: int = option(1000, "training steps in all; 0 evaluates only, say --init_from weights")
    batch_size: int = option(64, "examples in a training batch, over all devices")
    seed: int = option(0, "seed of the weights, the masks, the penalty and the data order")
    warmup_steps: int = option(0, "first steps, which train the weight-tied unrolled network")
    warmup_layers: int = option(4, "layers of the weight-tied unrolled network")
    log_every: int = option(50, "steps between two lines of metrics", may_change=True)
    eval_every: int = option(0, "steps between evaluations; 0 for the end only", may_change=True)
    checkpoint_every: int = option(500, "steps between two checkpoints", may_change=True)
    keep: int = option(2, "checkpoints kept, the newest ones", may_change=True)
    keep_every: int | None = option(
        None,
        "steps between checkpoints that are kept for ever, a multiple of checkpoint_every, or none",
        may_change=True,
    )
    keep_best: str = option(
        "",
        "metric of the evaluation whose best checkpoint is kept too, for instance min:loss or "
        "max:accuracy; only steps that are evaluated and saved count; empty for none",
        may_change=True,
    )
    skip: int = option(
        5, "updates in a row that may be left out because loss or gradient is not finite; one more "
        "stops the run",
        may_change=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("batch_size", "warmup_layers", "log_every"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("steps", "warmup_steps", "eval_every", "seed", "skip"):
            require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        for name in ("checkpoint_every", "keep"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        if self.keep_every is not None:
            multiple = self.keep_every >= 1 and self.keep_every % self.checkpoint_every == 0
            wanted = f"a multiple of checkpoint_every = {self.checkpoint_every}, or none"
            require(multiple, "keep_every", wanted, self.keep_every)
        if self.keep_best:
            direction, _, metric = self.keep_best.partition(":")
            known = direction in ("min", "max") and bool(metric)
            require(known, "keep_best", "min:NAME or max:NAME, or empty", self.keep_best)
            require(self.eval_every >= 1, "eval_every", "at least 1 for keep_best", self.eval_every)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation."""

    max_steps: int | None = option(
        None, "solver budget; none for solver.max_steps", may_change=True
    )
    budgets: tuple[int, ...] = option(
        (), "further budgets to evaluate at after the last step", may_change=True
    )
    spectral_batches: int = option(
        0, "batches on which spectral radius and penalty are measured; 0 for none", may_change=True
    )
    spectral_iters: int = option(100, "power iterations of the spectral radius", may_change=True)

    def __post_init__(self) -> None:
        if self.max_steps is not None:
            require(self.max_steps >= 1, "max_steps", "at least 1, or none", self.max_steps)
        require(all(b >= 1 for b in self.budgets), "budgets", "at least 1 each", self.budgets)
        require(self.spectral_batches >= 0, "spectral_batches", "at least 0", self.spectral_batches)
        require(self.spectral_iters >= 1, "spectral_iters", "at least 1", self.spectral_iters)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What every experiment needs; experiments inherit and add ``model`` and ``data``."""

    workdir: str = option(
        "runs/default",
        "folder of checkpoints, metrics and plots, local or gs://BUCKET/FOLDER",
        may_change=True,
    )
    init_from: str = option(
        "",
        "weights that a new run starts from: the workdir of a trained model, or a folder or "
        ".safetensors file of deq_jax.convert; empty for random weights",
    )
    diagnose: bool = option(
        False, "instead of training, diagnose the model in workdir, in init_from, or at its "
        "initial weights",
        may_change=True,
    )  # fmt: skip
    dry_run: bool = option(
        False, "instead of training, compile a step and show parameters, memory and operations; "
        "needs no data, writes nothing",
        may_change=True,
    )  # fmt: skip
    profile: str = option(
        "", "START:COUNT traces so many steps, the first one after START finished steps, into the "
        "folder profile of the workdir, for TensorBoard's profile page; empty for none",
        may_change=True,
    )  # fmt: skip
    accumulate: int = option(
        1, "parts that a training batch is computed in, one after the other, for one update"
    )
    precision: Literal["float32", "bf16"] = option(
        "float32", "of f; bf16: f in bfloat16, parameters, solvers and all else in float32"
    )
    shard_above: int | None = option(
        None, "numbers in an array of parameters from which on it is split over the devices, as "
        "far as a side divides, its optimiser state too; none: each device holds all",
        may_change=True,
    )  # fmt: skip
    solver: SolverConfig = SolverConfig()
    backward: BackwardConfig = BackwardConfig()
    jac: JacConfig = JacConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()

    def __post_init__(self) -> None:
        require(bool(self.workdir), "workdir", "the name of a folder", self.workdir)
        require(
            re.fullmatch(r"(\d+:[1-9]\d*)?", self.profile) is not None,
            "profile",
            "START:COUNT, for instance 10:5, or empty",
            self.profile,
        )
        require(self.accumulate >= 1, "accumulate", "at least 1", self.accumulate)
        if self.shard_above is not None:
            require(self.shard_above >= 1, "shard_above", "at least 1, or none", self.shard_above)
        require(
            self.solver.max_steps + self.jac.budget_low >= 1,
            "jac.budget_low",
            f"above -solver.max_steps = -{self.solver.max_steps}",
            self.jac.budget_low,
        )
        self.backward.build_adjoint().check(self.solver.build(), self.solver.keep)

    @property
    def profiled_steps(self) -> tuple[int, int]:
        """The first step that ``profile`` traces, and the first one after them."""
        start, count = map(int, (self.profile or "0:0").split(":"))
        return start, start + count

    @property
    def eval_steps(self) -> int:
        """The budget of the main evaluation."""
        return self.eval.max_steps or self.solver.max_steps

    @property
    def eval_budgets(self) -> tuple[int, ...]:
        """All budgets of an evaluation, in rising order."""
        return tuple(sorted({*self.eval.budgets, self.eval_steps}))

    def build_solver(self) -> deq.Picard | deq.Anderson | deq.Broyden:
        """Builds the forward solver of training, with room for the largest random budget.

        The training step passes the budget of each solve (``max_steps``) itself.

        Returns:
          A solver; no budget of a training step exceeds its ``max_steps``.

        Example:
          >>> Config(solver=SolverConfig(max_steps=8), jac=JacConfig(budget_high=2)).build_solver()
          Anderson(tol=0.001, max_steps=10, ...)
        """
        return self.solver.build(self.solver.max_steps + self.jac.budget_high)

    def build_eval_solver(self) -> deq.Picard | deq.Anderson | deq.Broyden:
        """Builds the forward solver of evaluation, with room for the largest budget there.

        It is not the one of training: the length of a history must not depend on how often, or at
        which budgets, a model is evaluated.

        Returns:
          A solver; no evaluation budget exceeds its ``max_steps``.

        Example:
          >>> Config(eval=EvalConfig(budgets=(4, 50))).build_eval_solver().max_steps
          50
        """
        return self.solver.build(max(self.eval_budgets))
