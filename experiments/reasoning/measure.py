"""What a trained model does at other numbers of loops, from other starts, and on its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import deq_jax as deq
from deq_jax import tree
from deq_jax.training import Batch
from experiments.reasoning.config import ReasoningConfig
from experiments.reasoning.data import Puzzles

Numbers = dict[str, Any]

STARTS = {"zero": 0.0, "noise": 1.0, "noise x 3": 3.0}
"""Name of a start -> standard deviation of its numbers."""

LONG = (16, 64)
"""Loops after which other starts are compared."""


class Examination:
    """A model with its weights, and the compiled measurements of it."""

    def __init__(self, model: Any, params: Any, config: ReasoningConfig) -> None:
        """Compiles nothing yet.

        Args:
          model: a `LoopedTransformer`.
          params: its weights.
          config: of its training; `report` is read.
        """
        report = self._report = config.report
        most = max(*report.loops, report.at, *LONG)
        # It never stops on its own; what it skips is what could no longer change.
        loop: Any = {"solver": deq.Picard(tol=1e-30, max_steps=most)}
        loop |= {"adjoint": deq.Implicit(deq.Picard()), "fixed_point": deq.fixed_point}
        own = dataclasses.replace(config.solver, tol=max(config.solver.tol, 1e-3)).build(most)
        last = model.clone(keep="last", **loop)
        self._last = _compiled(last, params)
        self._best = _compiled(model.clone(keep="best", **loop), params)
        self._own = _compiled(model.clone(keep="best", **loop | {"solver": own}), params)
        self._radius = jax.jit(partial(_radius, last, params, report))
        self._most, self._features = most, model.cell.features

    def __call__(self, puzzles: Puzzles, *, hidden: bool) -> Numbers:
        """Measures.

        Args:
          puzzles: the test set.
          hidden: whether the input has places for the answers.

        Returns:
          "last", "best": loops -> share of puzzles solved; "rms", "residual", "radius": loops ->
          mean over the puzzles; "quarters": solved by quarter of the residual, least first;
          "starts": start -> loops -> solved; "best_of": solved from one noisy start, from that of
          the least residual among several, and from any; "own": "steps" and "accuracy" where the
          model's own solver stops; "rounds" (hidden answers): rounds -> solved.
        """
        report, batch = self._report, puzzles.arrays()
        found: Numbers = {
            name: {} for name in ("last", "best", "rms", "residual", "radius", "starts")
        }
        some = {name: array[: report.radius_examples] for name, array in batch.items()}
        start = self.begin(batch)
        looks = self.on(batch, start, {*report.loops, report.at})
        for loops in report.loops:
            look = looks[loops]
            found["last"][loops] = _mean(look["right"])
            found["rms"][loops] = _mean(look["rms"])
            found["residual"][loops] = _mean(look["residual"])
            found["best"][loops] = _mean(self._best(batch, loops)["right"])
            found["radius"][loops] = float(self._radius(some, loops))
        look = looks[report.at]
        order = np.argsort(look["residual"], kind="stable")
        found["quarters"] = [_mean(part) for part in np.array_split(look["right"][order], 4)]
        for name, size in STARTS.items():
            start = size * jax.random.normal(jax.random.key(1), start.shape)
            looks = self.on(batch, start, LONG)
            found["starts"][name] = {n: _mean(looks[n]["right"]) for n in LONG}
        found["best_of"] = self._best_of(batch, start.shape)
        look = self._own(batch, self._most)
        found["own"] = {"steps": _mean(look["steps"]), "accuracy": _mean(look["right"])}
        if hidden:
            found["rounds"] = {n: self._rounds(batch, n) for n in report.rounds}
        return found

    def begin(self, batch: Batch) -> Any:
        """The model's own start, float [B, T, C]."""
        return self._best(batch, 0)["z"]

    def on(self, batch: Batch, z: Any, loops: Collection[int]) -> dict[int, Numbers]:
        """Loops on from a state.

        Args:
          batch: puzzles.
          z: float [B, T, C].
          loops: numbers of loops.

        Returns:
          loops -> "z", "answer" int [B, T], "confidence" [B, T], "right" bool [B], "rms" [B],
          "residual" [B], "steps" [B].
        """
        found, done = {}, 0
        for count in sorted(loops):
            found[count] = self._last(batch, count - done, z)
            z, done = found[count]["z"], count
        return found

    def _best_of(self, batch: Batch, shape: tuple[int, ...]) -> Numbers:
        right, residual = [], []
        for key in jax.random.split(jax.random.key(2), self._report.starts):
            look = self._last(batch, self._report.at, jax.random.normal(key, shape))
            right.append(look["right"])
            residual.append(look["residual"])
        solved = np.stack(right)
        chosen = np.take_along_axis(solved, np.argmin(residual, axis=0)[None], axis=0)
        any_start = solved.any(axis=0)
        return {"one": _mean(solved), "least residual": _mean(chosen), "any": _mean(any_start)}

    def _rounds(self, batch: Batch, rounds: int) -> float:
        """Accuracy after rounds of predicting, and hiding the least confident again."""
        words, scored = batch["words"], batch["scored"] > 0
        loops, answer = self._report.at, words
        for done in range(1, rounds + 1):
            now = {**batch, "words": words}
            look = self._last(now, loops, self.begin(now))
            fixed = scored & (words != batch["words"])
            answer = np.where(fixed, words, look["answer"])
            sure = np.where(fixed, np.inf, look["confidence"])
            # As in training: a share of cos(pi t / 2) stays hidden.
            share = np.cos(np.pi / 2 * done / rounds)
            rank = np.argsort(np.argsort(np.where(scored, sure, -np.inf), axis=1), axis=1)
            rank = rank - (~scored).sum(axis=1, keepdims=True)  # 0: the least confident
            hide = rank < np.floor(share * scored.sum(axis=1, keepdims=True))
            words = np.where(scored & ~hide, answer, batch["words"])
        right = ((answer == batch["targets"]) | ~scored).all(axis=1)
        return _mean(right)


def _compiled(model: Any, params: Any) -> Callable[..., Numbers]:
    """A model as a function of puzzles, loops and start, compiled once for all numbers of loops."""
    look = jax.jit(partial(_look, model))

    def run(batch: Batch, loops: int, start: Any = None) -> Numbers:
        return jax.device_get(look(params, dict(batch), jnp.int32(loops), start))

    return run


def _look(model: Any, params: Any, batch: Batch, loops: jax.Array, start: Any) -> Numbers:
    scores, solution = model.apply(
        {"params": params}, batch["words"], train=False, max_steps=loops, z0=start
    )
    f, weights, z, x = solution.at
    image = f(weights, z, x)
    gap = jax.tree.map(jnp.subtract, image, z)
    answer = jnp.argmax(scores, axis=-1)
    wrong = (answer != batch["targets"]) * batch["scored"]
    return {
        "z": z,
        "answer": answer,
        "confidence": jax.nn.softmax(scores).max(axis=-1),
        "right": wrong.sum(axis=1) == 0,
        "rms": jnp.sqrt(jnp.square(z).mean(axis=(1, 2))),
        "residual": tree.norm(gap) / tree.norm(image),
        "steps": solution.stats.num_steps,
    }


def _radius(model: Any, params: Any, report: Any, batch: Batch, loops: jax.Array) -> jax.Array:
    apply = partial(model.apply, {"params": params}, train=False, max_steps=loops)
    at = apply(batch["words"])[1].at
    radius = deq.spectral_radius(*at, key=jax.random.key(0), iters=report.radius_iters)
    return radius.mean()


def _mean(values: Any) -> float:
    return float(np.mean(values))
