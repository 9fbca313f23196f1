"""Fixed-point problems whose answers are known without solving them.

In every problem ``x`` is added to the map, so that it can be varied, differentiated or spoiled
sample by sample; where the answer is for x = 0, ``x`` is zero.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from deq_jax import init
from deq_jax.solvers.base import StopMode
from deq_jax.tree import PyTree


def _itself(z: PyTree) -> PyTree:
    return z


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """An equation z = f(params, z, x) and what is known about it.

    Attributes:
      name: for messages and test ids.
      f: the map ``(params, z, x) -> z``.
      params: its parameters, a dict of arrays.
      x: tree like ``z0``, added to the map.
      z0: where to start, tree of arrays ``[B, ...]``.
      solution: what ``observe(z*)`` is; None where no solution exists.
      kind: ``"contraction"``: plain iteration converges from ``z0``; ``"solvable"``: a solution
        exists, and plain iteration does not reach it; ``"unsolvable"``: none exists.
      condition: bound of norm(z - z*) / norm(f(z) - z) near the solution; inf if there is none.
      observe: the part of the state that has a closed form; by default all of it.
      vjp: cotangent of z* -> (gradient in params, gradient in x), where it has a closed form.
      least: of an unsolvable problem, stop mode -> positive lower bound of the residual in exact
        arithmetic; a mode is missing where the residual tends to 0 at infinity.
    """

    name: str
    f: Callable[[PyTree, PyTree, PyTree], PyTree]
    params: PyTree
    x: PyTree
    z0: PyTree
    solution: PyTree | None
    kind: Literal["contraction", "solvable", "unsolvable"]
    condition: float = 1.0
    observe: Callable[[PyTree], PyTree] = _itself
    vjp: Callable[[PyTree], tuple[PyTree, PyTree]] | None = None
    least: Mapping[StopMode, float] = dataclasses.field(default_factory=dict)

    def error(self, value: PyTree) -> jax.Array:
        """Returns the largest absolute error of every sample, ``[B]``.

        Args:
          value: a candidate solution, tree like ``z0``.

        Returns:
          float32 or wider, ``[B]``.

        Raises:
          ValueError: if the problem has no solution.
        """
        if self.solution is None:
            raise ValueError(
                f"got a value for problem {self.name}, which has no solution; wanted a problem "
                'whose kind is not "unsolvable"'
            )

        def leaf(a: jax.Array, b: jax.Array) -> jax.Array:
            wide = jnp.promote_types(a.dtype, jnp.float32)
            gap = jnp.abs(a.astype(wide) - b.astype(wide))
            return gap.reshape(gap.shape[0], -1).max(axis=1)

        errors = jax.tree.map(leaf, self.observe(value), self.solution)
        return jnp.stack(jax.tree.leaves(errors)).max(axis=0)


def affine(
    batch: int = 4,
    size: int = 8,
    radius: float = 0.5,
    *,
    dtype: Any = jnp.float32,
    key: jax.Array | None = None,
) -> Problem:
    """The equation z = z W + b + x with W a Haar-distributed orthogonal matrix times ``radius``.

    Every eigenvalue and singular value of W has modulus ``radius``.  The solution and all gradients
    are in closed form: z* = (b + x)(I - W)^-1; for a cotangent c and u = c (I - W)^-T the gradients
    are z*^T u in W, the sum of u over the batch in b, and u in x.

    Args:
      batch: number of samples B; the scale of x grows from 0.1 to 10 along them.
      size: elements of a sample.
      radius: spectral radius, not 1; plain iteration converges below 1.
      dtype: dtype of all arrays.
      key: PRNG key; None for a fixed one.

    Returns:
      Problem with z0 = 0 of shape ``[B, size]``.

    Example:
      >>> problem = affine(batch=2, size=3)
      >>> float(problem.error(problem.solution).max())
      0.0
    """
    keys = jax.random.split(jax.random.key(0) if key is None else key, 3)
    weight = init.orthogonal(radius)(keys[0], (size, size), dtype)
    bias = jax.random.normal(keys[1], (size,), dtype)
    scale = jnp.logspace(-1, 1, batch, dtype=dtype)[:, None]
    x = scale * jax.random.normal(keys[2], (batch, size), dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    resolvent = jnp.linalg.inv(jnp.eye(size, dtype=wide) - weight.astype(wide))
    solution = ((bias[None, :] + x).astype(wide) @ resolvent).astype(dtype)

    def vjp(cotangent: jax.Array) -> tuple[PyTree, PyTree]:
        u = cotangent @ resolvent.T.astype(dtype)
        return {"W": solution.T @ u, "b": u.sum(axis=0)}, u

    return Problem(
        name=f"affine-{radius}",
        f=lambda params, z, x: z @ params["W"] + params["b"][None, :] + x,
        params={"W": weight, "b": bias},
        x=x,
        z0=jnp.zeros_like(x),
        solution=solution,
        kind="contraction" if radius < 1 else "solvable",
        condition=1 / abs(1 - radius),
        vjp=vjp,
    )


def cosine(batch: int = 4, *, dtype: Any = jnp.float32) -> Problem:
    """The equation z = cos(a z) + x with a = 1: the Dottie number, 0.7390851332151607.

    Args:
      batch: number of samples, which differ in their starts.
      dtype: dtype of all arrays.

    Returns:
      Problem with state ``[B, 1]``.
    """
    return scalar(
        "cosine",
        lambda params, z, x: jnp.cos(params["a"] * z) + x,
        {"a": 1.0},
        0.7390851332151607,
        (0.1, 1.5),
        batch,
        dtype,
    )


def exponential(batch: int = 4, *, dtype: Any = jnp.float32) -> Problem:
    """The equation z = exp(-a z) + x with a = 1: the omega constant, 0.5671432904097838.

    Args:
      batch: number of samples, which differ in their starts.
      dtype: dtype of all arrays.

    Returns:
      Problem with state ``[B, 1]``.
    """
    return scalar(
        "exponential",
        lambda params, z, x: jnp.exp(-params["a"] * z) + x,
        {"a": 1.0},
        0.5671432904097838,
        (0.0, 1.5),
        batch,
        dtype,
    )


def logistic(batch: int = 4, rate: float = 2.8, *, dtype: Any = jnp.float32) -> Problem:
    """The equation z = r z (1 - z) + x, with fixed points 1 - 1/r and 0.

    The derivative at 1 - 1/r is 2 - r: plain iteration converges slowly at r = 2.8; at r = 3.3 it
    settles on a cycle of two and must be reported as not converged.

    Args:
      batch: number of samples, which differ in their starts.
      rate: r, in (1, 4).
      dtype: dtype of all arrays.

    Returns:
      Problem with state ``[B, 1]``; a contraction for r < 3.
    """
    problem = scalar(
        f"logistic-{rate}",
        lambda params, z, x: params["r"] * z * (1 - z) + x,
        {"r": rate},
        1 - 1 / rate,
        (0.4, 0.55),
        batch,
        dtype,
    )
    return dataclasses.replace(problem, kind="contraction" if rate < 3 else "solvable")


def rotation(batch: int = 4, angle: float = math.pi / 2, *, dtype: Any = jnp.float32) -> Problem:
    """The equation z = z R + x with R the rotation of the plane by ``angle``; z* = x (I - R)^-1.

    Plain iteration goes round in a circle for ever; an accelerated method needs three steps.

    Args:
      batch: number of samples.
      angle: in radians, not a multiple of 2 pi.
      dtype: dtype of all arrays.

    Returns:
      Problem with state ``[B, 2]``.
    """
    c, s = math.cos(angle), math.sin(angle)
    matrix = np.array([[c, s], [-s, c]])
    x = np.stack([np.linspace(1, 2, batch), np.linspace(-1, 1, batch)], axis=1)
    return Problem(
        name="rotation",
        f=lambda params, z, x: z @ params["R"] + x,
        params={"R": jnp.asarray(matrix, dtype)},
        x=jnp.asarray(x, dtype),
        z0=jnp.zeros((batch, 2), dtype),
        solution=jnp.asarray(x @ np.linalg.inv(np.eye(2) - matrix), dtype),
        kind="solvable",
        condition=1 / math.hypot(1 - c, s),
    )


def nonnormal(batch: int = 4, strength: float = 10.0, *, dtype: Any = jnp.float32) -> Problem:
    """The equation z = z A + x with A = [[0, a], [0, 0]]: spectral radius 0, Frobenius norm a.

    The first steps of any solver grow by the factor a, although plain iteration is exact after two.

    Args:
      batch: number of samples.
      strength: a.
      dtype: dtype of all arrays.

    Returns:
      Problem with state ``[B, 2]`` and z* = x (I + A).
    """
    matrix = np.array([[0.0, strength], [0.0, 0.0]])
    x = np.stack([np.linspace(0.5, 2, batch), np.linspace(-1, 1, batch)], axis=1)
    return Problem(
        name="nonnormal",
        f=lambda params, z, x: z @ params["A"] + x,
        params={"A": jnp.asarray(matrix, dtype)},
        x=jnp.asarray(x, dtype),
        z0=jnp.zeros((batch, 2), dtype),
        solution=jnp.asarray(x @ (np.eye(2) + matrix), dtype),
        kind="contraction",
        condition=1 + abs(strength),
    )


def scalar(
    name: str,
    f: Callable[[PyTree, PyTree, PyTree], PyTree],
    params: dict[str, float],
    root: float,
    starts: tuple[float, float],
    batch: int,
    dtype: Any,
) -> Problem:
    """Returns a problem in one unknown whose samples differ in their starts only."""
    return Problem(
        name=name,
        f=f,
        params={key: jnp.asarray(value, dtype) for key, value in params.items()},
        x=jnp.zeros((batch, 1), dtype),
        z0=jnp.linspace(*starts, batch, dtype=dtype)[:, None],
        solution=jnp.full((batch, 1), root, dtype),
        kind="contraction",
    )
