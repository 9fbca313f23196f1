"""Looped transformers: one shared block, run as a looped network or as a DEQ.

    e = embed(words);   z_{k+1} = f(z_k; e);   p(answer) = softmax(readout(z))

The same weights are a looped network of T loops (`deq.Picard` with ``keep="last"`` and
`deq.Backprop`), or a DEQ (any solver, any gradient rule): solver and rule are attributes of the
model, the number of loops is an argument of the call.

References: Yang et al. (STARS), arXiv 2605.26733; Geiping et al., Scaling up test-time compute with
latent reasoning, arXiv 2502.05171; Bansal et al., End-to-end algorithm synthesis with recurrent
networks, arXiv 2202.05826 (recall).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

import deq_jax as deq
from deq_jax import linen
from deq_jax.adjoints import Adjoint, BackwardStats
from deq_jax.solvers import Keep, Solution, Solver

Norm = Literal["sandwich", "post", "pre"]
Start = Literal["input", "zero", "learned", "noise"]

_FULL = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
_HALF = nn.initializers.variance_scaling(0.25, "fan_in", "normal")
"""Of what is added to the state: half the standard deviation."""


class LoopedCell(nn.Module):
    """A transformer block as a map of the state.

        y = z + e with recall, else z

        sandwich:  y <- LN(y + attend(LN(y)));  y <- LN(y + mlp(LN(y)))
        post:      y <- LN(y + attend(y));      y <- LN(y + mlp(y))
        pre:       y <- y + attend(LN(y));      y <- y + mlp(LN(y))

    The state of a pre-norm block grows with the loops; the other two bound it.  Without recall the
    input enters through the start of the loop alone, and a contraction forgets it.

    Attributes:
      features: C, size of the state at a position.
      heads: attention heads; they divide C.
      hidden: units of the mlp, which has a ReLU.
      norm: where the block normalises.
      recall: whether the input is added before every loop.
      causal: whether a position attends to itself and those before it only.
      window: positions that a position attends to, itself and those before it, or None for all.  In
        place of positions before the first one stand a zero key and value: a layer without
        embedded positions can tell where the text begins.

    Raises:
      ValueError: when called, for settings that do not fit.

    Example:
      >>> z = jnp.ones((2, 5, 8))
      >>> LoopedCell(8, heads=2, hidden=16).init_with_output(jax.random.key(0), z, z)[0].shape
      (2, 5, 8)
    """

    features: int
    heads: int = 4
    hidden: int = 128
    norm: Norm = "sandwich"
    recall: bool = True
    causal: bool = False
    window: int | None = None

    @nn.compact
    def __call__(self, z: jax.Array, x: jax.Array) -> jax.Array:
        """Maps state z [B, T, C] and embedded input x [B, T, C] to the next state [B, T, C]."""
        self._check()
        inside = _norm if self.norm != "post" else lambda name, y: y
        outside = _norm if self.norm != "pre" else lambda name, y: y
        y = z + x if self.recall else z
        y = outside("norm_attend", y + self._attend(inside("norm_attend_in", y)))
        return outside("norm_mlp", y + self._mlp(inside("norm_mlp_in", y)))

    def _check(self) -> None:
        if self.norm not in get_args(Norm):
            raise ValueError(f"got norm={self.norm!r}; wanted one of {', '.join(get_args(Norm))}")
        if self.heads < 1 or self.features % self.heads:
            raise ValueError(
                f"got {self.heads} heads for {self.features} features; wanted a divisor of the "
                "features"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"got window={self.window}; wanted at least 1 position, or None")

    def _mlp(self, y: jax.Array) -> jax.Array:
        h = nn.relu(nn.Dense(self.hidden, kernel_init=_FULL, name="mlp_in")(y))
        return nn.Dense(self.features, kernel_init=_HALF, name="mlp_out")(h)

    def _attend(self, y: jax.Array) -> jax.Array:
        size = self.features // self.heads
        qkv = nn.Dense(3 * self.features, use_bias=False, kernel_init=_FULL, name="qkv")(y)
        q, k, v = jnp.moveaxis(qkv.reshape(*y.shape[:-1], 3, self.heads, size), -3, 0)
        q = q * size**-0.5
        if self.window is None:
            mixed = _attend(q, k, v, self.causal)
        else:
            mixed = _attend_back(q, k, v, self.window)
        out = nn.Dense(self.features, use_bias=False, kernel_init=_HALF, name="attend_out")
        return out(mixed.reshape(y.shape))


def _norm(name: str, y: jax.Array) -> jax.Array:
    return nn.LayerNorm(epsilon=1e-5, name=name)(y)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> jax.Array:
    """Attention [B, T, H, D] of each position to all, or to itself and those before it."""
    scores = jnp.einsum("bthd,bshd->bhts", q, k)
    if causal:
        scores = jnp.where(jnp.tri(q.shape[1], dtype=bool)[None, None], scores, -jnp.inf)
    return jnp.einsum("bhts,bshd->bthd", nn.softmax(scores), v)


def _attend_back(q: jax.Array, k: jax.Array, v: jax.Array, window: int) -> jax.Array:
    """Attention [B, T, H, D] of each position to itself and the ``window`` - 1 before it."""
    length = q.shape[1]

    def shifted(a: jax.Array) -> jax.Array:
        padded = jnp.pad(a, ((0, 0), (window - 1, 0), (0, 0), (0, 0)))
        return jnp.stack([padded[:, i : i + length] for i in range(window)], axis=2)

    scores = jnp.einsum("bthd,btwhd->bthw", q, shifted(k))
    return jnp.einsum("bthw,btwhd->bthd", nn.softmax(scores), shifted(v))


class LoopedTransformer(nn.Module):
    """Embedding, a looped `LoopedCell`, and a linear readout of every position.

    A looped network of T loops, trained through all of them, with T an argument of the call:
    ``solver=deq.Picard(tol=1e-12, max_steps=16), keep="last", adjoint=deq.Backprop()``, and
    ``max_steps=T``.  A DEQ of the same weights: ``solver=deq.Anderson()``.

    Attributes:
      cell: the block.
      words: number of different words in the input.
      outputs: number of different words in the answer.
      length: longest input, of which positions are embedded; 0 for none.
      solver: forward solver.
      adjoint: gradient rule; None for ``Implicit(solver)``.
      keep: the iterate to return, ``"best"`` (smallest residual) or ``"last"``.
      start: where the loop begins: at the embedded ``"input"``, at ``"zero"``, at a ``"learned"``
        vector, or at Gaussian ``"noise"`` (stream "dropout" in training; the same numbers in every
        evaluation).
      reparam: reparametrisation of the cell's parameters, None for plain ones.
      fixed_point: `deq.fixed_point`, or the sharded one of `training.parallel`.

    Example:
      >>> model = LoopedTransformer(
      ...     cell=LoopedCell(8, heads=2, hidden=16, parent=None),
      ...     words=5,
      ...     outputs=3,
      ...     length=6,
      ...     solver=deq.Picard(tol=1e-12, max_steps=16),
      ...     adjoint=deq.Backprop(),
      ...     keep="last",
      ... )
      >>> words = jnp.ones((2, 6), jnp.int32)
      >>> variables = model.init(jax.random.key(0), words, train=False)
      >>> scores, solution = model.apply(variables, words, train=False, max_steps=4)
      >>> scores.shape, solution.stats.num_steps.tolist()
      ((2, 6, 3), [4, 4])
    """

    cell: LoopedCell
    words: int
    outputs: int
    length: int
    solver: Solver
    adjoint: Adjoint | None = None
    keep: Keep = "best"
    start: Start = "input"
    reparam: Any = None
    fixed_point: Callable[..., Solution] = deq.fixed_point

    @nn.compact
    def __call__(
        self,
        words: jax.Array,
        *,
        train: bool,
        max_steps: int | jax.Array | None = None,
        probe: BackwardStats | None = None,
        z0: jax.Array | None = None,
    ) -> tuple[jax.Array, Solution]:
        """Answers.

        Args:
          words: int [B, T].
          train: whether this is a training pass.
          max_steps: loops, or budget of the solve: one number, or one a sample, int [B]; None for
            the solver's.
          probe: see `deq.backward_probe`.
          z0: float [B, T, C], another start than ``start``.

        Returns:
          Scores (logits) of the answer at every position, float [B, T, outputs], and the solution
          of the solve.
        """
        normal = nn.initializers.normal(1.0)
        x = nn.Embed(self.words, self.cell.features, embedding_init=normal, name="embed")(words)
        if self.length:
            if words.shape[1] > self.length:
                raise ValueError(
                    f"got an input of {words.shape[1]} words; wanted at most length={self.length}"
                )
            positions = self.param("positions", normal, (self.length, self.cell.features))
            x = x + positions[None, : words.shape[1]]
        layer = linen.DEQ(
            self.cell.clone(parent=None, name=None),
            self.solver,
            adjoint=self.adjoint,
            keep=self.keep,
            reparam=self.reparam,
            fixed_point=self.fixed_point,
            name="equilibrium",
        )
        start = self._begin(x, train)
        z0 = start if z0 is None else z0.astype(x.dtype)
        solution = layer(z0, x, train=train, max_steps=max_steps, probe=probe)
        z = solution.value
        if self.cell.norm == "pre":
            z = _norm("norm_out", z)
        return nn.Dense(self.outputs, kernel_init=_FULL, name="readout")(z), solution

    def _begin(self, x: jax.Array, train: bool) -> jax.Array:
        match self.start:
            case "input":
                return x
            case "zero":
                return jnp.zeros_like(x)
            case "learned":
                vector = self.param("start", nn.initializers.normal(1.0), x.shape[-1:])
                return jnp.broadcast_to(vector, x.shape)
            case "noise":
                key = self.make_rng("dropout") if train else jax.random.key(0)
                return jax.random.normal(key, x.shape, x.dtype)
        raise ValueError(f"got start={self.start!r}; wanted one of {', '.join(get_args(Start))}")
