"""The implicit layer: a fixed point with a gradient rule that is chosen apart from the solver."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax import traced, tree
from deq_jax.solvers.base import (
    Keep,
    Solution,
    Solver,
    SolveStats,
    Unbatched,
    as_batched,
    check_count,
    check_fraction,
    check_solver,
    serializable,
    solve_traced,
    split_budget,
    trace_map,
    without_batch,
)
from deq_jax.traced import Traced
from deq_jax.tree import PyTree

Map = Callable[[PyTree, PyTree, PyTree], PyTree]
"""f(params, z, x) -> z."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BackwardStats:
    """Statistics of a backward solve, as the "gradient" of a probe delivers them.

    Attributes:
      num_steps: float32 ``[B]``, vector-Jacobian products spent on the sample.
      residual: float32 ``[B]``, residual of the adjoint.
      converged: float32 ``[B]``, 1 where the backward solve reached its tolerance, else 0.
    """

    num_steps: jax.Array
    residual: jax.Array
    converged: jax.Array


serializable(BackwardStats)


def backward_probe(z0: PyTree, *, batched: bool | None = None) -> BackwardStats:
    """Zeros whose cotangent carries the statistics of the backward solve.

    A custom_vjp rule can return nothing but cotangents.  Pass the probe to `fixed_point` and
    differentiate with respect to it too: what comes out is no gradient but the statistics.

    Args:
      z0: any tree of floating-point arrays ``[B, ...]``; only B is used.
      batched: see `fixed_point`; the zeros are scalars if it is False.

    Returns:
      BackwardStats of float32 zeros ``[B]``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from deq_jax.solvers import Picard
      >>> def loss(x, probe):
      ...     f = lambda params, z, x: 0.5 * z + x
      ...     z0 = jnp.zeros_like(x)
      ...     sol = fixed_point(f, None, z0, x, solver=Picard(max_steps=20), probe=probe)
      ...     return sol.value.sum()
      >>> x = jnp.ones((2, 3))
      >>> _, stats = jax.grad(loss, argnums=(0, 1))(x, backward_probe(x))
      >>> stats.converged.tolist()
      [1.0, 1.0]
    """
    state = as_batched(z0, False) if batched is False else tree.as_state(z0)
    zeros = tree.column(state)
    probe = BackwardStats(num_steps=zeros, residual=zeros, converged=zeros)
    return jax.tree.map(lambda leaf: leaf[0], probe) if batched is False else probe


class Adjoint(Protocol):
    """A gradient rule: solves forward and decides what the backward pass will be."""

    def run(
        self,
        f: Map,
        params: PyTree,
        z0: PyTree,
        x: PyTree,
        *,
        solver: Solver,
        max_steps: int | jax.Array | None,
        probe: BackwardStats | None,
        keep: Keep,
        trace: bool,
    ) -> Solution:
        """Returns the solution of ``solver``, differentiable by this rule."""
        ...


