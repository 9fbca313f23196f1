"""Trains a grid of models, family x scale x seed, in one compiled program."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import deq_jax as deq
from deq_jax.training import Batch, TrainState
from deq_jax.training.metrics import Mean
from deq_jax.training.optim import make_optimizer
from deq_jax.training.state import split_seed
from deq_jax.training.step import forward_metrics, make_update
from deq_jax.training.task import Pass, forward
from experiments.initialization import data
from experiments.initialization.config import InitConfig
from experiments.initialization.task import build_task, draw_scaled

TRACKED = ("loss", "skipped", "unconverged", "bwd_unconverged", "fwd_steps", "grad_norm")
"""Metrics of every training step that are kept."""

RADIUS_EXAMPLES = 64
"""Test examples whose Jacobian is measured."""


@dataclasses.dataclass(frozen=True)
class Family:
    """What became of the models of one family, C = scales x seeds of them, seeds fastest.

    Attributes:
      history: metric -> float32 ``[C, steps]``, nan where an update was left out.
      start: metric -> float32 ``[C]``, on the test set before training: "loss", "accuracy",
        "solved", "fwd_steps", "radius".
      end: the same after training.
      seconds: of training, compilation included.
    """

    history: dict[str, np.ndarray]
    start: dict[str, np.ndarray]
    end: dict[str, np.ndarray]
    seconds: float


class Counted:
    """A function under jit that knows how often it was compiled."""

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        """Compiles nothing yet.

        Args:
          function: pure.
          **options: of `jax.jit`.
        """
        self.compiled = 0

        def traced(*args: Any) -> Any:
            self.compiled += 1  # runs when jit traces, once for every program
            return function(*args)

        self._call = jax.jit(traced, **options)

    def __call__(self, *args: Any) -> Any:
        """Calls the function."""
        return self._call(*args)


class Sweep:
    """The programs of a grid: initial weights, training, evaluation.

    Scale and seed are operands, and the family decides about the initial weights only: whatever
    the grid, training is compiled once and evaluation once, for all families.
    """

    def __init__(self, config: InitConfig) -> None:
        """Reads the data.

        Args:
          config: the whole configuration.
        """
        self.config = config
        self.train_set, self.test_set, classes = data.build_data(config.data)
        self.inputs, self.classes = self.train_set.x.shape[1], classes
        self.task = build_task(config, self.inputs, classes)
        self.optimizer = make_optimizer(config.optim, config.train.steps)
        self.update = make_update(self.task, config, self.optimizer)
        self.order = data.order(
            len(self.train_set.x), config.train.batch_size, config.train.steps, config.train.seed
        )
        self.programs = {
            "initial weights": Counted(self._init, static_argnums=2),
            "training": Counted(self._train, donate_argnums=0),
            "evaluation": Counted(self._evaluate),
        }

    def cells(self) -> tuple[np.ndarray, np.ndarray]:
        """Scale float32 ``[C]`` and seed int32 ``[C]`` of every model of a family."""
        sweep = self.config.sweep
        seeds = self.config.train.seed + np.arange(sweep.seeds, dtype=np.int32)
        scales = np.asarray(sweep.scales, np.float32)
        return np.repeat(scales, sweep.seeds), np.tile(seeds, len(scales))

    def start(self, scale: Any, seed: Any, family: str) -> TrainState:
        """The state of one model before training, with the weights of ``train.seed = seed``.

        Args:
          scale: of W, a number or a traced scalar.
          seed: likewise; the same encoder, readout and unit W at every scale.
          family: of W.

        Returns:
          The state at step 0.
        """
        task = build_task(self.config, self.inputs, self.classes, family)
        params = draw_scaled(task, split_seed(seed)[0], scale)
        return TrainState(
            step=jnp.int32(0), params=params, opt_state=self.optimizer.init(params), extra={}
        )

    def forward(self, params: Any, batch: Batch) -> Pass:
        """Solves at the evaluation's budget."""
        return forward(self.task, self.config, params, {}, None, batch)

    def run(self, family: str) -> Family:
        """Trains the models of a family, with progress on stderr.

        Args:
          family: of W.

        Returns:
          What became of them.
        """
        began, steps = time.monotonic(), self.config.train.steps
        states = self.programs["initial weights"](*self.cells(), family)
        first = jax.device_get(self.programs["evaluation"](states, self.test_set))
        parts = []
        for chunk in np.split(self.order, steps // self.config.train.log_every):
            states, tracked = self.programs["training"](states, self.train_set, chunk)
            parts.append(jax.device_get(tracked))
            losses = parts[-1]["loss"][:, -1]
            losses = losses[np.isfinite(losses)]
            words = "none is finite"
            if losses.size:
                low, middle, high = np.quantile(losses, [0, 0.5, 1])
                words = f"{middle:.3g} ({low:.3g} to {high:.3g})"
            done = sum(p["loss"].shape[1] for p in parts)
            sys.stderr.write(
                f"{family}  step {done}/{steps}  median loss of {len(self.cells()[0])} models "
                f"{words}  {time.monotonic() - began:.0f} s\n"
            )
        last = jax.device_get(self.programs["evaluation"](states, self.test_set))
        history = {n: np.concatenate([p[n] for p in parts], axis=1) for n in TRACKED}
        return Family(history, first, last, time.monotonic() - began)

    def _map(self, function: Callable[[TrainState], Any], states: TrainState) -> Any:
        # Under vmap a solve lasts until its slowest model is done, so models of one scale share it.
        count = len(self.cells()[0])
        return lax.map(function, states, batch_size=min(self.config.sweep.together, count))

    def _init(self, scales: jax.Array, seeds: jax.Array, family: str) -> TrainState:
        return jax.vmap(lambda scale, seed: self.start(scale, seed, family))(scales, seeds)

    def _train(self, states: TrainState, examples: data.Set, places: jax.Array) -> Any:
        def step(state: TrainState, chosen: jax.Array) -> tuple[TrainState, Any]:
            state, measured = self.update(state, examples.batch(chosen))
            # 0 / 0 where an update was left out: nan, and "skipped" says why.
            return state, {n: measured[n].total / measured[n].count for n in TRACKED}

        return self._map(lambda state: lax.scan(step, state, places), states)

    def _evaluate(self, states: TrainState, examples: data.Set) -> Any:
        batches = jnp.arange(len(examples.x)).reshape(-1, self.config.data.eval_batch_size)

        def evaluate(state: TrainState) -> dict[str, jax.Array]:
            def one(_: None, places: jax.Array) -> tuple[None, dict[str, Mean]]:
                batch = examples.batch(places)
                return None, forward_metrics(self.forward(state.params, batch), batch)

            _, measured = lax.scan(one, None, batches)
            found = {n: m.total.sum() / m.count.sum() for n, m in measured.items()}
            few = examples.batch(jnp.arange(min(RADIUS_EXAMPLES, len(examples.x))))
            solution = self.forward(state.params, few).solution
            assert solution is not None
            at = solution.at
            radius = deq.spectral_radius(
                *at, key=jax.random.key(0), iters=self.config.eval.spectral_iters
            )
            kept = {n: found[n] for n in ("loss", "accuracy", "fwd_steps", "fwd_residual")}
            solved = {"solved": 1 - found["unconverged"]}
            return kept | solved | {"radius": (radius * few["mask"]).sum() / few["mask"].sum()}

        return self._map(evaluate, states)
