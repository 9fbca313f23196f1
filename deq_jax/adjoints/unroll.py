"""The gradient through damped applications of f after the solve."""

from __future__ import annotations

import dataclasses

import jax
from jax import lax

from deq_jax import traced
from deq_jax.adjoints.base import Call
from deq_jax.solvers.base import Keep, Solution, Solver, check_count, check_fraction
from deq_jax.solvers.loop import Operands, Outcome, Settings, at, solve_traced
from deq_jax.traced import Traced
from deq_jax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class Unroll:
    """Differentiates through ``steps`` damped applications of f after the solve.

        z <- (1 - damping) z + damping f(params, z, x)

    The iteration starts from the solver's value, which is held constant.  ``Unroll(1)`` is the
    Jacobian-free gradient, ``Unroll(k, tau)`` the phantom gradient; after a solve of zero steps it
    is the weight-tied network of k layers used to warm up.  The value returned is the last iterate;
    the statistics are those of the solve before it.

    Args:
      steps: applications of f, at least 1.
      damping: step length in (0, 1].

    Returns:
      A gradient rule for `fixed_point`.

    Raises:
      ValueError: for a setting out of range.

    Example:
      >>> import jax, jax.numpy as jnp, deq_jax as deq
      >>> def loss(x):
      ...     f = lambda params, z, x: 0.5 * z + x
      ...     solver, rule = deq.Picard(max_steps=20), deq.Unroll(2)
      ...     return deq.fixed_point(f, None, 0 * x, x, solver=solver, adjoint=rule).value.sum()
      >>> jax.grad(loss)(jnp.ones((1, 2))).tolist()
      [[1.5, 1.5]]

    Reference:
      Fung et al., JFB: Jacobian-Free Backpropagation for Implicit Networks (2022);
      Geng et al., On Training Implicit Models (2021), equation (9).
    """

    steps: int
    damping: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", check_count("Unroll", "steps", self.steps))
        object.__setattr__(self, "damping", check_fraction("Unroll", "damping", self.damping))

    def check(self, solver: Solver, keep: Keep) -> None:
        """See `Adjoint`; every solver will do."""

    def run(self, call: Call) -> Solution:
        """See `Adjoint`."""
        program, settings, operands = call.prepare()
        found = traced.call(_unroll, program, (self, settings), operands, inline=False)
        return Solution(found.value, found.stats, states=found.states)


def _unroll(program: Traced, rule: Unroll, settings: Settings, operands: Operands) -> Outcome:
    found = lax.stop_gradient(solve_traced(program, settings, lax.stop_gradient(operands)))

    def layers(z: PyTree) -> PyTree:
        return applied(program, operands, z, rule.steps, rule.damping)

    return Outcome(layers(found.value), found.stats, tuple(map(layers, found.states)))


def applied(
    program: Traced, operands: Operands, z: PyTree, steps: int = 1, damping: float = 1.0
) -> PyTree:
    """Applies f to a constant state, with damping.

    Args:
      program: f.
      operands: its operands, with respect to which the result can be differentiated.
      z: the state, tree ``[B, ...]``.
      steps: number of applications.
      damping: step length.

    Returns:
      Tree like ``z``.
    """
    f = at(program, operands)

    def layer(z: PyTree, _: None) -> tuple[PyTree, None]:
        image = f(z)
        if damping == 1.0:
            return image, None
        return jax.tree.map(lambda a, b: a + damping * (b - a), z, image), None

    return lax.scan(layer, lax.stop_gradient(z), None, length=steps)[0]
