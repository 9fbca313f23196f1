"""Dropout masks, drawn once per solve, and the optional methods of a cell.

`MaskedCell` and `InjectingCell` are the two optional methods that `deq_jax.linen.DEQ` and
`deq_jax.nnx.DEQ` look for.  A cell may have none, one or both; it inherits from nothing here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp


class MaskedCell(Protocol):
    """A Linen or NNX cell with a method ``masks``.

    The layer calls ``masks`` once per solve in training (Linen: ``train=True``, NNX: ``key=...``)
    and ``cell(z, x, masks)`` at every step.  Otherwise ``masks`` is None.

    The layer looks for a method of the cell's class.  A field or a submodule named ``masks`` has no
    such meaning.

    Example:
      >>> import jax, jax.numpy as jnp, deq_jax as deq
      >>> from flax import linen as nn
      >>> class Cell(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, z, x, masks):
      ...         z = z if masks is None else z * masks
      ...         return jnp.tanh(nn.Dense(4, kernel_init=deq.init.orthogonal(0.5))(z) + x)
      ...     def masks(self, key, z, x):
      ...         return deq.masks.bernoulli(key, z.shape, 0.1)
      >>> layer, x = deq.linen.DEQ(Cell(), solver=deq.Picard(max_steps=50)), jnp.ones((2, 4))
      >>> rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
      >>> sol, _ = layer.init_with_output(rngs, jnp.zeros_like(x), x, train=True)
      >>> sol.stats.converged.tolist()
      [True, True]
    """

    def masks(self, key: jax.Array, z: Any, x: Any) -> Any:
        """Returns the masks of one solve, any tree.

        Args:
          key: PRNG key.
          z: the start, tree of arrays ``[B, ...]``.
          x: the operands that the layer was called with, or None.
        """
        ...

    def __call__(self, z: Any, x: Any, masks: Any) -> Any:
        """Returns a tree like ``z``; ``x`` is None if the layer was called without it."""
        ...


class InjectingCell(Protocol):
    """A Linen or NNX cell with a method ``inject``.

    The layer calls ``inject(x)`` once per solve and ``cell(z, cell.inject(x))`` at every step.  Put
    there whatever does not depend on z.  As with `MaskedCell`, only a method of the class counts.

    Example:
      >>> import jax, jax.numpy as jnp, deq_jax as deq
      >>> from flax import linen as nn
      >>> class Cell(nn.Module):
      ...     def setup(self):
      ...         self.inner = nn.Dense(4, kernel_init=deq.init.orthogonal(0.5))
      ...         self.outer = nn.Dense(4)
      ...     def inject(self, x):
      ...         return self.outer(x)
      ...     def __call__(self, z, injected):
      ...         return jnp.tanh(self.inner(z) + injected)
      >>> layer = deq.linen.DEQ(Cell(), solver=deq.Picard(max_steps=50))
      >>> sol, _ = layer.init_with_output(jax.random.key(0), jnp.zeros((2, 4)), jnp.ones((2, 9)))
      >>> sol.stats.converged.tolist()
      [True, True]
    """

    def inject(self, x: Any) -> Any:
        """Returns what the call takes in place of ``x``, any tree."""
        ...

    def __call__(self, z: Any, injected: Any) -> Any:
        """Returns a tree like ``z``."""
        ...


def has_method(cell: object, name: str) -> bool:
    """Returns whether the class of a cell defines a method; fields and submodules do not count.

    Args:
      cell: a Linen or NNX module.
      name: ``"masks"`` or ``"inject"``.

    Returns:
      True for a method.

    Example:
      >>> has_method("a cell", "inject"), has_method("a cell", "upper")
      (False, True)
    """
    kind = type(cell)
    return name not in getattr(kind, "__dataclass_fields__", ()) and callable(
        getattr(kind, name, None)
    )


def bernoulli(
    key: jax.Array,
    shape: Sequence[int],
    rate: float,
    *,
    share_axes: Sequence[int] = (),
    dtype: Any = jnp.float32,
) -> jax.Array:
    """Draws a dropout mask that leaves the mean of what it multiplies unchanged.

    mask = b / (1 - rate), with b = 0 with probability ``rate`` and 1 otherwise.

    Draw the mask before the solve and pass it to f in ``params`` or ``x``: a fixed point exists
    only if f is the same function at every step.

    Args:
      key: a PRNG key.
      shape: shape of the array to be masked, batch axis included.
      rate: probability of dropping an element, in [0, 1).
      share_axes: axes along which all elements share one value; they have size 1 in the result.
        ``(1, 2)`` drops whole channels of ``[B, H, W, C]``; ``(1,)`` repeats one mask at all
        positions of ``[B, T, D]``.
      dtype: floating-point dtype of the mask.

    Returns:
      An array of the rank of ``shape`` that broadcasts against it.

    Raises:
      ValueError: if the rate is outside [0, 1), the dtype is not floating-point, or ``shape`` lacks
        a shared axis.

    Example:
      >>> import jax
      >>> bernoulli(jax.random.key(0), (2, 8, 8, 3), 0.25, share_axes=(1, 2)).shape
      (2, 1, 1, 3)

    Reference: Gal and Ghahramani, arXiv 1512.05287; Bai, Kolter and Koltun, arXiv 1909.01377,
    appendix (one mask per solve).
    """
    if not 0 <= rate < 1:
        raise ValueError(
            f"got rate={rate!r}; wanted the probability of dropping an element, 0 <= rate < 1"
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"got dtype={dtype}; wanted a floating-point dtype, that of the state")
    rank = len(shape)
    for axis in share_axes:
        if not -rank <= axis < rank:
            raise ValueError(
                f"got share_axes={tuple(share_axes)} for shape {tuple(shape)}; wanted axes from "
                f"{-rank} to {rank - 1}"
            )
    shared = {axis % rank for axis in share_axes}
    drawn = tuple(1 if axis in shared else size for axis, size in enumerate(shape))
    if rate == 0:
        return jnp.ones(drawn, dtype)
    kept = jax.random.bernoulli(key, 1 - rate, drawn)
    return jnp.where(kept, 1 / (1 - rate), 0.0).astype(dtype)
