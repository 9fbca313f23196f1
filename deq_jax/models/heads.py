"""Heads of the multiscale DEQ: what is made of an equilibrium of several resolutions.

Layout, initial values and batch normalisation as in the published code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from deq_jax.models.layers import NORMAL, UNIFORM, BatchNorm, Conv, resize_bilinear

State = tuple[jax.Array, ...]
"""One float [B, H_i, W_i, C_i] for each branch, finest first, each half as high and wide."""

EXPANSION = 4
"""Channels that leave a bottleneck, over its width."""


class Bottleneck(nn.Module):
    """Residual bottleneck of the classification head: 1x1, 3x3, 1x1.

    Its three batch normalisations have no scale and bias, that of the projection has.

    Attributes:
      width: channels inside; four times as many leave.
      momentum: of the batch normalisations.

    Example:
      >>> x = jnp.ones((1, 4, 4, 8))
      >>> Bottleneck(2).init_with_output(jax.random.key(0), x, train=False)[0].shape
      (1, 4, 4, 8)
    """

    width: int
    momentum: float = 0.1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps float [B, H, W, C] to [B, H, W, 4 * width]."""
        out = EXPANSION * self.width
        y = x
        for i, (features, window) in enumerate(((self.width, 1), (self.width, 3), (out, 1)), 1):
            y = nn.relu(y) if i > 1 else y
            y = Conv(features, window, kernel_init=NORMAL, name=f"conv{i}")(y)
            y = BatchNorm(self.momentum, affine=False, name=f"norm{i}")(y, train=train)
        if x.shape[-1] != out:
            x = Conv(out, 1, kernel_init=NORMAL, name="project")(x)
            x = BatchNorm(self.momentum, name="project_norm")(x, train=train)
        return nn.relu(x + y)


class ClassificationHead(nn.Module):
    """From the equilibrium to logits, from the finest branch down.

        y = bottleneck(z_0);   y = bottleneck(z_i) + relu(BN(strided conv(y))), i = 1, 2, ...
        logits = linear(mean over positions of relu(BN(conv(y))))

    Attributes:
      classes: number of classes.
      widths: of the bottlenecks, one for each branch.
      final: channels before the pooling.
      momentum: of the batch normalisations.

    Raises:
      ValueError: another number of widths than of branches.

    Example:
      >>> head = ClassificationHead(classes=10, widths=(2, 4), final=32)
      >>> z = (jnp.ones((1, 4, 4, 8)), jnp.ones((1, 2, 2, 16)))
      >>> head.init_with_output(jax.random.key(0), z, train=False)[0].shape
      (1, 10)
    """

    classes: int
    widths: tuple[int, ...]
    final: int
    momentum: float = 0.1

    @nn.compact
    def __call__(self, z: State, *, train: bool) -> jax.Array:
        """Maps a state to logits, float32 or wider [B, classes]."""
        if len(self.widths) != len(z):
            raise ValueError(
                f"widths of the head must be one number for each of the {len(z)} branches, got "
                f"{self.widths}"
            )
        y: Any = None
        for i, (width, branch) in enumerate(zip(self.widths, z, strict=True)):
            wide = Bottleneck(width, self.momentum, name=f"increase{i}")(branch, train=train)
            if y is not None:
                y = self._conv(f"down{i - 1}", y, EXPANSION * width, 3, 2)
                wide = wide + self._norm(f"down{i - 1}_norm", y, train)
            y = wide
        y = self._norm("final_norm", self._conv("final", y, self.final, 1, 1), train)
        linear = nn.Dense(
            self.classes,
            kernel_init=UNIFORM,
            bias_init=pytorch_bias(self.final),
            name="classifier",
        )
        return _at_least_float32(linear(y.mean((1, 2))))

    def _conv(self, name: str, x: jax.Array, features: int, window: int, strides: int) -> jax.Array:
        layer = Conv(
            features,
            window,
            strides,
            use_bias=True,
            kernel_init=NORMAL,
            bias_init=NORMAL,
            name=name,
        )
        return layer(x)

    def _norm(self, name: str, x: jax.Array, train: bool) -> jax.Array:
        return nn.relu(BatchNorm(self.momentum, name=name)(x, train=train))


class SegmentationHead(nn.Module):
    """From the equilibrium to a score for every class and pixel of the finest branch.

        y = join of all branches, resized bilinearly with aligned corners
        scores = conv1x1(relu(BN(conv1x1(y))))

    Attributes:
      classes: number of classes.
      momentum: of the batch normalisation.

    Example:
      >>> z = (jnp.ones((1, 4, 4, 8)), jnp.ones((1, 2, 2, 16)))
      >>> SegmentationHead(19).init_with_output(jax.random.key(0), z, train=False)[0].shape
      (1, 4, 4, 19)
    """

    classes: int
    momentum: float = 0.1

    @nn.compact
    def __call__(self, z: State, *, train: bool) -> jax.Array:
        """Maps a state to scores, float32 or wider [B, H_0, W_0, classes]."""
        y = upsample_and_join(z)
        options: Any = {"use_bias": True, "kernel_init": NORMAL, "bias_init": NORMAL}
        y = Conv(y.shape[-1], 1, name="merge", **options)(y)
        y = nn.relu(BatchNorm(self.momentum, name="merge_norm")(y, train=train))
        return _at_least_float32(Conv(self.classes, 1, name="scores", **options)(y))


def _at_least_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def pytorch_bias(fan_in: int) -> Callable[..., jax.Array]:
    """PyTorch's default bias of a layer, uniform in +-1/sqrt(fan_in).

    Args:
      fan_in: inputs of one unit of the layer.

    Returns:
      An initialiser.

    Example:
      >>> bool(jnp.abs(pytorch_bias(4)(jax.random.key(0), (9,))).max() <= 0.5)
      True
    """
    bound = 1 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def upsample_and_join(z: State) -> jax.Array:
    """Resizes all branches to the finest one and joins their channels.

    Args:
      z: state.

    Returns:
      float [B, H_0, W_0, sum of C_i]; bilinear, corners aligned.

    Example:
      >>> upsample_and_join((jnp.ones((1, 4, 4, 2)), jnp.ones((1, 2, 2, 3)))).shape
      (1, 4, 4, 5)
    """
    height, width = z[0].shape[1:3]
    resized = [resize_bilinear(y, (height, width), align_corners=True) for y in z[1:]]
    return jnp.concatenate([z[0], *resized], axis=-1)
