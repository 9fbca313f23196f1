"""The implicit layer: a fixed point with a gradient rule that is chosen apart from the solver."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax import tree
from deq_jax.solvers.base import (
    Solution,
    Solver,
    SolveStats,
    check_count,
    check_fraction,
    check_image,
    solve,
)
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


def backward_probe(z0: PyTree) -> BackwardStats:
    """Zeros whose cotangent carries the statistics of the backward solve.

    A custom_vjp rule can return nothing but cotangents.  Pass the probe to `fixed_point` and
    differentiate with respect to it too: what comes out is no gradient but the statistics.

    Args:
      z0: any tree of floating-point arrays ``[B, ...]``; only B is used.

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
    flat, _ = tree.batch_ravel(z0)
    zeros = jnp.zeros_like(flat[:, 0], dtype=jnp.float32)
    return BackwardStats(num_steps=zeros, residual=zeros, converged=zeros)


class Adjoint(Protocol):
    """A gradient rule: solves forward and decides what the backward pass will be."""

    def run(
        self,
        f: Map,
        params: PyTree,
        z0: PyTree,
        x: PyTree,
        solver: Solver,
        max_steps: int | jax.Array | None,
        probe: BackwardStats | None,
    ) -> Solution:
        """Returns the solution of ``solver``, differentiable by this rule."""
        ...


@dataclasses.dataclass(frozen=True)
class Implicit:
    """The implicit function theorem: the exact gradient of the fixed point, at constant memory.

    With z* = f(params, z*, x) and a cotangent v, solves u = J^T u + v, J = df/dz at z*, and returns
    u^T df/dparams and u^T df/dx.  Each step costs one vector-Jacobian product; derivatives by
    params and x are formed once, after the loop.

    Args:
      solver: the method for the linear system, with its own tolerance and budget.

    Returns:
      A gradient rule for `fixed_point`.

    Reference:
      Bai, Kolter, Koltun, Deep Equilibrium Models (2019), Theorem 1.
    """

    solver: Solver

    def run(
        self,
        f: Map,
        params: PyTree,
        z0: PyTree,
        x: PyTree,
        solver: Solver,
        max_steps: int | jax.Array | None,
        probe: BackwardStats | None,
    ) -> Solution:
        """See `Adjoint`."""
        # An int is a compile-time fact, which custom_vjp must not turn into an array.
        static = max_steps if isinstance(max_steps, int) else None
        traced = None if static is not None else max_steps
        out: Any = _implicit(f, solver, self.solver, static, params, z0, x, traced, probe)
        return Solution(value=out[0], stats=out[1])


@dataclasses.dataclass(frozen=True)
class Unroll:
    """Differentiates through ``steps`` damped applications of f after the solve.

    z <- (1 - damping) z + damping f(params, z, x), starting from the solver's answer, which is held
    constant.  ``Unroll(1)`` is the Jacobian-free gradient, ``Unroll(k, tau)`` the phantom gradient;
    after a solve of zero steps it is the weight-tied network of k layers used to warm up.  The
    value returned is the last iterate; the statistics are those of the solve before it.

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
        check_count("Unroll", "steps", self.steps)
        check_fraction("Unroll", "damping", self.damping)

    def run(
        self,
        f: Map,
        params: PyTree,
        z0: PyTree,
        x: PyTree,
        solver: Solver,
        max_steps: int | jax.Array | None,
        probe: BackwardStats | None,
    ) -> Solution:
        """See `Adjoint`; there is no backward solve, so ``probe`` gets the gradient zero."""
        del probe
        held, start, fixed = map(lax.stop_gradient, (params, z0, x))
        sol = solve(solver, lambda z: f(held, z, fixed), start, max_steps=max_steps)

        def layer(z: PyTree, _: None) -> tuple[PyTree, None]:
            image = f(params, z, x)
            check_image(z, image)
            if self.damping == 1.0:
                return image, None
            return jax.tree.map(lambda a, b: a + self.damping * (b - a), z, image), None

        value, _ = lax.scan(layer, lax.stop_gradient(sol.value), None, length=self.steps)
        return Solution(value=value, stats=sol.stats)


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
      Cotangents of ``params`` and ``x``, and the statistics of the solve.

    Example:
      >>> import jax.numpy as jnp
      >>> from deq_jax.solvers import Picard
      >>> one = jnp.ones((1, 1))
      >>> f = lambda params, z, x: 0.5 * z + x
      >>> _, d_x, _ = root_vjp(f, None, 2 * one, one, one, Picard(tol=1e-6, max_steps=50))
      >>> round(float(d_x[0, 0]), 4)
      2.0
    """
    # One linearisation serves the loop and the derivatives after it: inside the loop only the
    # product with df/dz is alive, and the compiler drops the rest.
    image, vjp = jax.vjp(f, params, z, x)
    check_image(z, image)

    def adjoint(u: PyTree) -> PyTree:
        return jax.tree.map(jnp.add, vjp(u)[1], cotangent)

    sol = solve(solver, adjoint, cotangent)
    d_params, _, d_x = vjp(sol.value)
    return d_params, d_x, sol.stats


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _implicit(
    f: Map,
    solver: Solver,
    backward: Solver,
    static: int | None,
    params: PyTree,
    z0: PyTree,
    x: PyTree,
    traced: jax.Array | None,
    probe: BackwardStats | None,
) -> tuple[PyTree, SolveStats]:
    del backward, probe
    budget = traced if static is None else static
    sol = solve(solver, lambda z: f(params, z, x), z0, max_steps=budget)
    return sol.value, sol.stats


