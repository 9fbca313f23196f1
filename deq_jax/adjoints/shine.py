"""The gradient by the factors that Broyden's forward solve leaves."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from deq_jax import traced, tree
from deq_jax.adjoints.base import BackwardStats, Call, as_probe, floats
from deq_jax.adjoints.implicit import at_unit_scale, sampled
from deq_jax.solvers.anderson import Anderson
from deq_jax.solvers.base import Keep, Solution, Solver, SolveStats, as_int, check_solver
from deq_jax.solvers.broyden import Broyden, BroydenState
from deq_jax.solvers.loop import Operands, Outcome, Settings, at, iterate, solve_traced
from deq_jax.traced import Traced
from deq_jax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class Shine:
    """Uses the inverse Jacobian that Broyden's forward solve has built for the backward pass too.

    The forward solve ends with H, an approximation of (J - I)^-1.  In place of the solution of
    u = J^T u + v, the backward pass takes u = P v with P = -H^T, which costs no vector-Jacobian
    product, and refines it: steps of Anderson's method for u = u + P (v + J^T u - u), one product
    each.

    P knows only the directions of the forward steps.  On cells trained with a Jacobian penalty
    (``benchmarks.shine``) P alone was hardly nearer to the exact gradient than the Jacobian-free
    one, by cosine 0.972 to 0.972 (image cell) and 0.948 to 0.947 (text cell); one refining step
    gave 0.999 and 0.990.

    A sample whose forward solve did not converge keeps the Jacobian-free gradient, u = v.

    Args:
      refine: number of refining steps, 0 or more.  Or a solver: then all samples are refined from
        their start (P v, or v with P = I) until its tolerance, and the gradient is the exact one,
        as by `Implicit`.

    Returns:
      A gradient rule for `fixed_point`, whose solver has to be `Broyden`.

    Raises:
      ValueError: if ``refine`` is neither.

    Example:
      >>> import jax, jax.numpy as jnp, deq_jax as deq
      >>> def loss(x):
      ...     f = lambda params, z, x: 0.5 * z + x
      ...     solver, rule = deq.Broyden(tol=1e-6), deq.Shine(refine=2)
      ...     return deq.fixed_point(f, None, 0 * x, x, solver=solver, adjoint=rule).value.sum()
      >>> jax.grad(loss)(jnp.ones((1, 2))).round(3).tolist()
      [[2.0, 2.0]]

    Reference:
      Ramzi et al., SHINE: SHaring the INverse Estimate from the forward pass for bi-level
      optimization and implicit models (2022).
    """

    refine: int | Solver = 0

    def __post_init__(self) -> None:
        steps = as_int(self.refine)
        if steps is None:
            check_solver(self.refine, "refine of Shine")
        elif steps < 0:
            raise ValueError(f"got refine={self.refine!r} for Shine; wanted 0 or more, or a solver")
        else:
            object.__setattr__(self, "refine", steps)

    def check(self, solver: Solver, keep: Keep) -> None:
        """See `Adjoint`; wants Broyden."""
        del keep
        if not isinstance(solver, Broyden):
            raise ValueError(
                f"got solver={solver!r} with the adjoint Shine; wanted Broyden(...), whose forward "
                "factors it uses"
            )

    def run(self, call: Call) -> Solution:
        """See `Adjoint`."""
        program, settings, operands = call.prepare()
        found = _solve(program, self, settings, operands, call.probe)
        return Solution(found.value, found.stats, states=sampled(program, operands, found))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _solve(
    program: Traced,
    rule: Shine,
    settings: Settings,
    operands: Operands,
    probe: BackwardStats | None,
) -> Outcome:
    del rule, probe
    return traced.call(solve_traced, program, (settings,), operands)


def _solve_fwd(
    program: Traced,
    rule: Shine,
    settings: Settings,
    operands: Operands,
    probe: BackwardStats | None,
) -> tuple[Outcome, Any]:
    del rule
    found, left = traced.call(_run, program, (settings,), operands)
    saved = (operands._replace(z0=None, budget=None), found.value, *left)
    return found, (saved, None if probe is None else ())


def _run(program: Traced, settings: Settings, operands: Operands) -> tuple[Outcome, Any]:
    """The solve, the solver's state, its steps of every sample, and which samples may use them."""
    f = at(program, operands)
    found = iterate(settings, f, operands.z0, operands.budget, carry=True)
    last = found.last
    assert last is not None
    moves = last.num_steps - last.done.astype(jnp.int32)
    usable = found.stats.converged
    return found._replace(last=None), (last.state, jnp.where(usable, moves, 0), usable)


def _solve_bwd(
    program: Traced, rule: Shine, settings: Settings, saved: Any, cotangents: Outcome
) -> tuple[Operands, BackwardStats | None]:
    saved, probed = saved
    static = (rule, settings.solver)
    gradients, stats = traced.call(_backward, program, static, *saved, cotangents.value)
    return gradients, None if probed is None else as_probe(stats)


_solve.defvjp(_solve_fwd, _solve_bwd)


def _backward(
    program: Traced,
    rule: Shine,
    solver: Broyden,
    operands: Operands,
    z: PyTree,
    state: BroydenState,
    moves: jax.Array,
    usable: jax.Array,
    cotangent: PyTree,
) -> tuple[Operands, SolveStats]:
    free = floats(operands)
    _, vjp = jax.vjp(lambda z, values: at(program, free.fill(values))(z), z, free.values)
    if isinstance(rule.refine, int):
        # By Anderson: plain refinement runs away where P is poor and J large.
        steps = max(1, rule.refine)
        refiner = Anderson(tol=solver.tol, max_steps=steps, memory=steps, stop=solver.stop)
        settings = Settings(refiner, rule.refine, keep="last", trace=False)
    else:
        settings = Settings(rule.refine, rule.refine.max_steps, keep="best", trace=False)
    v, unscaled = at_unit_scale(settings.solver, cotangent)

    def precondition(r: PyTree) -> PyTree:
        return solver.transposed_inverse(r, state, moves)

    def refined(u: PyTree) -> PyTree:
        r = jax.tree.map(lambda v, p, u: v + p - u, v, vjp(u)[0], u)
        return jax.tree.map(jnp.add, u, precondition(r))

    found = iterate(settings, refined, precondition(v))
    u = tree.where(usable, found.value, v) if isinstance(rule.refine, int) else found.value
    _, gradients = vjp(unscaled(u))
    return free.cotangents(gradients), found.stats
