"""Trees of arrays with a common batch axis.

Shape letters used in every trailing shape comment of this package:

* ``B``: batch, the leading axis of every leaf;
* ``D``: elements of one sample's state, all leaves together;
* ``m``: rows of a solver's history;
* ``...``: the other axes of a leaf, which are never reshaped, so that their sharding is kept.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

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
        a = a if hasattr(a, "dtype") else jnp.asarray(a)
        return f"{a.dtype.name}[{','.join(map(str, a.shape))}]"

    return str(jax.tree.map(leaf, tree)).replace("'float", "float").replace("]'", "]")


def batch_size(tree: PyTree) -> int:
    """Returns the common length ``B`` of the leading axis of all leaves.

    Args:
      tree: tree of arrays ``[B, ...]``.

    Returns:
      ``B``.

    Raises:
      ValueError: if there is no leaf, a leaf has no axis, or the leading axes disagree.
    """
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]
    if not shapes or any(not shape for shape in shapes) or len({s[0] for s in shapes}) > 1:
        raise ValueError(
            f"got a state {describe(tree)}; wanted at least one array, all with the same leading "
            "batch axis; add the axis, give every leaf the same number of samples, or pass "
            "batched=False for a single sample without the axis"
        )
    return shapes[0][0]


def as_state(tree: PyTree) -> PyTree:
    """Returns a batched state with its leaves as JAX arrays.

    Args:
      tree: tree of floating-point arrays ``[B, ...]``, B >= 1; dtypes may differ.

    Returns:
      The same tree of `jax.Array`.

    Raises:
      ValueError: for an empty batch, a leaf that is not floating-point, or leading axes that
        disagree.
    """
    batch = batch_size(tree)
    if batch == 0:
        raise ValueError(
            f"got an empty batch, {describe(tree)}; wanted at least one sample; skip the call"
        )
    state = jax.tree.map(jnp.asarray, tree)
    if not all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(state)):
        raise ValueError(
            f"got a state {describe(tree)}; wanted real floating-point arrays only; cast the state "
            "(split complex numbers into real and imaginary part), and pass integers and keys in x "
            "or params"
        )
    return state


def batch_ravel(tree: PyTree) -> tuple[jax.Array, Callable[[jax.Array], PyTree]]:
    """Flattens a batched tree to one row per sample.

    Solvers work on trees; this is for diagnostics that want vectors.

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
    leaves, treedef = jax.tree.flatten(as_state(tree))
    sizes = [math.prod(leaf.shape[1:]) for leaf in leaves]
    common = functools.reduce(jnp.promote_types, [leaf.dtype for leaf in leaves])

    def unravel(flat: jax.Array) -> PyTree:
        parts, start = [], 0
        for leaf, size in zip(leaves, sizes, strict=True):
            part = flat[:, start : start + size]
            parts.append(part.reshape((flat.shape[0], *leaf.shape[1:])).astype(leaf.dtype))
            start += size
        return treedef.unflatten(parts)

    rows = [
        leaf.reshape(leaf.shape[0], size).astype(common)
        for leaf, size in zip(leaves, sizes, strict=True)
    ]
    return (rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=1)), unravel


