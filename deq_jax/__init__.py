"""Deep equilibrium models in JAX: solvers, implicit layer, Jacobian regularisation.

The names listed here are the public interface.  Flax layers live in `deq_jax.linen` and
`deq_jax.nnx`, tools for testing one's own solver or cell in `deq_jax.testing`.
"""

from deq_jax import init, masks
from deq_jax.implicit import (
    Adjoint,
    BackwardStats,
    Implicit,
    Unroll,
    backward_probe,
    fixed_point,
    root_vjp,
)
from deq_jax.jacobian import frobenius_penalty, spectral_radius
from deq_jax.reparam import WeightNorm, spectral_norm, weight_norm
from deq_jax.solvers import (
    Anderson,
    Broyden,
    Equation,
    Picard,
    Solution,
    Solver,
    SolveStats,
    solve,
)

__all__ = [
    "Adjoint",
    "Anderson",
    "BackwardStats",
    "Broyden",
    "Equation",
    "Implicit",
    "Picard",
    "Solution",
    "SolveStats",
    "Solver",
    "Unroll",
    "WeightNorm",
    "backward_probe",
    "fixed_point",
    "frobenius_penalty",
    "init",
    "masks",
    "root_vjp",
    "solve",
    "spectral_norm",
    "spectral_radius",
    "weight_norm",
]
