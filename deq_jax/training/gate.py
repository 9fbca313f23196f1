"""A number that is computed, with its gradient, only if it is wanted."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax.tree import PyTree


def value_if(
    wanted: jax.Array,
    function: Callable[[PyTree, PyTree], jax.Array],
    operands: PyTree,
    constants: PyTree,
    none: jax.Array,
) -> jax.Array:
    """Computes a number or skips it.

    Autodiff of `jax.lax.cond` keeps what the gradient of the branch that is taken needs, and the
    other branch fills as many arrays with zeros.  Here the branch that is taken computes its
    gradient at once, and only that is kept.

    Args:
      wanted: bool scalar.
      function: (operands, constants) -> scalar; it holds no array that is differentiated.
      operands: any tree; the result is differentiable by its floating-point arrays.
      constants: any tree, held constant.
      none: what is returned otherwise, a scalar of the dtype of the function's.

    Returns:
      function(operands, constants) or ``none``; differentiable once, in reverse mode.

    Example:
      >>> def area(wanted, side):
      ...     return value_if(wanted, lambda x, factor: factor * x * x, side, 2.0, jnp.float32(0))
      >>> gradient = jax.grad(area, argnums=1)
      >>> gradient(True, 3.0).item(), gradient(False, 3.0).item()
      (12.0, 0.0)
    """
    leaves, treedef = jax.tree.flatten(operands)
    inexact = [jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in leaves]

    def join(real: list, other: list) -> PyTree:
        parts = iter(real), iter(other)
        return jax.tree.unflatten(treedef, [next(parts[not is_real]) for is_real in inexact])

    def value(real: list, other: list, constants: PyTree) -> jax.Array:
        return function(join(real, other), constants)

    @jax.custom_vjp
    def gated(
        wanted: jax.Array, none: jax.Array, real: list, other: list, constants: PyTree
    ) -> jax.Array:
        return lax.cond(wanted, lambda: value(real, other, constants), lambda: none)

    def forward(
        wanted: jax.Array, none: jax.Array, real: list, other: list, constants: PyTree
    ) -> tuple[jax.Array, list]:
        return lax.cond(
            wanted,
            lambda: jax.value_and_grad(value)(real, other, constants),
            lambda: (none, jax.tree.map(jnp.zeros_like, real)),
        )

    def backward(gradient: list, cotangent: jax.Array) -> tuple:
        scaled = [(cotangent * part).astype(part.dtype) for part in gradient]
        return None, None, scaled, None, None

    gated.defvjp(forward, backward)
    real = [leaf for leaf, is_real in zip(leaves, inexact, strict=True) if is_real]
    other = [leaf for leaf, is_real in zip(leaves, inexact, strict=True) if not is_real]
    return gated(wanted, none, real, other, constants)
