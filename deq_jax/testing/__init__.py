"""For custom solvers and cells: problems with known answers, and assertions."""

from deq_jax.testing.assertions import (
    assert_batch_independent,
    assert_fixed_point,
    assert_honest,
    assert_solver,
)
from deq_jax.testing.gradients import assert_gradients_agree
from deq_jax.testing.problems import (
    Problem,
    affine,
    cosine,
    exponential,
    logistic,
    nonnormal,
    rotation,
)
from deq_jax.testing.systems import all_problems, chandrasekhar, kinsol, multiscale
from deq_jax.testing.unsolvable import growth, hyperbola, no_fixed_point, prenorm, translation

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
    "growth",
    "hyperbola",
    "kinsol",
    "logistic",
    "multiscale",
    "no_fixed_point",
    "nonnormal",
    "prenorm",
    "rotation",
    "translation",
]
