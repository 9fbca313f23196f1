"""Batched trees as matrices: the only place where states are flattened.

Shape letters used in every trailing shape comment of this package:

* ``B``: batch, the leading axis of every leaf;
* ``D``: elements of one sample's state, all leaves together;
* ``m``: rows of a solver's history.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

PyTree = Any

# Accelerators multiply float32 matrices in TF32 or bfloat16 unless told otherwise, too coarse for
# a residual that is compared with a tolerance and for a Gram matrix that is nearly singular.
EXACT = lax.Precision.HIGHEST


def describe(tree: PyTree) -> str:
    """Returns ``tree`` with its leaves replaced by ``dtype[shape]``, for error messages.

    Args:
      tree: any tree of arrays.

    Returns:
      A short text such as ``{'a': float32[2,3]}``.
    """

    def leaf(a: Any) -> str:
        return f"{jnp.result_type(a).name}[{','.join(map(str, jnp.shape(a)))}]"

    return str(jax.tree.map(leaf, tree)).replace("'float", "float").replace("]'", "]")


def batch_size(tree: PyTree) -> int:
    """Returns the common length ``B`` of the leading axis of all leaves.

    Args:
      tree: tree of arrays ``[B, ...]``.

    Returns:
      ``B``.

    Raises:
      ValueError: when there is no leaf, a leaf has no axis, or the leading axes disagree.
    """
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]
    if not shapes or any(not shape for shape in shapes) or len({s[0] for s in shapes}) > 1:
        raise ValueError(
            f"got a state {describe(tree)}; wanted at least one array, all with the same leading "
            "batch axis; add the axis, or give every leaf the same number of samples"
        )
    return shapes[0][0]


def batch_ravel(tree: PyTree) -> tuple[jax.Array, Callable[[jax.Array], PyTree]]:
    """Flattens a batched tree to one row per sample.

    Args:
      tree: tree of floating-point arrays ``[B, ...]``, B >= 1.  Mixed dtypes are promoted.

    Returns:
      The matrix ``[B, D]`` and the function that turns such a matrix back into a tree of the
      original shapes and dtypes.

    Raises:
      ValueError: for an empty batch, a leaf that is not floating-point, or leading axes that
        disagree.

    Example:
      >>> import jax.numpy as jnp
      >>> flat, unravel = batch_ravel({"a": jnp.ones((2, 3)), "b": jnp.zeros((2, 2, 2))})
      >>> flat.shape
      (2, 7)
    """
    batch = batch_size(tree)
    leaves, treedef = jax.tree.flatten(tree)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    shapes = [leaf.shape for leaf in leaves]
    dtypes = [leaf.dtype for leaf in leaves]
    if batch == 0:
        raise ValueError(
            f"got an empty batch, {describe(tree)}; wanted at least one sample; skip the call"
        )
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        raise ValueError(
            f"got a state {describe(tree)}; wanted floating-point arrays only; cast the state, and "
            "pass integers and keys in x or params"
        )
    sizes = [math.prod(shape[1:]) for shape in shapes]
    common = jnp.result_type(*dtypes)

    def unravel(flat: jax.Array) -> PyTree:
        if len(sizes) == 1:
            return treedef.unflatten([flat.reshape(shapes[0]).astype(dtypes[0])])
        parts, start = [], 0
        for shape, dtype, size in zip(shapes, dtypes, sizes, strict=True):
            part = flat[:, start : start + size]
            parts.append(part.reshape((flat.shape[0], *shape[1:])).astype(dtype))
            start += size
        return treedef.unflatten(parts)

    rows = [leaf.reshape(batch, -1).astype(common) for leaf in leaves]
    return (rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=1)), unravel


def stat_dtype(dtype: Any) -> Any:
    """Returns the dtype in which sums over a state are formed: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def dot(a: PyTree, b: PyTree) -> jax.Array:
    """Per-sample inner product, summed over all leaves.

    Args:
      a: tree of arrays ``[B, ...]``.
      b: tree of the same shapes.

    Returns:
      ``[B]``, float32 or wider.
    """

    def leaf(x: jax.Array, y: jax.Array) -> jax.Array:
        dtype = stat_dtype(jnp.result_type(x, y))
        x, y = x.reshape(x.shape[0], -1), y.reshape(y.shape[0], -1)
        return jnp.einsum("bd,bd->b", x, y, precision=EXACT, preferred_element_type=dtype)

    return sum(jax.tree.leaves(jax.tree.map(leaf, a, b)))  # type: ignore[return-value]


def norm(a: PyTree) -> jax.Array:
    """Per-sample Euclidean norm over all leaves.

    Args:
      a: tree of arrays ``[B, ...]``.

    Returns:
      ``[B]``, float32 or wider.
    """
    return jnp.sqrt(dot(a, a))


def where(mask: jax.Array, a: PyTree, b: PyTree) -> PyTree:
    """Chooses whole samples: those of ``a`` where ``mask`` holds, those of ``b`` elsewhere.

    Args:
      mask: bool ``[B]``.
      a: tree of arrays ``[B, ...]``.
      b: tree of the same shapes.

    Returns:
      A tree like ``a``.
    """

    def leaf(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - 1)), x, y)

    return jax.tree.map(leaf, a, b)
