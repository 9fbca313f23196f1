"""Problems with known answers, and assertions, for testing solvers and cells of your own."""

from deq_jax.testing.assertions import (
    assert_batch_independent,
    assert_fixed_point,
    assert_gradients_agree,
    assert_honest,
    assert_solver,
)
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
    "exponential",
    "kinsol",
    "logistic",
    "multiscale",
    "no_fixed_point",
    "nonnormal",
    "rotation",
]
