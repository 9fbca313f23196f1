"""Metrics as sums and counts, which merge over steps and devices without bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

_Array = Any


@flax.struct.dataclass
class Mean:
    """A mean that is still a sum and a count.

    Attributes:
      total: the sum, a scalar or an array.
      count: how many it is over, a scalar.
    """

    total: _Array
    count: _Array

    @property
    def value(self) -> jax.Array:
        """Total / count, 0 where the count is 0."""
        return self.total / jnp.where(self.count > 0, self.count, 1)


def merge(left: Mapping[str, Mean], right: Mapping[str, Mean]) -> dict[str, Mean]:
    """Adds two sets of means on the host, in float64; a name may be missing from either.

    Args:
      left: name -> Mean.
      right: name -> Mean, of arrays on the host.

    Returns:
      name -> Mean over the examples of both.

    Example:
      >>> compute(merge({"a": Mean(1.0, 1)}, {"a": Mean(2.0, 1)}))
      {'a': 1.5}
    """
    result = dict(left)
    for name, mean in right.items():
        total, count = np.float64(mean.total), np.float64(mean.count)
        if name in result:
            total, count = result[name].total + total, result[name].count + count
        result[name] = Mean(total, count)
    return result


def compute(means: Mapping[str, Mean]) -> dict[str, float]:
    """Divides; this is the default `summarize` of `train` and `evaluate`.

    Args:
      means: name -> Mean of scalars.

    Returns:
      name -> total / count, for those whose count is above 0.

    Example:
      >>> compute({"loss": Mean(3.0, 2.0), "never": Mean(0.0, 0.0)})
      {'loss': 1.5}
    """
    return {name: float(m.total / m.count) for name, m in means.items() if m.count > 0}


def to_json(means: Mapping[str, Mean]) -> dict[str, Any]:
    """Means as JSON holds them, exactly.

    Args:
      means: name -> Mean on the host.

    Returns:
      name -> [total, count] of floats and lists.

    Example:
      >>> to_json({"a": Mean(np.float64(0.5), np.float64(2))})
      {'a': [0.5, 2.0]}
    """
    return {
        n: [np.asarray(m.total).tolist(), np.asarray(m.count).tolist()] for n, m in means.items()
    }


def from_json(tree: Mapping[str, Any]) -> dict[str, Mean]:
    """Undoes `to_json`.

    Args:
      tree: name -> [total, count].

    Returns:
      name -> Mean on the host, float64.

    Example:
      >>> compute(from_json({"a": [0.5, 2.0]}))
      {'a': 0.25}
    """
    return {name: Mean(np.float64(t), np.float64(c)) for name, (t, c) in tree.items()}
