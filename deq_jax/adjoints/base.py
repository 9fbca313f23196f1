"""What gradient rules share: the protocol, one call's arguments, statistics of backward solves."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from deq_jax import traced, tree
from deq_jax.solvers.base import (
    Keep,
    Solution,
    Solver,
    SolveStats,
    as_batched,
    serializable,
    split_budget,
    trace_map,
)
from deq_jax.solvers.loop import Operands, Settings
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
    differentiate with respect to it too: what comes out is no gradient but the statistics.  Rules
    that solve no linear system return zeros.

    Args:
      z0: any tree of floating-point arrays ``[B, ...]``; only B is used.
      batched: see `fixed_point`; the zeros are scalars if it is False.

    Returns:
      BackwardStats of float32 zeros ``[B]``.

    Example:
      >>> import jax, jax.numpy as jnp, deq_jax as deq
      >>> def loss(x, probe):
      ...     f = lambda params, z, x: 0.5 * z + x
      ...     z0 = jnp.zeros_like(x)
      ...     sol = deq.fixed_point(f, None, z0, x, solver=deq.Picard(max_steps=20), probe=probe)
      ...     return sol.value.sum()
      >>> x = jnp.ones((2, 3))
      >>> _, stats = jax.grad(loss, argnums=(0, 1))(x, deq.backward_probe(x))
      >>> stats.converged.tolist()
      [1.0, 1.0]
    """
    state = as_batched(z0, False) if batched is False else tree.as_state(z0)
    zeros = tree.column(state)
    probe = BackwardStats(num_steps=zeros, residual=zeros, converged=zeros)
    return jax.tree.map(lambda leaf: leaf[0], probe) if batched is False else probe


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of one `fixed_point`, checked, as a gradient rule sees them.

    Attributes:
      f: f(params, z, x) -> z.
      params: parameters, any tree.
      z0: start, tree of arrays ``[B, ...]``.
      x: other operands, any tree.
      solver: the forward method.
      max_steps: budget; None for the solver's.
      probe: from `backward_probe`, or None.
      keep: the iterate to return.
      trace: whether to record ``stats.trace``.
      states: numbers of the iterates to sample.
    """

    f: Map
    params: PyTree
    z0: PyTree
    x: PyTree
    solver: Solver
    max_steps: int | jax.Array | None = None
    probe: BackwardStats | None = None
    keep: Keep = "best"
    trace: bool = True
    states: tuple[int, ...] = ()

    def prepare(self, *, apart: bool = False) -> tuple[Traced, Settings, Operands]:
        """Traces f and checks the budget.

        Args:
          apart: whether the loop will be differentiated, which the devices of a `jax.shard_map`
            leave at different steps: what they share then gets its sum over the devices outside.

        Returns:
          f as a program, and the static arguments and the operands of its solve.

        Raises:
          ValueError: if f closes over arrays that would have to be summed inside of the loop.
        """

        def trace(params: PyTree, z0: PyTree, x: PyTree) -> tuple[Traced, tuple, PyTree]:
            return trace_map(lambda z: traced.trace(self.f, params, z, x), z0)

        params, x = self.params, self.x
        program, consts, z0 = trace(params, self.z0, x)
        shared = (params, x, consts)
        varied = tree.vary(shared, z0) if apart else shared
        if any(map(operator.is_not, jax.tree.leaves(varied), jax.tree.leaves(shared))):
            params, x, apart_consts = varied
            if any(map(operator.is_not, apart_consts, consts)):
                raise ValueError(
                    f"got an f that closes over {tree.describe(consts)}, which the devices of a "
                    "shard_map share; wanted them in params or x for a gradient through the loop"
                )
            program, consts, z0 = trace(params, z0, x)
        static, budget = split_budget(self.solver, self.max_steps, z0)
        return (
            program,
            Settings(self.solver, static, self.keep, self.trace, self.states),
            Operands(consts, (params,), z0, (x,), budget),
        )


class Adjoint(Protocol):
    """A gradient rule: solves forward and decides what the backward pass will be.

    A rule is a value: hashable, without state of its own.
    """

    def check(self, solver: Solver, keep: Keep) -> None:
        """Raises ValueError if the rule does not go with the forward solver or with ``keep``."""
        ...

    def run(self, call: Call) -> Solution:
        """Returns the solution of a call, differentiable by this rule, without ``aux``."""
        ...


def floats(operands: Operands) -> tree.Floats:
    """Returns what of a solve has gradients: all but the start and the budget."""
    return tree.Floats(operands._replace(z0=None, budget=None))


def as_probe(stats: SolveStats) -> BackwardStats:
    """Returns the statistics of a backward solve as the cotangent of a probe."""
    return BackwardStats(
        num_steps=stats.num_steps.astype(jnp.float32),
        residual=stats.residual,
        converged=stats.converged.astype(jnp.float32),
    )
