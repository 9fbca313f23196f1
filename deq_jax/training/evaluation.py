"""Evaluation at several step budgets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import deq_jax as deq
from deq_jax.jacobian import penalty_per_sample
from deq_jax.training import metrics
from deq_jax.training.config import Config
from deq_jax.training.metrics import Mean
from deq_jax.training.parallel import batch_sharding, make_mesh, pad, place, replicated
from deq_jax.training.state import TrainState
from deq_jax.training.step import forward_metrics
from deq_jax.training.task import Batch, EvalData, Pass, Task, forward

EvalStep = Callable[[TrainState, Batch, Any], tuple[dict[str, Mean], Any]]
"""(state, batch, max_steps) -> (metrics, carry), the latter None of independent batches."""

_AHEAD = 8
"""Batches that the host may be ahead of the devices."""


def make_eval_step(
    task: Task,
    config: Config,
    mesh: Mesh,
    measure: Callable[[Pass, Batch], dict[str, Mean]] = forward_metrics,
) -> EvalStep:
    """Builds the compiled evaluation of one batch.

    Args:
      task: model and loss.
      config: the solver of evaluation is read.
      mesh: the state is replicated over it, batches are split over it.
      measure: what is measured of a forward pass.

    Returns:
      A jitted `EvalStep`; max_steps is traced, so that all budgets share one compilation.

    Example:
      >>> sums, carry = make_eval_step(task, config, mesh)(state, batch, 12)  # doctest: +SKIP
    """

    def step(state: TrainState, batch: Batch, max_steps: jax.Array) -> Any:
        found = forward(
            task, config, state.params, state.extra, state.carry, batch, max_steps=max_steps
        )
        return measure(found, batch), found.carry

    # All that goes in has a place already.
    return jax.jit(step, out_shardings=(replicated(mesh), batch_sharding(mesh)))


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

    def measure(found: Pass, batch: Batch) -> dict[str, Mean]:
        if found.solution is None:
            return {}
        at, mask = found.solution.at, batch["mask"]
        radius = deq.spectral_radius(*at, key=radius_key, iters=config.eval.spectral_iters)
        return {
            "spectral_radius": _finite_mean(radius, mask),
            "penalty": _finite_mean(penalty_per_sample(*at, key=penalty_key), mask),
        }

    return make_eval_step(task, config, mesh, measure)


class Evaluator:
    """Evaluates states of one task; keeps the compiled steps between calls."""

    def __init__(
        self, task: Task, config: Config, eval_data: EvalData, *, mesh: Mesh | None = None
    ) -> None:
        """Prepares the steps; they are compiled when first used.

        Args:
          task: model and loss.
          config: ``eval`` says at which budgets, and whether the spectral radius is wanted.
          eval_data: called once for each evaluation, for the batches of one pass.
          mesh: devices, from `parallel.make_mesh`; None for all devices.
        """
        self._task, self._config, self._data = task, config, eval_data
        self._mesh = make_mesh() if mesh is None else mesh
        self._step = make_eval_step(task, config, self._mesh)
        self._diagnose = make_diagnostic_step(task, config, self._mesh)
        self._first_carry = jax.jit(
            partial(task.first_carry, train=False), out_shardings=batch_sharding(self._mesh)
        )

    def __call__(
        self,
        state: TrainState,
        eval_data: EvalData | None = None,
        *,
        budgets: Sequence[int] | None = None,
    ) -> dict[int, dict[str, float]]:
        """Evaluates a state; every batch is read once, for all budgets.

        Args:
          state: what to evaluate.
          eval_data: other data than usual, of the same shapes.
          budgets: numbers of solver steps; None for `config.eval_budgets`.

        Returns:
          budget -> metric -> mean over the examples: the task's own means, and "loss", "fwd_steps",
          "fwd_residual" and "unconverged" (a share); at the main budget (`config.eval_steps`) also
          "spectral_radius" and "penalty" if `config.eval.spectral_batches` > 0.

        Raises:
          ValueError: the data has no batch.
        """
        budgets = self._config.eval_budgets if budgets is None else budgets
        merged: dict[int, dict[str, Mean]] = {budget: {} for budget in budgets}
        diagnosed: dict[str, Mean] = {}
        carries = {budget: self._first_carry() for budget in budgets}
        limits = {budget: jnp.int32(budget) for budget in budgets}
        pending: list[tuple[dict[int, Any], dict[str, Mean]]] = []  # on the devices

        def fetch(count: int) -> None:
            nonlocal diagnosed
            for measured, diagnosis in jax.device_get(pending[:count]):
                for budget, means in measured.items():
                    merged[budget] = metrics.merge(merged[budget], means)
                diagnosed = metrics.merge(diagnosed, diagnosis)
            del pending[:count]

        empty = True
        for index, batch in enumerate((eval_data or self._data)()):
            empty = False
            if self._task.carry is None:
                batch = pad(batch, self._mesh.local_mesh.size)
            placed, measured, diagnosis = place(batch, self._mesh), {}, {}
            for budget in budgets:
                # The optimiser's state is of no use here, and need not be traced.
                now = dataclasses.replace(state, opt_state=None, carry=carries[budget])
                measured[budget], carries[budget] = self._step(now, placed, limits[budget])
                if budget == self._config.eval_steps and index < self._config.eval.spectral_batches:
                    diagnosis, _ = self._diagnose(now, placed, limits[budget])
            pending.append((measured, diagnosis))
            if len(pending) > _AHEAD:
                fetch(1)
        if empty:
            raise ValueError("got no batch from eval_data; wanted one pass over the data")
        fetch(len(pending))
        result = {budget: self._task.summarize(means) for budget, means in merged.items()}
        if diagnosed:
            result[self._config.eval_steps] |= metrics.compute(diagnosed)
        return result


def evaluate(
    task: Task,
    config: Config,
    state: TrainState,
    eval_data: EvalData,
    *,
    mesh: Mesh | None = None,
) -> dict[int, dict[str, float]]:
    """Evaluates one state; see `Evaluator`, which does not compile anew for the next one.

    Args:
      task: model and loss.
      config: ``eval`` says at which budgets, and whether the spectral radius is wanted.
      state: what to evaluate.
      eval_data: called for the batches of one pass.
      mesh: devices, from `parallel.make_mesh`; None for all devices.

    Returns:
      budget -> metric -> number, as ``Evaluator.__call__``.

    Example:
      >>> evaluate(task, config, state, eval_data)[12]["loss"]  # doctest: +SKIP
    """
    return Evaluator(task, config, eval_data, mesh=mesh)(state)


def _finite_mean(values: jax.Array, mask: jax.Array) -> Mean:
    """Mean over the real examples whose value is finite; where() because 0 * inf is nan."""
    mask = jnp.where(jnp.isfinite(values), mask, 0)
    return Mean(jnp.where(mask > 0, values * mask, 0).sum(), mask.sum())
