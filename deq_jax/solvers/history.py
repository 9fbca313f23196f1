"""A solver's memory: the last m vectors of every sample, read and written in place.

Passes over the history decide what a step of Anderson or Broyden costs, so the layout was chosen by
measuring: ``[B, m, D]``, where both the inner products with a vector and the combination of rows
are batched matrix-vector products.  A large history is split into blocks of rows, and blocks that
hold no row yet are not read.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax.tree import EXACT, stat_dtype

# Below this size (bytes) one block is read faster than a branch is taken.
_SPLIT_BYTES = 16 * 2**20
_BLOCK_ROWS = 5

History = tuple[jax.Array, ...]  # blocks [B, rows, D]


def empty(z: jax.Array, rows: int) -> History:
    """Returns a history of ``rows`` zero vectors for states like ``z [B, D]``."""
    split = rows * z.size * z.dtype.itemsize > _SPLIT_BYTES
    size = _BLOCK_ROWS if split else rows
    counts = [min(size, rows - start) for start in range(0, rows, size)]
    zero = jnp.zeros_like(z)[:, None]
    return tuple(jnp.broadcast_to(zero, (z.shape[0], n, z.shape[1])) for n in counts)


def write(history: History, slot: jax.Array, v: jax.Array) -> History:
    """Returns the history with row ``slot`` replaced by ``v [B, D]``."""

    def put(block: jax.Array, v: jax.Array, row: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(block, v[:, None], row, axis=1)

    if len(history) == 1:
        return (put(history[0], v, slot),)
    blocks, start = [], 0
    for block in history:
        stop = start + block.shape[1]
        here = (start <= slot) & (slot < stop)
        blocks.append(lax.cond(here, put, lambda block, v, row: block, block, v, slot - start))
        start = stop
    return tuple(blocks)


def inner(history: History, v: jax.Array, filled: jax.Array) -> jax.Array:
    """Inner products of the rows with ``v [B, D]``; rows >= ``filled`` may read as zero.

    Args:
      history: the rows.
      v: one vector per sample.
      filled: integer scalar, number of rows written so far.

    Returns:
      ``[B, m]``, float32 or wider.
    """
    dtype = stat_dtype(v.dtype)

    def read(block: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.einsum("bmd,bd->bm", block, v, precision=EXACT, preferred_element_type=dtype)

    if len(history) == 1:
        return read(history[0], v)

    def skip(block: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.zeros_like(block[:, :, 0], dtype=dtype)

    parts, start = [], 0
    for block in history:
        parts.append(lax.cond(start < filled, read, skip, block, v))
        start += block.shape[1]
    return jnp.concatenate(parts, axis=1)


def combine(history: History, c: jax.Array, filled: jax.Array) -> jax.Array:
    """Sum of the rows weighted by ``c [B, m]``, which must be zero from ``filled`` on.

    Args:
      history: the rows.
      c: one weight per row and sample.
      filled: integer scalar, number of rows written so far.

    Returns:
      ``[B, D]`` in the dtype of the history.
    """
    dtype, wide = history[0].dtype, c.dtype

    def read(block: jax.Array, c: jax.Array) -> jax.Array:
        if dtype == wide:
            return jnp.einsum("bm,bmd->bd", c, block, precision=EXACT)
        # Rounded to bfloat16, weights of size 10 no longer sum to one: use two such numbers each.
        high = c.astype(dtype)
        both = jnp.stack([high, (c - high.astype(wide)).astype(dtype)], axis=1)  # [B, 2, m]
        out = jnp.einsum("bsm,bmd->bsd", both, block, precision=EXACT, preferred_element_type=wide)
        return out.sum(axis=1).astype(dtype)

    rows = history[0].shape[1]
    total, start = read(history[0], c[:, :rows]), rows
    for block in history[1:]:
        stop = start + block.shape[1]
        total = lax.cond(
            start < filled,
            lambda total, block, c: total + read(block, c),
            lambda total, block, c: total,
            total,
            block,
            c[:, start:stop],
        )
        start = stop
    return total