def _implicit_fwd(
    f: Map,
    solver: Solver,
    backward: Solver,
    static: int | None,
    params: PyTree,
    z0: PyTree,
    x: PyTree,
    traced: jax.Array | None,
    probe: BackwardStats | None,
) -> tuple[tuple[PyTree, SolveStats], Any]:
    out: Any = _implicit(f, solver, backward, static, params, z0, x, traced, probe)
    # Whether there is a probe is a fact about the tree, not a value that a trace could hide.
    return out, (params, out[0], x, None if probe is None else ())


def _implicit_bwd(
    f: Map, solver: Solver, backward: Solver, static: int | None, saved: Any, cotangents: Any
) -> tuple[PyTree, None, PyTree, None, BackwardStats | None]:
    del solver, static
    params, z, x, probed = saved
    d_params, d_x, stats = root_vjp(f, params, z, x, cotangents[0], backward)
    carried = BackwardStats(
        num_steps=stats.num_steps.astype(jnp.float32),
        residual=stats.residual,
        converged=stats.converged.astype(jnp.float32),
    )
    return d_params, None, d_x, None, None if probed is None else carried


_implicit.defvjp(_implicit_fwd, _implicit_bwd)


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
) -> Solution:
    """Solves z = f(params, z, x) and is differentiable in ``params`` and ``x``.

    Everything f depends on is an argument: weights in ``params``; injected input, dropout masks and
    keys in ``x`` (or ``params``).  A function that closes over traced values fails under nested
    transformations.  The start ``z0`` gets the gradient zero.

    Args:
      f: pure function f(params, z, x) -> z; each sample's image depends on that sample alone.
      params: parameters, any tree.
      z0: start, tree of floating-point arrays ``[B, ...]``.
      x: other operands, any tree.
      solver: the forward method, e.g. ``Anderson(tol=1e-3, max_steps=30)``.
      adjoint: the gradient rule; ``Implicit(solver)`` if None.
      max_steps: budget of this call, an int or a traced integer scalar, at most
        ``solver.max_steps``; 0 leaves ``z0`` as it is.
      probe: from `backward_probe`, to read the statistics of the backward solve.

    Returns:
      Solution: ``value`` like ``z0``, and ``stats`` of the forward solve.

    Raises:
      ValueError: for an empty batch, an f that changes tree, shape or dtype, or a bad budget.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from deq_jax.solvers import Anderson
      >>> f = lambda w, z, x: jnp.tanh(z @ w + x)
      >>> w, x = 0.1 * jnp.eye(3), jnp.ones((2, 3))
      >>> solver = Anderson(tol=1e-5, max_steps=20)
      >>> loss = lambda w: fixed_point(f, w, jnp.zeros_like(x), x, solver=solver).value.sum()
      >>> jax.grad(loss)(w).shape
      (3, 3)

    Reference:
      Bai, Kolter, Koltun, Deep Equilibrium Models (2019), equations (3) to (5).
    """
    rule = Implicit(solver) if adjoint is None else adjoint
    return rule.run(f, params, z0, x, solver, max_steps, probe)
