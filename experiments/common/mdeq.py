"""What the image tasks share: the settings of the multiscale DEQ, and its wiring."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from deq_jax.models.mdeq import MDEQ
from deq_jax.models.mdeq_cell import MDEQCell, check_cell
from deq_jax.solvers.base import StopMode
from deq_jax.training import BackwardConfig, Config, SolverConfig, option, require
from deq_jax.training.solving import solve_options
from experiments.common.families import FamilyConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrunkConfig(FamilyConfig):
    """Stem and cell of a multiscale DEQ; an image task inherits and adds its head."""

    channels: tuple[int, ...] = option((24, 24), "channels of each branch, finest first")
    expansion: int = option(5, "channels of a block's hidden layer over those of its branch")
    blocks: int = option(1, "residual blocks in each branch")
    big_kernels: tuple[int, ...] = option(
        (), "for each branch, how many of a block's two convolutions are 5x5; empty for none"
    )
    groups: int = option(8, "groups of the normalisations in the cell")
    post_affine: bool = option(False, "whether the cell's last normalisation has scale and bias")
    dropout: float = option(0.0, "variational dropout in the blocks, one mask for a solve")
    remat: bool = option(
        False, "whether gradients compute the inside of blocks again: less memory, more time",
        may_change=True,
    )  # fmt: skip
    downsample: int = option(0, "how often the stem halves the images: 0, 1 or 2")
    momentum: float = option(0.1, "weight of the newest batch in running batch statistics")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_cell(self)
        require(self.downsample in (0, 1, 2), "downsample", "0, 1 or 2", self.downsample)
        require(0 < self.momentum <= 1, "momentum", "in (0, 1]", self.momentum)


def check_size(trunk: TrunkConfig, height: int, width: int) -> None:
    """Refuses images that the branches cannot halve.

    Args:
      trunk: channels and downsample are read.
      height: of the images.
      width: of the images.

    Raises:
      ValueError: a side does not divide.

    Example:
      >>> check_size(TrunkConfig(channels=(8, 8)), 32, 32)
    """
    unit = 2 ** (trunk.downsample + len(trunk.channels) - 1)
    require(
        height > 0 and width > 0 and height % unit == 0 and width % unit == 0,
        "data.size",
        f"a multiple of {unit} in both directions for {len(trunk.channels)} branches and "
        f"downsample {trunk.downsample}",
        (height, width),
    )


def build_mdeq(config: Config, trunk: TrunkConfig, head: nn.Module, mesh: Mesh) -> MDEQ:
    """Wires a multiscale DEQ.

    Args:
      config: solver, backward, jac and eval are read.
      trunk: stem and cell.
      head: what is made of the equilibrium.
      mesh: the devices over which the solve is split.

    Returns:
      The model.
    """
    cell = MDEQCell(
        channels=trunk.channels,
        expansion=trunk.expansion,
        blocks=trunk.blocks,
        big_kernels=trunk.big_kernels,
        groups=trunk.groups,
        post_affine=trunk.post_affine,
        dropout=trunk.dropout,
        remat=trunk.remat,
        weights=trunk.build_weights(),
    )
    return MDEQ(
        cell=cell,
        head=head,
        downsample=trunk.downsample,
        momentum=trunk.momentum,
        **solve_options(config, mesh),
    )


def image_shapes(
    config: Config, size: tuple[int, ...], label: tuple[int, ...]
) -> dict[str, jax.ShapeDtypeStruct]:
    """The sample of an image task, see `deq_jax.training.Task`.

    Args:
      config: train.batch_size is read.
      size: height, width and colours of an image.
      label: shape of a label.

    Returns:
      "image" float32 and "label" int32, with the batch axis in front.

    Example:
      >>> image_shapes(Config(), (8, 8, 1), ())["image"].shape
      (64, 8, 8, 1)
    """
    batch = config.train.batch_size
    return {
        "image": jax.ShapeDtypeStruct((batch, *size), jnp.float32),
        "label": jax.ShapeDtypeStruct((batch, *label), jnp.int32),
    }


def broyden(
    forward: int, backward: int, stop: StopMode, *, backward_tol: float = 1e-3
) -> dict[str, Any]:
    """Broyden's method both ways, forward with the published tolerance, 1e-3.

    Args:
      forward: evaluations of f in training.
      backward: products with the Jacobian in training.
      stop: what the tolerance is for, in both directions.
      backward_tol: tolerance of the backward solve; the published one if absent.

    Returns:
      solver and backward, as keyword arguments of a `Config`.

    Example:
      >>> broyden(18, 20, "rel")["solver"].max_steps
      18
    """
    back = BackwardConfig(solver="broyden", max_steps=backward, tol=backward_tol, stop=stop)
    return {
        "solver": SolverConfig(name="broyden", max_steps=forward, tol=1e-3, stop=stop),
        "backward": back,
    }
