"""Solvers for z = f(z), and the loop that runs them."""

from deq_jax.solvers.anderson import Anderson
from deq_jax.solvers.base import Equation, Keep, Solution, Solver, SolveStats
from deq_jax.solvers.broyden import Broyden
from deq_jax.solvers.loop import solve
from deq_jax.solvers.picard import Picard

__all__ = [
    "Anderson",
    "Broyden",
    "Equation",
    "Keep",
    "Picard",
    "Solution",
    "SolveStats",
    "Solver",
    "solve",
]
