"""The assertion that a gradient has a second and a third computation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deq_jax import tree
from deq_jax.fixed_point import fixed_point
from deq_jax.solvers import Broyden, Solution, Solver
from deq_jax.tree import PyTree

_StateMap = Callable[[PyTree, PyTree, PyTree], PyTree]


def assert_gradients_agree(
    f: _StateMap,
    params: PyTree,
    z0: PyTree,
    x: PyTree = None,
    *,
    solver: Solver | None = None,
    unroll: int = 400,
    damping: float = 1.0,
    directions: int = 3,
    rtol: float = 1e-5,
    key: jax.Array | None = None,
) -> None:
    """Asserts that three computations of the gradient of a solution agree, in float64.

    For loss = sum(c * z*) with a random c: the implicit gradient, the gradient by differentiating
    ``unroll`` steps of z <- (1 - damping) z + damping f(z) from the solution, and central
    differences along random directions, for all floating-point leaves of ``params`` and ``x``.
    The gradient in ``z0`` must be zero.

    Args:
      f: the map ``(params, z, x) -> z``; it must not cast to a fixed dtype.
      params: its parameters.
      z0: start, tree of arrays ``[B, ...]``.
      x: the other operands of f.
      solver: reaches the solution and solves the backward system; None for a Broyden method with a
        tolerance of 1e-12.
      unroll: number of steps; their contraction must make the last one negligible.
      damping: step length; less than 1 where the plain iteration does not converge.
      directions: number of random directions for the differences.
      rtol: largest difference allowed, relative to the size of the gradient.
      key: PRNG key of c and of the directions; None for a fixed one.

    Returns:
      None.

    Raises:
      AssertionError: saying which two computations disagree and where.

    Example:
      >>> import jax.numpy as jnp
      >>> f = lambda params, z, x: jnp.cos(params * z) + x
      >>> assert_gradients_agree(f, jnp.float32(0.9), jnp.ones((2, 3)), jnp.zeros((2, 3)))
    """
    with jax.enable_x64(True):
        z0, operands = _widen(z0), _widen((params, x))
        settings = solver or Broyden(tol=1e-12, max_steps=200, memory=50, stop="abs")
        free, rebuild = _floating(operands)
        keys = jax.random.split(jax.random.key(0) if key is None else key, 2 + directions)
        c = _normal_like(keys[0], z0)

        def answer(free: list[jax.Array], start: PyTree) -> tuple[jax.Array, Solution]:
            p, other = rebuild(free)
            sol = fixed_point(f, p, start, other, solver=settings)
            return tree.dot(sol.value, c).sum(), sol

        (_, sol), (implicit, from_z0) = jax.value_and_grad(answer, (0, 1), has_aux=True)(free, z0)
        if not sol.stats.converged.all():
            raise AssertionError(
                f"got residuals {sol.stats.residual} of the forward solve; wanted at most "
                f"{settings.tol} in all samples"
            )

        def unrolled(free: list[jax.Array]) -> jax.Array:
            p, other = rebuild(free)

            def step(z: PyTree, _: None) -> tuple[PyTree, None]:
                mix = jax.tree.map(lambda a, b: a + damping * (b - a), z, f(p, z, other))
                return mix, None

            start = lax.stop_gradient(sol.value)
            return tree.dot(lax.scan(step, start, None, length=unroll)[0], c).sum()

        _close("implicit and unrolled gradient", implicit, jax.grad(unrolled)(free), rtol)
        _close("gradient in z0 and zero", from_z0, jax.tree.map(jnp.zeros_like, z0), rtol)

        along = [_normal_like(k, free) for k in keys[2:]]
        moved = [
            [a + eps * d for a, d in zip(free, direction, strict=True)]
            for direction in along
            for eps in (1e-5, -1e-5)
        ]
        # Under one map, all these solves are compiled once.
        stacked = jax.tree.map(lambda *a: jnp.stack(a), *moved)
        ends = lax.map(lambda point: answer(point, sol.value)[0], stacked).reshape(-1, 2)
        size = [sum(jnp.linalg.norm(a) for a in implicit)]
        for direction, (above, below) in zip(along, ends, strict=True):
            slope = sum(jnp.vdot(a, b) for a, b in zip(implicit, direction, strict=True))
            difference = (above - below) / 2e-5
            _close("implicit gradient and finite difference", [slope], [difference], rtol, size)


def _close(what: str, a: PyTree, b: PyTree, rtol: float, size: PyTree | None = None) -> None:
    for x, y, s in zip(
        *(jax.tree.leaves(t) for t in (a, b, b if size is None else size)), strict=True
    ):
        x, y = np.asarray(x), np.asarray(y)
        gap, allowed = np.abs(x - y).max(initial=0), rtol * (1e-3 + np.abs(s).max(initial=0))
        if not gap <= allowed:
            raise AssertionError(
                f"{what} disagree: got {x} and {y}; wanted a difference of at most {allowed}"
            )


def _widen(operand: PyTree) -> PyTree:
    """Casts floating-point leaves to float64."""

    def leaf(a: Any) -> jax.Array:
        a = jnp.asarray(a)
        return a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a

    return jax.tree.map(leaf, operand)


def _floating(operands: PyTree) -> tuple[list[jax.Array], Callable[[list[jax.Array]], PyTree]]:
    """Returns the floating-point leaves, and how to put others in their places."""
    leaves, treedef = jax.tree.flatten(operands)
    places = [i for i, a in enumerate(leaves) if jnp.issubdtype(a.dtype, jnp.floating)]

    def rebuild(free: list[jax.Array]) -> PyTree:
        filled = list(leaves)
        for i, a in zip(places, free, strict=True):
            filled[i] = a
        return treedef.unflatten(filled)

    return [leaves[i] for i in places], rebuild


def _normal_like(key: jax.Array, like: PyTree) -> PyTree:
    leaves, treedef = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    drawn = [jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, leaves, strict=True)]
    return treedef.unflatten(drawn)
