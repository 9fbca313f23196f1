"""Layers that are fast inside a solver loop: the one convolution, group normalisation.

Images are NHWC and kernels HWIO everywhere: XLA's CPU convolution is fast inside a loop for this
pair of layouts only, and 5 to 40 times slower for any other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

Pair = tuple[int, int]

_LAYOUT = ("NHWC", "HWIO", "NHWC")


class _How(NamedTuple):
    """The geometry of a convolution, a number for each of H and W."""

    strides: Pair
    pads: tuple[Pair, ...]
    dilation: Pair  # of the input: 2 puts one zero between neighbours
    spread: Pair  # of the kernel, likewise


def conv2d(x: jax.Array, kernel: jax.Array, *, strides: int | Pair = 1) -> jax.Array:
    """Convolves images with a kernel under 'SAME' padding.

    y[b, i, j, o] = sum_{p, q, c} x[b, s i + p - l, s j + q - l, c] kernel[p, q, c, o]

    The values are those of `jax.lax.conv_general_dilated`.  Both gradients are written as further
    convolutions of the same layout, where autodiff would change the order of the dimensions: inside
    a loop or a `lax.cond` on CPU, 5 times slower for ``x`` and 50 to 150 times for the kernel.
    Reverse mode may be nested to any order; forward mode (`jax.jvp`) is not supported, as for every
    `jax.custom_vjp`.

    Args:
      x: images, float ``[B, H, W, C]``.
      kernel: weights, float ``[P, Q, C, O]``.
      strides: step of the output grid, one number or one for each of H and W.

    Returns:
      float ``[B, ceil(H / stride), ceil(W / stride), O]``.

    Raises:
      ValueError: the shapes do not fit, or a stride is below 1.

    Example:
      >>> conv2d(jnp.ones((1, 5, 5, 2)), jnp.ones((3, 3, 2, 4)), strides=2).shape
      (1, 3, 3, 4)
    """
    pair = (strides, strides) if isinstance(strides, int) else tuple(strides)
    if x.ndim != 4 or kernel.ndim != 4 or x.shape[3] != kernel.shape[2]:
        raise ValueError(
            f"got x of shape {x.shape} and a kernel of shape {kernel.shape}; wanted [B, H, W, C] "
            "and [P, Q, C, O] with the same C; transpose NCHW images and OIHW kernels beforehand"
        )
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"got strides={strides}; wanted one or two whole numbers of at least 1")
    rows, columns = (
        _same_pads(size, window, stride)
        for size, window, stride in zip(x.shape[1:3], kernel.shape[:2], pair, strict=True)
    )
    return _conv(x, kernel, _How(pair, (rows, columns), (1, 1), (1, 1)))


def _same_pads(size: int, window: int, stride: int) -> Pair:
    """Zeros before and after one axis so that it comes out with ceil(size / stride) positions."""
    total = max((-(-size // stride) - 1) * stride + window - size, 0)
    return total // 2, total - total // 2


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(x: jax.Array, kernel: jax.Array, how: _How) -> jax.Array:
    """y[i] = sum_p dilated_x[i * stride + p * spread - before] kernel[p], along both axes."""
    return lax.conv_general_dilated(
        x,
        kernel,
        how.strides,
        how.pads,
        lhs_dilation=how.dilation,
        rhs_dilation=how.spread,
        dimension_numbers=_LAYOUT,
    )


def _conv_fwd(x: jax.Array, kernel: jax.Array, how: _How) -> tuple[jax.Array, Any]:
    return _conv(x, kernel, how), (x, kernel)


def _conv_bwd(how: _How, saved: Any, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both gradients are convolutions of the same family, so that this holds at every order."""
    x, kernel = saved
    x_pads, kernel_pads = [], []
    for axis in (0, 1):
        before, spread = how.pads[axis][0], how.spread[axis]
        window = (kernel.shape[axis] - 1) * spread + 1
        size = (x.shape[axis + 1] - 1) * how.dilation[axis] + 1
        reach = (cotangent.shape[axis + 1] - 1) * how.strides[axis] + 1
        x_pads.append((window - 1 - before, size - reach + before))
        kernel_pads.append((before, window - 1 + reach - size - before))
    # To x: tap p carried position i * stride + p * spread - before to i; the flipped tap carries it
    # back.  Stride and dilation change places.
    flipped = kernel[::-1, ::-1].swapaxes(2, 3)
    to_x = _How(how.dilation, tuple(x_pads), how.strides, how.spread)
    d_x: Any = _conv(cotangent, flipped, to_x)
    # To the kernel: the same sum read as a convolution over p whose taps are the positions i.
    # Stride and spread change places, channels and batch of x too.
    to_kernel = _How(how.spread, tuple(kernel_pads), how.dilation, how.strides)
    d_kernel: Any = _conv(x.transpose(3, 1, 2, 0), cotangent.transpose(1, 2, 0, 3), to_kernel)
    return d_x, d_kernel.transpose(1, 2, 0, 3)


_conv.defvjp(_conv_fwd, _conv_bwd)


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
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    spatial = tuple(range(1, x.ndim - 1))
    size = math.prod(x.shape[1:-1]) * channels // groups  # numbers in one group

    def group_mean(values: jax.Array) -> jax.Array:
        # Positions first, groups after: on CPU up to five times faster than one reduction over
        # two axes of [B, N, G, C/G].
        per_channel = jnp.sum(values, axis=spatial)  # [B, C]
        mean = jnp.sum(per_channel.reshape(-1, groups, channels // groups), axis=2) / size  # [B, G]
        spread = jnp.repeat(mean, channels // groups, axis=1, total_repeat_length=channels)
        return spread.reshape((x.shape[0], *(1 for _ in spatial), channels))  # [B, 1 ..., C]

    centred = wide - group_mean(wide)
    out = centred * lax.rsqrt(group_mean(jnp.square(centred)) + eps)
    trailing = (1,) * (x.ndim - 1) + (channels,)  # explicit, for users who forbid rank promotion
    if scale is not None:
        out = out * scale.astype(wide.dtype).reshape(trailing)
    if bias is not None:
        out = out + bias.astype(wide.dtype).reshape(trailing)
    return out.astype(x.dtype)


class Conv(nn.Module):
    """`conv2d` as a Linen module: parameters ``kernel`` [P, Q, C, O] and, on request, ``bias`` [O].

    Attributes:
      features: number of output channels O.
      window: size of the square kernel.
      strides: step of the output grid.
      use_bias: whether a bias is added.
      kernel_init: initializer of the kernel.

    Example:
      >>> Conv(4).init_with_output(jax.random.key(0), jnp.ones((1, 8, 8, 2)))[0].shape
      (1, 8, 8, 4)
    """

    features: int
    window: int = 3
    strides: int | Pair = 1
    use_bias: bool = False
    kernel_init: Callable[..., jax.Array] = nn.initializers.he_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float [B, H, W, C] to float [B, H', W', features]."""
        shape = (self.window, self.window, x.shape[-1], self.features)
        y = conv2d(x, self.param("kernel", self.kernel_init, shape), strides=self.strides)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
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
