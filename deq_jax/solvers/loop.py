"""The one loop over z, which runs every solver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax import traced, tree
from deq_jax.solvers import history
from deq_jax.solvers.base import (
    Keep,
    Solution,
    Solver,
    SolveStats,
    Unbatched,
    as_batched,
    check_keep,
    check_solver,
    split_budget,
    trace_map,
    without_batch,
)
from deq_jax.traced import Traced
from deq_jax.tree import PyTree

# How far norm(f(z)) may grow beyond r (see `SolveStats`) and still lower a relative residual.
_GROWTH = 100.0


class Loop(NamedTuple):
    """Carry of the loop; every array but ``k`` has a batch axis.

    Attributes:
      k: int32 scalar, steps taken.
      z: the iterate, tree ``[B, ...]``.
      state: of the solver.
      best: the iterate of the smallest residual; None with ``keep="last"``.
      done: bool ``[B]``, converged or given up.
      num_steps: int32 ``[B]``.
      residual: float32 ``[B]``.
      reference: ``[B]``, the size r of `SolveStats`.
      trace: float32 ``[max_steps, B]``, or None.
      states: tree ``[n + 1, B, ...]``, the n sampled iterates and a row that is overwritten by all
        others; None for n = 0.
    """

    k: jax.Array
    z: PyTree
    state: Any
    best: PyTree | None
    done: jax.Array
    num_steps: jax.Array
    residual: jax.Array
    reference: jax.Array
    trace: jax.Array | None
    states: PyTree | None


Run = Callable[[Callable[[Loop], jax.Array], Callable[[Loop], Loop], Loop], Loop]
"""What runs a loop: run(go, body, start), such as `jax.lax.while_loop`."""


class Settings(NamedTuple):
    """Static arguments of a solve.

    Attributes:
      solver: the method.
      budget: largest number of steps; None if it is an array.
      keep: the iterate to return.
      trace: whether to record the residuals of all steps.
      states: numbers of the iterates to sample.
    """

    solver: Solver
    budget: int | None
    keep: Keep
    trace: bool
    states: tuple[int, ...] = ()


class Operands(NamedTuple):
    """Operands of a solve of z = program(consts, *before, z, *after).

    Attributes:
      consts: what f closes over.
      before: arguments of f before z.
      z0: start, tree of arrays ``[B, ...]``.
      after: arguments of f after z.
      budget: the budget as an array, int32 scalar or ``[B]``, or None.
    """

    consts: tuple[jax.Array, ...]
    before: tuple[PyTree, ...]
    z0: PyTree
    after: tuple[PyTree, ...]
    budget: jax.Array | None


class Outcome(NamedTuple):
    """What a solve leaves.

    Attributes:
      value: the iterate that was asked for.
      stats: how it was found.
      states: the sampled iterates.
      last: the carry at the end; None if it was not asked for.
    """

    value: PyTree
    stats: SolveStats
    states: tuple[PyTree, ...] = ()
    last: Loop | None = None


def solve(
    solver: Solver,
    f: Callable[[PyTree], PyTree],
    z0: PyTree,
    *,
    max_steps: int | jax.Array | None = None,
    keep: Keep = "best",
    batched: bool | None = None,
    trace: bool = True,
) -> Solution:
    """Solves z = f(z) for every sample of a batch.

    One evaluation of f per step.  Each sample has its own residual (see `SolveStats`) and stops on
    its own; the loop ends when all samples have stopped or the budget is spent.  A sample whose
    residual is no longer finite is given up.  Not differentiable: see `deq_jax.fixed_point`.

    Args:
      solver: the method, e.g. ``Anderson(tol=1e-3, max_steps=30)``.
      f: maps a tree of arrays ``[B, ...]`` to the same tree, sample by sample.
      z0: start, tree of floating-point arrays ``[B, ...]``.
      max_steps: budget of this call, a whole number from 0 to the solver's own, or an integer array
        of one number or of one a sample ``[B]``; traced, it is cut off at these bounds.  0 returns
        ``z0`` unevaluated.
      keep: ``"best"`` returns the iterate of the smallest residual; ``"last"`` the one after the
        last step, or the one that converged.
      batched: False for a z0 without a batch axis; True for samples that are single numbers.
      trace: whether ``stats.trace`` is recorded.

    Returns:
      Solution with ``value`` like ``z0`` and the statistics.

    Raises:
      ValueError: for an empty batch, an f that changes tree, shape or dtype, or a bad budget.

    Example:
      >>> import jax.numpy as jnp, deq_jax as deq
      >>> sol = deq.solve(deq.Picard(tol=1e-6, max_steps=100), jnp.cos, jnp.ones((1, 1)))
      >>> round(float(sol.value[0, 0]), 4)
      0.7391
    """
    check_solver(solver)
    state = as_batched(z0, batched)
    if batched is False:
        f = Unbatched(f, 0)
    program, consts, state = trace_map(lambda z: traced.trace(f, z), state)
    static, budget = split_budget(solver, max_steps, state)
    settings = Settings(solver, static, keep, trace)
    operands = Operands(consts, (), state, (), budget)
    found = traced.call(solve_traced, program, (settings,), operands)
    solution = Solution(value=found.value, stats=found.stats)
    return without_batch(solution) if batched is False else solution


def solve_traced(program: Traced, settings: Settings, operands: Operands) -> Outcome:
    """Solves z = program(consts, *before, z, *after), for `traced.call`."""
    return iterate(settings, at(program, operands), operands.z0, operands.budget)


def at(program: Traced, operands: Operands) -> Callable[[PyTree], PyTree]:
    """Returns the function of z alone."""
    return lambda z: program(operands.consts, *operands.before, z, *operands.after)


def iterate(
    settings: Settings,
    f: Callable[[PyTree], PyTree],
    z0: PyTree,
    budget: jax.Array | None = None,
    *,
    run: Run = lax.while_loop,
    hold: bool = False,
    carry: bool = False,
) -> Outcome:
    """Runs the loop of `solve` on arguments that have been checked.

    Args:
      settings: the solver, and what to return.
      f: maps a tree of arrays ``[B, ...]`` to the same tree.
      z0: start, tree of arrays ``[B, ...]``.
      budget: largest number of steps, if ``settings.budget`` is None.
      run: what runs the loop.
      hold: whether a finished sample keeps z and the solver's state, and takes no part in the
        derivative of later steps.
      carry: whether to return the carry at the end.

    Returns:
      The value, the statistics, and what else was asked for.
    """
    solver, keep, states = settings.solver, settings.keep, settings.states
    check_keep(keep)
    steps: Any = settings.budget if budget is None else budget
    each = jnp.ndim(steps) > 0  # every sample has a budget of its own
    column = tree.column(z0)  # [B]
    numbers = sorted(set(states))
    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(z0))
    largest = float(jnp.finfo(jnp.float32).max)

    def body(c: Loop) -> Loop:
        fz = f(c.z)
        # Where the loop itself is differentiated, the statistics are constants.
        image, z = lax.stop_gradient((fz, c.z))
        gap, size = tree.norm(jax.tree.map(jnp.subtract, image, z)), tree.norm(image)
        first = jnp.where(c.k < 2, size, 0)
        near = jnp.isfinite(gap) & (size <= _GROWTH * gap)
        reference = jnp.maximum(c.reference, jnp.where(near, gap, 0))
        reference = jnp.maximum(reference, jnp.where(jnp.isfinite(first), first, 0))
        # Rounding f(z) must not cost as much as the first images had.
        finite = jnp.isfinite(gap) & (eps * size <= reference)
        if solver.stop == "rel":
            size = jnp.minimum(size, _GROWTH * reference)
            gap = jnp.where(gap == 0, 0, gap / size)
        r = jnp.where(finite, jnp.minimum(gap, largest), jnp.inf).astype(jnp.float32)  # [B]
        active = ~c.done & (c.num_steps < steps) if each else ~c.done
        better = active & (r < c.residual)
        stop = (r <= solver.tol) | ~finite
        done = c.done | (active & stop if each else stop)
        residual = jnp.where(better if keep == "best" else active, r, c.residual)
        num_steps = c.num_steps + active.astype(jnp.int32)
        row = jnp.where(active, r, jnp.inf)
        # One small kernel computes these; fused into the large ones below, it would be repeated,
        # and keep copies of what it replaces.
        better, done, active, residual, num_steps, row = lax.optimization_barrier(
            (better, done, active if each else None, residual, num_steps, row)
        )
        stay = done | ~active if each else done
        if carry and not hold:  # by a residual of 0 a finished sample adds nothing to the state
            fz = tree.where(stay, c.z, fz)
        before = (c.z, fz, c.state)
        if hold:
            before = _held(stay, lax.stop_gradient(before), before)
        z_next, state = solver.step(*before)
        best = tree.where(better, c.z, c.best) if keep == "best" else None
        if hold:
            z_next, state = _held(stay, (c.z, c.state), (z_next, state))
        elif keep == "best":
            z_next = _kept(stay, c.z, z_next)
        else:
            z_next = tree.where(stay, c.z, z_next)
        residuals, sampled = c.trace, c.states
        if residuals is not None:
            residuals = lax.dynamic_update_index_in_dim(residuals, row, c.k, axis=0)
        if sampled is not None:
            sampled = _sample(sampled, numbers, c.k + 1, z_next)
        return Loop(
            k=c.k + 1,
            z=z_next,
            state=state,
            best=best,
            done=done,
            num_steps=num_steps,
            residual=residual,
            reference=reference,
            trace=residuals,
            states=sampled,
        )

    def loop(z0: PyTree, state: Any) -> Outcome:
        last = Loop(
            k=jnp.int32(0),
            z=z0,
            state=state,
            best=z0 if keep == "best" else None,
            done=column > 0,
            num_steps=column.astype(jnp.int32),
            residual=column + jnp.inf,
            reference=column.astype(tree.widest(z0)),
            trace=jnp.broadcast_to(column + jnp.inf, (solver.max_steps, column.shape[0]))
            if settings.trace
            else None,
            states=_repeat(z0, len(numbers) + 1) if numbers else None,
        )
        if not (isinstance(steps, int) and steps == 0):  # else there is nothing to compile
            last = run(lambda c: jnp.any(~c.done & (c.num_steps < steps)), body, last)
        stats = SolveStats(
            num_steps=last.num_steps,
            residual=last.residual,
            converged=last.residual <= solver.tol,
            trace=last.trace,
        )
        value = last.z if last.best is None else last.best

        def sample(number: int) -> PyTree:
            row = numbers.index(number)
            taken = number <= stats.num_steps - last.done.astype(jnp.int32)
            return tree.where(taken, jax.tree.map(lambda a: a[row], last.states), value)

        return Outcome(value, stats, tuple(map(sample, states)), last if carry else None)

    state = solver.init(z0)
    if carry or run is not lax.while_loop or not history.is_large(state):
        return loop(z0, state)
    return lax.platform_dependent(
        z0,
        cpu=lambda z: loop(z, history.split(solver.init(z))),
        default=lambda z: loop(z, solver.init(z)),
    )


def _kept(done: jax.Array, z: PyTree, z_next: PyTree) -> PyTree:
    """Lets finished samples stay where it is cheap: nothing that is returned depends on them.

    On accelerators the choice is one kernel with that of the best iterate, and saves a copy of z.
    """
    return lax.platform_dependent(
        done, z, z_next, cpu=lambda done, z, z_next: z_next, default=tree.where
    )


def _held(done: jax.Array, old: PyTree, new: PyTree) -> PyTree:
    """Lets finished samples keep the old numbers in all arrays that have a batch axis."""

    def leaf(old: jax.Array, new: jax.Array) -> jax.Array:
        by_sample = new.ndim and done.shape[0] in (1, new.shape[0])
        return jnp.where(tree.spread(done, new), old, new) if by_sample else new

    return jax.tree.map(leaf, old, new)


def _sample(states: PyTree, numbers: list[int], k: jax.Array, z: PyTree) -> PyTree:
    """Writes iterate k into its row, or into the last one if nobody asked for it."""
    at = jnp.array(numbers)
    row = jnp.where(jnp.any(at == k), jnp.sum(at < k), len(numbers))
    return jax.tree.map(
        lambda a, new: lax.dynamic_update_index_in_dim(a, new, row, axis=0), states, z
    )


def _repeat(z: PyTree, rows: int) -> PyTree:
    return jax.tree.map(lambda a: jnp.broadcast_to(a[None], (rows, *a.shape)), z)
