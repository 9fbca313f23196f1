"""Equations without a solution, which an honest solver reports as not converged.

In floating-point arithmetic some of them do have solutions: where norm(z) is so large that
f(z) - z is lost in rounding, f(z) equals z bit for bit.  `deq_jax.solve` gives a sample up before
that, so there it is never reported as converged.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deq_jax import init
from deq_jax.testing.problems import Problem, scalar


def no_fixed_point(batch: int = 4, *, dtype: Any = jnp.float32) -> Problem:
    """The equation z = 2 sqrt(1 + (a z)^2) + x with a = 1, x = 0, whose residual grows like norm z.

    There is no solution: f(z) - z is at least sqrt(3), and at least half of f(z), for every z.

    Args:
      batch: number of samples, which differ in their starts.
      dtype: dtype of all arrays.

    Returns:
      Problem with state ``[B, 1]``, ``solution=None``.
    """
    problem = scalar(
        "no-fixed-point",
        lambda params, z, x: 2 * jnp.sqrt(1 + (params["a"] * z) ** 2) + x,
        {"a": 1.0},
        0.0,
        (0.0, 1.0),
        batch,
        dtype,
    )
    return _without_solution(problem, rel=0.5, abs=math.sqrt(3))


def growth(batch: int = 4, *, dtype: Any = jnp.float32) -> Problem:
    """The equation z = exp(a z) + x with a = 1, x = 0, whose residual grows exponentially.

    There is no real solution: exp(z) - z is at least 1, and at least 1 - 1/e of exp(z), for every
    z.  Plain iteration overflows within a few steps.

    Args:
      batch: number of samples, which differ in their starts.
      dtype: dtype of all arrays.

    Returns:
      Problem with state ``[B, 1]``, ``solution=None``.
    """
    problem = scalar(
        "growth",
        lambda params, z, x: jnp.exp(params["a"] * z) + x,
        {"a": 1.0},
        0.0,
        (0.0, 1.0),
        batch,
        dtype,
    )
    return _without_solution(problem, rel=1 - 1 / math.e, abs=1.0)


def translation(batch: int = 4, size: int = 8, *, dtype: Any = jnp.float32) -> Problem:
    """The equation z = a z + x with a = 1 and norm(x) = 1, whose residual is constant.

    There is no solution: norm(f(z) - z) is 1 for every z.  Divided by norm(f(z)) it tends to 0 at
    infinity, so a relative residual needs a size that a runaway cannot inflate, such as that of
    `deq_jax.solve`.

    Args:
      batch: number of samples.
      size: elements of a sample.
      dtype: dtype of all arrays.

    Returns:
      Problem with state ``[B, size]``, z0 = 0 and ``solution=None``.
    """
    x = jax.random.normal(jax.random.key(0), (batch, size))
    x = (x / jnp.linalg.norm(x, axis=1, keepdims=True)).astype(dtype)
    problem = Problem(
        name="translation",
        f=lambda params, z, x: params["a"] * z + x,
        params={"a": jnp.ones((), dtype)},
        x=x,
        z0=jnp.zeros_like(x),
        solution=None,
        kind="unsolvable",
    )
    return _without_solution(problem, rel=2e-3, abs=0.98)  # norm(x) is 1 to bfloat16's rounding


def prenorm(batch: int = 4, size: int = 8, *, dtype: Any = jnp.float32) -> Problem:
    """The equation z = z + 0.1 tanh(z W) + x, W orthogonal, every element of x 1 or -1.

    A residual block that never normalises its output.  There is no solution: every element of
    f(z) - z has at least the modulus 0.9 and at most 1.1, for every z.

    Args:
      batch: number of samples.
      size: elements of a sample.
      dtype: dtype of all arrays.

    Returns:
      Problem with state ``[B, size]``, z0 = 0 and ``solution=None``.
    """
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.rademacher(keys[0], (batch, size), dtype)
    problem = Problem(
        name="prenorm",
        f=lambda params, z, x: z + 0.1 * jnp.tanh(z @ params["W"]) + x,
        params={"W": init.orthogonal(1.0)(keys[1], (size, size), dtype)},
        x=x,
        z0=jnp.zeros_like(x),
        solution=None,
        kind="unsolvable",
    )
    return _without_solution(problem, rel=2e-3, abs=0.9 * np.sqrt(size))


def hyperbola(batch: int = 4, *, dtype: Any = jnp.float32) -> Problem:
    """The equation z = sqrt((a z)^2 + 1) + x with a = 1, x = 0, whose residual tends to 0.

    There is no solution, but f(z) - z is less than 1 / (2 z): it falls below any tolerance at a
    large z.  A solver that reports this as converged is honest; only a look at the Jacobian, which
    is 1 - 1 / (2 z^2), shows that no fixed point is near (`deq.diagnose` does).

    Args:
      batch: number of samples, which differ in their starts.
      dtype: dtype of all arrays.

    Returns:
      Problem with state ``[B, 1]``, ``solution=None``, and no lower bound in ``least``.
    """
    problem = scalar(
        "hyperbola",
        lambda params, z, x: jnp.sqrt((params["a"] * z) ** 2 + 1) + x,
        {"a": 1.0},
        0.0,
        (0.0, 1.0),
        batch,
        dtype,
    )
    return _without_solution(problem)


def _without_solution(problem: Problem, **least: float) -> Problem:
    return dataclasses.replace(
        problem, solution=None, kind="unsolvable", condition=math.inf, least=least
    )
