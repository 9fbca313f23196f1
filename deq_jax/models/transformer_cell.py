"""The map that a DEQ-Transformer iterates: relative attention and a feed-forward layer.

Parameters, their initial values and the order of operations follow the published code, so that its
weights can be loaded (`deq_jax.convert.transformer`).
"""

from __future__ import annotations

import functools
import math
from typing import Any, ClassVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

import deq_jax as deq
from deq_jax.models.families import product_inits
from deq_jax.models.layers import NORMAL, UNIFORM
from deq_jax.tree import stat_dtype


@flax.struct.dataclass
class Memory:
    """What a stream of text remembers of its last M positions; no gradient goes into it.

    Attributes:
      z: float [B, M, C], their equilibria.
      u: float [B, M, 2C], their injections into keys and values.
      filled: int32 [B], how many of the positions, the last ones, hold something.
    """

    z: jax.Array
    u: jax.Array
    filled: jax.Array


@flax.struct.dataclass
class Injection:
    """What the cell is given besides its state, for T positions after M remembered ones.

    Attributes:
      u: float [B, T, 3C], injections into queries, keys and values.
      memory: of the positions before.
      positions: float [1, M + T, C], from `positions`, perhaps under a dropout mask.
    """

    u: jax.Array
    memory: Memory
    positions: jax.Array


@flax.struct.dataclass
class _Operands:
    """What of an `Injection` does not change during a solve, computed once.

    Attributes:
      u: float [B, T, 3C].
      k: float [B, M, H, D], keys of the memory.
      v: float [B, M, H, D], values of the memory.
      r: float [1, M + T, H, D], keys of the relative positions.
      filled: int32 [B].
    """

    u: jax.Array
    k: jax.Array
    v: jax.Array
    r: jax.Array
    filled: jax.Array


def positions(length: int, features: int, dtype: Any = jnp.float32) -> jax.Array:
    """Embeds the distances length - 1, ..., 1, 0: sines, then cosines.

    Args:
      length: number of distances.
      features: C.
      dtype: of the result; distances and angles are computed in float32 or wider.

    Returns:
      ``[1, length, features]``, sin and cos of distance * 10000^(-2 i / features).

    Example:
      >>> positions(3, 2)[0, :, 1].tolist()[2]  # cos(0)
      1.0
    """
    wide = stat_dtype(dtype)  # bfloat16 has not the digits to tell 600 distances apart
    rates = 10000.0 ** (-jnp.arange(0, features, 2, dtype=wide) / features)
    angles = jnp.arange(length - 1, -1, -1, dtype=wide)[:, None] * rates[None]
    both = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return both[None, :, :features].astype(dtype)


def relative_shift(scores: jax.Array) -> jax.Array:
    """Moves scores of distances to the keys that are so far away.

    Args:
      scores: [B, H, T, K]; column j is that of distance K - 1 - j.

    Returns:
      [B, H, T, K]; column j of query i is that of the distance K - T + i - j.  Columns of keys
      after the query hold something else, and must be masked.

    Example:
      >>> relative_shift(jnp.arange(6.0).reshape(1, 1, 2, 3))[0, 0].tolist()
      [[1.0, 2.0, 0.0], [3.0, 4.0, 5.0]]

    Reference: Dai et al., Transformer-XL, arXiv 1901.02860, appendix B.
    """
    batch, heads, queries, keys = scores.shape
    # One more column turns each row's start by one; the rows then lie as they are wanted.
    padded = jnp.pad(scores, ((0, 0), (0, 0), (0, 0), (1, 0)))
    rows = padded.reshape(batch, heads, keys + 1, queries)[:, :, 1:]
    return rows.reshape(batch, heads, queries, keys)


def visible(queries: int, keys: int, filled: jax.Array, window: int | None = None) -> jax.Array:
    """Tells which keys a query may attend to.

    Args:
      queries: T.
      keys: K = M + T.
      filled: int32 [B], how many of the M remembered positions hold something.
      window: largest number of positions, the query's own among them; None for all.

    Returns:
      bool [B, 1, T, K].

    Example:
      >>> visible(2, 4, jnp.array([1]))[0, 0].astype(int).tolist()
      [[0, 1, 1, 0], [0, 1, 1, 1]]
    """
    memory = keys - queries
    distance = memory + jnp.arange(queries)[:, None] - jnp.arange(keys)[None]  # [T, K]
    near = (distance >= 0) & (distance < (keys if window is None else window))
    held = jnp.arange(keys)[None] >= memory - filled[:, None]  # [B, K]
    return near[None, None] & held[:, None, None]


