"""A check that a solve has worked, for code that runs outside of jit."""

from __future__ import annotations

import jax
import numpy as np
from jax.core import Tracer

from deq_jax.solvers import Solution


class ConvergenceError(RuntimeError):
    """Raised by `check` if a solve has failed.

    A RuntimeError, because the arguments of the solve may all be valid: code that catches the
    ValueError of a bad argument does not catch this one.
    """


def check(sol: Solution, *, share: float = 0.0) -> Solution:
    """Returns ``sol`` if samples have converged, and raises if none or too few have.

    Compiled code cannot raise, so `deq_jax.fixed_point` reports failures in ``sol.stats`` only.
    Call this where such a failure is an error.

    Args:
      sol: what `deq_jax.solve`, `deq_jax.fixed_point` or a layer returned.
      share: smallest share of the samples that must have converged, 0 to 1; at least one sample
        must in any case.

    Returns:
      ``sol`` itself, so that calls can be chained.

    Raises:
      ConvergenceError: if no sample has converged, or fewer than ``share``.
      ValueError: if called inside a transformation (jit, grad, vmap), or with a share outside
        [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> f = lambda params, z, x: jnp.cos(z) + x
      >>> x = jnp.zeros((3, 1))
      >>> solver = deq.Anderson(tol=1e-4, max_steps=20)
      >>> sol = check(deq.fixed_point(f, None, x, x, solver=solver), share=1.0)
      >>> round(float(sol.value[0, 0]), 3)
      0.739
    """
    if not 0 <= share <= 1:
        raise ValueError(f"check: got share={share!r}; wanted a number in [0, 1]")
    stats = sol.stats
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(stats)):
        raise ValueError(
            "check: got traced statistics; wanted concrete ones, because compiled code cannot "
            "raise; return the solution from the transformed function (jit, grad, vmap) and check "
            "it outside, or use sol.stats.converged"
        )
    converged, residual, steps = (
        np.asarray(a).ravel() for a in (stats.converged, stats.residual, stats.num_steps)
    )
    if converged.any() and converged.mean() >= share:
        return sol
    count = f"{converged.sum()} of {converged.size} samples converged"
    if share:
        count += f"; wanted at least {share:.0%}"
    if not steps.any():
        raise ConvergenceError(f"{count}: the solve took no step (max_steps=0).")
    if np.isinf(residual).all():
        raise ConvergenceError(
            f"{count}: f(z0) is not finite. Look for values in params, z0 or x that are not "
            "finite, or for an overflow in f."
        )
    raise ConvergenceError(
        f"{count}: the residual is {residual.min():.2g} at best and {np.median(residual):.2g} in "
        f"the median, after {np.median(steps):g} steps (median). Call deq.diagnose(f, params, z0, "
        "x, key=key) to see why, or try more steps (max_steps), another solver or a larger tol."
    )
