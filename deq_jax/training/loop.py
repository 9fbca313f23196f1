"""The training loop: everything around the step that happens on the host."""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jax
import optax
from jax.sharding import Mesh

from deq_jax import folders
from deq_jax.errors import Diverged, Interrupted, UsageError
from deq_jax.training import distributed, fields, metrics, weights, workdir
from deq_jax.training.checkpoint import CheckpointError, Checkpoints
from deq_jax.training.config import Config
from deq_jax.training.console import Console
from deq_jax.training.distributed import PreemptionSync, StopRequest
from deq_jax.training.evaluation import Evaluator
from deq_jax.training.optim import make_optimizer
from deq_jax.training.parallel import make_mesh, place, require_even
from deq_jax.training.state import TrainState, abstract_state, create_state
from deq_jax.training.step import make_train_step
from deq_jax.training.task import DataIterator, EvalData, Task
from deq_jax.training.writers import MetricWriter, Writer, read_history

# Steps that the host may be ahead of the devices: enough to keep them busy, few enough that a
# request to stop is honoured soon and that batches do not pile up.
_AHEAD = 2


Evaluation = dict[int, dict[str, float]]
"""budget -> metric -> number."""

Callback = Callable[[int, TrainState, Evaluation | None], None]
"""(finished steps, state, evaluation after this step or None) -> None."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves.

    Attributes:
      state: the final state.
      evaluation: budget -> metric -> number, of the final evaluation; {} without eval_data.
      history: the records of metrics.jsonl, oldest first.  Each has "kind" ("train" or "eval"),
        "step", and the metrics; an "eval" record has "budget" besides.
    """

    state: TrainState
    evaluation: dict[int, dict[str, float]]
    history: list[dict[str, Any]]


def train(
    task: Task,
    config: Config,
    train_data: DataIterator,
    eval_data: EvalData | None = None,
    *,
    mesh: Mesh | None = None,
    optimizer: optax.GradientTransformation | None = None,
    writers: Iterable[Writer] = (),
    callbacks: Iterable[Callback] = (),
) -> TrainResult:
    """Trains a task, or resumes it, in ``config.workdir``.

    A run that was interrupted, even by kill -9, continues from its newest checkpoint and ends with
    the same parameters, bit for bit, as one that was not.

    Args:
      task: model and loss.
      config: the whole configuration; written to config.json.
      train_data: endless training batches, at the position of the first batch of the run.
      eval_data: called at every evaluation for the batches of one pass; None for no evaluation.
      mesh: devices, from `parallel.make_mesh`; None for all devices.
      optimizer: replaces the one that ``config.optim`` describes; it applies its own learning rate,
        and "lr" is not logged.
      writers: receive all metrics beside metrics.jsonl and TensorBoard, in process 0.
      callbacks: called after every training step, in all processes.  The state is donated to the
        next step: copy what is to be kept.

    Returns:
      A `TrainResult`.

    Raises:
      UsageError: the workdir holds another configuration or no usable checkpoint, or is in use; the
        loss is no longer finite; a batch does not divide over the devices; the final state cannot
        be saved.
      Interrupted: SIGTERM or SIGINT came; a checkpoint was saved.

    Example:
      >>> result = train(task, config, train_data, eval_data)  # doctest: +SKIP
      >>> result.evaluation[config.eval_steps]["loss"]  # doctest: +SKIP

      Metrics in Weights & Biases as well:

      >>> class Wandb:
      ...     def write(self, kind, step, values, *, budget=None):
      ...         suffix = "" if budget is None else f"/budget_{budget}"
      ...         wandb.log({f"{kind}/{k}{suffix}": v for k, v in values.items()}, step=step)
      >>> train(task, config, train_data, eval_data, writers=[Wandb()])  # doctest: +SKIP
    """
    mesh = make_mesh() if mesh is None else mesh
    if config.train.steps:
        require_even("train.batch_size", config.train.batch_size, mesh.size)
    evaluator = None
    if eval_data is not None:
        evaluator = Evaluator(task, config, eval_data, mesh=mesh)
    with (
        workdir.claimed(config) as folder,
        StopRequest() as stop,
        Console(config.train.steps, enabled=distributed.is_first()) as console,
        Checkpoints(
            folder / "checkpoints",
            keep=config.train.keep,
            keep_every=config.train.keep_every,
            keep_best=config.train.keep_best,
            fits=partial(_misfit, config),
            say=console.say,
        ) as checkpoints,
    ):
        run = _Run(
            task,
            config,
            train_data,
            evaluator,
            mesh,
            folder,
            console,
            checkpoints,
            optimizer,
            writers if distributed.is_first() else (),
            callbacks,
        )
        with run.metrics_file:
            try:
                evaluation = run.to_the_end(stop)
            finally:
                run.profile.close(())
        distributed.barrier("trained")  # process 0 has written all that the others read now
        return TrainResult(run.state, evaluation, read_history(folder))


