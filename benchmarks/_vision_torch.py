"""The multiscale DEQ in PyTorch: the network that deq_jax is measured against.

Parameters are named as in the published state dict, so that one set of weights runs in both
libraries.
"""

# PyTorch and torchdeq are installed by the extra [bench] only.
# pyright: reportMissingImports=false

import functools
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks._case import PENALTY
from benchmarks._torch import Equilibrium, WeightNorm, refresh, start

GROUPS = 8
EXPANSION = 4  # of a bottleneck


class _NormedConv(WeightNorm):
    def __init__(self, inner: int, out: int, window: int) -> None:
        weight = torch.empty(out, inner, window, window)
        super().__init__(nn.init.kaiming_uniform_(weight, a=math.sqrt(5)))
        self.padding = window // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight, padding=self.padding)


class _Block(nn.Module):
    """Residual block of one branch; the finest one gets the injection x."""

    def __init__(self, channels: int, expansion: int) -> None:
        super().__init__()
        hidden = expansion * channels
        self.conv1, self.gn1 = _NormedConv(channels, hidden, 3), nn.GroupNorm(GROUPS, hidden)
        self.conv2, self.gn2 = _NormedConv(hidden, channels, 3), nn.GroupNorm(GROUPS, channels)
        self.gn3 = nn.GroupNorm(GROUPS, channels)

    def forward(self, z: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor:
        h = self.conv2(F.relu(self.gn1(self.conv1(z)), inplace=True))
        h = self.gn2(h if x is None else h + x)
        return self.gn3(F.relu(h + z))


def _unit(
    conv: nn.Module, channels: int, groups: int = GROUPS, affine: bool = True
) -> nn.Sequential:
    """Convolution and group normalisation."""
    norm = nn.GroupNorm(groups, channels, affine=affine)
    return nn.Sequential(OrderedDict(conv=conv, gnorm=norm))


def _resize(channels: tuple[int, ...], i: int, j: int) -> nn.Module:
    """From branch j to branch i: strided convolutions down, or a 1x1 one and repetition up."""
    if i == j:
        return nn.Identity()
    inner, out = channels[j], channels[i]
    if j > i:
        net = _unit(_plain(inner, out, 1, 1), out)
        net.append(nn.Upsample(scale_factor=2 ** (j - i)))
    else:
        widths = [inner] * (i - j - 1) + [out]
        net = nn.Sequential(*(_unit(_plain(inner, width, 3, 2), width) for width in widths))
        for unit in net[:-1]:
            unit.append(nn.ReLU(inplace=True))
    return nn.Sequential(OrderedDict(net=net))


def _plain(inner: int, out: int, window: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(inner, out, window, stride, window // 2, bias=False)
    nn.init.normal_(conv.weight, 0, 0.01)
    return conv


class _Cell(nn.Module):
    """The map that is iterated; `channels` are those of each branch, finest first."""

    def __init__(self, channels: tuple[int, ...], expansion: int) -> None:
        super().__init__()
        ways = range(len(channels))
        blocks = [nn.ModuleList([_Block(c, expansion)]) for c in channels]
        self.branches = nn.ModuleList(nn.ModuleDict({"blocks": one}) for one in blocks)
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(_resize(channels, i, j) for j in ways) for i in ways
        )
        self.post_fuse_layers = nn.ModuleList(
            _unit(_NormedConv(c, c, 1), c, GROUPS // 2, affine=False) for c in channels
        )

    def forward(self, z: list[torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
        blocks = [branch["blocks"][0] for branch in self.branches]
        y = [block(z[i], None if i else x) for i, block in enumerate(blocks)]
        out = []
        for i, after in enumerate(self.post_fuse_layers):
            row: Any = self.fuse_layers[i]
            parts = [resize(y_j) for resize, y_j in zip(row, y, strict=True)]
            total = functools.reduce(torch.add, parts)
            out.append(after(F.relu(total)))
        return out


class _Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a projection; four times as many channels leave as are inside."""

    def __init__(self, inner: int, width: int) -> None:
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
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


def _conv_norm(inner: int, out: int, window: int, stride: int = 1, bias: bool = True) -> list:
    conv = nn.Conv2d(inner, out, window, stride, window // 2, bias=bias)
    return [conv, nn.BatchNorm2d(out), nn.ReLU()]


class _MDEQ(nn.Module):
    """Stem, cell and head; the solve sits between the last two."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        first, wide = model.channels[0], [EXPANSION * w for w in model.head]
        self.downsample = nn.Sequential(
            *_conv_norm(3, first, 3, bias=False), *_conv_norm(first, first, 3, bias=False)
        )
        inject = nn.Sequential(*_conv_norm(first, first, 1, bias=False))
        self.stage0 = inject if len(model.channels) > 2 else nn.Identity()
        self.fullstage = _Cell(model.channels, model.expansion)
        sizes = zip(model.channels, model.head, strict=True)
        self.incre_modules = nn.ModuleList(nn.Sequential(_Bottleneck(c, w)) for c, w in sizes)
        self.downsamp_modules = nn.ModuleList(
            nn.Sequential(*_conv_norm(a, b, 3, 2)) for a, b in zip(wide[:-1], wide[1:], strict=True)
        )
        self.final_layer = nn.Sequential(*_conv_norm(wide[-1], model.final, 1))
        self.classifier = nn.Linear(model.final, model.classes)

    def stem(self, images: torch.Tensor) -> torch.Tensor:
        """From images [B, 3, H, W] to the injection; weights are normalised here."""
        refresh(self.fullstage)
        return self.stage0(self.downsample(images))

    def head(self, z: list[torch.Tensor]) -> torch.Tensor:
        """From the equilibrium to logits."""
        y = self.incre_modules[0](z[0])
        for down, increase, branch in zip(
            self.downsamp_modules, self.incre_modules[1:], z[1:], strict=True
        ):
            y = down(y) + increase(branch)
        return self.classifier(self.final_layer(y).mean((2, 3)))


def build(
    case: Any, config: Any, batch: dict[str, np.ndarray]
) -> tuple[Callable[[], None], Callable[[], dict[str, float]]]:
    """Sets one case up.

    Args:
        case: a `benchmarks.vision.Case`; its form is "NCHW", "channels_last" or "compiled".
        config: an `experiments.image_classification.config.ImageConfig`.
        batch: "image" [B, H, W, 3] and "label" [B].

    Returns:
        What runs a step or an inference, and what gives the evaluations of f and the products with
        its Jacobian in the last run.
    """
    device = start(case.device, case.threads)
    last, train = case.form != "NCHW", case.task != "infer"
    order = torch.channels_last if last else torch.contiguous_format
    place: Any = {"device": device, "memory_format": order}
    net = _MDEQ(config.model).train(train).to(**place)
    images = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2).to(**place)
    classes = torch.from_numpy(batch["label"]).long().to(device)
    shapes = [(c, 32 >> i, 32 >> i) for i, c in enumerate(config.model.channels)]
    sizes = list(map(math.prod, shapes))
    # torchdeq's Broyden makes one evaluation more than its steps.
    solve = Equilibrium(
        net.fullstage,
        case,
        f_solver="broyden",
        b_solver="broyden",
        f_max_iter=config.solver.max_steps - 1,
        b_max_iter=config.backward.max_steps - 1,
        eval_f_max_iter=config.eval_steps - 1,
    )

    # The state is one matrix [B, D], where each branch lies as its images lie in memory.
    def join(z: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([(y.permute(0, 2, 3, 1) if last else y).flatten(1) for y in z], 1)

    def split(flat: torch.Tensor) -> list[torch.Tensor]:
        pairs = zip(flat.split(sizes, 1), shapes, strict=True)
        if last:
            return [y.unflatten(1, (h, w, c)).permute(0, 3, 1, 2) for y, (c, h, w) in pairs]
        return [y.unflatten(1, shape) for y, shape in pairs]

    def run() -> None:
        net.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(train):
            x = net.stem(images)
            zeros = x.new_zeros(x.shape[0], sum(sizes))
            z = solve(lambda cell, flat: join(cell(split(flat), x)), zeros)
            logits = net.head(split(z))
        if train:
            (F.cross_entropy(logits, classes) + PENALTY * solve.penalty).backward()
        if device == "cuda":
            torch.cuda.synchronize()

    if case.form == "compiled":
        run()  # compiling takes memory of its own
    return run, solve.counts


def reference(
    model: Any, batch: dict[str, np.ndarray]
) -> tuple[dict, list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Evaluates the network at a random state, for the comparison with deq_jax.

    Args:
        model: sizes.
        batch: "image" [B, H, W, 3].

    Returns:
        Its state dict, z, f(z, x) for the x of the images, and the head's logits at z; NHWC.
    """
    torch.manual_seed(0)
    net = _MDEQ(model).eval()
    for parameter in net.parameters():  # scales of 1 and biases of 0 would hide a mistake
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    images = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2)
    sizes = [(len(images), c, 32 >> i, 32 >> i) for i, c in enumerate(model.channels)]
    z = list(map(torch.randn, sizes))
    with torch.no_grad():
        out, logits = net.fullstage(z, net.stem(images)), net.head(z).numpy()
    states, values = ([y.permute(0, 2, 3, 1).numpy() for y in part] for part in (z, out))
    state = {name: value.numpy() for name, value in net.state_dict().items()}
    return state, states, values, logits
