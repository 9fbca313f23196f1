"""The multiscale DEQ for images: several resolutions that are one equilibrium.

    x = stem(image);   z* = f(z*, x), z = (z_0, z_1, ...), finest first;   logits = head(z*)

Reference: Bai, Koltun and Kolter, Multiscale Deep Equilibrium Models, NeurIPS 2020.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import deq_jax as deq
from deq_jax import linen
from deq_jax.adjoints import Adjoint, BackwardStats
from deq_jax.models.layers import NORMAL, BatchNorm, Conv
from deq_jax.models.mdeq_cell import WEIGHT_NORM, MDEQCell
from deq_jax.solvers import Keep, Solution, Solver


class Stem(nn.Module):
    """From the image to the injection: two 3x3 convolutions with batch norm, outside the solve.

    Attributes:
      channels: of the finest branch.
      downsample: how many of the two convolutions halve the resolution, 0 to 2.
      inject: whether a 1x1 convolution follows.
      momentum: of the batch normalisations.

    Example:
      >>> stem = Stem(8, downsample=1)
      >>> images = jnp.ones((2, 8, 8, 3))
      >>> stem.init_with_output(jax.random.key(0), images, train=False)[0].shape
      (2, 4, 4, 8)
    """

    channels: int
    downsample: int = 0
    inject: bool = False
    momentum: float = 0.1

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Maps images [B, H, W, colours] to [B, H / 2^downsample, W / 2^downsample, channels]."""
        x = images
        for i in (1, 2):
            strides = 2 if self.downsample >= i else 1
            x = Conv(self.channels, strides=strides, kernel_init=NORMAL, name=f"conv{i}")(x)
            x = nn.relu(BatchNorm(self.momentum, name=f"norm{i}")(x, train=train))
        if self.inject:
            x = Conv(self.channels, 1, kernel_init=NORMAL, name="inject")(x)
            x = nn.relu(BatchNorm(self.momentum, name="inject_norm")(x, train=train))
        return x


class MDEQ(nn.Module):
    """Stem, equilibrium of an `MDEQCell`, head.

    The solve starts at zero.  Weight norm and dropout masks are computed once per call.

    Attributes:
      cell: the map that is iterated.
      head: a module called as ``head(z, train=...)``: `ClassificationHead` or another.
      solver: forward solver.
      adjoint: gradient rule; None for ``Implicit(solver)``.
      keep: the iterate to return, ``"best"`` (smallest residual) or ``"last"``.
      downsample: how often the stem halves the images, 0 to 2.
      momentum: weight of the newest batch in the stem's running batch statistics.
      reparam: reparametrisation of the cell's parameters, None for plain ones.
      fixed_point: `deq.fixed_point`, or the sharded one of `training.parallel`.

    Example:
      >>> from deq_jax.models.heads import ClassificationHead
      >>> model = MDEQ(
      ...     cell=MDEQCell(channels=(8, 16)),
      ...     head=ClassificationHead(classes=10, widths=(2, 4), final=32),
      ...     solver=deq.Broyden(max_steps=5),
      ... )
      >>> images = jnp.ones((2, 8, 8, 3))
      >>> variables = model.init(jax.random.key(0), images, train=False)
      >>> logits, solution = model.apply(variables, images, train=False)
      >>> logits.shape, solution.value[1].shape
      ((2, 10), (2, 4, 4, 16))
    """

    cell: MDEQCell
    head: nn.Module
    solver: Solver
    adjoint: Adjoint | None = None
    keep: Keep = "best"
    downsample: int = 0
    momentum: float = 0.1
    reparam: Any = WEIGHT_NORM
    fixed_point: Callable[..., Solution] = deq.fixed_point

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool,
        max_steps: int | jax.Array | None = None,
        probe: BackwardStats | None = None,
    ) -> tuple[jax.Array, Solution]:
        """Runs the model.

        Args:
          images: float [B, H, W, colours].
          train: whether batch statistics are those of the batch (the collection "batch_stats" must
            then be mutable) and dropout masks are drawn (stream "dropout").
          max_steps: budget of this solve; None for the solver's.
          probe: see `deq.backward_probe`.

        Returns:
          What the head makes of the equilibrium, and the solution of the solve.

        Raises:
          ValueError: images that cannot be halved as often as the branches want.
        """
        branches = len(self.cell.channels)
        self._check(images)
        # The published code leaves the 1x1 injection out in small models.
        inject = self.downsample > 0 or branches > 2
        stem = Stem(self.cell.channels[0], self.downsample, inject, self.momentum, name="stem")
        x = stem(images, train=train)
        batch, height, width, _ = x.shape
        z0 = tuple(
            jnp.zeros((batch, height >> i, width >> i, c), x.dtype)
            for i, c in enumerate(self.cell.channels)
        )
        layer = linen.DEQ(
            self.cell.clone(parent=None, name=None),
            self.solver,
            adjoint=self.adjoint,
            keep=self.keep,
            reparam=self.reparam,
            fixed_point=self.fixed_point,
            name="equilibrium",
        )
        solution = layer(z0, x, train=train, max_steps=max_steps, probe=probe)
        return self.head(solution.value, train=train), solution

    def _check(self, images: jax.Array) -> None:
        if self.downsample not in (0, 1, 2):
            raise ValueError(f"downsample must be 0, 1 or 2, got {self.downsample}")
        unit = 2 ** (self.downsample + len(self.cell.channels) - 1)
        height, width = images.shape[1:3]
        if height % unit or width % unit:
            raise ValueError(
                f"got images of {height} x {width}; wanted both sides to divide by {unit}, for "
                f"{self.downsample} halvings in the stem and {len(self.cell.channels)} branches: "
                "crop or resize the images, or take fewer branches"
            )