class TransformerCell(nn.Module):
    """One layer of relative attention, with the input injected into queries, keys and values.

        post-norm:  h = N(z + o(A(W z + u)));       f = N(h + F(h))
        pre-norm:   h = N(z + o(A(W N(z) + u)));    f = h + F(h)

    with N layer normalisation without parameters, A the heads, F(h) = W2 relu(W1 h + b1) + b2.
    In the pre-norm form it is the un-normalised z that is added to the attention, and the
    normalised h to the feed-forward layer, as published.

    Keys and values of the memory and those of the relative positions do not depend on z: `inject`
    computes them, once for a solve.

    Attributes:
      features: C; the heads divide it.
      heads: H.
      hidden: width of the feed-forward layer.
      pre_norm: which form.
      window: positions that a query attends to, its own among them; None for all there are.
      dropout: of the outputs of attention and of both layers of F, one mask for all positions.
      attention_dropout: of the attention weights.
      hidden_parts: in how many parts F is computed, one after the other, and computed again where
        a gradient needs it; they divide hidden.  More parts take less memory and more time.
      weights: family of the initial weights of what maps the state to itself: each of queries, keys
        and values (all heads together), the output map, and the feed-forward layer as a product;
        None for the published ones.
      x_axes: (class attribute) which operands of a solve are split by samples, for
        `deq_jax.training.parallel.sharded_fixed_point`: all but the keys of the positions.

    Raises:
      ValueError: for settings out of range.

    Example:
      >>> from deq_jax import linen
      >>> cell = TransformerCell(features=8, heads=2, hidden=16)
      >>> z = jnp.zeros((1, 4, 8))
      >>> memory = Memory(z=z[:, :2], u=jnp.zeros((1, 2, 16)), filled=jnp.array([2]))
      >>> x = Injection(u=jnp.ones((1, 4, 24)), memory=memory, positions=positions(6, 8))
      >>> params = cell.init(jax.random.key(0), z, x, method=linen.once)
      >>> cell.apply(params, z, x, method=linen.once).shape
      (1, 4, 8)

    Reference: Bai, Kolter and Koltun, Deep Equilibrium Models, arXiv 1909.01377, section 4;
    Dai et al., Transformer-XL, arXiv 1901.02860.
    """

    features: int
    heads: int
    hidden: int
    pre_norm: bool = False
    window: int | None = None
    dropout: float = 0.0
    attention_dropout: float = 0.0
    hidden_parts: int = 1
    weights: deq.init.MatrixInitializer | None = None

    x_axes: ClassVar[Any] = (_Operands(u=0, k=0, v=0, r=None, filled=0), 0)  # type: ignore

    def __post_init__(self) -> None:
        """Refuses settings that do not fit each other."""
        check_cell(self)
        super().__post_init__()

    def setup(self) -> None:
        """Creates the five maps and the two biases of the attention."""

        def dense(features: int, bias: bool = True, init: Any = UNIFORM) -> nn.Dense:
            return nn.Dense(features, use_bias=bias, kernel_init=init)

        shape = (self.heads, self.features // self.heads)
        self.qkv = dense(
            3 * self.features, bias=False, init=self._three if self.weights else UNIFORM
        )
        self.r = dense(self.features, bias=False)
        self.o = dense(self.features, init=self.weights or UNIFORM)
        first, second = product_inits(self, self.weights, "ff1", UNIFORM)
        self.ff1, self.ff2 = dense(self.hidden, init=first), dense(self.features, init=second)
        self.content_bias = self.param("content_bias", NORMAL, shape)
        self.position_bias = self.param("position_bias", NORMAL, shape)
        self.norm = nn.LayerNorm(
            epsilon=1e-5, use_bias=False, use_scale=False, use_fast_variance=False
        )

    def __call__(self, z: jax.Array, x: _Operands, masks: Any = None) -> jax.Array:
        """One application of f.

        Args:
          z: state, float [B, T, C].
          x: what `inject` returned.
          masks: what `masks` drew, or None.

        Returns:
          The next state, float [B, T, C].
        """
        drop = _Drop(masks)
        qkv = self.qkv(self.norm(z) if self.pre_norm else z) + x.u
        q, k, v = (self._heads(part) for part in jnp.split(qkv, 3, axis=-1))
        k, v = jnp.concatenate([x.k, k], axis=1), jnp.concatenate([x.v, v], axis=1)
        content = jnp.einsum("bihd,bjhd->bhij", q + self.content_bias[None, None], k)
        place = jnp.einsum("bihd,jhd->bhij", q + self.position_bias[None, None], x.r[0])
        scores = (content + relative_shift(place)) / math.sqrt(q.shape[-1])  # [B, H, T, K]
        seen = visible(z.shape[1], k.shape[1], x.filled, self.window)
        # In float32 or wider: the sum over all keys would lose small weights in bfloat16.
        wide = jnp.where(seen, scores, -jnp.inf).astype(stat_dtype(scores.dtype))
        weights = jax.nn.softmax(wide, axis=-1).astype(scores.dtype)
        mixed = jnp.einsum("bhij,bjhd->bihd", drop("attention", weights), v)
        h = self.norm(z + drop("attention_out", self.o(mixed.reshape(z.shape))))
        out = h + drop("out", self._feed_forward(h, drop))
        return out if self.pre_norm else self.norm(out)

    def inject(self, x: Injection) -> _Operands:
        """Computes what a solve does not change.

        Args:
          x: injections, memory and positions.

        Returns:
          The second argument of the cell.
        """
        memory = x.memory
        z = self.norm(memory.z) if self.pre_norm else memory.z
        k, v = jnp.split(self.qkv(z)[..., self.features :] + memory.u, 2, axis=-1)
        r = self._heads(self.r(x.positions))
        return _Operands(u=x.u, k=self._heads(k), v=self._heads(v), r=r, filled=memory.filled)

    def masks(self, key: jax.Array, z: jax.Array, x: Injection) -> dict[str, jax.Array]:
        """Draws the dropout masks of one solve.

        Args:
          key: PRNG key.
          z: start of the solve.
          x: injections, memory and positions.

        Returns:
          name -> mask divided by 1 - rate: "attention" [B, H, T, K], "attention_out" and "out"
          [B, 1, C], "hidden" [B, 1, hidden]; only those with a rate above 0.
        """
        batch, length, _ = z.shape
        keys = length + x.memory.z.shape[1]
        wanted = {
            "attention": ((batch, self.heads, length, keys), self.attention_dropout),
            "attention_out": ((batch, 1, self.features), self.dropout),
            "hidden": ((batch, 1, self.hidden), self.dropout),
            "out": ((batch, 1, self.features), self.dropout),
        }
        drawn = zip(jax.random.split(key, len(wanted)), wanted.items(), strict=True)
        return {
            name: deq.masks.bernoulli(k, shape, rate, dtype=z.dtype)
            for k, (name, (shape, rate)) in drawn
            if rate > 0
        }

    def _feed_forward(self, h: jax.Array, drop: _Drop) -> jax.Array:
        """F, float [B, T, C] to the same."""
        if self.hidden_parts == 1 or self.is_initializing():
            return self.ff2(drop("hidden", nn.relu(self.ff1(h))))

        def split(a: jax.Array, axis: int) -> jax.Array:
            shape = (*a.shape[:axis], self.hidden_parts, -1, *a.shape[axis + 1 :])
            return jnp.moveaxis(a.reshape(shape), axis, 0)

        first, second = (layer.variables["params"] for layer in (self.ff1, self.ff2))
        units = {"w1": split(first["kernel"], 1), "b1": split(first["bias"][None, None], 2)}
        units |= {"w2": split(second["kernel"], 0)}
        if "hidden" in drop.masks:
            units["mask"] = split(drop.masks["hidden"], 2)
        wide = stat_dtype(h.dtype)  # of the sum over the parts

        # Once for a gradient, and once more for the gradient of a gradient, the penalty's.
        again = functools.partial(jax.checkpoint, prevent_cse=False)

        @again
        def image(h: jax.Array, own: dict[str, jax.Array]) -> jax.Array:
            inner = nn.relu(h @ own["w1"] + own["b1"]) * own.get("mask", 1)
            return jnp.matmul(inner, own["w2"], preferred_element_type=wide)

        @again
        def add(total: jax.Array, own: dict[str, jax.Array]) -> tuple[jax.Array, None]:
            return total + image(h, own), None

        total, _ = lax.scan(add, jnp.zeros_like(h, wide), units)
        return total.astype(h.dtype) + second["bias"][None, None]

    def _three(self, key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
        """Queries, keys and values side by side, each drawn as a square matrix."""
        assert self.weights is not None
        parts = [self.weights(k, (shape[0], shape[0]), dtype) for k in jax.random.split(key, 3)]
        return jnp.concatenate(parts, axis=1)

    def _heads(self, a: jax.Array) -> jax.Array:
        """[B, L, C] to [B, L, H, D]."""
        return a.reshape(*a.shape[:2], self.heads, a.shape[2] // self.heads)


class _Drop:
    """Multiplies by the mask of a name, if there is one."""

    def __init__(self, masks: dict[str, jax.Array] | None) -> None:
        self.masks = masks or {}

    def __call__(self, name: str, a: jax.Array) -> jax.Array:
        return a * self.masks[name] if name in self.masks else a


def check_cell(cell: Any) -> None:
    """Refuses settings of a cell that do not fit each other.

    Args:
      cell: anything with the attributes of `TransformerCell`.

    Raises:
      ValueError: as `TransformerCell` says.

    Example:
      >>> check_cell(TransformerCell(features=8, heads=2, hidden=16))
    """
    if cell.heads < 1 or cell.features < 1 or cell.features % cell.heads or cell.features % 2:
        raise ValueError(
            f"features must be even and divide by the heads, got features={cell.features} and "
            f"heads={cell.heads}"
        )
    if cell.hidden < 1:
        raise ValueError(f"hidden must be at least 1, got {cell.hidden}")
    if cell.hidden_parts < 1 or cell.hidden % cell.hidden_parts:
        raise ValueError(f"hidden_parts must divide hidden={cell.hidden}, got {cell.hidden_parts}")
    if cell.window is not None and cell.window < 1:
        raise ValueError(f"window must be at least 1, or None, got {cell.window}")
    for name in ("dropout", "attention_dropout"):
        if not 0 <= getattr(cell, name) < 1:
            raise ValueError(f"{name} must be in [0, 1), got {getattr(cell, name)}")
