"""Initial weights of a family for two layers in a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

import deq_jax as deq

Init = Callable[..., jax.Array]


def product_inits(
    module: nn.Module, weights: deq.init.MatrixInitializer | None, first: str, usual: Init
) -> tuple[Init, Init]:
    """Initialisers of two layers of a module whose product is to be a matrix of a family.

    Args:
      module: the owner of both layers.
      weights: the family; None for the usual initialiser of both.
      first: name of the first layer, drawn before the second.
      usual: initialiser of either kernel without a family.

    Returns:
      Of the first kernel and of the second; see `deq_jax.init.product_first`.

    Example:
      >>> product_inits(nn.Module(), None, "conv1", nn.initializers.ones)[0].__name__
      'ones'
    """
    if weights is None:
        return usual, usual

    def second(key: jax.Array, *request: Any) -> jax.Array:
        drawn = module.variables["params"][first]["kernel"]
        return deq.init.product_second(weights, drawn)(key, *request)

    return deq.init.product_first(weights), second
