"""What an experiment provides: a `Task`.  How training runs its model: `init` and `forward`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp

import deq_jax as deq
from deq_jax.solvers import Solution
from deq_jax.training import metrics
from deq_jax.training.config import Config
from deq_jax.training.metrics import Mean

if TYPE_CHECKING:
    import flax.linen as nn

Batch = Mapping[str, Any]
"""Arrays with a common leading axis B, among them "mask" float32[B], 0 for padding."""

EvalData = Callable[[], Iterable[Batch]]
"""Called at each evaluation; returns the batches of one pass over the evaluation set."""

CORRUPT = "corrupt"
"""Name in a batch of float32[B], 1 where a record could not be read; counted if it is there."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """What is particular to an experiment; training does everything else.

    The model is a Linen module.  One with a DEQ layer has the attributes ``solver`` and
    ``adjoint``, which training replaces for warm-up and evaluation, and is called as

        ``(output, solution) = model(*inputs, train=..., max_steps=..., probe=...)``

    A module without the attribute ``solver`` is an explicit network: ``output = model(*inputs,
    train=...)``.  Collections other than "params" may change in training steps.  The random
    streams are "params" and "dropout".

    Attributes:
      model: the Linen module.
      inputs: ``(batch, carry) -> tuple``, the positional arguments of the model.
      loss: ``(output, batch) -> {name: Mean}``.  The mean "loss" is minimised; each of the others
        becomes a metric of its name.  Sums are over the examples whose mask is 1.
      sample: name -> `jax.ShapeDtypeStruct` of a training batch, over all devices; "mask" is added.
      carry: ``train -> tree of arrays [B, ...]``, what the first batch of a training run, or of an
        evaluation pass, receives from its predecessor; None if batches are independent.
      leave: ``output -> tree``, what a batch leaves to the next one, like ``carry``.
      x_axes: which operands of f hold one entry for each example, as for
        `deq_jax.training.parallel.sharded_fixed_point`.
      summarize: turns merged means into the numbers that are logged.

    Example:
      >>> import flax.linen as nn
      >>> from deq_jax.models import MLPDEQ
      >>> def squared_error(y, batch):
      ...     error = jnp.square(y - batch["y"])[:, 0] * batch["mask"]
      ...     return {"loss": Mean(error.sum(), batch["mask"].sum())}
      >>> one = jax.ShapeDtypeStruct((16, 1), jnp.float32)
      >>> task = Task(
      ...     model=MLPDEQ(outputs=1, width=8, solver=deq.Anderson()),
      ...     inputs=lambda batch, carry: (batch["x"],),
      ...     loss=squared_error,
      ...     sample={"x": one, "y": one},
      ... )
    """

    model: nn.Module
    inputs: Callable[[Batch, Any], tuple[Any, ...]]
    loss: Callable[[Any, Batch], Mapping[str, Mean]]
    sample: Mapping[str, jax.ShapeDtypeStruct]
    carry: Callable[[bool], Any] | None = None
    leave: Callable[[Any], Any] = lambda output: None
    x_axes: Any = 0
    summarize: Callable[[Mapping[str, Mean]], dict[str, float]] = metrics.compute

    def first_carry(self, *, train: bool) -> Any:
        """What the first batch receives; None if batches are independent."""
        return None if self.carry is None else self.carry(train)


@flax.struct.dataclass
class Pass:
    """The result of one forward pass.

    Attributes:
      means: what the task's `loss` returned.
      solution: of the DEQ layer, its ``equation`` filled in; None of an explicit network.
      extra: the collections other than "params" after the pass.
      carry: what the batch leaves to the next one.
      output: of the model.
    """

    means: dict[str, Mean]
    solution: Solution | None
    extra: Any
    carry: Any
    output: Any

    @property
    def loss(self) -> jax.Array:
        """float32 scalar, the mean that is minimised; 0 of a batch without examples."""
        return self.means["loss"].value


class DataIterator(Protocol):
    """An endless source of training batches whose position can be saved and restored."""

    def __next__(self) -> Batch:
        """The next batch, as numpy arrays."""
        ...

    def get_state(self) -> Any:
        """The position before the next batch, as something that JSON can hold."""
        ...

    def set_state(self, state: Any) -> None:
        """Returns to a position that `get_state` gave."""
        ...


def init(task: Task, key: jax.Array) -> tuple[Any, Any]:
    """Draws the initial weights; to be called under jit, which drops the solve.

    Args:
      task: its model and sample are used.
      key: a PRNG key.

    Returns:
      (params, extra): the trained parameters, and the other collections ({} if none).

    Example:
      >>> params, extra = jax.jit(partial(init, task))(jax.random.key(0))  # doctest: +SKIP
    """
    batch = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in task.sample.items()}
    inputs = task.inputs(batch, task.first_carry(train=True))
    # Weights do not depend on the solve, which need not be compiled nor split over devices.
    model: Any = task.model
    options: Any = {"max_steps": 0} if has_solver(model) else {}
    if hasattr(model, "fixed_point"):
        model = model.clone(fixed_point=deq.fixed_point)
    variables: Any = model.init(key, *inputs, train=False, **options)
    return variables["params"], {name: part for name, part in variables.items() if name != "params"}


def forward(
    task: Task,
    config: Config,
    params: Any,
    extra: Any,
    carry: Any,
    batch: Batch,
    *,
    key: jax.Array | None = None,
    train: bool = False,
    warmup: bool = False,
    max_steps: int | jax.Array | None = None,
    probe: Any = None,
) -> Pass:
    """Runs the model on a batch, and the loss.

    Args:
      task: model and loss.
      config: the solvers and the warm-up are read.
      params: trained parameters.
      extra: the other collections.
      carry: what the batch before has left.
      batch: arrays [B, ...].
      key: PRNG key for dropout; None in evaluation.
      train: static; whether this is a training pass.
      warmup: static; whether to run the weight-tied unrolled network (`Unroll` from the start).
      max_steps: budget of the solve; None for ``config.eval_steps``, ignored in the warm-up.
      probe: see `deq.backward_probe`.

    Returns:
      A `Pass`.

    Example:
      >>> forward(task, config, params, extra, None, batch).loss  # doctest: +SKIP
    """
    model, solution, options = task.model, None, {}
    if has_solver(model):
        budget = config.eval_steps if max_steps is None else max_steps
        model = for_phase(model, config, train=train, warmup=warmup)
        options = {"max_steps": 0 if warmup else budget, "probe": probe}
    result: Any = model.apply(
        {"params": params, **extra},
        *task.inputs(batch, carry),
        train=train,
        mutable=list(extra) if train else False,
        rngs=None if key is None else {"dropout": key},
        **options,
    )
    output, extra = result if train else (result, extra)
    if has_solver(model):
        output, solution = output
    means = dict(task.loss(output, batch))
    return Pass(means, solution, extra, task.leave(output), output)


def has_solver(model: nn.Module) -> bool:
    """Whether a model has a DEQ layer that training wires: an attribute ``solver``.

    Args:
      model: a Linen module.

    Returns:
      False for an explicit network.

    Example:
      >>> from deq_jax.models import ResNet
      >>> has_solver(ResNet(classes=10, depth=18))
      False
    """
    return hasattr(model, "solver")


def for_phase(model: Any, config: Config, *, train: bool, warmup: bool = False) -> Any:
    """Wires a model for a phase: training, its warm-up, or evaluation.

    Args:
      model: a Linen module with the attributes ``solver`` and ``adjoint``.
      config: the solvers and the warm-up are read.
      train: whether the pass is one of training.
      warmup: whether it belongs to the warm-up, which trains the weight-tied unrolled network.

    Returns:
      The model, with the solver of evaluation, or with ``Unroll(train.warmup_layers)``.  A solver
      that is not the one of `Config.build_solver` stays in evaluation too; larger budgets are cut
      off at its own.

    Example:
      >>> from deq_jax.models import ScalarDEQ
      >>> from deq_jax.training import EvalConfig
      >>> config = Config(eval=EvalConfig(budgets=(50,)))
      >>> model = ScalarDEQ(solver=config.build_solver())
      >>> for_phase(model, config, train=False).solver.max_steps
      50
    """
    if warmup:
        return model.clone(adjoint=deq.Unroll(config.train.warmup_layers))
    if train or model.solver != config.build_solver():
        return model
    return model.clone(solver=config.build_eval_solver())
