"""A convolutional DEQ classifier of one resolution, for small images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import deq_jax as deq
from deq_jax import linen
from deq_jax.implicit import Adjoint, BackwardStats
from deq_jax.models.layers import Conv, GroupNorm, group_norm
from deq_jax.solvers import Solution, Solver


class ResidualCell(nn.Module):
    """The residual block that is iterated, as in one branch of a multiscale DEQ.

        h = conv2(relu(GN(conv1(z))))
        f(z, x) = GN(relu(GN(mask * h + x) + z))

    Attributes:
      channels: C, channels of the state.
      expansion: the hidden layer has `expansion * C` channels.
      groups: groups of every normalisation; it divides C.
      dropout: probability of dropping an element of h, with one mask for a whole solve.
      kernel_init: initialiser of both kernels.

    Example:
      >>> cell, z = ResidualCell(channels=8), jnp.ones((2, 4, 4, 8))
      >>> cell.init_with_output(jax.random.key(0), z, z)[0].shape
      (2, 4, 4, 8)

    Reference: Bai, Koltun and Kolter, Multiscale Deep Equilibrium Models, NeurIPS 2020, figure 2.
    """

    channels: int
    expansion: int = 1
    groups: int = 8
    dropout: float = 0.0
    kernel_init: Callable[..., jax.Array] = nn.initializers.he_normal()

    @nn.compact
    def __call__(self, z: jax.Array, x: jax.Array, masks: jax.Array | None = None) -> jax.Array:
        """One application of f.

        Args:
          z: state, float [B, H, W, C].
          x: injected input, float [B, H, W, C].
          masks: what `masks` drew, or None.

        Returns:
          float [B, H, W, C].
        """
        h = Conv(self.expansion * self.channels, kernel_init=self.kernel_init, name="conv1")(z)
        h = nn.relu(GroupNorm(self.groups, name="norm1")(h))
        h = Conv(self.channels, kernel_init=self.kernel_init, name="conv2")(h)
        if masks is not None:
            h = h * masks
        h = GroupNorm(self.groups, name="norm2")(h + x)
        # Without scale and bias: the state has unit size whatever is penalised.
        return GroupNorm(self.groups, affine=False)(nn.relu(h + z))

    def masks(self, key: jax.Array, z: jax.Array, x: jax.Array) -> jax.Array | None:
        """Draws the dropout mask of one solve.

        Args:
          key: PRNG key.
          z: start of the solve, float [B, H, W, C].
          x: not used.

        Returns:
          float [B, H, W, C] divided by 1 - dropout, or None when nothing is dropped.
        """
        del x
        if self.dropout == 0:
            return None
        return deq.masks.bernoulli(key, z.shape, self.dropout, dtype=z.dtype)


class ConvDEQ(nn.Module):
    """Image classifier: stem, equilibrium of a `ResidualCell`, head.

        x = conv(relu(GN(conv(image))));   z* = f(z*, x);   logits = linear(pool(relu(GN(z*))))

    The solve starts at ``GN(relu(GN(x)))``, what f gives where the two convolutions and the state
    are left out: it costs nothing, and makes the first steps of the solve worth looking at.

    Attributes:
      classes: number of classes.
      solver: forward solver.
      adjoint: gradient rule; None for `Implicit(solver)`.
      channels: C, channels of stem and state.
      expansion: see `ResidualCell`.
      groups: see `ResidualCell`.
      dropout: see `ResidualCell`.
      pool: the head averages over squares of `pool` positions; it divides H and W.
      kernel_init: initialiser of the cell's kernels.
      reparam: reparametrisation of the cell's kernels, None for plain ones.
      fixed_point: `deq.fixed_point`, or the sharded one of `training.parallel`.

    Example:
      >>> model = ConvDEQ(classes=10, solver=deq.Anderson(max_steps=5), channels=8)
      >>> images = jnp.ones((2, 8, 8, 1))
      >>> variables = model.init(jax.random.key(0), images, train=False)
      >>> logits, solution = model.apply(variables, images, train=False)
      >>> logits.shape, solution.value.shape
      ((2, 10), (2, 8, 8, 8))
    """

    classes: int
    solver: Solver
    adjoint: Adjoint | None = None
    channels: int = 24
    expansion: int = 1
    groups: int = 8
    dropout: float = 0.0
    pool: int = 4
    kernel_init: Callable[..., jax.Array] = nn.initializers.he_normal()
    reparam: Any = deq.weight_norm
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
        """Classifies images.

        Args:
          images: float [B, H, W, channels of the image].
          train: whether dropout masks are drawn (stream "dropout").
          max_steps: budget of this solve; None for the solver's.
          probe: see `deq.backward_probe`.

        Returns:
          logits float32 [B, classes], and the solution of the solve.

        Raises:
          ValueError: `pool` does not divide the images.
        """
        height, width = images.shape[1:3]
        if height % self.pool or width % self.pool:
            raise ValueError(
                f"got images of {height} x {width} with pool={self.pool}; wanted a pool that "
                "divides both"
            )
        stem = nn.relu(
            GroupNorm(self.groups, name="stem_norm")(Conv(self.channels, name="stem")(images))
        )
        x = Conv(self.channels, name="inject")(stem)
        z0 = group_norm(nn.relu(group_norm(x, self.groups)), self.groups)
        cell = ResidualCell(
            self.channels, self.expansion, self.groups, self.dropout, self.kernel_init, parent=None
        )
        layer = linen.DEQ(
            cell,
            self.solver,
            adjoint=self.adjoint,
            reparam=self.reparam,
            fixed_point=self.fixed_point,
            name="equilibrium",
        )
        solution = layer(z0, x, train=train, max_steps=max_steps, probe=probe)
        features = nn.relu(GroupNorm(self.groups, name="head_norm")(solution.value))
        pooled = nn.avg_pool(features, (self.pool, self.pool), (self.pool, self.pool))
        logits = nn.Dense(self.classes, name="head")(pooled.reshape(len(pooled), -1))
        return logits.astype(jnp.float32), solution
