"""The `fixed_point` that a configuration asks for: split over devices, f in bfloat16."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import deq_jax as deq
from deq_jax.adjoints import Map
from deq_jax.solvers import Equation, Solution
from deq_jax.training.config import Config
from deq_jax.training.parallel import sharded_fixed_point
from deq_jax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class InBfloat16:
    """f(params, z, x) computed in bfloat16 for a state, parameters and operands in float32.

    Attributes:
      f: the map; float32 in, float32 out.
      has_aux: whether f returns ``(z, aux)``.

    Example:
      >>> f = InBfloat16(lambda params, z, x: params * z + x)
      >>> one = jnp.ones((1, 1))
      >>> f(one, one, 0.001 * one).item(), f(one, one, 0.001 * one).dtype.name
      (1.0, 'float32')
    """

    f: Map
    has_aux: bool = False

    def __call__(self, params: PyTree, z: PyTree, x: PyTree) -> PyTree:
        """Casts, applies f and casts back, all but what f returns beside z."""
        out = self.f(*(jax.tree.map(_lower, part) for part in (params, z, x)))
        image, *aux = out if self.has_aux else (out,)
        image = jax.tree.map(lambda a, like: a.astype(like.dtype), image, z)
        return (image, *aux) if self.has_aux else image


def in_bfloat16(fixed_point: Callable[..., Solution]) -> Callable[..., Solution]:
    """Makes a `deq_jax.fixed_point` whose f is computed in bfloat16, forward and backward.

    State, history, residuals and parameters stay in float32, and so do the gradients that devices
    sum.  The rounding of f, up to 2^-9 of every element, is what a residual can fall to.

    Args:
      fixed_point: `deq_jax.fixed_point`, or one with its signature.

    Returns:
      A function of the same signature.

    Example:
      >>> from deq_jax import Picard, fixed_point
      >>> solve, one = in_bfloat16(fixed_point), jnp.ones((1, 1))
      >>> sol = solve(lambda p, z, x: 0.5 * z + x, None, one, one, solver=Picard(tol=4e-3))
      >>> sol.value.dtype.name, abs(sol.value.item() - 2) < 0.02
      ('float32', True)
    """

    def solve(f: Map, params: PyTree, z0: PyTree, x: PyTree = None, **options: Any) -> Solution:
        # The compiler moves the casts of params and x out of the loops.
        lowered = InBfloat16(f, options.get("has_aux", False))
        solution = fixed_point(lowered, params, z0, x, **options)
        if lowered.has_aux:  # its f is none of z alone
            return solution
        equation = solution.equation or Equation(f=lowered, params=params, x=x)
        return dataclasses.replace(solution, equation=equation)

    return solve


def _lower(leaf: Any) -> Any:
    return leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf


def make_fixed_point(config: Config, mesh: Mesh | None, x_axes: Any = 0) -> Callable[..., Solution]:
    """Builds the `fixed_point` that a configuration asks for.

    Args:
      config: precision is read.
      mesh: the devices over which solves are split; None for one device.
      x_axes: which leaves of x are split, see `sharded_fixed_point`.

    Returns:
      A function with the signature of `deq_jax.fixed_point`.

    Example:
      >>> make_fixed_point(Config(), None) is deq.fixed_point
      True
    """
    solve = deq.fixed_point if mesh is None else sharded_fixed_point(mesh, x_axes)
    return in_bfloat16(solve) if config.precision == "bf16" else solve


def solve_options(config: Config, mesh: Mesh | None, x_axes: Any = 0) -> dict[str, Any]:
    """The fields by which a model with a DEQ layer is told how to solve.

    Args:
      config: solver, backward, jac and precision are read.
      mesh: see `make_fixed_point`.
      x_axes: see `make_fixed_point`.

    Returns:
      "solver", "adjoint", "keep" and "fixed_point".

    Example:
      >>> sorted(solve_options(Config(), None))
      ['adjoint', 'fixed_point', 'keep', 'solver']
    """
    return {
        "solver": config.build_solver(),
        "adjoint": config.backward.build_adjoint(),
        "keep": config.solver.keep,
        "fixed_point": make_fixed_point(config, mesh, x_axes),
    }
