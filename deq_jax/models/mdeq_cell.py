"""The map that a multiscale DEQ iterates.

Parameters that are not under weight normalisation, their initial values, the order of operations
and the padding follow the published code, so that its weights can be loaded (`deq_jax.convert`).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

import deq_jax as deq
from deq_jax.models.families import Init, product_inits
from deq_jax.models.heads import State
from deq_jax.models.layers import NORMAL, UNIFORM, Conv, GroupNorm, upsample_nearest
from deq_jax.reparam import WeightNorm, is_weight


def is_normalised(path: str, leaf: Any) -> bool:
    """Tells which of an `MDEQCell`'s parameters the published model puts under weight norm.

    Args:
      path: of the leaf in the cell's parameters, keys joined by ``/``.
      leaf: the array.

    Returns:
      True for the kernels of the residual blocks and of the convolutions after the fusion.

    Example:
      >>> is_normalised("fuse_0_1/conv/kernel", jax.numpy.ones((1, 1, 4, 4)))
      False
    """
    return path.startswith(("branch", "post")) and is_weight(path, leaf)


WEIGHT_NORM = WeightNorm(select=is_normalised)
"""The reparametrisation of the published model."""


class Block(nn.Module):
    """The residual block of one branch.

        h = mask * conv2(relu(GN(conv1(z))))
        y = GN(relu(GN(h + x) + z))

    Attributes:
      expansion: the hidden layer has `expansion` times the channels of z.
      big_kernels: how many of the two convolutions are 5x5 instead of 3x3, the first one first.
      groups: groups of every normalisation.
      kernel_init: initialiser of both kernels.
      weights: family of the product of both kernels at their centre taps, not ``kernel_init``;
        gaussian ones are drawn at all taps.

    Example:
      >>> z = jax.numpy.ones((2, 4, 4, 8))
      >>> Block().init_with_output(jax.random.key(0), z, None, None)[0].shape
      (2, 4, 4, 8)
    """

    expansion: int = 5
    big_kernels: int = 0
    groups: int = 8
    kernel_init: Init = UNIFORM
    weights: deq.init.MatrixInitializer | None = None

    @nn.compact
    def __call__(self, z: jax.Array, x: jax.Array | None, mask: jax.Array | None) -> jax.Array:
        """Maps z float [B, H, W, C], x and mask like z or None, to the shape of z."""
        channels = z.shape[-1]
        windows = [5 if self.big_kernels > i else 3 for i in (0, 1)]
        first, second = product_inits(self, self.weights, "conv1", self.kernel_init)
        h = Conv(self.expansion * channels, windows[0], kernel_init=first, name="conv1")(z)
        h = nn.relu(GroupNorm(self.groups, name="norm1")(h))
        h = Conv(channels, windows[1], kernel_init=second, name="conv2")(h)
        h = h if mask is None else h * mask
        h = h if x is None else h + x
        h = GroupNorm(self.groups, name="norm2")(h)
        return GroupNorm(self.groups, name="norm3")(nn.relu(h + z))


class Down(nn.Module):
    """From a finer branch to a coarser one: strided 3x3 convolutions, one for each halving.

    Attributes:
      features: channels of the target.
      halvings: how often the resolution is halved.
      groups: groups of the normalisations.

    Example:
      >>> Down(16, 2).init_with_output(jax.random.key(0), jax.numpy.ones((1, 8, 8, 8)))[0].shape
      (1, 2, 2, 16)
    """

    features: int
    halvings: int
    groups: int = 8

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        """Maps float [B, H, W, C] to [B, H / 2^halvings, W / 2^halvings, features]."""
        source = z.shape[-1]
        for k in range(self.halvings):
            last = k == self.halvings - 1
            width = self.features if last else source
            z = Conv(width, strides=2, kernel_init=NORMAL, name=f"conv{k}")(z)
            z = GroupNorm(self.groups, name=f"norm{k}")(z)
            z = z if last else nn.relu(z)
        return z


class Up(nn.Module):
    """From a coarser branch to a finer one: 1x1 convolution, normalisation, nearest neighbour.

    Attributes:
      features: channels of the target.
      doublings: how often the resolution is doubled.
      groups: groups of the normalisation.

    Example:
      >>> Up(16, 2).init_with_output(jax.random.key(0), jax.numpy.ones((1, 2, 2, 8)))[0].shape
      (1, 8, 8, 16)
    """

    features: int
    doublings: int
    groups: int = 8

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        """Maps float [B, H, W, C] to [B, H * 2^doublings, W * 2^doublings, features]."""
        z = Conv(self.features, 1, kernel_init=NORMAL, name="conv")(z)
        return upsample_nearest(GroupNorm(self.groups, name="norm")(z), 2**self.doublings)


class After(nn.Module):
    """What closes a branch after the fusion: GN(conv(relu(z))), with half of the groups.

    Attributes:
      groups: groups of the model's other normalisations.
      affine: whether the normalisation has scale and bias.
      kernel_init: initialiser of the 1x1 kernel.

    Example:
      >>> After().init_with_output(jax.random.key(0), jax.numpy.ones((1, 4, 4, 8)))[0].shape
      (1, 4, 4, 8)
    """

    groups: int = 8
    affine: bool = False
    kernel_init: Init = UNIFORM

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        """Maps float [B, H, W, C] to the same shape."""
        z = Conv(z.shape[-1], 1, kernel_init=self.kernel_init, name="conv")(nn.relu(z))
        return GroupNorm(max(self.groups // 2, 1), self.affine, name="norm")(z)


class MDEQCell(nn.Module):
    """The map f that is iterated: a residual block in every branch, then all branches into all.

        y_i = block_i(z_i, x if i = 0);   s_i = sum_j fuse_ij(y_j);   f_i = GN(conv(relu(s_i)))

    with fuse_ij the identity for i = j, ``Down`` for j < i and ``Up`` for j > i.

    Attributes:
      channels: C_i, channels of each branch, finest first.
      expansion: of the blocks.
      blocks: residual blocks in each branch; the first one takes the injection.
      big_kernels: for each branch, how many of a block's two convolutions are 5x5; () for none.
      groups: groups of the normalisations; it divides all channels.
      post_affine: whether the last normalisation has scale and bias.
      dropout: probability of dropping an element of a block's h, one mask for a whole solve.
      remat: whether a gradient computes the inside of each block and of each resizing again,
        instead of keeping it: less memory, more time.
      kernel_init: initialiser of the kernels that weight norm owns.
      weights: family of the initial weights of what maps a branch to itself, instead of
        ``kernel_init``: the blocks' two kernels as a product, and the 1x1 kernel after the fusion.

    Raises:
      ValueError: lengths that disagree, groups that do not divide, a rate outside [0, 1).

    Example:
      >>> cell = MDEQCell(channels=(8, 16))
      >>> z = (jax.numpy.ones((1, 4, 4, 8)), jax.numpy.ones((1, 2, 2, 16)))
      >>> out, _ = cell.init_with_output(jax.random.key(0), z, z[0])
      >>> [y.shape for y in out]
      [(1, 4, 4, 8), (1, 2, 2, 16)]

    Reference: Bai, Koltun and Kolter, Multiscale Deep Equilibrium Models, figure 2.
    """

    channels: tuple[int, ...]
    expansion: int = 5
    blocks: int = 1
    big_kernels: tuple[int, ...] = ()
    groups: int = 8
    post_affine: bool = False
    dropout: float = 0.0
    remat: bool = False
    kernel_init: Init = UNIFORM
    weights: deq.init.MatrixInitializer | None = None

    def __post_init__(self) -> None:
        """Refuses settings that do not fit each other."""
        check_cell(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, z: State, x: jax.Array, masks: Any = None) -> State:
        """One application of f.

        Args:
          z: state.
          x: injection into the finest branch, like z[0].
          masks: what `masks` drew, or None.

        Returns:
          The next state.
        """
        parts: tuple[Any, ...] = (Block, Down, Up, After)
        if self.remat:  # for a gradient, and for the gradient of a gradient, the penalty's
            parts = tuple(nn.remat(nn.remat(part)) for part in parts)
        block_type, down, up, close = parts
        branches = range(len(self.channels))
        after_blocks = []
        for i, y in enumerate(z):
            for j in range(self.blocks):
                big = self.big_kernels[i] if self.big_kernels else 0
                block = block_type(
                    self.expansion,
                    big,
                    self.groups,
                    self.kernel_init,
                    self.weights,
                    name=f"branch{i}_block{j}",
                )
                mask = masks[i][j] if masks is not None else None
                y = block(y, x if i == j == 0 else None, mask)
            after_blocks.append(y)
        fused = []
        for i in branches:
            total = after_blocks[i]
            for j in branches:
                if j != i:
                    way = down if j < i else up
                    resize = way(self.channels[i], abs(i - j), self.groups, name=f"fuse_{i}_{j}")
                    total = total + resize(after_blocks[j])
            init = self.weights or self.kernel_init
            after = close(self.groups, self.post_affine, init, name=f"post{i}")
            fused.append(after(total))
        return tuple(fused)

    def masks(self, key: jax.Array, z: State, x: jax.Array) -> Any:
        """Draws the dropout masks of one solve.

        Args:
          key: PRNG key.
          z: start of the solve.
          x: not used.

        Returns:
          For each branch and block an array like z_i, divided by 1 - dropout; None when nothing is
          dropped.
        """
        del x
        if self.dropout == 0:
            return None
        keys = jax.random.split(key, (len(z), self.blocks))
        return tuple(
            tuple(deq.masks.bernoulli(k, z_i.shape, self.dropout, dtype=z_i.dtype) for k in row)
            for z_i, row in zip(z, keys, strict=True)
        )


def check_cell(cell: Any) -> None:
    """Refuses settings of a cell that do not fit each other.

    Args:
      cell: anything with the attributes of `MDEQCell`.

    Raises:
      ValueError: as `MDEQCell` says.

    Example:
      >>> check_cell(MDEQCell(channels=(8, 16)))
    """
    channels, groups = cell.channels, cell.groups
    if not channels or min(channels) < 1:
        raise ValueError(f"channels must be one number above 0 for each branch, got {channels}")
    if groups < 1 or any(c % groups for c in channels):
        raise ValueError(f"groups must divide all channels {channels}, got {groups}")
    if cell.expansion < 1 or cell.blocks < 1:
        raise ValueError(
            f"expansion and blocks must be at least 1, got {cell.expansion} and {cell.blocks}"
        )
    big = cell.big_kernels
    if big and (len(big) != len(channels) or not set(big) <= {0, 1, 2}):
        raise ValueError(
            f"big_kernels must be 0, 1 or 2 for each of the {len(channels)} branches, or empty, "
            f"got {big}"
        )
    if not 0 <= cell.dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {cell.dropout}")
