"""f in bfloat16, everything around it in float32."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from deq_jax.adjoints import Map
from deq_jax.solvers import Equation, Solution
from deq_jax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class InBfloat16:
    """f(params, z, x) computed in bfloat16 for a state, parameters and operands in float32.

    Attributes:
      f: the map; float32 in, float32 out.
      has_aux: whether f returns ``(z, aux)``.

    Example:
      >>> f = InBfloat16(lambda params, z, x: params * z + x)
      >>> one = jnp.ones((1, 1))
      >>> f(one, one, 0.001 * one).item(), f(one, one, 0.001 * one).dtype.name
      (1.0, 'float32')
    """

    f: Map
    has_aux: bool = False

    def __call__(self, params: PyTree, z: PyTree, x: PyTree) -> PyTree:
        """Casts, applies f and casts back, all but what f returns beside z."""
        out = self.f(*(jax.tree.map(_lower, part) for part in (params, z, x)))
        image, *aux = out if self.has_aux else (out,)
        image = jax.tree.map(lambda a, like: a.astype(like.dtype), image, z)
        return (image, *aux) if self.has_aux else image


def in_bfloat16(fixed_point: Callable[..., Solution]) -> Callable[..., Solution]:
    """Makes a `deq_jax.fixed_point` whose f is computed in bfloat16, forward and backward.

    State, history, residuals and parameters stay in float32, and so do the gradients that devices
    sum.  The rounding of f, up to 2^-9 of every element, is what a residual can fall to.

    Args:
      fixed_point: `deq_jax.fixed_point`, or one with its signature.

    Returns:
      A function of the same signature.

    Example:
      >>> from deq_jax import Picard, fixed_point
      >>> solve, one = in_bfloat16(fixed_point), jnp.ones((1, 1))
      >>> sol = solve(lambda p, z, x: 0.5 * z + x, None, one, one, solver=Picard(tol=4e-3))
      >>> sol.value.dtype.name, abs(sol.value.item() - 2) < 0.02
      ('float32', True)
    """

    def solve(f: Map, params: PyTree, z0: PyTree, x: PyTree = None, **options: Any) -> Solution:
        # The compiler moves the casts of params and x out of the loops.
        lowered = InBfloat16(f, options.get("has_aux", False))
        solution = fixed_point(lowered, params, z0, x, **options)
        if lowered.has_aux:  # its f is none of z alone
            return solution
        return dataclasses.replace(solution, equation=Equation(f=lowered, params=params, x=x))

    return solve


def _lower(leaf: Any) -> Any:
    return leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf
