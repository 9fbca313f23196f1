"""Cross-entropy over a large vocabulary without the matrix of all its scores."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from deq_jax.tree import stat_dtype

CHUNK = 2**24
"""Scores computed at once: 64 MiB in float32."""


def linear_nll(
    hidden: jax.Array,
    table: jax.Array,
    bias: jax.Array,
    labels: jax.Array,
    start: int | jax.Array = 0,
    stop: int | jax.Array | None = None,
    *,
    chunk: int | None = None,
) -> jax.Array:
    """Negative log-likelihood of labels under softmax(table hidden + bias), a few rows at a time.

    Never holds more than ``chunk`` rows of scores, and does no work for rows outside of
    ``start:stop``.  The backward pass computes the scores once more.

    Args:
      hidden: float [N, D].
      table: float [V, D].
      bias: float [V].
      labels: int [N], in [0, V) within ``start:stop``, anything elsewhere.
      start: first row wanted; it may be traced.
      stop: row after the last one wanted; None for N.
      chunk: rows at once; None for as many as ``CHUNK`` allows.

    Returns:
      float32 (float64 of float64) [N]; 0 for rows outside of ``start:stop``.  Differentiable once,
      in reverse; hidden, table and bias may have different dtypes, which their gradients keep.

    Raises:
      ValueError: for shapes that do not fit each other, or a chunk below 1.

    Example:
      >>> hidden, table = jnp.zeros((3, 2)), jnp.ones((4, 2))
      >>> nll = linear_nll(hidden, table, jnp.zeros(4), jnp.array([0, 1, 2]))
      >>> [round(x, 4) for x in nll.tolist()]  # log 4
      [1.3863, 1.3863, 1.3863]
    """
    rows, words = hidden.shape[0], table.shape[0]
    if table.shape[1] != hidden.shape[1] or bias.shape != (words,) or labels.shape != (rows,):
        raise ValueError(
            f"got hidden {hidden.shape}, table {table.shape}, bias {bias.shape}, labels "
            f"{labels.shape}; wanted [N, D], [V, D], [V], [N]"
        )
    chunk = max(CHUNK // words, 1) if chunk is None else chunk
    if chunk < 1:
        raise ValueError(f"got chunk={chunk}; wanted at least 1")
    if rows <= chunk and stop is None and isinstance(start, int) and start == 0:
        return _rows_nll(hidden, table, bias, labels)[0]
    ends = jnp.asarray(start), jnp.asarray(rows if stop is None else stop)
    return _chunked_nll(min(chunk, rows), hidden, table, bias, labels, *ends)


def scores(hidden: jax.Array, table: jax.Array, bias: jax.Array) -> jax.Array:
    """Scores of words.

    Args:
      hidden: float [..., D].
      table: float [V, D].
      bias: float [V].

    Returns:
      table hidden + bias, [..., V], summed and kept in float32 or wider.  The product is taken in
      the wider of the dtypes of hidden and table.

    Example:
      >>> scores(jnp.ones((1, 2)), jnp.ones((3, 2)), jnp.zeros(3)).tolist()
      [[2.0, 2.0, 2.0]]
    """
    common, wide = _dtypes(hidden, table)
    product = jnp.matmul(hidden.astype(common), table.T.astype(common), preferred_element_type=wide)
    return product + jnp.expand_dims(bias.astype(wide), tuple(range(hidden.ndim - 1)))


def _dtypes(hidden: jax.Array, table: jax.Array) -> tuple[Any, Any]:
    """Dtypes of factors and of sums."""
    common = jnp.promote_types(hidden.dtype, table.dtype)
    return common, stat_dtype(common)


def _rows_nll(
    hidden: jax.Array, table: jax.Array, bias: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the negative log-likelihoods and log-normalisers, [N] both."""
    values = scores(hidden, table, bias)
    total = jax.nn.logsumexp(values, axis=-1)
    # A label of a row that is not wanted may be anything.
    labels = jnp.clip(labels, 0, table.shape[0] - 1)
    return total - jnp.take_along_axis(values, labels[:, None], axis=-1)[:, 0], total


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_nll(chunk, hidden, table, bias, labels, start, stop):  # noqa: ANN001
    return _chunked_fwd(chunk, hidden, table, bias, labels, start, stop)[0]


def _chunked_fwd(
    chunk: int, hidden: Any, table: Any, bias: Any, labels: Any, start: Any, stop: Any
):
    rows = hidden.shape[0]
    # The last chunk may stand out: slices that do would be moved back inside.
    padded, places = _pad(chunk, hidden), _pad(chunk, labels)
    zeros = jnp.zeros_like(padded[:, 0], dtype=_dtypes(hidden, table)[1])

    def body(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        begin = start + i * chunk
        part, label = (_slice(a, begin, chunk) for a in (padded, places))
        nll, total = _rows_nll(part, table, bias, label)
        nll = jnp.where(_inside(begin, chunk, stop), nll, 0)
        return _put(carry[0], nll, begin), _put(carry[1], total, begin)

    nll, total = jax.lax.fori_loop(0, -(-(stop - start) // chunk), body, (zeros, zeros))
    return nll[:rows], (hidden, table, bias, labels, start, stop, total)


def _chunked_bwd(chunk: int, saved: Any, cotangent: jax.Array):
    hidden, table, bias, labels, start, stop, total = saved
    rows, words = hidden.shape[0], table.shape[0]
    common, wide = _dtypes(hidden, table)
    factor = table.astype(common)
    padded, places, weights = (_pad(chunk, a) for a in (hidden, labels, cotangent))

    def body(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        d_hidden, d_table, d_bias = carry
        begin = start + i * chunk
        part, label, weight, log_sum = (
            _slice(a, begin, chunk) for a in (padded, places, weights, total)
        )
        weight = jnp.where(_inside(begin, chunk, stop), weight, 0)
        shares = jnp.exp(scores(part, table, bias) - log_sum[:, None])  # [chunk, V]
        hit = jnp.clip(label, 0, words - 1)[:, None] == jnp.arange(words)[None]
        d_scores = (shares - hit) * weight[:, None]
        d_bias = d_bias + d_scores.sum(axis=0)
        d_scores = d_scores.astype(common)
        d_hidden = _put(d_hidden, d_scores @ factor, begin)
        own = jnp.matmul(d_scores.T, part.astype(common), preferred_element_type=wide)
        return d_hidden, d_table + own, d_bias

    # Sums over many chunks: in float32 or wider.
    zeros = (
        jnp.zeros_like(padded),
        jnp.zeros_like(table, dtype=wide),
        jnp.zeros_like(bias, dtype=wide),
    )
    trips = -(-(stop - start) // chunk)
    d_hidden, d_table, d_bias = jax.lax.fori_loop(0, trips, body, zeros)
    return d_hidden[:rows], d_table.astype(table.dtype), d_bias.astype(bias.dtype), None, None, None


_chunked_nll.defvjp(_chunked_fwd, _chunked_bwd)


def _pad(chunk: int, a: jax.Array) -> jax.Array:
    return jnp.concatenate([a, jnp.zeros_like(a, shape=(chunk, *a.shape[1:]))])


def _slice(a: jax.Array, begin: jax.Array, chunk: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(a, begin, chunk)


def _put(a: jax.Array, part: jax.Array, begin: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(a, part.astype(a.dtype), begin, axis=0)


def _inside(begin: jax.Array, chunk: int, stop: jax.Array) -> jax.Array:
    return begin + jnp.arange(chunk) < stop
