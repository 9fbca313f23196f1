"""Random matrix families as JAX initializers, and what random-matrix theory predicts for them.

Agarwala and Schoenholz (ICML 2022, arXiv 2207.09432) show that deep equilibrium models, unlike
explicit networks, depend on the family and not only on the variance of their initial weights.  The
three families here have the same entry variance, so that nothing else differs between them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

_Sampler = Callable[[jax.Array, int, int, Any], jax.Array]
_Initializer = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class MatrixInitializer:
    """A JAX initializer that draws matrices, or convolution kernels, of one family.

    Made by `gaussian`, `orthogonal` and `goe`.  It compares and hashes by value, so two modules
    built with equal initializers share one compiled function.

    Attributes:
      family: ``"gaussian"``, ``"orthogonal"`` or ``"goe"``.
      scale: square root of n times the entry variance.
      sample: draws an ``[n_in, n_out]`` matrix of entry variance 1 / n_in.
      centre: whether a convolution kernel has the matrix at its centre tap and zeros elsewhere.
    """

    family: str
    scale: float
    sample: _Sampler
    centre: bool

    def __call__(
        self,
        key: jax.Array,
        shape: Sequence[int],
        dtype: Any = jnp.float32,
        out_sharding: Any = None,
    ) -> jax.Array:
        """Draws the weights.

        Args:
          key: a PRNG key.
          shape: ``[n_in, n_out]``, or a kernel ``[*window, n_in, n_out]`` (HWIO in 2-D).
          dtype: floating-point dtype of the result; drawn in float32 or wider, then cast.
          out_sharding: sharding of the result, as in `jax.nn.initializers`.

        Returns:
          An array of the shape and dtype asked for.

        Raises:
          ValueError: for fewer than two axes, an empty shape, a dtype that is not floating-point,
            or a rectangular symmetric matrix.
        """
        shape = tuple(shape)
        dtype = _check_request(self.family, shape, dtype)
        *window, n_in, n_out = shape
        wide = jnp.promote_types(dtype, jnp.float32)
        if self.centre:
            weights = _at_centre(self.sample(key, n_in, n_out, wide), window)
        else:
            flat = self.sample(key, math.prod(window) * n_in, n_out, wide)
            weights = flat.reshape(shape)
        weights = (self.scale * weights).astype(dtype)
        return weights if out_sharding is None else jax.sharding.reshard(weights, out_sharding)


def gaussian(scale: float = 1.0, *, centre: bool = False) -> MatrixInitializer:
    """Independent Gaussian entries.

    W_ij ~ N(0, scale^2 / n).  For large square matrices the spectral radius is ``scale`` and the
    operator norm ``2 scale``.  In a kernel all taps are drawn, n = taps * n_in, so that a unit
    input gives an output of variance scale^2, as with the other two families.

    Args:
      scale: square root of n times the entry variance; at least 0.
      centre: draws the centre tap of a kernel only, as the other families do; n = n_in.

    Returns:
      An initializer ``(key, shape, dtype) -> array``.

    Raises:
      ValueError: for a negative or infinite scale.

    Example:
      >>> import jax
      >>> gaussian(0.5)(jax.random.key(0), (16, 16)).shape
      (16, 16)

    Reference: Agarwala and Schoenholz, arXiv 2207.09432, section 3.
    """
    return MatrixInitializer("gaussian", _check_scale(scale), _sample_gaussian, centre=centre)


def orthogonal(scale: float = 1.0) -> MatrixInitializer:
    """Orthogonal matrices with the uniform (Haar) distribution.

    W = scale * Q, Q^T Q = I, so that the entry variance is scale^2 / n and every singular value is
    ``scale``.  A rectangular ``[n_in, n_out]`` matrix has orthogonal columns (rows when n_in <
    n_out), scaled to keep the entry variance at scale^2 / n_in.  A kernel is delta-orthogonal: the
    matrix at the centre tap, zeros elsewhere.

    Args:
      scale: square root of n times the entry variance; at least 0.

    Returns:
      An initializer ``(key, shape, dtype) -> array``.

    Raises:
      ValueError: for a negative or infinite scale.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> w = orthogonal(0.5)(jax.random.key(0), (16, 16))
      >>> bool(jnp.allclose(w.T @ w, 0.25 * jnp.eye(16), atol=1e-6))
      True

    References: Mezzadri, arXiv math-ph/0609050 (Haar measure by QR); Xiao et al., arXiv 1806.05393
    (delta-orthogonal kernels); Agarwala and Schoenholz, arXiv 2207.09432.
    """
    return MatrixInitializer("orthogonal", _check_scale(scale), _sample_orthogonal, centre=True)


def goe(scale: float = 1.0) -> MatrixInitializer:
    """Symmetric Gaussian matrices (Gaussian orthogonal ensemble).

    W = scale * (G + G^T) / sqrt(2 n), G_ij ~ N(0, 1): exactly symmetric, entry variance scale^2 / n
    off the diagonal and twice that on it.  Spectral radius and operator norm tend to ``2 scale``.
    A kernel has the matrix at its centre tap and zeros elsewhere, which makes the convolution a
    symmetric operator.

    Args:
      scale: square root of n times the variance of an off-diagonal entry; at least 0.

    Returns:
      An initializer ``(key, shape, dtype) -> array`` for square matrices (n_in = n_out).

    Raises:
      ValueError: for a negative or infinite scale.

    Example:
      >>> import jax
      >>> w = goe(0.5)(jax.random.key(0), (3, 3, 8, 8))
      >>> bool((w[1, 1] == w[1, 1].T).all())
      True

    Reference: Agarwala and Schoenholz, arXiv 2207.09432, section 3.
    """
    return MatrixInitializer("goe", _check_scale(scale), _sample_goe, centre=True)


def product_first(matrix: MatrixInitializer) -> _Initializer:
    """First factor of a product of two layers that is to be a matrix of a family.

    For a hidden layer between two of n units, W1 [n, h] and W2 [h, n]: gaussian factors are
    independent, each of scale sqrt(s), and so is their product for large h of entry variance
    s^2 / n.  For the other families W1 W1^T = s I, and W2 = W1^T M / s with a matrix M of the
    family, so that W1 W2 = M exactly.  In kernels of convolutions both factors are where the family
    has its matrix: at the centre tap, gaussian ones (unless told otherwise) at all taps.

    Args:
      matrix: the family and scale s of the product.

    Returns:
      An initializer ``(key, shape, dtype) -> array`` for ``[*window, n, h]``, h at least n except
      for gaussian ones.

    Example:
      >>> first = product_first(goe(0.5))(jax.random.key(0), (4, 9), jnp.float32)
      >>> both = first @ product_second(goe(0.5), first)(jax.random.key(1), (9, 4), jnp.float32)
      >>> bool(jnp.allclose(both, both.T, atol=1e-6))
      True
    """
    root = math.sqrt(matrix.scale)
    if matrix.family == "gaussian":
        return gaussian(root, centre=matrix.centre)

    def draw(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
        *_, n, hidden = shape
        if hidden < n:
            raise ValueError(
                f"{matrix.family}: got a hidden layer of {hidden} between layers of {n}; wanted at "
                f"least {n}, or the product of the two has no full rank; widen it or take gaussian"
            )
        return orthogonal(root * math.sqrt(n / hidden))(key, shape, dtype)

    return draw


def product_second(matrix: MatrixInitializer, first: jax.Array) -> _Initializer:
    """Second factor of a product; see `product_first`.

    Args:
      matrix: the family and scale of the product.
      first: what `product_first` drew, ``[*window, n, h]``.

    Returns:
      An initializer for ``[*window, h, n]``, whose window may be another one.

    Example:
      >>> first = product_first(orthogonal(0.5))(jax.random.key(0), (2, 3), jnp.float32)
      >>> product_second(orthogonal(0.5), first)(jax.random.key(1), (3, 2), jnp.float32).shape
      (3, 2)
    """
    if matrix.family == "gaussian":
        return gaussian(math.sqrt(matrix.scale), centre=matrix.centre)
    centre = first[_centre(first.shape[:-2])]  # [n, h]

    def draw(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
        *window, _, n = shape
        drawn = matrix(key, (n, n), dtype)
        return _at_centre(centre.T.astype(dtype) @ drawn / (matrix.scale or 1.0), window)

    return draw


def predicted_gain(family: str, scale: float) -> tuple[float, float]:
    """Predicts how much a linear DEQ amplifies its input, for wide layers.

    For z* = W z* + x with R = (I - W)^-1 of size N: L1 = tr(R R^T) / N, the mean gain of squared
    length (of the solution, and of the vector-Jacobian product); L2 = tr((R R^T)^2) / N, its
    fluctuation.  Limits N -> infinity at entry variance s^2 / N:

    * gaussian: L1 = 1 / (1 - s^2), L2 = (1 - s^2)^-4;
    * orthogonal: L1 = 1 / (1 - s^2), L2 = (1 + s^2) / (1 - s^2)^3;
    * goe: L1 = ((1 - 4 s^2)^(-1/2) - 1) / (2 s^2), L2 = (1 - 4 s^2)^(-5/2).

    Args:
      family: ``"gaussian"``, ``"orthogonal"`` or ``"goe"``.
      scale: s, from 0 up to the family's critical scale (`critical_scale`), exclusive.

    Returns:
      ``(L1, L2)``.

    Raises:
      ValueError: for an unknown family, or a scale at which no stable equilibrium exists.

    Example:
      >>> predicted_gain("orthogonal", 0.5)[0] == 1 / 0.75
      True

    Reference: Agarwala and Schoenholz, arXiv 2207.09432, section 3.
    """
    limit = critical_scale(family)
    if not 0 <= scale < limit:
        raise ValueError(
            f"got scale={scale!r} for the {family} family; wanted 0 <= scale < {limit}, beyond "
            "which the gain is infinite; choose a smaller scale"
        )
    s2 = scale * scale
    if family == "goe":
        q = math.sqrt(1 - 4 * s2)
        return 2 / (q * (1 + q)), q**-5  # the first is the formula above, also right at s = 0
    if family == "gaussian":
        return 1 / (1 - s2), (1 - s2) ** -4
    return 1 / (1 - s2), (1 + s2) / (1 - s2) ** 3


def predicted_norms(family: str, scale: float) -> tuple[float, float]:
    """Predicts the spectral radius and the operator norm of a wide square matrix.

    Args:
      family: ``"gaussian"`` (s, 2 s), ``"orthogonal"`` (s, s) or ``"goe"`` (2 s, 2 s).
      scale: s, at least 0.

    Returns:
      ``(spectral radius, operator norm)``, the limits for n -> infinity.

    Raises:
      ValueError: for an unknown family or a negative scale.

    Example:
      >>> predicted_norms("gaussian", 0.5)
      (0.5, 1.0)
    """
    radius = 1 / critical_scale(family)
    scale = _check_scale(scale)
    return radius * scale, (1.0 if family == "orthogonal" else 2.0) * scale


def critical_scale(family: str) -> float:
    """Returns the scale at which the predicted spectral radius reaches one.

    Args:
      family: ``"gaussian"``, ``"orthogonal"`` or ``"goe"``.

    Returns:
      1, 1 or 1/2.

    Raises:
      ValueError: for an unknown family.

    Example:
      >>> critical_scale("goe")
      0.5
    """
    if family not in ("gaussian", "orthogonal", "goe"):
        raise ValueError(f'got family={family!r}; wanted "gaussian", "orthogonal" or "goe"')
    return 0.5 if family == "goe" else 1.0


def _centre(window: Sequence[int]) -> tuple[int, ...]:
    """The tap that a "SAME" convolution of stride 1 aligns with the output."""
    return tuple((size - 1) // 2 for size in window)


def _at_centre(matrix: jax.Array, window: Sequence[int]) -> jax.Array:
    """A kernel with the matrix at its centre tap and zeros elsewhere."""
    return jnp.zeros((*window, *matrix.shape), matrix.dtype).at[_centre(window)].set(matrix)


def _check_scale(scale: float) -> float:
    if not 0 <= scale < math.inf:
        raise ValueError(f"got scale={scale!r}; wanted a finite number of at least 0")
    return float(scale)


def _check_request(family: str, shape: tuple[int, ...], dtype: Any) -> Any:
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    if len(shape) < 2 or 0 in shape:
        raise ValueError(
            f"{family}: got shape {shape}; wanted [n_in, n_out] or a kernel [*window, n_in, n_out] "
            "without empty axes; use another initializer for biases"
        )
    if family == "goe" and shape[-1] != shape[-2]:
        raise ValueError(
            f"goe: got shape {shape}; wanted n_in = n_out, as a symmetric matrix is square; use "
            "gaussian or orthogonal here"
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{family}: got dtype {dtype}; wanted a floating-point dtype")
    return dtype


def _sample_gaussian(key: jax.Array, n_in: int, n_out: int, dtype: Any) -> jax.Array:
    return jax.random.normal(key, (n_in, n_out), dtype) / math.sqrt(n_in)


def _sample_orthogonal(key: jax.Array, n_in: int, n_out: int, dtype: Any) -> jax.Array:
    long, short = max(n_in, n_out), min(n_in, n_out)
    q, r = jnp.linalg.qr(jax.random.normal(key, (long, short), dtype))
    # QR is unique, and Q Haar distributed, only once R's diagonal is positive.
    q = q * jnp.where(jnp.diagonal(r) < 0, -1, 1).astype(dtype)[None, :]
    return q if n_in >= n_out else q.T * math.sqrt(n_out / n_in)


def _sample_goe(key: jax.Array, n_in: int, n_out: int, dtype: Any) -> jax.Array:
    g = jax.random.normal(key, (n_in, n_out), dtype)
    return (g + g.T) / math.sqrt(2 * n_in)
