"""Deep equilibrium models in JAX: solvers, implicit layer, Jacobian regularisation.

The names in ``__all__`` are the public interface of the core.  The other parts are imported on
first use, so that ``import deq_jax`` needs no Flax: ``deq_jax.linen`` and ``deq_jax.nnx`` (the
layers), ``deq_jax.models``, ``deq_jax.data``, ``deq_jax.training``, ``deq_jax.convert``, and
``deq_jax.testing`` (tools for testing your own solver or cell).
"""

import importlib
from typing import TYPE_CHECKING, Any

from deq_jax import init, masks
from deq_jax.adjoints import (
    Adjoint,
    Backprop,
    BackwardStats,
    Implicit,
    Reversible,
    Shine,
    Unroll,
    backward_probe,
    root_vjp,
)
from deq_jax.check import ConvergenceError, check
from deq_jax.correction import correction
from deq_jax.diagnosis import Diagnosis, diagnose
from deq_jax.fixed_point import fixed_point
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
    "Backprop",
    "BackwardStats",
    "Broyden",
    "ConvergenceError",
    "Diagnosis",
    "Equation",
    "Implicit",
    "Picard",
    "Reversible",
    "Shine",
    "Solution",
    "SolveStats",
    "Solver",
    "Unroll",
    "WeightNorm",
    "backward_probe",
    "check",
    "correction",
    "diagnose",
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

__version__ = "0.1.0"

_PARTS = ("convert", "data", "linen", "models", "nnx", "testing", "training")

if TYPE_CHECKING:
    from deq_jax import convert, data, linen, models, nnx, testing, training  # noqa: F401
else:

    def __getattr__(name: str) -> Any:
        if name in _PARTS:
            return importlib.import_module(f"deq_jax.{name}")
        raise AttributeError(f"module 'deq_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PARTS})
