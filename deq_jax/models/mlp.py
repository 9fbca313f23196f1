"""Fully connected DEQs: the cell of the paper's synthetic task, and a general one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import deq_jax as deq
from deq_jax import linen
from deq_jax.adjoints import Adjoint, BackwardStats
from deq_jax.models.families import product_inits
from deq_jax.models.layers import UNIFORM
from deq_jax.solvers import Keep, Solution, Solver

Activation = Callable[[jax.Array], jax.Array]


def hard_tanh(x: jax.Array) -> jax.Array:
    """Clips to [-1, 1].

    Args:
      x: any array.

    Returns:
      The same shape.

    Example:
      >>> hard_tanh(jnp.array([-3.0, 0.5])).tolist()
      [-1.0, 0.5]
    """
    return jnp.clip(x, -1, 1)


def identity(x: jax.Array) -> jax.Array:
    """Returns its argument: the activation of a linear DEQ.

    Args:
      x: anything.

    Returns:
      `x`.

    Example:
      >>> identity(3)
      3
    """
    return x


class ToyCell(nn.Module):
    """The two-layer map of the synthetic task; its state is the prediction itself.

    f(z; x) = W2^T relu(W1 z + U x + b)

    All parameters start uniform in +-1/sqrt(fan in), the default of PyTorch's linear layers, with
    which the published results were made.

    Attributes:
      hidden: number of hidden units.
      weights: family of the product W2^T W1 at the start; None for the published weights.

    Example:
      >>> z = jnp.ones((2, 1))
      >>> ToyCell(5).init_with_output(jax.random.key(0), z, z)[0].shape
      (2, 1)

    Reference: Bai, Koltun and Kolter, arXiv 2106.14342, section 5.1.
    """

    hidden: int = 50
    weights: deq.init.MatrixInitializer | None = None

    @nn.compact
    def __call__(self, z: jax.Array, x: jax.Array) -> jax.Array:
        """Maps state z [B, n_out] and input x [B, n_in] to the next state [B, n_out]."""
        bias = self.param("bias", UNIFORM, (1, self.hidden))  # fan in of the scalar task
        first, second = product_inits(self, self.weights, "W1", UNIFORM)
        h = nn.Dense(self.hidden, use_bias=False, kernel_init=first, name="W1")(z)
        h = h + nn.Dense(self.hidden, use_bias=False, kernel_init=UNIFORM, name="U")(x) + bias
        out = nn.Dense(z.shape[-1], use_bias=False, kernel_init=second, name="W2")
        return out(nn.relu(h))


class DenseCell(nn.Module):
    """One fully connected layer as a map of the state.

    ``f(z; x) = phi(W z + x)``

    Attributes:
      activation: phi, e.g. `jnp.tanh`, `jax.nn.relu`, ``hard_tanh``, ``identity``.
      kernel_init: initialiser of W, e.g. ``deq.init.orthogonal(0.8)``.

    Example:
      >>> z = jnp.ones((2, 4))
      >>> DenseCell(jnp.tanh).init_with_output(jax.random.key(0), z, z)[0].shape
      (2, 4)

    Reference: Agarwala and Schoenholz, arXiv 2207.09432, section 2.
    """

    activation: Activation = jnp.tanh
    kernel_init: Callable[..., jax.Array] = deq.init.orthogonal(0.5)

    @nn.compact
    def __call__(self, z: jax.Array, x: jax.Array) -> jax.Array:
        """Maps state z [B, D] and injection x [B, D] to the next state [B, D]."""
        kernel = self.param("kernel", self.kernel_init, (z.shape[-1], z.shape[-1]))
        return self.activation(z @ kernel + x)


class ScalarDEQ(nn.Module):
    """The model of the synthetic task: the equilibrium of a `ToyCell` is the prediction.

    ``y = z*``, ``z* = f(z*; x)``, solved from 0.

    Attributes:
      solver: forward solver.
      adjoint: gradient rule; None for ``Implicit(solver)``.
      keep: the iterate to return, ``"best"`` (smallest residual) or ``"last"``.
      hidden: hidden units of the cell.
      weights: family of the cell's initial weights; None for the published ones.
      fixed_point: `deq.fixed_point`, or the sharded one of `training.parallel`.

    Example:
      >>> model = ScalarDEQ(solver=deq.Broyden(max_steps=6))
      >>> x = jnp.ones((3, 1))
      >>> variables = model.init(jax.random.key(0), x, train=False)
      >>> model.apply(variables, x, train=False)[0].shape
      (3, 1)
    """

    solver: Solver
    adjoint: Adjoint | None = None
    keep: Keep = "best"
    hidden: int = 50
    weights: deq.init.MatrixInitializer | None = None
    fixed_point: Callable[..., Solution] = deq.fixed_point

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        train: bool,
        max_steps: int | jax.Array | None = None,
        probe: BackwardStats | None = None,
    ) -> tuple[jax.Array, Solution]:
        """Predicts.

        Args:
          x: float [B, n].
          train: not used; there is no dropout.
          max_steps: budget of this solve; None for the solver's.
          probe: see `deq.backward_probe`.

        Returns:
          prediction float [B, 1], and the solution of the solve.
        """
        layer = linen.DEQ(
            ToyCell(self.hidden, self.weights, parent=None),
            self.solver,
            adjoint=self.adjoint,
            keep=self.keep,
            fixed_point=self.fixed_point,
            name="equilibrium",
        )
        solution = layer(jnp.zeros_like(x[:, :1]), x, train=train, max_steps=max_steps, probe=probe)
        return solution.value, solution


class MLPDEQ(nn.Module):
    """Fully connected DEQ: linear encoder, equilibrium of a `DenseCell`, linear readout.

    ``z* = phi(W z* + E x + e)``, ``y = R z* + r``

    Attributes:
      outputs: size of y.
      width: D, size of the state.
      solver: forward solver.
      adjoint: gradient rule; None for ``Implicit(solver)``.
      keep: the iterate to return, ``"best"`` (smallest residual) or ``"last"``.
      activation: phi.
      kernel_init: initialiser of W.
      reparam: reparametrisation of W, None for a plain one.
      fixed_point: `deq.fixed_point`, or the sharded one of `training.parallel`.

    Example:
      >>> model = MLPDEQ(outputs=3, width=16, solver=deq.Anderson())
      >>> x = jnp.ones((2, 5))
      >>> variables = model.init(jax.random.key(0), x, train=False)
      >>> model.apply(variables, x, train=False)[0].shape
      (2, 3)
    """

    outputs: int
    width: int
    solver: Solver
    adjoint: Adjoint | None = None
    keep: Keep = "best"
    activation: Activation = jnp.tanh
    kernel_init: Callable[..., jax.Array] = deq.init.orthogonal(0.5)
    reparam: Any = None
    fixed_point: Callable[..., Solution] = deq.fixed_point

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        train: bool,
        max_steps: int | jax.Array | None = None,
        probe: BackwardStats | None = None,
    ) -> tuple[jax.Array, Solution]:
        """Maps inputs to outputs.

        Args:
          x: float [B, n].
          train: not used; there is no dropout.
          max_steps: budget of this solve; None for the solver's.
          probe: see `deq.backward_probe`.

        Returns:
          float [B, outputs], and the solution of the solve.
        """
        injected = nn.Dense(self.width, name="encoder")(x)
        layer = linen.DEQ(
            DenseCell(self.activation, self.kernel_init, parent=None),
            self.solver,
            adjoint=self.adjoint,
            keep=self.keep,
            reparam=self.reparam,
            fixed_point=self.fixed_point,
            name="equilibrium",
        )
        z0 = jnp.zeros_like(injected)
        solution = layer(z0, injected, train=train, max_steps=max_steps, probe=probe)
        return nn.Dense(self.outputs, name="readout")(solution.value), solution
