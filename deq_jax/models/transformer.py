"""Language models on transformer layers: the DEQ-Transformer and its explicit baselines.

    u = inject(embed(words));   z* = f(z*; u, memory);   log p(next word) = softmax(z*)

A text is read in segments of T words.  A segment attends to the memory of M positions before it,
whose equilibria and injections the segments before have left.

Reference: Bai, Kolter and Koltun, Deep Equilibrium Models, arXiv 1909.01377; Bai, Koltun and
Kolter, arXiv 2106.14342.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

import deq_jax as deq
from deq_jax import linen
from deq_jax.adjoints import Adjoint, BackwardStats
from deq_jax.models.embeddings import AdaptiveEmbedding
from deq_jax.models.layers import NORMAL
from deq_jax.models.transformer_cell import Injection, Memory, TransformerCell, positions
from deq_jax.solvers import Keep, Solution, Solver


class _LanguageModel(nn.Module):
    """What the models share: everything but the way from injections to states."""

    vocab: AdaptiveEmbedding
    cell: TransformerCell
    memory: int
    dropout: float = 0.0
    reparam: Any = deq.weight_norm
    init_weights: Callable[..., jax.Array] = NORMAL

    def _setup(self) -> None:
        features = self.cell.features
        if self.vocab.features != features:
            raise ValueError(
                f"got an embedding of {self.vocab.features} features for a cell of {features}; "
                "wanted the same number"
            )
        if self.memory < 0:
            raise ValueError(f"memory must be at least 0 positions, got {self.memory}")
        self.inject = nn.Dense(3 * features, kernel_init=self.init_weights)

    def _layers(self) -> tuple[int, ...]:
        """Axes of a memory between the streams and the positions."""
        return ()

    def empty_memory(self, batch: int, length: int | None = None) -> Memory:
        """The memory of streams that begin.

        Args:
          batch: B, number of streams.
          length: positions to remember; None for ``memory``.

        Returns:
          A `Memory` of zeros.
        """
        features, length = self.cell.features, self.memory if length is None else length
        return Memory(
            z=jnp.zeros((batch, *self._layers(), length, features)),
            u=jnp.zeros((batch, length, 2 * features)),
            filled=jnp.zeros(batch, jnp.int32),
        )

    def next_word(
        self, words: jax.Array, memory: Memory, *, max_steps: int | jax.Array | None = None
    ) -> tuple[jax.Array, Memory]:
        """Reads one segment and predicts what follows it.

        Args:
          words: int [B, T].
          memory: what the segments before have left.
          max_steps: budget of the solve; None for the solver's.

        Returns:
          Log-probabilities of the next word, float [B, V], and the memory after the segment.
        """
        z, memory, _ = self._read(words, memory, False, max_steps, None)
        return self.vocab.log_probs(z[:, -1]), memory

    def _score(
        self,
        words: jax.Array,
        targets: jax.Array,
        memory: Memory,
        train: bool,
        max_steps: Any = None,
        probe: Any = None,
    ) -> tuple[tuple[jax.Array, Memory], Solution | None]:
        z, memory, solution = self._read(words, memory, train, max_steps, probe)
        if train and self.dropout > 0:
            z = z * self._mask(z)
        return (self.vocab.nll(z, targets), memory), solution

    def _read(
        self, words: jax.Array, memory: Memory, train: bool, max_steps: Any, probe: Any
    ) -> tuple[jax.Array, Memory, Solution | None]:
        """States [B, T, C], the memory after the segment, and the solution of a solve."""
        embedded = self.vocab(words)
        distances = positions(
            words.shape[1] + memory.u.shape[1], self.cell.features, embedded.dtype
        )
        if train and self.dropout > 0:
            embedded, distances = embedded * self._mask(embedded), distances * self._mask(distances)
        u = self.inject(embedded)
        x = Injection(u=u, memory=lax.stop_gradient(memory), positions=distances)
        z, remembered, solution = self._states(x, train, max_steps, probe)
        u_kv = u[..., self.cell.features :]
        after = Memory(
            z=_shift(memory.z, lax.stop_gradient(remembered)),
            u=_shift(memory.u, lax.stop_gradient(u_kv)),
            filled=jnp.minimum(memory.filled + words.shape[1], memory.u.shape[1]),
        )
        return z, after, solution

    def _mask(self, a: jax.Array) -> jax.Array:
        """One mask for all positions."""
        key = self.make_rng("dropout")
        return deq.masks.bernoulli(key, a.shape, self.dropout, share_axes=(1,), dtype=a.dtype)

    def _states(
        self, x: Injection, train: bool, max_steps: Any, probe: Any
    ) -> tuple[jax.Array, jax.Array, Solution | None]:
        """States [B, T, C], what is remembered of them, and the solution of a solve."""
        raise NotImplementedError


class DEQTransformer(_LanguageModel):
    """The DEQ-Transformer: the equilibrium of a `TransformerCell` predicts the next word.

    The solve starts at zero.  Weight norm and dropout masks are computed once per call.

    Attributes:
      vocab: embedding and softmax.
      cell: the map that is iterated.
      memory: M, positions that a segment attends to before its own.
      dropout: of embedding, positions and output, one mask for all positions.
      reparam: reparametrisation of the cell's parameters, None for plain ones.
      init_weights: initialiser of the injection's weights.
      solver: forward solver.
      adjoint: gradient rule; None for ``Implicit(solver)``.
      keep: the iterate to return, ``"best"`` (smallest residual) or ``"last"``.
      fixed_point: `deq.fixed_point`, or the sharded one of `training.parallel`.

    Example:
      >>> model = DEQTransformer(
      ...     vocab=AdaptiveEmbedding(vocab=50, features=8),
      ...     cell=TransformerCell(features=8, heads=2, hidden=16),
      ...     memory=4,
      ...     solver=deq.Anderson(max_steps=5),
      ... )
      >>> words, memory = jnp.ones((2, 3), jnp.int32), model.empty_memory(2)
      >>> init = jax.jit(lambda key: model.init(key, words, words, memory, train=False))
      >>> apply = jax.jit(lambda v: model.apply(v, words, words, memory, train=False))
      >>> (nll, memory), solution = apply(init(jax.random.key(0)))
      >>> nll.shape, memory.filled.tolist()
      ((2, 3), [3, 3])
    """

    solver: Solver = deq.Anderson()
    adjoint: Adjoint | None = None
    keep: Keep = "best"
    fixed_point: Callable[..., Solution] = deq.fixed_point

    def setup(self) -> None:
        """Creates the submodules."""
        self._setup()
        self.equilibrium = linen.DEQ(
            self.cell.clone(parent=None, name=None),
            self.solver,
            adjoint=self.adjoint,
            keep=self.keep,
            reparam=self.reparam,
            fixed_point=self.fixed_point,
        )

    def __call__(
        self,
        words: jax.Array,
        targets: jax.Array,
        memory: Memory,
        *,
        train: bool,
        max_steps: int | jax.Array | None = None,
        probe: BackwardStats | None = None,
    ) -> tuple[tuple[jax.Array, Memory], Solution]:
        """Reads one segment of every stream and scores the words that follow.

        Args:
          words: int [B, T].
          targets: int [B, T], the word after each.
          memory: what the segments before have left; its length may differ from ``memory``.
          train: whether dropout masks are drawn (stream "dropout").
          max_steps: budget of the solve; None for the solver's.
          probe: see `deq.backward_probe`.

        Returns:
          ``(nll, memory), solution``: negative log-likelihood of the targets, float [B, T]; the
          memory after the segment; the solution of the solve.
        """
        output, solution = self._score(words, targets, memory, train, max_steps, probe)
        assert solution is not None
        return output, solution

    def _states(
        self, x: Injection, train: bool, max_steps: Any, probe: Any
    ) -> tuple[jax.Array, jax.Array, Solution | None]:
        start = jnp.zeros_like(x.u[..., : self.cell.features])
        solution = self.equilibrium(start, x, train=train, max_steps=max_steps, probe=probe)
        return solution.value, solution.value, solution


class ExplicitTransformer(_LanguageModel):
    """The baseline: a network of L such layers, each with a memory of its own.

    z_0 = 0, z_{l+1} = f_l(z_l; u, memory_l).  Layer l remembers its inputs z_l.

    Attributes:
      vocab: embedding and softmax.
      cell: a layer.
      memory: M, positions that a segment attends to before its own.
      dropout: of embedding, positions and output, one mask for all positions.
      reparam: reparametrisation of the layers' parameters, None for plain ones.
      init_weights: initialiser of the injection's weights.
      layers: L.
      tied: whether all layers have the same weights (dropout masks included, as in a solve).

    Example:
      >>> model = ExplicitTransformer(
      ...     vocab=AdaptiveEmbedding(vocab=50, features=8),
      ...     cell=TransformerCell(features=8, heads=2, hidden=16),
      ...     memory=4,
      ...     layers=3,
      ... )
      >>> words, memory = jnp.ones((2, 3), jnp.int32), model.empty_memory(2)
      >>> init = jax.jit(lambda key: model.init(key, words, words, memory, train=False))
      >>> apply = jax.jit(lambda v: model.apply(v, words, words, memory, train=False))
      >>> nll, memory = apply(init(jax.random.key(0)))
      >>> nll.shape, memory.z.shape
      ((2, 3), (2, 3, 4, 8))
    """

    layers: int = 12
    tied: bool = False

    def setup(self) -> None:
        """Creates the submodules."""
        self._setup()
        if self.layers < 1:
            raise ValueError(f"layers must be at least 1, got {self.layers}")

        def draw(key: jax.Array) -> Any:
            cell = self.cell.clone(parent=None, name=None)
            state = jnp.zeros((1, 1, cell.features))
            memory = Memory(state[:, :0], state[:, :0].repeat(2, axis=2), jnp.zeros(1, jnp.int32))
            x = Injection(state.repeat(3, axis=2), memory, positions(1, cell.features))

            def one(key: jax.Array) -> Any:
                params = cell.init(key, state, x, method=linen.once)["params"]
                return params if self.reparam is None else self.reparam.split(params)

            return one(key) if self.tied else jax.vmap(one)(jax.random.split(key, self.layers))

        self.stack = self.param("stack", draw)

    def __call__(
        self, words: jax.Array, targets: jax.Array, memory: Memory, *, train: bool
    ) -> tuple[jax.Array, Memory]:
        """Reads one segment of every stream and scores the words that follow.

        Args:
          words: int [B, T].
          targets: int [B, T], the word after each.
          memory: what the segments before have left; its length may differ from ``memory``.
          train: whether dropout masks are drawn (stream "dropout").

        Returns:
          Negative log-likelihood of the targets, float [B, T], and the memory after the segment.
        """
        return self._score(words, targets, memory, train)[0]

    def _layers(self) -> tuple[int, ...]:
        return (self.layers,)

    def _states(
        self, x: Injection, train: bool, max_steps: Any, probe: Any
    ) -> tuple[jax.Array, jax.Array, Solution | None]:
        del max_steps, probe
        cell = self.cell.clone(parent=None, name=None)
        start = jnp.zeros_like(x.u[..., : cell.features])
        keys = jax.random.split(self.make_rng("dropout"), self.layers) if train else None
        if keys is not None and self.tied:
            keys = keys[:1].repeat(self.layers, axis=0)

        def layer(z: jax.Array, own: Any) -> tuple[jax.Array, jax.Array]:
            weights, memory, key = own
            weights = self.stack if self.tied else weights
            params = weights if self.reparam is None else self.reparam.merge(weights)
            local = dataclasses.replace(x, memory=dataclasses.replace(x.memory, z=memory))
            masks = None if key is None else cell.masks(key, z, local)
            image: Any = cell.apply({"params": params}, z, local, masks, method=linen.once)
            return image, z

        memories = x.memory.z.swapaxes(0, 1)  # [L, B, M, C]
        stack = None if self.tied else self.stack
        z, inputs = lax.scan(layer, start, (stack, memories, keys), length=self.layers)
        return z, inputs.swapaxes(0, 1), None


def _shift(old: jax.Array, new: jax.Array) -> jax.Array:
    """Appends along the axis of positions, and keeps as many as there were."""
    length = old.shape[-2]
    both = jnp.concatenate([old, new.astype(old.dtype)], axis=-2)
    return both[..., both.shape[-2] - length :, :]
