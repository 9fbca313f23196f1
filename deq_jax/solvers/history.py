"""A solver's memory: the last m states of every sample, read and written in place.

Passes over the history decide what a step of Anderson or Broyden costs.  The layout was chosen by
measuring: ``[B, m, ...]`` for every leaf, where the inner products with a state and the combination
of rows are batched matrix-vector products.  A batch of one is stored without its batch axis, which
XLA would remove by copying the whole history in every step.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax import tree
from deq_jax.tree import EXACT, PyTree

# A CPU reads a history larger than this (bytes) in blocks, and skips blocks that hold no row yet.
_SPLIT_BYTES = 16 * 2**20
_BLOCK_ROWS = 5


@functools.partial(jax.tree_util.register_dataclass, data_fields=["blocks"], meta_fields=["axis"])
@dataclasses.dataclass(frozen=True)
class History:
    """Rows of states.

    Attributes:
      blocks: trees of arrays ``[B, rows, ...]``, or ``[rows, ...]`` for a batch of one.  There is
        one block, or several after `split`.
      axis: where the rows are, 1 or 0.
    """

    blocks: tuple[PyTree, ...]
    axis: int

    @property
    def counts(self) -> list[int]:
        """Rows of every block."""
        return [jax.tree.leaves(block)[0].shape[self.axis] for block in self.blocks]

    def write(self, slot: jax.Array, v: PyTree) -> History:
        """Returns the history with row ``slot`` replaced by ``v``, a tree ``[B, ...]``."""
        new = jax.tree.map(lambda leaf: leaf[:, None], v) if self.axis else v

        def put(block: PyTree, row: jax.Array) -> PyTree:
            write = functools.partial(lax.dynamic_update_slice_in_dim, axis=self.axis)
            return jax.tree.map(lambda h, leaf: write(h, leaf, row), block, new)

        if len(self.blocks) == 1:
            return self._with(put(self.blocks[0], slot))
        blocks, start = [], 0
        for block, count in zip(self.blocks, self.counts, strict=True):
            here = (start <= slot) & (slot < start + count)
            blocks.append(lax.cond(here, put, lambda block, row: block, block, slot - start))
            start += count
        return self._with(*blocks)

    def inner(self, v: PyTree, filled: jax.Array) -> jax.Array:
        """Inner products of the rows with a state.

        Args:
          v: tree ``[B, ...]``.
          filled: integer scalar, number of rows written so far; later rows may read as zero.

        Returns:
          ``[B, m]``, float32 or wider.
        """
        wide = tree.widest(v)

        def leaf(h: jax.Array, v: jax.Array) -> jax.Array:
            return tree.contract(h, v, batched=self.axis == 1).astype(wide)

        def read(block: PyTree) -> jax.Array:
            products = jax.tree.leaves(jax.tree.map(leaf, block, v))
            total = functools.reduce(operator.add, products)
            return total if self.axis else total.T  # [m, 1] for a batch of one

        if len(self.blocks) == 1:
            return read(self.blocks[0])
        parts, start, zero = [], 0, tree.column(v, wide)[:, None]
        for block, count in zip(self.blocks, self.counts, strict=True):
            nothing = jnp.broadcast_to(zero, (zero.shape[0], count))
            parts.append(lax.cond(start < filled, read, lambda _, n=nothing: n, block))
            start += count
        return jnp.concatenate(parts, axis=1)

    def combine(self, c: jax.Array, filled: jax.Array) -> PyTree:
        """Sum of the rows, weighted.

        Args:
          c: ``[B, m]``, one weight per row and sample, zero from row ``filled`` on.
          filled: integer scalar, number of rows written so far.

        Returns:
          Tree ``[B, ...]`` in the `stat_dtype` of every leaf.
        """
        batch = ((0,), (0,)) if self.axis else ((), ())

        def leaf(h: jax.Array, c: jax.Array) -> jax.Array:
            dtype = tree.stat_dtype(h.dtype)  # weights rounded to bfloat16 would not sum to one
            axes = ((1,), (self.axis,))
            return lax.dot_general(c.astype(dtype), h.astype(dtype), (axes, batch), EXACT)

        def read(block: PyTree, c: jax.Array) -> PyTree:
            return jax.tree.map(lambda h: leaf(h, c), block)

        total, start = read(self.blocks[0], c[:, : self.counts[0]]), self.counts[0]
        for block, count in zip(self.blocks[1:], self.counts[1:], strict=True):
            total = lax.cond(
                start < filled,
                lambda total, block, c: jax.tree.map(jnp.add, total, read(block, c)),
                lambda total, block, c: total,
                total,
                block,
                c[:, start : start + count],
            )
            start += count
        return total

    def _with(self, *blocks: PyTree) -> History:
        return dataclasses.replace(self, blocks=blocks)


def empty(z: PyTree, rows: int) -> History:
    """Returns a history of ``rows`` zero states.

    Args:
      z: tree of arrays ``[B, ...]``.
      rows: m.

    Returns:
      A history in one block.
    """
    axis = 0 if tree.batch_size(z) == 1 else 1

    def leaf(a: jax.Array) -> jax.Array:
        zero = tree.zeros_like(a if axis == 0 else a[:, None])
        shape = (*zero.shape[:axis], rows, *zero.shape[axis + 1 :])
        return jnp.broadcast_to(zero, shape)

    return History((jax.tree.map(leaf, z),), axis)


def gram(z: PyTree, rows: int) -> jax.Array:
    """Returns zeros ``[B, rows, rows]`` in float32 or wider, for inner products of rows.

    Args:
      z: tree of arrays ``[B, ...]``.
      rows: m.

    Returns:
      Zeros that are sharded as the batch is.
    """
    zero = tree.column(z, tree.widest(z))
    return jnp.broadcast_to(zero[:, None, None], (zero.shape[0], rows, rows))


def is_large(state: Any) -> bool:
    """Tells whether a solver's state has a history that a CPU reads faster in blocks.

    Args:
      state: from a solver's ``init``.

    Returns:
      False also for shapes that are only known as symbols.
    """
    return any(isinstance(node, History) and _is_large(node) for node in _nodes(state))


def split(state: Any) -> Any:
    """Cuts the large histories of a solver's state into blocks of rows.

    Args:
      state: from a solver's ``init``.

    Returns:
      The same state; it reads only those blocks that have rows.
    """

    def cut(node: Any) -> Any:
        if not (isinstance(node, History) and _is_large(node)):
            return node
        (whole,), (rows,), axis = node.blocks, node.counts, node.axis

        def block(start: int) -> PyTree:
            stop = min(start + _BLOCK_ROWS, rows)
            return jax.tree.map(lambda h: lax.slice_in_dim(h, start, stop, axis=axis), whole)

        return History(tuple(block(start) for start in range(0, rows, _BLOCK_ROWS)), axis)

    return jax.tree.map(cut, state, is_leaf=lambda node: isinstance(node, History))


def _nodes(state: Any) -> list[Any]:
    return jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, History))


def _is_large(history: History) -> bool:
    leaves = jax.tree.leaves(history)
    known = all(isinstance(length, int) for leaf in leaves for length in leaf.shape)
    return known and sum(leaf.nbytes for leaf in leaves) > _SPLIT_BYTES
