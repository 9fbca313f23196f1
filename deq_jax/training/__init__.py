"""Training shared by all experiments: flags, configuration, step, loop, checkpoints, metrics."""

from deq_jax.errors import Diverged, Interrupted, UsageError
from deq_jax.training.config import (
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
from deq_jax.training.evaluation import Evaluator, evaluate
from deq_jax.training.loop import TrainResult, train
from deq_jax.training.metrics import Mean
from deq_jax.training.state import TrainState
from deq_jax.training.step import make_train_step
from deq_jax.training.task import Batch, DataIterator, EvalData, Pass, Task
from deq_jax.training.writers import Writer, read_history

__all__ = [
    "BackwardConfig",
    "Batch",
    "Config",
    "DataIterator",
    "Diverged",
    "EvalConfig",
    "EvalData",
    "Evaluator",
    "Interrupted",
    "JacConfig",
    "Mean",
    "OptimConfig",
    "Pass",
    "SolverConfig",
    "Task",
    "TrainConfig",
    "TrainResult",
    "TrainState",
    "UsageError",
    "Writer",
    "evaluate",
    "make_train_step",
    "option",
    "read_history",
    "require",
    "train",
]
