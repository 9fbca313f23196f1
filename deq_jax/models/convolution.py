"""The convolution of image models: one forward form, gradients chosen by platform.

Images are NHWC and kernels HWIO everywhere: XLA's CPU convolution is fast inside a loop for this
pair of layouts only, and 5 to 40 times slower for any other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from deq_jax import tree

Pair = tuple[int, int]

_LAYOUT = ("NHWC", "HWIO", "NHWC")


class _How(NamedTuple):
    """The geometry of a convolution, a number for each of H and W."""

    strides: Pair
    pads: tuple[Pair, ...]
    dilation: Pair  # of the input: 2 puts one zero between neighbours
    spread: Pair  # of the kernel, likewise


def conv2d(x: jax.Array, kernel: jax.Array, *, strides: int | Pair = 1) -> jax.Array:
    """Convolves images with a kernel whose centre stands on every s-th pixel, from the first on.

    y[b, i, j, o] = sum_{p, q, c} x[b, s i + p - l, s j + q - l, c] kernel[p, q, c, o]

    with l = (window - 1) // 2 zeros before and window // 2 after each axis.  For stride 1 that is
    XLA's "SAME"; for larger strides "SAME" would put the grid elsewhere, depending on the size,
    while this is what published weights were trained with.

    The values are those of `jax.lax.conv_general_dilated`, and so are all derivatives, forward and
    reverse, to any order.  On a CPU both gradients are computed as further convolutions of the same
    layout: autodiff changes the order of the dimensions, which inside a loop or a `lax.cond` is 5
    to 80 times slower for ``x`` and 50 to 150 times for the kernel.

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
    pads = tuple(((window - 1) // 2, window // 2) for window in kernel.shape[:2])
    return _conv(x, kernel, _How(pair, pads, (1, 1), (1, 1)))


def _conv(x: jax.Array, kernel: jax.Array, how: _How) -> jax.Array:
    # The flipped kernel is an operand for the gradient by x on a CPU: a backward solve would
    # otherwise make it once a step.
    operands = tree.vary((x, kernel, _flip(kernel)), (x, kernel))
    return conv_p.bind(*operands, how=how)


def _flip(kernel: jax.Array) -> jax.Array:
    return kernel[::-1, ::-1].swapaxes(2, 3)


def _plain_conv(x: jax.Array, kernel: jax.Array, how: _How, layout: Any = _LAYOUT) -> jax.Array:
    """y[i] = sum_p dilated_x[i * stride + p * spread - before] kernel[p], along both axes."""
    return lax.conv_general_dilated(
        x,
        kernel,
        how.strides,
        how.pads,
        lhs_dilation=how.dilation,
        rhs_dilation=how.spread,
        dimension_numbers=layout,
    )


conv_p = Primitive("conv2d")
"""`_plain_conv` of x and a kernel, with the flipped kernel as an operand that has no influence.

A primitive, because only that may choose its gradient by platform and be differentiated forward: a
`jax.custom_vjp` cannot.
"""


def _value(x: jax.Array, kernel: jax.Array, flipped: jax.Array, *, how: _How) -> jax.Array:
    del flipped
    return _plain_conv(x, kernel, how)


def _type(x: Any, kernel: Any, flipped: Any, *, how: _How) -> Any:
    return jax.make_jaxpr(lambda *a: _value(*a, how=how))(x, kernel, flipped).out_avals[0]


def _jvp(primals: Any, tangents: Any, *, how: _How) -> tuple[jax.Array, Any]:
    x, kernel, flipped = primals
    d_x, d_kernel, d_flipped = tangents
    out = conv_p.bind(x, kernel, flipped, how=how)
    terms = []
    if not isinstance(d_x, ad.Zero):
        terms.append(conv_p.bind(d_x, kernel, flipped, how=how))
    if not isinstance(d_kernel, ad.Zero):
        terms.append(conv_p.bind(x, d_kernel, ad.instantiate_zeros(d_flipped), how=how))
    return out, sum(terms[1:], terms[0])


def _transpose(cotangent: Any, x: Any, kernel: Any, flipped: Any, *, how: _How) -> list[Any]:
    if isinstance(cotangent, ad.Zero):
        return [None, None, None]
    if ad.is_undefined_primal(x):
        return [_to_x(cotangent, x.aval.shape, kernel, flipped, how), None, None]
    return [None, _to_kernel(cotangent, x, kernel.aval.shape, how), None]


def _batch(operands: Any, axes: Any, *, how: _How) -> tuple[jax.Array, int]:
    x, kernel, flipped = operands
    if axes[1] is not None or axes[2] is not None:
        mapped = jax.vmap(lambda *a: _value(*a, how=how), axes)
        return mapped(x, kernel, flipped), 0
    x = jnp.moveaxis(x, axes[0], 0)
    y = conv_p.bind(x.reshape(-1, *x.shape[2:]), kernel, flipped, how=how)
    return y.reshape(*x.shape[:2], *y.shape[1:]), 0


conv_p.def_impl(_value)
conv_p.def_abstract_eval(_type)
ad.primitive_jvps[conv_p] = _jvp
ad.primitive_transposes[conv_p] = _transpose
batching.primitive_batchers[conv_p] = _batch
mlir.register_lowering(conv_p, mlir.lower_fun(_value, multiple_results=False))


def _to_x(
    cotangent: jax.Array, shape: tuple[int, ...], kernel: jax.Array, flipped: jax.Array, how: _How
) -> jax.Array:
    """The gradient by x: a convolution of the same family, so that this holds at every order.

    Tap p carried position i * stride + p * spread - before to i; the flipped tap carries it back.
    Stride and dilation change places.
    """
    pads = []
    for axis in (0, 1):
        before, window, reach, size = _extent(cotangent, shape, kernel.shape, how, axis)
        pads.append((window - 1 - before, size - reach + before))
    back = _How(how.dilation, tuple(pads), how.strides, how.spread)
    return lax.platform_dependent(
        cotangent,
        kernel,
        flipped,
        cpu=lambda y, kernel, flipped: conv_p.bind(y, flipped, kernel, how=back),
        default=lambda y, kernel, flipped: _plain_conv(
            y, lax.rev(kernel, (0, 1)), back, ("NHWC", "HWOI", "NHWC")
        ),
    )


def _to_kernel(cotangent: jax.Array, x: jax.Array, shape: tuple[int, ...], how: _How) -> jax.Array:
    """The gradient by the kernel: the same sum, read as a convolution over its taps p.

    Its own taps are the positions i.  Stride and spread change places, channels and batch of x too.
    """
    pads = []
    for axis in (0, 1):
        before, window, reach, size = _extent(cotangent, x.shape, shape, how, axis)
        pads.append((before, window - 1 + reach - size - before))
    back = _How(how.spread, tuple(pads), how.dilation, how.strides)

    def cpu(x: jax.Array, y: jax.Array) -> jax.Array:
        return _conv(x.transpose(3, 1, 2, 0), y.transpose(1, 2, 0, 3), back).transpose(1, 2, 0, 3)

    return lax.platform_dependent(
        x,
        cotangent,
        cpu=cpu,
        default=lambda x, y: _plain_conv(x, y, back, ("CHWN", "IHWO", "HWNC")),
    )


def _extent(
    cotangent: jax.Array, x: tuple[int, ...], kernel: tuple[int, ...], how: _How, axis: int
) -> tuple[int, int, int, int]:
    """Zeros before, window, reach of the output grid and size of x, along H or W."""
    window = (kernel[axis] - 1) * how.spread[axis] + 1
    reach = (cotangent.shape[axis + 1] - 1) * how.strides[axis] + 1
    size = (x[axis + 1] - 1) * how.dilation[axis] + 1
    return how.pads[axis][0], window, reach, size
