"""Evaluation at several step budgets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import deq_jax as deq
from deq_jax.jacobian import penalty_per_sample
from deq_jax.training import metrics
from deq_jax.training.config import Config
from deq_jax.training.parallel import batch_sharding, make_mesh, replicated
from deq_jax.training.placement import pad, place
from deq_jax.training.state import TrainState
from deq_jax.training.step import forward_metrics
from deq_jax.training.task import CARRY, Batch, Carrying, EvalData, Output, Task

Summarize = Callable[[Mapping[str, metrics.Mean]], dict[str, float]]
EvalStep = Callable[[TrainState, Batch, Any], tuple[dict[str, metrics.Mean], Any]]
"""(state, batch, max_steps) -> (metrics, carry), the latter None of a task that carries nothing."""


def make_eval_step(task: Task, mesh: Mesh) -> EvalStep:
    """Builds the compiled evaluation of one batch.

    Args:
      task: model and loss.
      mesh: the state is replicated over it, batches are split over it.

    Returns:
      A jitted `EvalStep`; max_steps is traced, so that all budgets share one compilation.

    Example:
      >>> sums, carry = make_eval_step(task, mesh)(state, batch, 12)  # doctest: +SKIP
    """

    def measure(output: Output, batch: Batch) -> dict[str, metrics.Mean]:
        return forward_metrics(output, batch)

    return _compile(task, measure, mesh)


def make_diagnostic_step(task: Task, config: Config, mesh: Mesh) -> EvalStep:
    """Builds the compiled measurement of the Jacobian at the solutions of one batch.

    Args:
      task: model and loss.
      config: `eval.spectral_iters` and `train.seed` are read.
      mesh: as for `make_eval_step`.

    Returns:
      A jitted `EvalStep` of "spectral_radius" and "penalty" (the squared Frobenius norm over the
      number of elements of z, the quantity that training weighs): means over the examples that are
      not padding and whose value is finite.

    Example:
      >>> sums, _ = make_diagnostic_step(task, config, mesh)(state, batch, 12)  # doctest: +SKIP
    """
    radius_key, penalty_key = jax.random.split(jax.random.key(config.train.seed))

    def measure(output: Output, batch: Batch) -> dict[str, metrics.Mean]:
        if output.solution is None:
            return {}
        at, mask = output.solution.at, batch["mask"]
        radius = deq.spectral_radius(*at, key=radius_key, iters=config.eval.spectral_iters)
        return {
            "spectral_radius": _finite_mean(radius, mask),
            "penalty": _finite_mean(penalty_per_sample(*at, key=penalty_key), mask),
        }

    return _compile(task, measure, mesh)


class Evaluator:
    """Evaluates states of one task; keeps the compiled steps between calls."""

    def __init__(
        self,
        task: Task,
        config: Config,
        eval_data: EvalData,
        *,
        mesh: Mesh | None = None,
        summarize: Summarize = metrics.compute,
    ) -> None:
        """Prepares the steps; they are compiled when first used.

        Args:
          task: model and loss.
          config: its `eval` part says at which budgets, and whether the spectral radius is wanted.
          eval_data: called once for each budget, for the batches of one pass.
          mesh: devices, from `parallel.make_mesh`; None for all devices.
          summarize: turns the merged sums of one pass into numbers.
        """
        self._task, self._config = task, config
        self._data, self._summarize = eval_data, summarize
        self._mesh = make_mesh() if mesh is None else mesh
        self._step = make_eval_step(task, self._mesh)
        self._diagnose = make_diagnostic_step(task, config, self._mesh)
        self._first_carry = lambda: None
        if isinstance(task, Carrying):
            self._first_carry = jax.jit(
                partial(task.carry, train=False), out_shardings=batch_sharding(self._mesh)
            )

    def __call__(
        self, state: TrainState, eval_data: EvalData | None = None
    ) -> dict[int, dict[str, float]]:
        """Evaluates a state at every budget of `config.eval_budgets`.

        Args:
          state: what to evaluate.
          eval_data: other data than usual, of the same shapes.

        Returns:
          budget -> metric -> mean over the examples: the task's own sums, and "loss", "fwd_steps",
          "fwd_residual" and "unconverged" (a share); at the main budget (`config.eval_steps`) also
          "spectral_radius" and "penalty" if `config.eval.spectral_batches` > 0.
        """
        data, result = eval_data or self._data, {}
        for budget in self._config.eval_budgets:
            merged = self._pass(self._step, state, data(), budget)
            if not merged:
                raise ValueError("got no batch from eval_data; wanted one pass over the data")
            result[budget] = self._summarize(merged)
        batches = self._config.eval.spectral_batches
        if batches:
            budget = self._config.eval_steps
            some = islice(data(), batches)
            measured = self._pass(self._diagnose, state, some, budget)
            result[budget] |= metrics.compute(measured)
        return result

    def _pass(
        self, step: EvalStep, state: TrainState, batches: Iterable[Batch], budget: int
    ) -> dict[str, metrics.Mean]:
        merged: dict[str, metrics.Mean] = {}
        max_steps = jnp.int32(budget)
        carry = self._first_carry()
        for batch in batches:
            if carry is None:
                batch = pad(batch, self._mesh.local_mesh.size)
            # The optimiser's state is of no use here, and need not be traced.
            now = dataclasses.replace(state, opt_state=None, carry=carry)
            measured, carry = step(now, place(batch, self._mesh), max_steps)
            merged = metrics.merge(merged, jax.device_get(measured))
        return merged


def evaluate(
    task: Task,
    config: Config,
    state: TrainState,
    eval_data: EvalData,
    *,
    mesh: Mesh | None = None,
    summarize: Summarize = metrics.compute,
) -> dict[int, dict[str, float]]:
    """Evaluates one state; see `Evaluator`, which does not compile anew for the next one.

    Args:
      task: model and loss.
      config: its `eval` part says at which budgets, and whether the spectral radius is wanted.
      state: what to evaluate.
      eval_data: called once for each budget, for the batches of one pass.
      mesh: devices, from `parallel.make_mesh`; None for all devices.
      summarize: turns the merged sums of one pass into numbers.

    Returns:
      budget -> metric -> number, as `Evaluator.__call__`.

    Example:
      >>> evaluate(task, config, state, eval_data)[12]["loss"]  # doctest: +SKIP
    """
    return Evaluator(task, config, eval_data, mesh=mesh, summarize=summarize)(state)


def _finite_mean(values: jax.Array, mask: jax.Array) -> metrics.Mean:
    """Mean over the real examples whose value is finite; where() because 0 * inf is nan."""
    mask = jnp.where(jnp.isfinite(values), mask, 0)
    return metrics.Mean(jnp.where(mask > 0, values * mask, 0).sum(), mask.sum())


def _compile(
    task: Task, measure: Callable[[Output, Batch], dict[str, metrics.Mean]], mesh: Mesh
) -> EvalStep:
    """A forward pass and what is measured of it."""
    shared, split = replicated(mesh), batch_sharding(mesh)

    def step(state: TrainState, batch: Batch, max_steps: jax.Array) -> Any:
        output = task.forward(
            state.params,
            state.collections(),
            batch,
            key=None,
            train=False,
            warmup=False,
            max_steps=max_steps,
            probe=None,
        )
        return measure(output, batch), output.extra.get(CARRY)

    return jax.jit(step, out_shardings=(shared, split))  # all that goes in has a place already
