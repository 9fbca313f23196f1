"""Layers of image models: convolution, normalisations, changes of resolution."""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from deq_jax.models.convolution import Pair, conv2d
from deq_jax.models.families import Init


def as_matrix(init: Init) -> Init:
    """Draws a kernel [..., C, O] as the matrix [... C, O].

    The numbers are the same, since an element's number depends on its place in memory alone.  On a
    CPU the program for a matrix compiles several times faster than that for a window.

    Args:
      init: an initialiser whose scale depends on the fan in alone, or on nothing.

    Returns:
      An initialiser.

    Example:
      >>> as_matrix(nn.initializers.he_normal())(jax.random.key(0), (3, 3, 2, 4)).shape
      (3, 3, 2, 4)
    """

    def draw(key: jax.Array, shape: tuple[int, ...], *dtype: Any) -> jax.Array:
        if len(shape) < 3:
            return init(key, shape, *dtype)
        return init(key, (math.prod(shape[:-1]), shape[-1]), *dtype).reshape(shape)

    return draw


NORMAL = as_matrix(nn.initializers.normal(0.01))
"""What the published codes draw every weight from that weight norm does not own."""

UNIFORM = as_matrix(nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"))
"""Uniform in +-1/sqrt(fan in), PyTorch's default, which they leave where weight norm is."""


def group_norm(
    x: jax.Array,
    groups: int,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    eps: float = 1e-5,
) -> jax.Array:
    """Normalises each group of channels of each sample to mean 0 and variance 1.

    y = (x - mean) / sqrt(var + eps) * scale + bias

    with mean and var over all positions and the channels of one group of one sample.  Nothing
    crosses samples, so it may stand inside a sharded solve.

    Args:
      x: float ``[B, ..., C]``; statistics are taken in float32 or wider.
      groups: number of groups; it divides C.
      scale: float ``[C]`` or None.
      bias: float ``[C]`` or None.
      eps: added to the variance.

    Returns:
      The shape and dtype of ``x``.

    Raises:
      ValueError: ``groups`` does not divide the number of channels.

    Example:
      >>> float(jnp.std(group_norm(jnp.arange(8.0).reshape(1, 2, 4), 1)).round(3))
      1.0

    Reference: Wu and He, Group Normalization, ECCV 2018, equation 1.
    """
    channels = x.shape[-1]
    if groups < 1 or channels % groups:
        raise ValueError(
            f"got groups={groups} for {channels} channels; wanted a divisor of the channels"
        )
    out: Any = _standardise(x.astype(jnp.promote_types(x.dtype, jnp.float32)), groups, eps)[0]
    trailing = (1,) * (x.ndim - 1) + (channels,)  # explicit, for users who forbid rank promotion
    if scale is not None:
        out = out * scale.astype(out.dtype).reshape(trailing)
    if bias is not None:
        out = out + bias.astype(out.dtype).reshape(trailing)
    return out.astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _standardise(x: jax.Array, groups: int, eps: float) -> tuple[jax.Array, jax.Array]:
    """Mean 0 and variance 1 in every group, and 1 / sqrt(var + eps), [B, 1, ..., C].

    The second output is there for the derivative.
    """
    moments = lax.platform_dependent(x, cpu=_two_passes, default=_one_pass)
    by_group = (x.shape[0], groups, x.shape[-1] // groups)
    means, variances = (moment.reshape(by_group) for moment in moments)
    # Less the first channel's mean: a large common one costs no digits.
    apart = means - means[:, :, :1]
    sums = _sum_both(apart, variances + jnp.square(apart), (2,))
    step, square = (jnp.expand_dims(total, 2) / by_group[2] for total in sums)  # [B, G, 1]
    rate = _spread(lax.rsqrt(jnp.maximum(square - jnp.square(step), 0) + eps), x)
    return (x - _spread(means[:, :, :1] + step, x)) * rate, rate


@_standardise.defjvp
def _standardise_jvp(groups: int, eps: float, primals: Any, tangents: Any) -> tuple[Any, Any]:
    """Autodiff would read x once more, for a mean that is zero, and keep more arrays."""
    (x,), (dx,) = primals, tangents
    outputs: Any = _standardise(x, groups, eps)
    y, rate = outputs
    dx = rate * dx
    mean, along = _group_means(dx, y * dx, groups)
    return outputs, (dx - mean - y * along, -rate * along)


def _sum_both(a: jax.Array, b: jax.Array, axes: tuple[int, ...]) -> Any:
    """Two sums in one operation, which stays one kernel on a GPU."""
    zero = jnp.zeros((), a.dtype)
    return lax.reduce((a, b), (zero, zero), lambda x, y: (x[0] + y[0], x[1] + y[1]), axes)


def _two_passes(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance over positions, [B, C]."""
    spatial = tuple(range(1, x.ndim - 1))
    positions = math.prod(x.shape[1:-1])
    mean = jnp.sum(x, spatial, keepdims=True) / positions
    var = jnp.sum(jnp.square(x - mean), spatial) / positions
    return mean.reshape(var.shape), var


def _one_pass(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same by sums of x and its square less one pixel.

    Half of the reading, and one kernel on a GPU.  The pixel is as far from the mean as any: on
    average one standard deviation, so that the difference of the sums costs one bit.
    """
    spatial = tuple(range(1, x.ndim - 1))
    positions = math.prod(x.shape[1:-1])
    pixel = x[(slice(None), *(slice(n // 2, n // 2 + 1) for n in x.shape[1:-1]))]
    mean = jnp.sum(x - pixel, spatial) / positions
    var = jnp.sum(jnp.square(x - pixel), spatial) / positions - jnp.square(mean)
    return pixel.reshape(mean.shape) + mean, var


def _group_means(a: jax.Array, b: jax.Array, groups: int) -> tuple[jax.Array, jax.Array]:
    """Two means over positions and the channels of a group, [B, 1, ..., C]."""

    def spread_mean(sums: jax.Array) -> jax.Array:
        by_group = jnp.sum(sums.reshape(a.shape[0], groups, -1), axis=2, keepdims=True)
        return _spread(by_group * (groups / math.prod(a.shape[1:])), a)

    def apart(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        return spread_mean(a), spread_mean(b)

    def together(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A kernel less on a GPU, where `_sum_both` has no transpose; more memory on a TPU."""
        means = spread_mean(lax.complex(a, b))
        return means.real, means.imag

    # Positions first, groups after: on CPU up to five times faster than one reduction over two axes
    # of [B, N, G, C/G].
    positions = tuple(range(1, a.ndim - 1))
    sums = jnp.sum(a, positions), jnp.sum(b, positions)  # [B, C]
    return lax.platform_dependent(*sums, cuda=together, rocm=together, default=apart)


def _spread(by_group: jax.Array, x: jax.Array) -> jax.Array:
    """From [B, G, 1] to [B, 1, ..., C]."""
    batch, groups, _ = by_group.shape
    wide = jnp.broadcast_to(by_group, (batch, groups, x.shape[-1] // groups))
    return wide.reshape(batch, *(1 for _ in x.shape[1:-1]), x.shape[-1])


class Conv(nn.Module):
    """`conv2d` as a Linen module: parameters ``kernel`` [P, Q, C, O] and, on request, ``bias`` [O].

    Attributes:
      features: number of output channels O.
      window: size of the square kernel.
      strides: step of the output grid.
      use_bias: whether a bias is added.
      kernel_init: initializer of the kernel.
      bias_init: initializer of the bias.

    Example:
      >>> Conv(4).init_with_output(jax.random.key(0), jnp.ones((1, 8, 8, 2)))[0].shape
      (1, 8, 8, 4)
    """

    features: int
    window: int = 3
    strides: int | Pair = 1
    use_bias: bool = False
    kernel_init: Init = as_matrix(nn.initializers.he_normal())
    bias_init: Init = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float [B, H, W, C] to float [B, H', W', features]."""
        shape = (self.window, self.window, x.shape[-1], self.features)
        y = conv2d(x, self.param("kernel", self.kernel_init, shape), strides=self.strides)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,))
            y = y + bias.reshape(1, 1, 1, -1)
        return y


class GroupNorm(nn.Module):
    """`group_norm` as a Linen module: parameters ``scale`` [C] and ``bias`` [C] when affine.

    Attributes:
      groups: number of groups.
      affine: whether scale and bias are learned.
      eps: added to the variance.

    Example:
      >>> GroupNorm(2).init_with_output(jax.random.key(0), jnp.ones((1, 8, 8, 4)))[0].shape
      (1, 8, 8, 4)
    """

    groups: int = 8
    affine: bool = True
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float [B, ..., C] to the same shape."""
        if not self.affine:
            return group_norm(x, self.groups, eps=self.eps)
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return group_norm(x, self.groups, scale, bias, eps=self.eps)


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, with PyTorch's bookkeeping.

        y = (x - mean) / sqrt(var + eps) * scale + bias
        running <- (1 - momentum) * running + momentum * batch

    In training mean and var are those of the batch (under jit with a sharded batch: of the whole
    batch); otherwise the running ones, collection ``batch_stats``: ``mean`` and ``var``, float32
    [C].  `flax.linen.BatchNorm` differs in one thing: there the running variance is the biased one,
    so that published weights would drift when trained on.  Samples depend on each other here: not
    for use in an iterated cell.

    Attributes:
      momentum: weight of the newest batch in the running statistics.
      affine: whether scale and bias are learned.
      eps: added to the variance.

    Example:
      >>> norm, x = BatchNorm(), jnp.ones((2, 8, 8, 4))
      >>> variables = norm.init(jax.random.key(0), x, train=True)
      >>> norm.apply(variables, x, train=False).shape
      (2, 8, 8, 4)

    Reference: Ioffe and Szegedy, arXiv 1502.03167, algorithm 1.
    """

    momentum: float = 0.1
    affine: bool = True
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps float [B, ..., C] to the same shape; ``train`` updates ``batch_stats``."""
        channels = x.shape[-1]
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), wide.dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), wide.dtype)
        row = (1,) * (x.ndim - 1) + (channels,)  # explicit, for users who forbid rank promotion
        mean, var = running_mean.value, running_var.value
        if train:
            axes, size = tuple(range(x.ndim - 1)), x.size // channels
            mean = wide.mean(axes)
            var = jnp.square(wide - mean.reshape(row)).mean(axes)
            if not self.is_initializing():
                keep, unbiased = 1 - self.momentum, var * (size / max(size - 1, 1))
                running_mean.value = keep * running_mean.value + self.momentum * mean
                running_var.value = keep * running_var.value + self.momentum * unbiased
        y = (wide - mean.reshape(row)) * lax.rsqrt(var + self.eps).reshape(row)
        if self.affine:
            scale = self.param("scale", nn.initializers.ones, (channels,))
            bias = self.param("bias", nn.initializers.zeros, (channels,))
            y = y * scale.reshape(row) + bias.reshape(row)
        return y.astype(x.dtype)


def upsample_nearest(x: jax.Array, factor: int) -> jax.Array:
    """Repeats every pixel `factor` times in both directions.

    Args:
      x: images, float ``[B, H, W, C]``.
      factor: at least 1.

    Returns:
      ``[B, H * factor, W * factor, C]``.

    Example:
      >>> upsample_nearest(jnp.arange(4.0).reshape(1, 2, 2, 1), 2)[0, :, :, 0].tolist()[1]
      [0.0, 0.0, 1.0, 1.0]
    """
    batch, height, width, channels = x.shape
    spread = jnp.broadcast_to(
        x[:, :, None, :, None, :], (batch, height, factor, width, factor, channels)
    )
    return spread.reshape(batch, height * factor, width * factor, channels)


def resize_bilinear(x: jax.Array, size: Pair, *, align_corners: bool = False) -> jax.Array:
    """Resizes images bilinearly, without smoothing when they shrink.

    Args:
      x: images, float ``[B, H, W, C]``.
      size: height and width wanted.
      align_corners: whether the centres of the corner pixels stay where they are, rather than the
        edges of the image; both as in PyTorch.

    Returns:
      ``[B, *size, C]``.

    Example:
      >>> x = jnp.arange(2.0).reshape(1, 1, 2, 1)
      >>> resize_bilinear(x, (1, 3), align_corners=True).ravel().tolist()
      [0.0, 0.5, 1.0]
    """
    shape = (x.shape[0], *size, x.shape[3])
    if not align_corners:
        return jax.image.resize(x, shape, "bilinear", antialias=False)
    # A single pixel has no corners to align: it is spread over the whole length.
    pairs = zip(size, x.shape[1:3], strict=True)
    scales = [(new - 1) / (old - 1) if old > 1 else new for new, old in pairs]
    scale = jnp.asarray([s or 1.0 for s in scales], x.dtype)
    return jax.image.scale_and_translate(
        x, shape, (1, 2), scale, 0.5 - 0.5 * scale, "linear", antialias=False
    )
