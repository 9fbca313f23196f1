"""Residual networks, the explicit baselines for the multiscale DEQ."""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from deq_jax.models.layers import BatchNorm, Conv

STAGES = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
"""Blocks in each of the four stages, by depth."""

INIT = nn.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")


class ResidualBlock(nn.Module):
    """One residual block: y = relu(shortcut(x) + branch(x)).

    The branch is two 3x3 convolutions, or with a bottleneck 1x1, 3x3 and 1x1 to four times the
    width; the stride is that of the (first) 3x3 convolution.

    Attributes:
      width: channels inside.
      strides: of the block.
      bottleneck: which branch.
      momentum: of the batch normalisations.

    Example:
      >>> block, x = ResidualBlock(8, 2, True), jnp.ones((1, 8, 8, 16))
      >>> block.init_with_output(jax.random.key(0), x, train=False)[0].shape
      (1, 4, 4, 32)
    """

    width: int
    strides: int = 1
    bottleneck: bool = False
    momentum: float = 0.1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps float [B, H, W, C] to [B, H / strides, W / strides, width or 4 * width]."""
        out = self.width * (4 if self.bottleneck else 1)
        if self.bottleneck:
            layers = [(self.width, 1, 1), (self.width, 3, self.strides), (out, 1, 1)]
        else:
            layers = [(self.width, 3, self.strides), (out, 3, 1)]
        y = x
        for i, (features, window, strides) in enumerate(layers, 1):
            y = nn.relu(y) if i > 1 else y
            y = Conv(features, window, strides, kernel_init=INIT, name=f"conv{i}")(y)
            y = BatchNorm(self.momentum, name=f"norm{i}")(y, train=train)
        if self.strides != 1 or x.shape[-1] != out:
            x = Conv(out, 1, self.strides, kernel_init=INIT, name="project")(x)
            x = BatchNorm(self.momentum, name="project_norm")(x, train=train)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet-18, 50 or 101.

    Strides stand on the 3x3 convolutions of the bottlenecks, as in today's common variant.

    Attributes:
      classes: number of classes.
      depth: 18, 50 or 101.
      stem: "imagenet" for a 7x7 convolution and max pooling, which halve the images twice; "cifar"
        for a single 3x3 convolution, which leaves their size.
      width: channels of the first stage; each further stage has twice as many.
      momentum: of the batch normalisations.

    Raises:
      ValueError: another depth or stem.

    Example:
      >>> model, x = ResNet(classes=10, depth=18, stem="cifar", width=8), jnp.ones((1, 32, 32, 3))
      >>> jax.eval_shape(lambda k: model.init_with_output(k, x, train=False)[0], jax.random.key(0))
      ShapeDtypeStruct(shape=(1, 10), dtype=float32)

    Reference: He, Zhang, Ren and Sun, arXiv 1512.03385, table 1.
    """

    classes: int
    depth: int
    stem: Literal["cifar", "imagenet"] = "imagenet"
    width: int = 64
    momentum: float = 0.1

    def __post_init__(self) -> None:
        """Refuses depths and stems that do not exist."""
        if self.depth not in STAGES:
            raise ValueError(f"depth must be one of {sorted(STAGES)}, got {self.depth}")
        if self.stem not in ("cifar", "imagenet"):
            raise ValueError(f'stem must be "cifar" or "imagenet", got {self.stem!r}')
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Classifies images.

        Args:
          images: float [B, H, W, colours].
          train: whether batch statistics are those of the batch (the collection "batch_stats" must
            then be mutable).

        Returns:
          logits, float32 or wider [B, classes].
        """
        window, strides = (7, 2) if self.stem == "imagenet" else (3, 1)
        x = Conv(self.width, window, strides, kernel_init=INIT, name="conv")(images)
        x = nn.relu(BatchNorm(self.momentum, name="norm")(x, train=train))
        if self.stem == "imagenet":
            pads: Any = ((1, 1), (1, 1))
            x = nn.max_pool(x, (3, 3), (2, 2), pads)
        for i, blocks in enumerate(STAGES[self.depth]):
            for j in range(blocks):
                block = ResidualBlock(
                    self.width * 2**i,
                    2 if i > 0 and j == 0 else 1,
                    self.depth > 18,
                    self.momentum,
                    name=f"stage{i}_block{j}",
                )
                x = block(x, train=train)
        logits = nn.Dense(self.classes, name="classifier")(x.mean((1, 2)))
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
