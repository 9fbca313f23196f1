"""The gradient through the iterations of the solver."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
from jax import lax

from deq_jax import traced, tree
from deq_jax.adjoints.base import Call
from deq_jax.solvers.base import Keep, Solution, Solver, check_count
from deq_jax.solvers.loop import Loop, Operands, Outcome, Settings, at, iterate
from deq_jax.traced import Traced


@dataclasses.dataclass(frozen=True)
class Backprop:
    """Differentiates through the solver's own iterations, as through an unrolled loop.

    The gradient is exact for the value returned, after any number of steps.  It reaches ``z0`` too.
    A step beyond the budget, or after all samples have stopped, is skipped at run time forward and
    backward: a *traced* ``max_steps`` trains with random loop counts by one compilation.

    The backward pass evaluates f again instead of storing what happened inside.  With
    ``segments=1`` it stores the iterates (and the solver's state) of all n = ``max_steps`` steps.
    With more segments it stores ``segments + n / segments`` of them, for one more evaluation of f a
    step; the square root of n stores the least.

    A sample that leaves the finite numbers makes the gradient NaN, as in every unrolled loop.

    Args:
      segments: number of stretches of steps, of which only the first iterate is stored.

    Returns:
      A gradient rule for `fixed_point`.

    Raises:
      ValueError: if ``segments`` is no whole number of at least 1.

    Example:
      >>> import jax, jax.numpy as jnp, deq_jax as deq
      >>> def loss(x, steps):
      ...     f = lambda params, z, x: 0.5 * z + x
      ...     solver, rule = deq.Picard(tol=1e-9, max_steps=16), deq.Backprop()
      ...     return deq.fixed_point(
      ...         f, None, 0 * x, x, solver=solver, adjoint=rule, keep="last", max_steps=steps
      ...     ).value.sum()
      >>> jax.jit(jax.grad(loss))(jnp.ones((1, 2)), 2).tolist()
      [[1.5, 1.5]]

    Reference:
      Griewank, Walther, Evaluating Derivatives, SIAM (2008), chapter 12; Chen et al., Training
      Deep Nets with Sublinear Memory Cost (2016).
    """

    segments: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", check_count("Backprop", "segments", self.segments))

    def check(self, solver: Solver, keep: Keep) -> None:
        """See `Adjoint`; every solver will do."""

    def run(self, call: Call) -> Solution:
        """See `Adjoint`."""
        program, settings, operands = call.prepare(apart=True)
        found = traced.call(_solve, program, (self, settings), operands, inline=False)
        return Solution(found.value, found.stats, states=found.states)


def _solve(program: Traced, rule: Backprop, settings: Settings, operands: Operands) -> Outcome:
    limit = settings.solver.max_steps if settings.budget is None else settings.budget
    run = functools.partial(_run, limit, rule.segments)
    data, restore = tree.without_keys(operands)
    return iterate(
        settings,
        lambda z: at(program, restore(data))(z),
        operands.z0,
        operands.budget,
        run=run,
        hold=True,
    )


def _run(
    limit: int,
    segments: int,
    go: Callable[[Loop], jax.Array],
    body: Callable[[Loop], Loop],
    start: Loop,
) -> Loop:
    """A loop of at most ``limit`` steps that can be differentiated backward."""

    def repeat(body: Callable[[Loop], Loop], length: int, c: Loop) -> Loop:
        def step(c: Loop, _: None) -> tuple[Loop, None]:
            return jax.checkpoint(lambda c: lax.cond(go(c), body, lambda c: c, c))(c), None

        return lax.scan(step, c, None, length=length)[0]

    segments = min(segments, limit)
    steps = functools.partial(repeat, body, math.ceil(limit / segments))
    return steps(start) if segments == 1 else repeat(steps, segments, start)
