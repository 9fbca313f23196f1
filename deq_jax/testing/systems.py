"""Larger problems with known answers: coupled nonlinear systems and several resolutions."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deq_jax.testing.problems import (
    Problem,
    affine,
    cosine,
    exponential,
    logistic,
    nonnormal,
    rotation,
)
from deq_jax.testing.unsolvable import growth, hyperbola, no_fixed_point, prenorm, translation
from deq_jax.tree import PyTree


def kinsol(batch: int = 4, *, dtype: Any = jnp.float32) -> Problem:
    """Three equations of SUNDIALS' KINSOL examples, solved for one unknown each.

    a = (cos((b - 1) c) + 1/2) / 3,  b = (sqrt(a^2 + sin c + 1.06) + 8.1) / 9,
    c = -(exp(-a (b - 1)) + (10 pi - 3) / 3) / 20;  the solution is (1/2, 1, -pi/6).

    Args:
      batch: number of samples, which differ in their starts.
      dtype: dtype of all arrays.

    Returns:
      Problem with state ``[B, 3]``.
    """

    def f(params: PyTree, z: jax.Array, x: jax.Array) -> jax.Array:
        a, b, c = z[:, 0], z[:, 1], z[:, 2]
        first = jnp.cos((b - 1) * c) + 0.5
        second = jnp.sqrt(a**2 + jnp.sin(c) + 1.06) + 8.1
        third = jnp.exp(-a * (b - 1)) + (10 * math.pi - 3) / 3
        return params["scale"][None, :] * jnp.stack([first, second, third], axis=1) + x

    start = np.outer(np.linspace(1, 5, batch), [0.1, 0.1, -0.1])
    return Problem(
        name="kinsol",
        f=f,
        params={"scale": jnp.asarray([1 / 3, 1 / 9, -1 / 20], dtype)},
        x=jnp.zeros((batch, 3), dtype),
        z0=jnp.asarray(start, dtype),
        solution=jnp.tile(jnp.asarray([0.5, 1, -math.pi / 6], dtype), (batch, 1)),
        kind="contraction",
        condition=1.5,
    )


def chandrasekhar(
    batch: int = 4, size: int = 16, albedo: float = 0.9, *, dtype: Any = jnp.float32
) -> Problem:
    """Chandrasekhar's H-equation of radiative transfer, by the midpoint rule.

    h_i = 1 / (1 - c/(2N) sum_j mu_i h_j / (mu_i + mu_j)) + x_i with mu_i = (i - 1/2) / N.  For
    every N the mean of h is (2 / c)(1 - sqrt(1 - c)): multiply by the denominator, sum over i, and
    use mu_i / (mu_i + mu_j) + mu_j / (mu_i + mu_j) = 1.

    Args:
      batch: number of samples, which differ in their starts.
      size: number of points N.
      albedo: c, in (0, 1).
      dtype: dtype of all arrays.

    Returns:
      Problem with state ``[B, N]``, of whose solution the mean is known.
    """
    mu = (np.arange(size) + 0.5) / size
    kernel = (mu[:, None] / (mu[:, None] + mu[None, :])).T / (2 * size)  # [N_j, N_i]
    start = np.outer(np.linspace(1, 1.5, batch), np.ones(size))
    mean = 2 / albedo * (1 - math.sqrt(1 - albedo))
    return Problem(
        name="chandrasekhar",
        f=lambda params, z, x: 1 / (1 - params["c"] * (z @ jnp.asarray(kernel, z.dtype))) + x,
        params={"c": jnp.asarray(albedo, dtype)},
        x=jnp.zeros((batch, size), dtype),
        z0=jnp.asarray(start, dtype),
        solution=jnp.full((batch, 1), mean, dtype),
        kind="contraction",
        condition=2 / math.sqrt(1 - albedo),
        observe=lambda z: z.mean(axis=1, keepdims=True),
    )


def multiscale(
    batch: int = 4, *, dtype: Any = jnp.float32, key: jax.Array | None = None
) -> Problem:
    """Two resolutions that feed each other, as in a multiscale DEQ, with a solution chosen first.

    high = tanh(high A + up(low) B) + x_high,  low = tanh(down(high) C + low D) + x_low, where up
    repeats pixels, down averages them, and x = z* - tanh(...) for a random z*.

    Args:
      batch: number of samples.
      dtype: dtype of all arrays.
      key: PRNG key; None for a fixed one.

    Returns:
      Problem with state ``{"high": [B, 4, 4, 2], "low": [B, 2, 2, 3]}``.
    """
    keys = jax.random.split(jax.random.key(0) if key is None else key, 6)
    shapes = {"A": (2, 2), "B": (3, 2), "C": (2, 3), "D": (3, 3)}
    params = {}
    for k, (name, shape) in zip(keys, shapes.items(), strict=False):
        matrix = jax.random.normal(k, shape, jnp.promote_types(dtype, jnp.float32))
        params[name] = (0.2 * matrix / jnp.linalg.norm(matrix)).astype(dtype)
    solution = {
        "high": jax.random.normal(keys[4], (batch, 4, 4, 2), dtype),
        "low": jax.random.normal(keys[5], (batch, 2, 2, 3), dtype),
    }

    def f(params: PyTree, z: PyTree, x: PyTree) -> PyTree:
        high, low = z["high"], z["low"]
        up = jnp.repeat(jnp.repeat(low, 2, axis=1), 2, axis=2)
        down = high.reshape(-1, 2, 2, 2, 2, 2).mean(axis=(2, 4))
        return {
            "high": jnp.tanh(high @ params["A"] + up @ params["B"]) + x["high"],
            "low": jnp.tanh(down @ params["C"] + low @ params["D"]) + x["low"],
        }

    zero = jax.tree.map(jnp.zeros_like, solution)
    x = jax.tree.map(lambda z, image: z - image, solution, f(params, solution, zero))
    return Problem("multiscale", f, params, x, zero, solution, "contraction", condition=2.0)


def all_problems(batch: int = 4, *, dtype: Any = jnp.float32) -> list[Problem]:
    """Returns one of every problem, the logistic map at r = 2.8 and r = 3.3.

    Args:
      batch: number of samples.
      dtype: dtype of all arrays.

    Returns:
      A list of problems with different names.

    Example:
      >>> [problem.name for problem in all_problems() if problem.kind == "unsolvable"]
      ['no-fixed-point', 'growth', 'translation', 'prenorm', 'hyperbola']
    """
    return [
        affine(batch, dtype=dtype),
        cosine(batch, dtype=dtype),
        exponential(batch, dtype=dtype),
        logistic(batch, 2.8, dtype=dtype),
        logistic(batch, 3.3, dtype=dtype),
        rotation(batch, dtype=dtype),
        kinsol(batch, dtype=dtype),
        chandrasekhar(batch, dtype=dtype),
        nonnormal(batch, dtype=dtype),
        multiscale(batch, dtype=dtype),
        no_fixed_point(batch, dtype=dtype),
        growth(batch, dtype=dtype),
        translation(batch, dtype=dtype),
        prenorm(batch, dtype=dtype),
        hyperbola(batch, dtype=dtype),
    ]
