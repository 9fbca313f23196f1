"""The multiscale DEQ in PyTorch: the network that deq_jax is measured against.

Parameters are named as in the published state dict, so that one set of weights runs in both
libraries.  Weights under weight norm are computed once a step, as in deq_jax.
"""

# PyTorch is installed by the extra [bench] only.
# pyright: reportMissingImports=false

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks._vision_case import Model

GROUPS = 8
EXPANSION = 4  # of a bottleneck


class NormedConv(nn.Module):
    """Convolution under weight norm; `refresh` computes its weight, once a step."""

    def __init__(self, inner: int, out: int, window: int) -> None:
        """Draws PyTorch's default weights.

        Args:
            inner: channels that enter.
            out: channels that leave.
            window: size of the kernel.
        """
        super().__init__()
        weight = torch.empty(out, inner, window, window)
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        self.weight_v = nn.Parameter(weight)
        self.weight_g = nn.Parameter(weight.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1))
        self.padding = window // 2

    def refresh(self) -> None:
        """Computes the weight from its length and direction."""
        v = self.weight_v
        self.weight = v * (self.weight_g / v.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolves [B, inner, H, W]."""
        return F.conv2d(x, self.weight, padding=self.padding)


class Block(nn.Module):
    """Residual block of one branch."""

    def __init__(self, channels: int, expansion: int) -> None:
        """Builds it.

        Args:
            channels: of the branch.
            expansion: hidden channels over those.
        """
        super().__init__()
        hidden = expansion * channels
        self.conv1, self.gn1 = NormedConv(channels, hidden, 3), nn.GroupNorm(GROUPS, hidden)
        self.conv2, self.gn2 = NormedConv(hidden, channels, 3), nn.GroupNorm(GROUPS, channels)
        self.gn3 = nn.GroupNorm(GROUPS, channels)

    def forward(self, z: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor:
        """Maps the branch z, with the injection x in the finest one."""
        h = self.conv2(F.relu(self.gn1(self.conv1(z)), inplace=True))
        h = self.gn2(h if x is None else h + x)
        return self.gn3(F.relu(h + z))


class Unit(nn.Module):
    """Convolution and group normalisation."""

    def __init__(self, conv: nn.Module, channels: int, groups: int = GROUPS, affine: bool = True):
        """Keeps the convolution.

        Args:
            conv: of `channels` outputs.
            channels: to be normalised.
            groups: of the normalisation.
            affine: whether it has scale and bias.
        """
        super().__init__()
        self.conv, self.gnorm = conv, nn.GroupNorm(groups, channels, affine=affine)
        self.activation: nn.Module = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolves and normalises."""
        return self.activation(self.gnorm(self.conv(x)))


class Resize(nn.Module):
    """From branch j to branch i: strided convolutions down, or a 1x1 one and repetition up."""

    def __init__(self, channels: tuple[int, ...], i: int, j: int) -> None:
        """Builds it.

        Args:
            channels: of all branches.
            i: where to.
            j: where from.
        """
        super().__init__()
        inner, out = channels[j], channels[i]
        self.factor = 2 ** max(j - i, 0)
        if j > i:
            self.net: nn.Module = Unit(_plain(inner, out, 1, 1), out)
            return
        widths = [inner] * (i - j - 1) + [out]
        units = [Unit(_plain(inner, width, 3, 2), width) for width in widths]
        for unit in units[:-1]:
            unit.activation = nn.ReLU(inplace=True)
        self.net = nn.Sequential(*units)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Maps branch j to the shape of branch i."""
        z = self.net(z)
        return F.interpolate(z, scale_factor=self.factor) if self.factor > 1 else z


def _plain(inner: int, out: int, window: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(inner, out, window, stride, window // 2, bias=False)
    nn.init.normal_(conv.weight, 0, 0.01)
    return conv


class Branch(nn.Module):
    """One resolution's residual block."""

    def __init__(self, channels: int, expansion: int) -> None:
        """Builds it.

        Args:
            channels: of the branch.
            expansion: of its block.
        """
        super().__init__()
        self.blocks = nn.ModuleList([Block(channels, expansion)])

    def forward(self, z: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor:
        """Applies the block."""
        return self.blocks[0](z, x)


class Cell(nn.Module):
    """The map that is iterated."""

    def __init__(self, channels: tuple[int, ...], expansion: int) -> None:
        """Builds it.

        Args:
            channels: of each branch, finest first.
            expansion: of the blocks.
        """
        super().__init__()
        ways = range(len(channels))
        self.branches = nn.ModuleList(Branch(c, expansion) for c in channels)
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(nn.Identity() if i == j else Resize(channels, i, j) for j in ways)
            for i in ways
        )
        self.post_fuse_layers = nn.ModuleList(
            Unit(NormedConv(c, c, 1), c, GROUPS // 2, affine=False) for c in channels
        )

    def forward(self, z: list[torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
        """One application of f."""
        y = [branch(z[i], None if i else x) for i, branch in enumerate(self.branches)]
        out = []
        for i, after in enumerate(self.post_fuse_layers):
            row: Any = self.fuse_layers[i]
            parts = [resize(y_j) for resize, y_j in zip(row, y, strict=True)]
            total = functools.reduce(torch.add, parts)
            out.append(after(F.relu(total)))
        return out


class Bottleneck(nn.Module):
    """Of the head: 1x1, 3x3, 1x1 and a projection."""

    def __init__(self, inner: int, width: int) -> None:
        """Builds it.

        Args:
            inner: channels that enter.
            width: channels inside; four times as many leave.
        """
        super().__init__()
        out = EXPANSION * width
        self.conv1 = nn.Conv2d(inner, width, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn1, self.bn2 = (nn.BatchNorm2d(width, affine=False) for _ in range(2))
        self.bn3 = nn.BatchNorm2d(out, affine=False)
        project = nn.Sequential(nn.Conv2d(inner, out, 1, bias=False), nn.BatchNorm2d(out))
        self.downsample = nn.Identity() if inner == out else project

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [B, inner, H, W] to [B, 4 * width, H, W]."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


def _conv_norm(inner: int, out: int, window: int, stride: int = 1, bias: bool = True) -> list:
    conv = nn.Conv2d(inner, out, window, stride, window // 2, bias=bias)
    return [conv, nn.BatchNorm2d(out), nn.ReLU()]


class Mdeq(nn.Module):
    """Stem, cell, head; `solve` sits between them."""

    def __init__(self, model: Model) -> None:
        """Builds it.

        Args:
            model: sizes.
        """
        super().__init__()
        first, wide = model.channels[0], [EXPANSION * w for w in model.head]
        self.downsample = nn.Sequential(
            *_conv_norm(3, first, 3, bias=False), *_conv_norm(first, first, 3, bias=False)
        )
        inject = nn.Sequential(*_conv_norm(first, first, 1, bias=False))
        self.stage0 = inject if len(model.channels) > 2 else nn.Identity()
        self.fullstage = Cell(model.channels, model.expansion)
        sizes = zip(model.channels, model.head, strict=True)
        self.incre_modules = nn.ModuleList(nn.Sequential(Bottleneck(c, w)) for c, w in sizes)
        self.downsamp_modules = nn.ModuleList(
            nn.Sequential(*_conv_norm(a, b, 3, 2)) for a, b in zip(wide[:-1], wide[1:], strict=True)
        )
        self.final_layer = nn.Sequential(*_conv_norm(wide[-1], model.final, 1))
        self.classifier = nn.Linear(model.final, model.classes)

    def stem(self, images: torch.Tensor) -> torch.Tensor:
        """From images [B, 3, H, W] to the injection; weights are normalised here."""
        for module in self.fullstage.modules():
            if isinstance(module, NormedConv):
                module.refresh()
        return self.stage0(self.downsample(images))

    def head(self, z: list[torch.Tensor]) -> torch.Tensor:
        """From the equilibrium to logits."""
        y = self.incre_modules[0](z[0])
        for down, increase, branch in zip(
            self.downsamp_modules, self.incre_modules[1:], z[1:], strict=True
        ):
            y = down(y) + increase(branch)
        return self.classifier(self.final_layer(y).mean((2, 3)))
