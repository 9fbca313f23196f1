"""The entry point: a fixed point with a gradient rule that is chosen apart from the solver."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from deq_jax import tree
from deq_jax.adjoints.base import Adjoint, BackwardStats, Call, Map
from deq_jax.adjoints.implicit import Implicit
from deq_jax.solvers.base import (
    Keep,
    Solution,
    Solver,
    Unbatched,
    as_batched,
    check_count,
    check_keep,
    check_solver,
    without_batch,
)
from deq_jax.tree import PyTree


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
    states: Sequence[int] = (),
    has_aux: bool = False,
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
      max_steps: budget of this call, a whole number from 0 to ``solver.max_steps``, or an integer
        array of one number or of one a sample ``[B]``; traced, it is cut off at these bounds.  0
        returns ``z0``.
      probe: from `backward_probe`, to read the statistics of the backward solve.
      keep: ``"best"`` returns the iterate of the smallest residual; ``"last"`` the one after the
        last step, or the one that converged.
      batched: False if z0 has no batch axis: then f is called without one, and the statistics are
        scalars.  True if z0 is ``[B]`` and every number is a sample.
      trace: whether ``stats.trace`` is recorded.  ``jax_debug_infs`` wants False.
      states: numbers i >= 1 of iterates z_i to sample, for losses on the way (`correction`).  A
        sample that stops earlier repeats its value.  Under `Implicit` and `Shine` a sampled state
        is f(z_i), under `Unroll` the rule's steps from z_i, with z_i constant: each state has a
        gradient of its own, which costs its evaluations.  Under `Backprop` it is z_i itself.
      has_aux: whether f returns ``(z, aux)``.  f is then evaluated once more, at the solution.

    Returns:
      Solution: ``value`` like ``z0``, ``stats`` of the forward solve, ``states`` and ``aux``.

    Raises:
      ValueError: for an empty batch, a z0 of one axis of which nothing is said, an f that changes
        tree, shape or dtype, a bad budget, a bad number in ``states``, a solver or adjoint that is
        none, or a rule that does not go with the solver.

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
    rule = check_rule(solver, adjoint, keep)
    z0 = as_batched(z0, batched)
    g = _First(f) if has_aux else f
    if batched is False:
        g = Unbatched(g, 1)
        probe = jax.tree.map(lambda leaf: leaf[None], probe)
    if probe is not None and tree.batch_size(probe) != tree.batch_size(z0):
        raise ValueError(
            f"got a probe {tree.describe(probe)} for a state {tree.describe(z0)}; wanted "
            "backward_probe(z0) of the same batch"
        )
    numbers = tuple(_check_number(number, solver.max_steps) for number in states)
    solution = rule.run(Call(g, params, z0, x, solver, max_steps, probe, keep, trace, numbers))
    solution = without_batch(solution) if batched is False else solution
    if not has_aux:
        return solution
    return dataclasses.replace(solution, aux=_pair(f(params, solution.value, x))[1])


def check_rule(solver: Solver, adjoint: Adjoint | None, keep: Keep) -> Adjoint:
    """Checks that a solver and a gradient rule go together.

    Args:
      solver: the forward method.
      adjoint: the gradient rule; None for ``Implicit(solver)``.
      keep: the iterate to return.

    Returns:
      The gradient rule.

    Raises:
      ValueError: if one of them is none, or they do not go together.
    """
    check_solver(solver)
    check_keep(keep)
    rule = Implicit(solver) if adjoint is None else adjoint
    if isinstance(rule, type) or not (hasattr(rule, "run") and hasattr(rule, "check")):
        raise ValueError(
            f"got adjoint={rule!r}; wanted a gradient rule, such as deq.Implicit(solver) or "
            "deq.Unroll(1)"
        )
    rule.check(solver, keep)
    return rule


def check_reparam(reparam: Any) -> None:
    """Raises ValueError for what a layer cannot split and merge parameters with.

    Args:
      reparam: of a layer; None for none.
    """
    if reparam is None or (hasattr(reparam, "split") and hasattr(reparam, "merge")):
        return
    raise ValueError(
        f"got reparam={reparam!r}; wanted None or an object with split and merge, such as "
        "deq.weight_norm; write one whose merge calls a function such as deq.spectral_norm"
    )


@dataclasses.dataclass(frozen=True)
class _First:
    """A map that returns (z, aux), without aux."""

    f: Callable[..., PyTree]

    def __call__(self, *operands: PyTree) -> PyTree:
        return _pair(self.f(*operands))[0]


def _pair(out: Any) -> tuple[PyTree, PyTree]:
    if not (isinstance(out, tuple) and len(out) == 2):
        raise ValueError(f"got has_aux=True and an f that returns {type(out)}; wanted (z, aux)")
    return out


def _check_number(number: Any, most: int) -> int:
    number = check_count("fixed_point", "states", number)
    if number > most:
        raise ValueError(
            f"got states with {number} for a solver of {most} steps; wanted numbers of steps from "
            "1 to solver.max_steps"
        )
    return number
