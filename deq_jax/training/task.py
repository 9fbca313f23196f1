"""What an experiment must provide: a `Task`, whose `forward` returns an `Output`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax

from deq_jax.solvers import Solution

Batch = Mapping[str, Any]
"""Arrays with a common leading axis B, among them "mask" float32[B]: 0 marks padding."""

EvalData = Callable[[], Iterable[Batch]]
"""Called at each evaluation; returns the batches of one pass over the evaluation set."""


CARRY = "carry"
"""Name in ``extra`` of what one batch leaves to the next, of a `Carrying` task."""


CORRUPT = "corrupt"
"""Name in a batch of float32[B], 1 where a record could not be read; counted if it is there."""


@flax.struct.dataclass
class Output:
    """What one forward pass of a task returns.

    Attributes:
      loss: float32 scalar, the mean over the examples whose mask is 1.
      sums: name -> scalar (or array) summed over the examples whose mask is 1.  Always holds
        "count", their number (or that of tokens, pixels ...), by which the others are divided.
      extra: the untrained collections after this pass (batch statistics ...), {} when none.
      solution: the solution of the equilibrium layer with its `equation` filled in, for statistics
        and the Jacobian penalty; None if the pass had none.
      weight: scalar, what the loss is a mean over if that is not ``sums["count"]``; else None.
    """

    loss: jax.Array
    sums: dict[str, jax.Array]
    extra: Any
    solution: Solution | None
    weight: jax.Array | None = None


class Task(Protocol):
    """An experiment, as the training step sees it.  Any object with these two methods will do."""

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Draws the initial weights.

        Args:
          key: a PRNG key.

        Returns:
          (params, extra): the trained parameters, and the untrained collections ({} when none).
        """
        ...

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
        """One forward pass, traced under jit.

        Args:
          params: trained parameters.
          extra: untrained collections.
          batch: arrays [B, ...], with "mask" float32[B].
          key: for dropout and the like; None in evaluation.
          train: static; whether this is a training pass.
          warmup: static; True asks for the weight-tied unrolled network
            (`Unroll(config.train.warmup_layers)` from a solve of 0 steps).
          max_steps: the budget of the solve, to be handed to the DEQ layer: a traced int32 scalar,
            or the int 0 in the warm-up phase.
          probe: to be handed to the DEQ layer (see `deq.backward_probe`); None in evaluation.

        Returns:
          An `Output`.
        """
        ...


@runtime_checkable
class Carrying(Protocol):
    """A task in which a batch leaves something to the next: a language model's memory of a text.

    `forward` finds it as ``extra[CARRY]`` and returns its successor in ``Output.extra``.  It
    belongs to the examples, not to the model: its leaves have the leading axis B, and are split
    over the devices as batches are.
    """

    def carry(self, *, train: bool) -> Any:
        """What the first batch of a training run, or of an evaluation pass, is given.

        Args:
          train: which of the two.

        Returns:
          A tree of arrays ``[B, ...]``.
        """
        ...


class DataIterator(Protocol):
    """An endless source of training batches that can be put back where it was."""

    def __next__(self) -> Batch:
        """The next batch, as numpy arrays."""
        ...

    def get_state(self) -> Any:
        """The position before the next batch, as something that JSON can hold."""
        ...

    def set_state(self, state: Any) -> None:
        """Returns to a position that `get_state` gave."""
        ...
