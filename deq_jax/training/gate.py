"""A number that is computed, with its gradient, only if it is wanted."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax import tree
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
      operands: tree of arrays; the result is differentiable by the floating-point ones.
      constants: any tree, held constant.
      none: what is returned otherwise, a scalar of the dtype of the function's.

    Returns:
      function(operands, constants) or ``none``; differentiable once, in reverse mode.

    Example:
      >>> import jax.numpy as jnp
      >>> def area(wanted, side):
      ...     return value_if(wanted, lambda x, factor: factor * x * x, side, 2.0, jnp.float32(0))
      >>> gradient, side = jax.grad(area, argnums=1), jnp.float32(3)
      >>> gradient(True, side).item(), gradient(False, side).item()
      (12.0, 0.0)
    """

    @jax.custom_vjp
    def gated(wanted: jax.Array, operands: PyTree, constants: PyTree, none: jax.Array) -> jax.Array:
        return lax.cond(wanted, lambda: function(operands, constants), lambda: none)

    def forward(
        wanted: jax.Array, operands: PyTree, constants: PyTree, none: jax.Array
    ) -> tuple[jax.Array, PyTree]:
        floats = tree.Floats(operands)
        types = list(map(jax.typeof, floats.values))

        def value(values: list[jax.Array]) -> jax.Array:
            return function(floats.fill(values), constants)

        found, gradient = lax.cond(
            wanted,
            lambda: jax.value_and_grad(value)(floats.values),
            # Zeros that do not read the operands, as `tree.zeros_like` would.
            lambda: (none, tree.match(list(map(jnp.zeros_like, floats.values)), types)),
        )
        return found, floats.cotangents(gradient)

    def backward(gradient: PyTree, cotangent: jax.Array) -> tuple:
        scaled = jax.tree.map(lambda part: (cotangent * part).astype(part.dtype), gradient)
        return None, scaled, None, None

    gated.defvjp(forward, backward)
    return gated(wanted, operands, constants, none)