@dataclasses.dataclass(frozen=True)
class Implicit:
    """The implicit function theorem: the exact gradient of the fixed point, at constant memory.

    With z* = f(params, z*, x) and a cotangent v, solves u = J^T u + v, J = df/dz at z*, and returns
    u^T df/dparams and u^T df/dx.  Each step costs one vector-Jacobian product; derivatives by
    params and x are formed once, after the loop.  In reverse mode it can be differentiated to any
    order: the backward system is a fixed point with the same rule.

    Args:
      solver: the method for the linear system, with its own tolerance and budget.

    Returns:
      A gradient rule for `fixed_point`.

    Raises:
      ValueError: if ``solver`` is not a solver.

    Example:
      >>> import jax, jax.numpy as jnp, deq_jax as deq
      >>> rule = deq.Implicit(deq.Broyden(tol=1e-6, max_steps=40))
      >>> def loss(x):
      ...     f = lambda params, z, x: 0.5 * z + x
      ...     solver = deq.Anderson(tol=1e-6)
      ...     return deq.fixed_point(f, None, 0 * x, x, solver=solver, adjoint=rule).value.sum()
      >>> jax.grad(loss)(jnp.ones((1, 2))).round(3).tolist()
      [[2.0, 2.0]]

    Reference:
      Bai, Kolter, Koltun, Deep Equilibrium Models (2019), Theorem 1.
    """

    solver: Solver

    def __post_init__(self) -> None:
        check_solver(self.solver, "the solver of Implicit")

    def run(
        self,
        f: Map,
        params: PyTree,
        z0: PyTree,
        x: PyTree,
        *,
        solver: Solver,
        max_steps: int | jax.Array | None,
        probe: BackwardStats | None,
        keep: Keep,
        trace: bool,
    ) -> Solution:
        """See `Adjoint`."""
        program, operands, how = _prepare(f, params, z0, x, solver, max_steps, keep, trace)
        out: Any = _implicit(program, self.solver, how, operands, probe)
        return Solution(*out)


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

    Reference:
      Fung et al., JFB: Jacobian-Free Backpropagation for Implicit Networks (2022);
      Geng et al., On Training Implicit Models (2021), equation (9).
    """

    steps: int
    damping: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", check_count("Unroll", "steps", self.steps))
        object.__setattr__(self, "damping", check_fraction("Unroll", "damping", self.damping))

    def run(
        self,
        f: Map,
        params: PyTree,
        z0: PyTree,
        x: PyTree,
        *,
        solver: Solver,
        max_steps: int | jax.Array | None,
        probe: BackwardStats | None,
        keep: Keep,
        trace: bool,
    ) -> Solution:
        """See `Adjoint`; there is no backward solve, so ``probe`` gets the gradient zero."""
        del probe
        program, operands, how = _prepare(f, params, z0, x, solver, max_steps, keep, trace)
        held = lax.stop_gradient(operands)
        start, stats = traced.call(solve_traced, program, how, *held)

        def layer(z: PyTree, _: None) -> tuple[PyTree, None]:
            image = program(operands[0], params, z, x)
            if self.damping == 1.0:
                return image, None
            return jax.tree.map(lambda a, b: a + self.damping * (b - a), z, image), None

        value, _ = lax.scan(layer, lax.stop_gradient(start), None, length=self.steps)
        return Solution(value=value, stats=stats)


def _prepare(
    f: Map,
    params: PyTree,
    z0: PyTree,
    x: PyTree,
    solver: Solver,
    max_steps: int | jax.Array | None,
    keep: Keep,
    trace: bool,
) -> tuple[Traced, tuple[PyTree, ...], tuple]:
    """Returns f as a program, and the operands and static arguments of `solve_traced`."""
    program, consts, z0 = trace_map(lambda z: traced.trace(f, params, z, x), z0)
    static, budget = split_budget(solver, max_steps)
    return program, (consts, (params,), z0, (x,), budget), (solver, static, keep, trace)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _implicit(
    program: Traced,
    backward: Solver,
    how: tuple,
    operands: tuple[PyTree, ...],
    probe: BackwardStats | None,
) -> tuple[PyTree, SolveStats]:
    del backward, probe
    return traced.call(solve_traced, program, how, *operands)


def _implicit_fwd(
    program: Traced,
    backward: Solver,
    how: tuple,
    operands: tuple[PyTree, ...],
    probe: BackwardStats | None,
) -> tuple[tuple[PyTree, SolveStats], Any]:
    out: Any = _implicit(program, backward, how, operands, probe)
    consts, (params,), _, (x,), _ = operands
    # Whether there is a probe is a fact about the tree, not a value that a trace could hide.
    return out, (consts, params, out[0], x, None if probe is None else ())


def _implicit_bwd(
    program: Traced, backward: Solver, how: tuple, saved: Any, cotangents: Any
) -> tuple[tuple[PyTree, ...], BackwardStats | None]:
    del how
    *operands, probed = saved
    (d_consts, d_params, d_x), stats = traced.call(
        _backward, program, (backward,), *operands, cotangents[0]
    )
    carried = BackwardStats(
        num_steps=stats.num_steps.astype(jnp.float32),
        residual=stats.residual,
        converged=stats.converged.astype(jnp.float32),
    )
    gradients = (d_consts, (d_params,), None, (d_x,), None)
    return gradients, None if probed is None else carried


_implicit.defvjp(_implicit_fwd, _implicit_bwd)


def _backward(
    program: Traced,
    solver: Solver,
    consts: PyTree,
    params: PyTree,
    z: PyTree,
    x: PyTree,
    cotangent: PyTree,
) -> tuple[PyTree, SolveStats]:
    """The backward pass: cotangents of (consts, params, x), None for integers, and statistics."""
    leaves, treedef = jax.tree.flatten((consts, params, x))
    trained = [jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in leaves]

    def f(z: PyTree, *floats: jax.Array) -> PyTree:
        given = iter(floats)
        full = [next(given) if t else leaf for t, leaf in zip(trained, leaves, strict=True)]
        consts, params, x = treedef.unflatten(full)
        return program(consts, params, z, x)

    # One linearisation serves the loop and the derivatives after it: inside the loop only the
    # product with df/dz is alive, and the compiler drops the rest.
    floats = [leaf for t, leaf in zip(trained, leaves, strict=True) if t]
    _, vjp = jax.vjp(f, z, *floats)
    # The system is linear: solved at unit scale, its gradient is proportional to the loss.
    scale = _power_of_two(lax.stop_gradient(cotangent)) if solver.stop == "rel" else None
    v = cotangent if scale is None else _scaled(cotangent, scale)

    # The residuals of the linearisation are operands of a fixed point of its own, so that the
    # backward pass can be differentiated in turn, and its backward pass too.
    def adjoint(operands: PyTree, u: PyTree, _: None) -> PyTree:
        vjp, v = operands
        return jax.tree.map(jnp.add, vjp(u)[0], v)

    system, held = traced.trace(adjoint, (vjp, v), v, None)
    how = (solver, solver.max_steps, "best", False)
    operands = (held, ((vjp, v),), lax.stop_gradient(v), (None,), None)
    u, stats = _implicit(system, solver, how, operands, None)
    _, *gradients = vjp(u if scale is None else _scaled(u, 1 / scale))
    given = iter(gradients)
    return treedef.unflatten([next(given) if t else None for t in trained]), stats


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
    check_solver(solver)
    z = tree.as_state(z)
    program, consts, z = trace_map(lambda z: traced.trace(f, params, z, x), z)
    (_, d_params, d_x), stats = traced.call(
        _backward, program, (solver,), consts, params, z, x, cotangent
    )
    return d_params, d_x, stats


def fixed_point(
    f: Map,
    params: PyTree,
    z0: PyTree,
    x: PyTree = None,
    *,
    solver: Solver,
    adjoint: Adjoint | None = None,
    max_steps: int | jax.Array | None = None,
    probe: BackwardStats | None = None,
    keep: Keep = "best",
    batched: bool | None = None,
    trace: bool = True,
) -> Solution:
    """Solves z = f(params, z, x) and is differentiable in ``params`` and ``x``.

    Everything f depends on is an argument: weights in ``params``; injected input, dropout masks and
    keys in ``x`` (or ``params``).  Arrays that f closes over work too, also under `jax.grad`.  The
    start ``z0`` has the gradient zero.

    f is traced once per call, as by `jax.jit`.  Outside jit the compiled program is kept, and a
    second call with the same f, solver and shapes compiles nothing.

    To give a solution that was found elsewhere an implicit gradient, pass it as
    ``z0=jax.lax.stop_gradient(z)`` with ``max_steps=0``.

    Args:
      f: pure function f(params, z, x) -> z; each sample's image depends on that sample alone.
      params: parameters, any tree.
      z0: start, tree of floating-point arrays ``[B, ...]``.
      x: other operands, any tree.
      solver: the forward method, e.g. ``Anderson(tol=1e-3, max_steps=30)``.
      adjoint: the gradient rule; ``Implicit(solver)`` if None.
      max_steps: budget of this call, a whole number from 0 to ``solver.max_steps``, or a traced
        integer scalar, which is cut off at these bounds; 0 returns ``z0``.
      probe: from `backward_probe`, to read the statistics of the backward solve.
      keep: ``"best"`` returns the iterate of the smallest residual; ``"last"`` the one after the
        last step, or the one that converged.
      batched: False if z0 has no batch axis: then f is called without one, and the statistics are
        scalars.  True if z0 is ``[B]`` and every number is a sample.
      trace: whether ``stats.trace`` is recorded.  `jax_debug_infs` wants False.

    Returns:
      Solution: ``value`` like ``z0``, and ``stats`` of the forward solve.

    Raises:
      ValueError: for an empty batch, a z0 of one axis of which nothing is said, an f that changes
        tree, shape or dtype, a bad budget, or a solver or adjoint that is none.

    Example:
      >>> import jax, jax.numpy as jnp, deq_jax as deq
      >>> f = lambda w, z, x: jnp.tanh(z @ w + x)
      >>> w, x = 0.1 * jnp.eye(3), jnp.ones((2, 3))
      >>> solver = deq.Anderson(tol=1e-5, max_steps=20)
      >>> loss = lambda w: deq.fixed_point(f, w, jnp.zeros_like(x), x, solver=solver).value.sum()
      >>> jax.grad(loss)(w).shape
      (3, 3)

      The gradient of a solution that another solver has found:

      >>> def loss(w):
      ...     z = jnp.zeros_like(x)
      ...     for _ in range(20):
      ...         z = f(w, z, x)
      ...     z = jax.lax.stop_gradient(z)
      ...     return deq.fixed_point(f, w, z, x, solver=solver, max_steps=0).value.sum()
      >>> jax.grad(loss)(w).shape
      (3, 3)

    Reference:
      Bai, Kolter, Koltun, Deep Equilibrium Models (2019), equations (3) to (5).
    """
    check_solver(solver)
    rule = Implicit(solver) if adjoint is None else adjoint
    if isinstance(rule, type) or not hasattr(rule, "run"):
        raise ValueError(
            f"got adjoint={rule!r}; wanted a gradient rule, such as deq.Implicit(solver) or "
            "deq.Unroll(1)"
        )
    z0 = as_batched(z0, batched)
    if batched is False:
        f = Unbatched(f, 1)
        probe = jax.tree.map(lambda leaf: leaf[None], probe)
    if probe is not None and tree.batch_size(probe) != tree.batch_size(z0):
        raise ValueError(
            f"got a probe {tree.describe(probe)} for a state {tree.describe(z0)}; wanted "
            "backward_probe(z0) of the same batch"
        )
    solution = rule.run(
        f,
        params,
        z0,
        x,
        solver=solver,
        max_steps=max_steps,
        probe=probe,
        keep=keep,
        trace=trace,
    )
    return without_batch(solution) if batched is False else solution
