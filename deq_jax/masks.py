"""Variational-dropout masks, drawn once per solve and passed to f as an operand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


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

    An equilibrium exists only if f is the same function at every step of a solve, so the mask must
    be drawn before the solve and enter f in ``params`` or ``x``.

    Args:
      key: a PRNG key.
      shape: shape of the array to be masked, batch axis included.
      rate: probability of dropping an element, in [0, 1).
      share_axes: axes along which one value is shared; they have size 1 in the result, e.g. ``(1,
        2)`` to drop whole channels of ``[B, H, W, C]``, or ``(1,)`` for one mask at all positions
        of ``[B, T, D]``.
      dtype: floating-point dtype of the mask.

    Returns:
      An array of the rank of ``shape`` that broadcasts against it.

    Raises:
      ValueError: for a rate outside [0, 1), or a shared axis that ``shape`` does not have.

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
