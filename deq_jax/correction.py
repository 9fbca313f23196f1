"""Losses on the way to the fixed point."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def correction(losses: Sequence[jax.Array], decay: float = 0.8) -> jax.Array:
    """Weights losses of sampled iterates and of the solution: the fixed-point correction.

    The sum of decay^(n - i) loss_i for i = 1 ... n: the last loss, that of the solution, has the
    weight 1, and the ones before it less and less.

    Args:
      losses: scalars, in the order of the steps.
      decay: the factor of one place, 0 to 1.

    Returns:
      The sum, a scalar.

    Raises:
      ValueError: for no loss, or a ``decay`` out of range.

    Example:
      >>> import jax.numpy as jnp, deq_jax as deq
      >>> f, one = lambda params, z, x: 0.5 * z + x, jnp.ones((1, 1))
      >>> sol = deq.fixed_point(f, None, one, one, solver=deq.Picard(), states=(2, 4))
      >>> losses = [jnp.mean((z - 2) ** 2) for z in (*sol.states, sol.value)]
      >>> float(correction(losses)) < 0.1
      True

      The sliced form starts each part from the value before, and each has its own gradient:

      >>> z, losses = one, []
      >>> for steps in (2, 2, 4):
      ...     sol = deq.fixed_point(f, None, z, one, solver=deq.Picard(), max_steps=steps)
      ...     z = sol.value
      ...     losses.append(jnp.mean((z - 2) ** 2))
      >>> bool(losses[0] > losses[1] > losses[2])
      True

    Reference:
      Bai et al., Deep Equilibrium Optical Flow Estimation (2022), equation (9).
    """
    if not losses or not 0 <= decay <= 1:
        raise ValueError(
            f"got {len(losses)} losses and decay={decay!r}; wanted at least one, and 0 to 1"
        )
    weights = [decay**n for n in reversed(range(len(losses)))]
    return jnp.sum(jnp.stack([w * loss for w, loss in zip(weights, losses, strict=True)]))
