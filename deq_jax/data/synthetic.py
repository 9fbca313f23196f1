"""The synthetic regression task of the Jacobian regularisation paper."""

from __future__ import annotations

import dataclasses

import numpy as np

from deq_jax.data.records import Record

LOW, HIGH = -2.0, 2.0
"""Range of x. The paper does not state it; over this one the curve has both its turning points."""


def curve(x: np.ndarray) -> np.ndarray:
    """The function to be learned, without noise.

    ``y = 1.5 x^3 + x^2 - 5 x + 2 sin(x) - 3``

    Args:
      x: any shape.

    Returns:
      The same shape.

    Example:
      >>> float(curve(np.float64(0)))
      -3.0

    Reference: Bai, Koltun and Kolter, arXiv 2106.14342, section 5.1.
    """
    return 1.5 * x**3 + x**2 - 5 * x + 2 * np.sin(x) - 3


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs (x, y), a source for ``deq_jax.data.pipeline``.

    Attributes:
      x: float32 [N, 1].
      y: float32 [N, 1].
    """

    x: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        """N."""
        return len(self.x)

    def __getitem__(self, index: int) -> Record:
        """{"x": [1], "y": [1]}."""
        return {"x": self.x[index], "y": self.y[index]}


def regression(count: int, *, seed: int, noise: float = 0.05) -> Pairs:
    """Draws pairs of the synthetic task.

    ``x ~ U(-2, 2)``, ``y = curve(x) + noise * N(0, 1)``

    Args:
      count: number of pairs, at least 1.
      seed: of x and of the noise.
      noise: standard deviation of the noise (the paper writes N(0, .05); read as a deviation here).

    Returns:
      x, y float32 [count, 1].

    Raises:
      ValueError: ``count`` below 1 or negative noise.

    Example:
      >>> regression(4096, seed=0).y.shape
      (4096, 1)

    Reference: Bai, Koltun and Kolter, arXiv 2106.14342, section 5.1.
    """
    if count < 1 or noise < 0:
        raise ValueError(f"got count={count}, noise={noise}; wanted count >= 1 and noise >= 0")
    rng = np.random.default_rng(seed)
    x = rng.uniform(LOW, HIGH, size=(count, 1))
    y = curve(x) + noise * rng.standard_normal((count, 1))
    return Pairs(x.astype(np.float32), y.astype(np.float32))
