"""The gradient by the implicit function theorem."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax import traced, tree
from deq_jax.adjoints.base import BackwardStats, Call, Map, as_probe, floats
from deq_jax.adjoints.unroll import applied
from deq_jax.solvers.base import (
    Keep,
    Solution,
    Solver,
    SolveStats,
    check_keep,
    check_solver,
    trace_map,
)
from deq_jax.solvers.loop import Operands, Outcome, Settings, at, iterate, solve_traced
from deq_jax.traced import Traced
from deq_jax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class Implicit:
    """The implicit function theorem: the exact gradient of the fixed point, at constant memory.

    With z* = f(params, z*, x) and a cotangent v, solves u = J^T u + v, J = df/dz at z*, and returns
    u^T df/dparams and u^T df/dx.  Each step costs one vector-Jacobian product; derivatives by
    params and x are formed once, after the loop.  In reverse mode it can be differentiated to any
    order: the backward system is a fixed point with the same rule.

    ``forward=True`` allows every derivative that JAX has: `jax.jvp`, `jax.jacfwd`, `jax.hessian`,
    `jax.linearize`.  A tangent t solves t = J t + (df/dparams) dparams + (df/dx) dx by the same
    solver.

    The Neumann series with k products, u = v + J^T v + ... + (J^T)^k v, is
    ``Implicit(Picard(tol=1e-30, max_steps=k), keep="last")``.

    Args:
      solver: the method for the linear system, with its own tolerance and budget.
      forward: whether forward mode is allowed too.  A probe needs False.
      keep: the iterate of the linear system to use, ``"best"`` (smallest residual) or ``"last"``.

    Returns:
      A gradient rule for `fixed_point`.

    Raises:
      ValueError: if ``solver`` is not a solver, or ``keep`` is unknown.

    Example:
      >>> import jax, jax.numpy as jnp, deq_jax as deq
      >>> rule = deq.Implicit(deq.Broyden(tol=1e-6, max_steps=40), forward=True)
      >>> def root(x):
      ...     f = lambda params, z, x: 0.5 * z + x**2
      ...     solver = deq.Anderson(tol=1e-6)
      ...     return deq.fixed_point(f, None, 0 * x, x, solver=solver, adjoint=rule).value.sum()
      >>> x = jnp.ones((1, 2))
      >>> jax.grad(root)(x).round(3).tolist()
      [[4.0, 4.0]]
      >>> jax.jvp(jax.grad(root), (x,), (x,))[1].round(3).tolist()
      [[4.0, 4.0]]

    Reference:
      Bai, Kolter, Koltun, Deep Equilibrium Models (2019), Theorem 1.
    """

    solver: Solver
    forward: bool = False
    keep: Keep = "best"

    def __post_init__(self) -> None:
        check_solver(self.solver, "the solver of Implicit")
        check_keep(self.keep)

    def check(self, solver: Solver, keep: Keep) -> None:
        """See `Adjoint`; every solver will do."""

    def run(self, call: Call) -> Solution:
        """See `Adjoint`."""
        program, settings, operands = call.prepare()
        if self.forward:
            if call.probe is not None:
                raise ValueError(
                    "got a probe and Implicit(forward=True); wanted one of them: forward mode has "
                    "no place for the statistics of the backward solve"
                )
            found = traced.call(_rooted, program, (self, settings), operands, inline=False)
        else:
            found = _implicit(program, self, settings, operands, call.probe)
        return Solution(found.value, found.stats, states=sampled(program, operands, found))


def sampled(program: Traced, operands: Operands, found: Outcome) -> tuple[PyTree, ...]:
    """Returns f of the sampled iterates, which are held constant: a Jacobian-free gradient each."""
    return tuple(traced.call(applied, program, (), operands, z, inline=False) for z in found.states)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _implicit(
    program: Traced,
    rule: Implicit,
    settings: Settings,
    operands: Operands,
    probe: BackwardStats | None,
) -> Outcome:
    del rule, probe
    return traced.call(solve_traced, program, (settings,), operands)


def _implicit_fwd(
    program: Traced,
    rule: Implicit,
    settings: Settings,
    operands: Operands,
    probe: BackwardStats | None,
) -> tuple[Outcome, Any]:
    found: Any = _implicit(program, rule, settings, operands, probe)
    # Whether there is a probe is a fact about the tree, not a value that a trace could hide.
    saved = operands._replace(z0=None, budget=None)
    return found, (saved, found.value, None if probe is None else ())


def _implicit_bwd(
    program: Traced, rule: Implicit, settings: Settings, saved: Any, cotangents: Outcome
) -> tuple[Operands, BackwardStats | None]:
    del settings
    operands, z, probed = saved
    gradients, stats = traced.call(_backward, program, (rule,), operands, z, cotangents.value)
    return gradients, None if probed is None else as_probe(stats)


_implicit.defvjp(_implicit_fwd, _implicit_bwd)


def _backward(
    program: Traced, rule: Implicit, operands: Operands, z: PyTree, cotangent: PyTree
) -> tuple[Operands, SolveStats]:
    """The backward pass: cotangents of the operands, and statistics."""
    # One linearisation serves the loop and the derivatives after it: inside the loop only the
    # product with df/dz is alive, and the compiler drops the rest.
    free = floats(operands)
    _, vjp = jax.vjp(lambda z, values: at(program, free.fill(values))(z), z, free.values)
    v, unscaled = at_unit_scale(rule.solver, cotangent)

    # The residuals of the linearisation are operands of a fixed point of its own, so that the
    # backward pass can be differentiated in turn, and its backward pass too.
    def adjoint(operands: PyTree, u: PyTree, _: None) -> PyTree:
        vjp, v = operands
        return jax.tree.map(jnp.add, vjp(u)[0], v)

    system, held = traced.trace(adjoint, (vjp, v), v, None)
    settings = Settings(rule.solver, rule.solver.max_steps, rule.keep, trace=False)
    inner = Operands(held, ((vjp, v),), lax.stop_gradient(v), (None,), None)
    found = _implicit(system, rule, settings, inner, None)
    _, gradients = vjp(unscaled(found.value))
    return free.cotangents(gradients), found.stats


def _rooted(program: Traced, rule: Implicit, settings: Settings, operands: Operands) -> Outcome:
    """The solve as a root of f(z) - z, of which JAX knows every derivative."""
    f = at(program, operands)
    solver = rule.solver

    def solve(_: Any, z0: PyTree) -> tuple[PyTree, tuple]:
        found = iterate(settings, f, z0, operands.budget)
        # JAX 0.10 wants floating-point numbers only beside a root.
        stats = dataclasses.replace(found.stats, **vars(as_probe(found.stats)))
        return found.value, (stats, found.states)

    def solve_linear(product: Callable[[PyTree], PyTree], b: PyTree) -> PyTree:
        """Solves (J - I) t = b, the product, or the same with J^T."""
        v, unscaled = at_unit_scale(solver, jax.tree.map(jnp.negative, b))

        def system(t: PyTree) -> PyTree:
            return jax.tree.map(lambda p, t, v: p + t + v, product(t), t, v)

        linear = Settings(solver, solver.max_steps, rule.keep, trace=False)
        return unscaled(iterate(linear, system, v).value)

    value, (stats, states) = lax.custom_root(
        lambda z: jax.tree.map(jnp.subtract, f(z), z),
        lax.stop_gradient(operands.z0),
        solve,
        lambda product, b: lax.custom_linear_solve(product, b, solve_linear, solve_linear),
        has_aux=True,
    )
    stats, states = lax.stop_gradient((stats, states))
    stats = dataclasses.replace(
        stats,
        num_steps=stats.num_steps.astype(jnp.int32),
        converged=stats.converged.astype(bool),
    )
    return Outcome(value, stats, states)


def at_unit_scale(solver: Solver, v: PyTree) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """Brings the right-hand side of a linear system to unit size, sample by sample.

    The system is linear: solved at unit scale, its gradient is proportional to the loss.

    Args:
      solver: of the system; absolute residuals are not rescaled.
      v: tree ``[B, ...]``.

    Returns:
      The scaled tree, and the function that scales a solution back.
    """
    if solver.stop != "rel":
        return v, lambda u: u
    scale = _power_of_two(lax.stop_gradient(v))
    return _scaled(v, scale), lambda u: _scaled(u, 1 / scale)


def _power_of_two(v: PyTree) -> jax.Array:
    """Per sample the power of two ``[B]`` that brings the largest entry of v into [1/2, 1)."""

    def largest(leaf: jax.Array) -> jax.Array:
        return jnp.max(jnp.abs(leaf), axis=range(1, leaf.ndim), initial=0)

    wide = tree.widest(v)
    peaks = [largest(leaf).astype(wide) for leaf in jax.tree.leaves(v)]
    peak = functools.reduce(jnp.maximum, peaks)
    _, exponent = jnp.frexp(peak)
    limit = jnp.finfo(wide).maxexp - 2
    exponent = jnp.where(jnp.isfinite(peak), jnp.clip(exponent, -limit, limit), 0)
    return jnp.ldexp(jnp.ones_like(peak), -exponent)


def _scaled(v: PyTree, scale: jax.Array) -> PyTree:
    """Multiplies every sample of v by a number; exact for a power of two."""

    def leaf(a: jax.Array) -> jax.Array:
        wide = tree.stat_dtype(a.dtype)
        return (a.astype(wide) * tree.spread(scale, a).astype(wide)).astype(a.dtype)

    return jax.tree.map(leaf, v)


def root_vjp(
    f: Map, params: PyTree, z: PyTree, x: PyTree, cotangent: PyTree, solver: Solver
) -> tuple[PyTree, PyTree, SolveStats]:
    """The backward pass of a fixed point alone.

    Solves u = J^T u + cotangent with J = df/dz at ``z``, then returns u^T df/dparams and
    u^T df/dx.

    Args:
      f: f(params, z, x) -> z.
      params: parameters, any tree.
      z: the fixed point, tree of arrays ``[B, ...]``.
      x: other operands, any tree.
      cotangent: tree like ``z``.
      solver: the method for the linear system, started from ``cotangent``.

    Returns:
      Cotangents of ``params`` and ``x``, None for leaves that are not floating-point, and the
      statistics of the solve, without a trace.

    Raises:
      ValueError: for a bad solver or state, or an f that changes tree, shape or dtype.

    Example:
      >>> import jax.numpy as jnp, deq_jax as deq
      >>> one = jnp.ones((1, 1))
      >>> f = lambda params, z, x: 0.5 * z + x
      >>> solver = deq.Picard(tol=1e-6, max_steps=50)
      >>> _, d_x, _ = deq.root_vjp(f, None, 2 * one, one, one, solver)
      >>> round(float(d_x[0, 0]), 4)
      2.0
    """
    rule = Implicit(solver)
    z = tree.as_state(z)
    program, consts, z = trace_map(lambda z: traced.trace(f, params, z, x), z)
    operands = Operands(consts, (params,), None, (x,), None)
    gradients, stats = traced.call(_backward, program, (rule,), operands, z, cotangent)
    (d_params,), (d_x,) = gradients.before, gradients.after
    return d_params, d_x, stats