class _Run:
    """The variables of one call of `train`."""

    def __init__(
        self,
        task: Task,
        config: Config,
        train_data: DataIterator,
        evaluator: Evaluator | None,
        mesh: Mesh,
        folder: Path,
        console: Console,
        checkpoints: Checkpoints,
        optimizer: optax.GradientTransformation | None,
        writers: Iterable[Writer],
        callbacks: Iterable[Callback],
    ) -> None:
        self.config, self.data, self.evaluator, self.mesh = config, train_data, evaluator, mesh
        self.folder, self.console, self.checkpoints = folder, console, checkpoints
        self.summarize, self.callbacks = task.summarize, tuple(callbacks)
        self.shows_rate = optimizer is None  # another optimizer has its own
        if optimizer is None:
            optimizer = make_optimizer(config.optim, config.train.steps)
        self.warmup_step = make_train_step(task, config, optimizer, mesh, warmup=True)
        self.train_step = make_train_step(task, config, optimizer, mesh)
        self.step = 0
        self.saved_step = 0
        self.in_warmup: bool | None = None
        self.pending: list[tuple[int, dict[str, metrics.Mean]]] = []  # on the devices
        self.window: dict[str, metrics.Mean] = {}  # on the host, since the last line of metrics
        self.evaluated: dict[str, float] | None = None  # of this step, at the main budget
        self.skipped: list[int] = []  # steps whose update was left out, in a row up to now
        self.preemption = PreemptionSync(mesh, _AHEAD)
        self.profile = _Profile(config, folder, console)
        state = self._restore(abstract_state(task, optimizer, mesh, shard_above=config.shard_above))
        self.state = self._begin(task, optimizer) if state is None else state
        self._restart_clock()
        try:
            self.metrics_file = MetricWriter(
                self.folder, self.step, self.console.say, enabled=distributed.is_first()
            )
        except folders.errors(self.folder) as error:
            reason = folders.reason(error)
            raise UsageError(f"cannot write metrics to {self.folder}: {reason}") from error
        self.writers: list[Writer] = [self.metrics_file, *writers]

    def to_the_end(self, stop: StopRequest) -> Evaluation:
        """Trains until the last step; returns the final evaluation."""
        every = self.config.train
        evaluation: Evaluation = {}
        while self.step < every.steps:
            if number := self.preemption.poll(stop.number):
                self._leave(number)
            self.profile.before(self.step)
            self._advance()
            self.profile.after(self.step, self.state)
            if self._is_due(every.log_every):
                self._log()
            evaluation, self.evaluated = {}, None
            if self.evaluator is not None and self._is_due(every.eval_every):
                evaluation = self._evaluate(self.evaluator)
                self.evaluated = evaluation[self.config.eval_steps]
            for callback in self.callbacks:
                callback(self.step, self.state, evaluation or None)
            if self._is_due(every.checkpoint_every):
                self._save_if_possible()
        if number := distributed.largest(stop.number or 0):  # what comes next must not begin
            self._leave(number)
        if self.evaluator is not None and not evaluation:  # the run was finished already
            evaluation = self.evaluator(self.state)
        self.checkpoints.finish()
        return evaluation

    def _is_due(self, every: int) -> bool:
        return self.step == self.config.train.steps or (every > 0 and self.step % every == 0)

    def _restore(self, template: TrainState) -> TrainState | None:
        restored = self.checkpoints.restore(template)
        if restored is None:
            return None
        self.data.set_state(restored.host["data"])
        self.window = metrics.from_json(restored.host["window"])
        self.skipped = list(restored.host.get("skipped", ()))
        self.step = self.saved_step = int(restored.state.step)
        self.console.say(f"resuming {self.folder} at step {self.step}")
        return restored.state

    def _begin(self, task: Task, optimizer: optax.GradientTransformation) -> TrainState:
        """The state of step 0: random weights, or those that the configuration names."""
        source, say = self.config.init_from, self.console.say
        loaded = weights.load(source, say) if source else None
        state = create_state(
            task,
            optimizer,
            self.config.train.seed,
            self.mesh,
            shard_above=self.config.shard_above,
        )
        if loaded is None:
            return state
        say(f"starting from the weights in {source}")
        params, extra = weights.adopt((state.params, state.extra), loaded, say)
        return dataclasses.replace(state, params=params, extra=extra)

    def _advance(self) -> None:
        try:
            batch = next(self.data)
        except StopIteration:
            raise UsageError(
                f"the training data ended at step {self.step} of {self.config.train.steps}; wanted "
                "an endless iterator: repeat the data, or lower train.steps"
            ) from None
        warmup = self.step < self.config.train.warmup_steps
        step = self.warmup_step if warmup else self.train_step
        compiles, self.in_warmup = warmup != self.in_warmup, warmup
        self.state, measured = step(self.state, place(batch, self.mesh))
        self.step += 1
        self.pending.append((self.step, measured))
        if compiles:
            jax.block_until_ready(measured)
            self._restart_clock()
        elif len(self.pending) > _AHEAD:
            jax.block_until_ready(self.pending[-1 - _AHEAD][1])
        self.console.advance(self.step)

    def _restart_clock(self) -> None:
        self.clock = (time.perf_counter(), self.step)

    def _flush(self) -> None:
        """Fetches the metrics of the steps since the last flush."""
        fetched = jax.device_get(self.pending)
        self.pending = []
        for step, measured in fetched:
            self.window = metrics.merge(self.window, measured)
            if not measured["skipped"].total:
                self.skipped = []
                continue
            self.skipped.append(step)
            self.console.say(f"step {step}: loss or gradient is not finite, no update was made")
            if len(self.skipped) > self.config.train.skip:
                self._complain()

    def _complain(self) -> NoReturn:
        self.checkpoints.finish()
        saved = self.checkpoints.steps()
        good = f"the checkpoint of step {saved[-1]} is good" if saved else "none was saved"
        first, last = self.skipped[0], self.skipped[-1]
        where = f"at step {last}" if first == last else f"at steps {first} to {last}"
        raise Diverged(
            f"loss or gradient is not finite {where}: more than train.skip = "
            f"{self.config.train.skip} updates in a row; {good}.  Lower optim.lr, set optim.clip "
            "or raise jac.gamma, in another --workdir: the same run would fail again"
        )

    def _log(self) -> None:
        self._flush()
        values = self.summarize(self.window)
        if not self.shows_rate:
            values.pop("lr", None)
        seconds, since = time.perf_counter() - self.clock[0], self.clock[1]
        if self.step > since:
            values["steps_per_second"] = (self.step - since) / seconds
        self._write("train", values)
        self.console.show(self.step, values)
        self.window = {}
        self._restart_clock()

    def _evaluate(self, evaluator: Evaluator) -> Evaluation:
        """Evaluates at the main budget, after the last step at all budgets."""
        main, is_last = self.config.eval_steps, self.step == self.config.train.steps
        evaluation = evaluator(self.state, budgets=None if is_last else (main,))
        for budget, values in evaluation.items():
            self._write("eval", values, budget)
        self.console.show_evaluation(self.step, main, evaluation[main])
        self._restart_clock()
        return evaluation

    def _write(self, kind: str, values: dict[str, float], budget: int | None = None) -> None:
        for writer in self.writers:
            writer.write(kind, self.step, values, budget=budget)

    def _save(self) -> None:
        """Begins a checkpoint, after making sure that it is worth keeping."""
        self._flush()
        try:
            self.checkpoints.finish()
        except CheckpointError as error:
            self.console.say(f"{error}; training goes on")
        host = {
            "config": fields.to_dict(self.config),
            "data": self.data.get_state(),
            "window": metrics.to_json(self.window),
            "skipped": self.skipped,
        }
        self.metrics_file.flush()
        self.checkpoints.save(self.step, self.state, host, metrics=self.evaluated)
        self.saved_step = self.step

    def _save_if_possible(self) -> None:
        """A full disk ends a run only when nothing can be lost by going on: at its last step."""
        try:
            self._save()
        except CheckpointError as error:
            if self.step == self.config.train.steps:
                raise
            self.console.say(f"{error}; training goes on")

    def _leave(self, number: int) -> NoReturn:
        name = signal.Signals(number).name
        if self.step > self.saved_step:
            self._save()
        self.checkpoints.finish()
        raise Interrupted(
            f"stopped by {name} after step {self.step} of {self.config.train.steps}; run the same "
            f"command again to resume from there ({self.folder})",
            number,
        )


class _Profile:
    """A trace of some training steps, which TensorBoard's profile page opens."""

    def __init__(self, config: Config, folder: Path, console: Console) -> None:
        self.start, self.stop = config.profiled_steps
        self.folder, self.console, self.is_running = folder / "profile", console, False

    def before(self, step: int) -> None:
        if self.start <= step < self.stop and not self.is_running:
            jax.profiler.start_trace(str(self.folder))
            self.is_running = True

    def after(self, step: int, state: Any) -> None:
        if self.is_running and step >= self.stop:
            self.close(state)
            self.console.say(f"trace of the steps {self.start} to {self.stop - 1}: {self.folder}")

    def close(self, state: Any) -> None:
        if self.is_running:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self.is_running = False


def _misfit(config: Config, host: dict[str, Any]) -> str:
    """Why a checkpoint cannot be continued by a run of this configuration; "" if it can."""
    differing = fields.differences(host["config"], config)
    return f"it is of another configuration: {'; '.join(differing)}" if differing else ""
