"""Gradient rules for `deq_jax.fixed_point`, one a file."""

from deq_jax.adjoints.backprop import Backprop
from deq_jax.adjoints.base import Adjoint, BackwardStats, Map, backward_probe
from deq_jax.adjoints.implicit import Implicit, root_vjp
from deq_jax.adjoints.reversible import Reversible
from deq_jax.adjoints.shine import Shine
from deq_jax.adjoints.unroll import Unroll

__all__ = [
    "Adjoint",
    "Backprop",
    "BackwardStats",
    "Implicit",
    "Map",
    "Reversible",
    "Shine",
    "Unroll",
    "backward_probe",
    "root_vjp",
]
