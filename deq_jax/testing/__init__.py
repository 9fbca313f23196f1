"""For solvers and cells of your own: problems with known answers, assertions, a diagnosis."""

from deq_jax.testing.assertions import (
    assert_batch_independent,
    assert_fixed_point,
    assert_gradients_agree,
    assert_honest,
    assert_solver,
)
from deq_jax.testing.diagnosis import Diagnosis, diagnose
from deq_jax.testing.problems import (
    Problem,
    affine,
    cosine,
    exponential,
    logistic,
    no_fixed_point,
    nonnormal,
    rotation,
)
from deq_jax.testing.systems import all_problems, chandrasekhar, kinsol, multiscale

__all__ = [
    "Diagnosis",
    "Problem",
    "affine",
    "all_problems",
    "assert_batch_independent",
    "assert_fixed_point",
    "assert_gradients_agree",
    "assert_honest",
    "assert_solver",
    "chandrasekhar",
    "cosine",
    "diagnose",
    "exponential",
    "kinsol",
    "logistic",
    "multiscale",
    "no_fixed_point",
    "nonnormal",
    "rotation",
]
