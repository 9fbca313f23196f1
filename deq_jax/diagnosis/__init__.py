"""Diagnosis of an equation z = f(params, z, x): solvers, Jacobian, and advice in sentences.

Runs on the host: the results are NumPy arrays and text, so `diagnose` cannot be part of a compiled
function.
"""

from deq_jax.diagnosis.measures import Diagnosis, diagnose

__all__ = ["Diagnosis", "diagnose"]
