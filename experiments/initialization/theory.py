"""Measures random matrices, and the solves of linear DEQs made of them, beside the predictions."""

from __future__ import annotations

import functools
import math
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import deq_jax as deq
from experiments.common import families
from experiments.initialization.config import FAMILIES, TheoryConfig

SOLVERS = {
    "picard": deq.Picard,
    "anderson": functools.partial(deq.Anderson, memory=5),
    "broyden": functools.partial(deq.Broyden, memory=20),
}


def measure(config: TheoryConfig) -> list[dict[str, Any]]:
    """Measures every family, size and scale, with progress on stderr.

    Args:
      config: what to measure.

    Returns:
      A record for each, of "family", "size", "fraction" (of the critical scale), "scale" and lists
      with one number for each matrix: "L1", "L2", "radius" (spectral), "norm" (operator), "gain"
      (squared length of the solution over that of x, mean over the x, of the Anderson solves), and
      for every solver "<name>_steps" (mean over the x) and "<name>_solved" (share of them).
    """
    began, records = time.monotonic(), []
    for size in config.sizes:
        for family in FAMILIES:
            matrices = [_measure_matrix(config, family, size, s) for s in range(config.seeds)]
            for i, fraction in enumerate(config.fractions):
                scale = fraction * deq.init.critical_scale(family)
                record = {"family": family, "size": size, "fraction": fraction, "scale": scale}
                names = matrices[0][i]
                records.append(record | {n: [m[i][n] for m in matrices] for n in names})
            sys.stderr.write(f"N = {size}  {family}  {time.monotonic() - began:.0f} s\n")
    return records


def _measure_matrix(
    config: TheoryConfig, family: str, size: int, seed: int
) -> list[dict[str, float]]:
    """The numbers of one matrix at every scale."""
    key = jax.random.fold_in(jax.random.key(seed), size)
    draw_key, x_key = jax.random.split(key)
    unit = families.FAMILIES[family](1.0)(draw_key, (size, size))
    scales = np.array(config.fractions) * deq.init.critical_scale(family)
    x = jax.random.normal(x_key, (config.inputs, size))
    solved = {}
    for name, make in SOLVERS.items():
        solver = make(tol=config.tol, max_steps=config.max_steps)
        solved[name] = jax.device_get(solve(solver, unit, scales.astype(np.float32), x))
    # Weights are drawn in float32, as a model's; what is computed of them is in float64, since near
    # the critical scale I - W is ill-conditioned.
    w = np.asarray(unit, np.float64)
    radius, norm = spectral_radius(w), math.sqrt(np.linalg.eigvalsh(w.T @ w)[-1])
    found = []
    for i, scale in enumerate(scales):
        first, second = gains(scale * w)
        numbers = {"L1": first, "L2": second, "radius": scale * radius, "norm": scale * norm}
        numbers["gain"] = float(solved["anderson"][2][i])
        for name, (steps, converged, _) in solved.items():
            numbers[f"{name}_steps"] = float(steps[i])
            numbers[f"{name}_solved"] = float(converged[i])
        found.append({n: float(v) for n, v in numbers.items()})
    return found


def gains(w: np.ndarray) -> tuple[float, float]:
    """L1 = tr(R R^T) / N and L2 = tr((R R^T)^2) / N of one matrix, R = (I - W)^-1.

    Args:
      w: float64 ``[N, N]``.

    Returns:
      (L1, L2).

    Example:
      >>> gains(np.eye(2) / 2)
      (4.0, 16.0)
    """
    size = len(w)
    resolvent = np.linalg.inv(np.eye(size) - w)
    gram = resolvent @ resolvent.T
    return float(np.trace(gram)) / size, float((gram * gram).sum()) / size


def spectral_radius(w: np.ndarray, squarings: int = 14) -> float:
    """Gelfand's formula by repeated squaring, norm(W^m)^(1/m) with m = 2^squarings.

    Too large by at most a factor N^(1/m) times that of the eigenvectors' condition: by 1e-3 for
    random matrices.  All eigenvalues of a matrix of 1,024 would take ten times as long.

    Args:
      w: float64 ``[N, N]``.
      squarings: how often W is squared.

    Returns:
      The largest modulus of an eigenvalue.

    Example:
      >>> round(spectral_radius(np.array([[0.0, 0.5], [-0.5, 0.0]])), 3)
      0.5
    """
    log, power = 0.0, w
    for i in range(squarings + 1):
        power = power @ power if i else power
        length = float(np.linalg.norm(power))
        if length == 0:
            return 0.0
        power, log = power / length, log + math.log(length) / 2**i
    return math.exp(log)


@functools.partial(jax.jit, static_argnums=0)
def solve(solver: Any, unit: jax.Array, scales: jax.Array, x: jax.Array) -> Any:
    """Solves z = s W z + x for all scales and inputs at once; samples stop on their own.

    Args:
      solver: of deq_jax.
      unit: W at s = 1, float32 ``[N, N]``.
      scales: s, float32 ``[S]``.
      x: float32 ``[B, N]``.

    Returns:
      Mean steps, share solved, and mean squared length of z over that of x, float32 ``[S]`` each.
    """
    rows = jnp.repeat(scales, len(x))[:, None]  # [S B, 1]
    inputs = jnp.tile(x, (len(scales), 1))

    def f(w: Any, z: Any, operands: Any) -> jax.Array:
        scale, x = operands
        return scale * (z @ w.T) + x

    zeros = jnp.zeros_like(inputs)
    solution = deq.fixed_point(f, unit, zeros, (rows, inputs), solver=solver)
    stats = solution.stats
    gain = jnp.sum(solution.value**2, axis=1) / jnp.sum(inputs**2, axis=1)
    found = (stats.num_steps.astype(jnp.float32), stats.converged.astype(jnp.float32), gain)
    return tuple(a.reshape(len(scales), -1).mean(axis=1) for a in found)


def predicted_picard(family: str, scale: float, tol: float) -> int:
    """Evaluations of f that plain iteration from 0 takes to a relative residual, for wide layers.

    Evaluation k has the residual norm(W^(k-1) x), whose mean square is s^(2 (k-1)) norm(x)^2, for
    the symmetric family times the (k-1)st Catalan number; f(z) has grown to sqrt(L1) norm(x).

    Args:
      family: of W.
      scale: s.
      tol: the relative residual.

    Returns:
      The least k that reaches it.

    Example:
      >>> predicted_picard("orthogonal", 0.1, 1e-4)
      5
    """
    limit = math.log(deq.init.predicted_gain(family, scale)[0]) + 2 * math.log(tol)
    k, squared = 1, 0.0  # log of the mean square of W^(k-1) x
    while squared > limit:
        catalan = (4 * k - 2) / (k + 1) if family == "goe" else 1.0
        squared += 2 * math.log(scale) + math.log(catalan)
        k += 1
    return k