def stat_dtype(dtype: Any) -> Any:
    """Returns the dtype in which sums over a state are formed: float32, or float64 for float64."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def widest(tree: PyTree) -> Any:
    """Returns the `stat_dtype` of all leaves together.

    Args:
      tree: tree of arrays.

    Returns:
      float32, or float64 if a leaf is float64.
    """
    double = any(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(tree))
    return jnp.dtype(jnp.float64 if double else jnp.float32)


def zeros_like(a: jax.Array, dtype: Any = None) -> jax.Array:
    """Zeros that are sharded, and vary over mesh axes, as an array does.

    `jnp.zeros_like` forgets the sharding of explicit axes under a jit without `jax.set_mesh`.  The
    array is read: of constant zeros XLA holds a solver's history twice (`tests/test_cost.py`).

    Args:
      a: any array.
      dtype: of the zeros, that of ``a`` if None.

    Returns:
      An array of the same shape.
    """
    return (a < a).astype(a.dtype if dtype is None else dtype)


def column(tree: PyTree, dtype: Any = jnp.float32) -> jax.Array:
    """Zeros ``[B]`` that are sharded, and vary over mesh axes, as the batch axis of a tree does.

    Args:
      tree: tree of arrays ``[B, ...]``.
      dtype: of the zeros.

    Returns:
      ``[B]``.
    """
    leaf = jax.tree.leaves(tree)[0]
    split = jax.typeof(leaf).sharding.spec
    # One number a sample will do: XLA would fold a sum over a large constant when it compiles.  Of
    # an axis that is split all numbers are taken: to pick one would be communication.
    one = tuple(slice(None) if split[axis] else slice(1) for axis in range(1, leaf.ndim))
    few = leaf[:, *one]
    return jnp.any(few < few, axis=tuple(range(1, leaf.ndim))).astype(dtype)


def match(tree: PyTree, types: PyTree) -> PyTree:
    """Gives arrays the explicit sharding and the varying mesh axes of others.

    A start of zeros often has neither, while its image under f has both.

    Args:
      tree: tree of arrays.
      types: tree of the same structure, of anything that `jax.typeof` returns.

    Returns:
      The same numbers.
    """

    def leaf(a: jax.Array, wanted: Any) -> jax.Array:
        have = jax.typeof(a)
        if wanted.sharding != have.sharding and any(part for part in wanted.sharding.spec):
            a = jax.sharding.reshard(a, wanted.sharding)
        missing = tuple(sorted(_varying(wanted) - _varying(have)))
        return lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(leaf, tree, types)


def vary(tree: PyTree, like: PyTree) -> PyTree:
    """Lets arrays vary over the mesh axes that a state varies over inside `jax.shard_map`.

    Where a loop is differentiated that devices leave at different steps, its operands are varied
    before it: then autodiff sums their gradients over the devices once, outside of the loop.

    Args:
      tree: tree of arrays.
      like: the state, tree of arrays.

    Returns:
      The same numbers.
    """
    axes = frozenset[str]().union(*(_varying(jax.typeof(leaf)) for leaf in jax.tree.leaves(like)))

    def leaf(a: Any) -> Any:
        missing = tuple(sorted(axes - _varying(jax.typeof(a))))
        return lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(leaf, tree)


class Floats:
    """The floating-point leaves of a tree, which are what has gradients.

    Args:
      tree: tree of arrays.

    Example:
      >>> part = Floats({"count": jnp.int32(3), "weight": jnp.float32(2)})
      >>> part.fill([a + 1 for a in part.values])["weight"].item()
      3.0
    """

    def __init__(self, tree: PyTree) -> None:
        self._leaves, self._treedef = jax.tree.flatten(tree)
        self._trained = [jnp.issubdtype(jnp.result_type(a), jnp.inexact) for a in self._leaves]

    @property
    def values(self) -> list[jax.Array]:
        """The leaves."""
        return [a for a, t in zip(self._leaves, self._trained, strict=True) if t]

    def fill(self, values: list[jax.Array]) -> PyTree:
        """Returns the tree with other floating-point leaves."""
        given = iter(values)
        pairs = zip(self._leaves, self._trained, strict=True)
        return self._treedef.unflatten([next(given) if t else a for a, t in pairs])

    def cotangents(self, values: list[jax.Array]) -> PyTree:
        """Returns the same with None for all other leaves, as `jax.custom_vjp` wants it."""
        given = iter(values)
        return self._treedef.unflatten([next(given) if t else None for t in self._trained])


def without_keys(tree: PyTree) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """Replaces PRNG keys by their data: JAX 0.10 takes none in a differentiated `lax.cond`.

    Args:
      tree: tree of arrays.

    Returns:
      The tree with arrays of integers for keys, and the function that restores the keys.
    """

    def implementation(leaf: Any) -> Any:
        is_key = jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
        return jax.random.key_impl(leaf) if is_key else None

    leaves, treedef = jax.tree.flatten(tree)
    kinds = [implementation(leaf) for leaf in leaves]
    data = [
        leaf if kind is None else jax.random.key_data(leaf)
        for leaf, kind in zip(leaves, kinds, strict=True)
    ]

    def restore(tree: PyTree) -> PyTree:
        pairs = zip(jax.tree.leaves(tree), kinds, strict=True)
        return treedef.unflatten(
            [a if kind is None else jax.random.wrap_key_data(a, impl=kind) for a, kind in pairs]
        )

    return treedef.unflatten(data), restore


def _varying(type_of_array: Any) -> frozenset[str]:
    """Mesh axes that an array varies over inside `jax.shard_map`."""
    return getattr(getattr(type_of_array, "mat", None), "varying", frozenset())


def contract(a: jax.Array, b: jax.Array, *, batched: bool = True) -> jax.Array:
    """Sums a product over the trailing axes, those of ``b`` but for its first.

    Args:
      a: ``[B, ...]`` or ``[B, m, ...]``; ``[m, ...]`` if not batched.
      b: ``[B, ...]``.
      batched: whether the first axes are the same, or an axis of the result each.

    Returns:
      ``[B]`` or ``[B, m]``; ``[m, B]`` if not batched; in the `stat_dtype` of ``a``.
    """
    first = a.ndim - b.ndim + 1
    axes = (tuple(range(first, a.ndim)), tuple(range(1, b.ndim)))
    sharding, out = jax.typeof(b).sharding, None
    if any(part is not None for part in sharding.spec[1:]):
        # Explicit axes: the sum over a sharded axis has to name the sharding of its result.
        lead = (sharding.spec[0],) if batched else (None,)
        out = NamedSharding(sharding.mesh, PartitionSpec(*lead, *(None,) * (first - batched)))
    return lax.dot_general(
        a,
        b,
        (axes, ((0,), (0,)) if batched else ((), ())),
        precision=EXACT,
        preferred_element_type=stat_dtype(a.dtype),
        out_sharding=out,
    )


def dot(a: PyTree, b: PyTree) -> jax.Array:
    """Per-sample inner product, summed over all leaves.

    Args:
      a: tree of arrays ``[B, ...]``.
      b: tree of the same shapes and dtypes.

    Returns:
      ``[B]``, float32 or wider.
    """
    wide = widest(a)

    def leaf(x: jax.Array, y: jax.Array) -> jax.Array:
        return contract(x, y).astype(wide)

    return functools.reduce(operator.add, jax.tree.leaves(jax.tree.map(leaf, a, b)))


def norm(a: PyTree) -> jax.Array:
    """Per-sample Euclidean norm over all leaves.

    Args:
      a: tree of arrays ``[B, ...]``.

    Returns:
      ``[B]``, float32 or wider.
    """
    return jnp.sqrt(dot(a, a))


def spread(c: jax.Array, like: jax.Array) -> jax.Array:
    """Appends axes of length one to ``c [B]``, so that it broadcasts against ``like [B, ...]``."""
    return lax.expand_dims(c, range(1, like.ndim))


def where(mask: jax.Array, a: PyTree, b: PyTree) -> PyTree:
    """Chooses whole samples: those of ``a`` where ``mask`` holds, those of ``b`` elsewhere.

    Args:
      mask: bool ``[B]``.
      a: tree of arrays ``[B, ...]``.
      b: tree of the same shapes.

    Returns:
      A tree like ``a``.
    """
    return jax.tree.map(lambda x, y: jnp.where(spread(mask, x), x, y), a, b)
