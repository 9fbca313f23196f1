"""One gradient of the solver benchmark, given as JSON on the command line: prints a line of JSON.

Value and gradient of sum(c z*) by weights and input, for the dense problem of `benchmarks._peers`:
Broyden's method forward with 20 steps and all of them in memory, 20 products backward where a
linear system is solved.  Reversible and Backprop differentiate 20 steps of plain iteration.  The
error is that of the gradient against float64, with both systems solved to rounding.
"""

# The peers are installed by the extra [bench] only.
# pyright: reportMissingImports=false

import dataclasses
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks._case import NEVER, limit_threads, peak_mb, times_ms
from benchmarks._peers import arrays, f_jax

PROBLEM, STEPS, PHANTOM = "dense", 20, (5, 0.5)
RULES = {
    "deq_jax": ("implicit", "unroll", "phantom", "shine", "shine-2", "reversible", "backprop"),
    "torchdeq": ("implicit", "unroll", "phantom"),
}
"""Library -> its rules; implicit is the exact gradient, unroll the Jacobian-free one."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: a library, a gradient rule, a number of threads."""

    library: str
    rule: str
    threads: int


def exact() -> list[np.ndarray]:
    """The gradient of the fixed point, in float64."""
    weights, x, cotangent = (a.astype(np.float64) for a in arrays(PROBLEM))
    z, u = np.zeros_like(x), cotangent
    for _ in range(300):
        z = np.tanh(z @ weights + x)
    slope = 1 - z**2
    for _ in range(300):
        u = cotangent + (slope * u) @ weights.T
    return [z.T @ (slope * u), slope * u]


def build(case: Case) -> Callable[[], Any]:
    """Compiles value and gradient.

    Args:
        case: its library must be installed.

    Returns:
        What computes [gradient by weights, gradient by x] and waits for it.
    """
    return _torchdeq(case) if case.library == "torchdeq" else _deq_jax(case)


def _deq_jax(case: Case) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp

    import deq_jax as deq

    weights, x, cotangent = (jnp.asarray(a) for a in arrays(PROBLEM))
    broyden = deq.Broyden(tol=NEVER, max_steps=STEPS, memory=STEPS)
    # Shine uses the factors of samples that have converged only.
    converged = deq.Broyden(tol=1e-3, max_steps=STEPS, memory=STEPS)
    picard = deq.Picard(tol=NEVER, max_steps=STEPS)
    rule, solver, keep = {
        "implicit": (deq.Implicit(broyden), broyden, "best"),
        "unroll": (deq.Unroll(1), broyden, "best"),
        "phantom": (deq.Unroll(*PHANTOM), broyden, "best"),
        "shine": (deq.Shine(0), converged, "best"),
        "shine-2": (deq.Shine(2), converged, "best"),
        "reversible": (deq.Reversible(0.5), picard, "last"),
        "backprop": (deq.Backprop(), picard, "last"),
    }[case.rule]
    f: Any = f_jax(PROBLEM)

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        z0 = jnp.zeros_like(x)
        sol = deq.fixed_point(f, w, z0, x, solver=solver, adjoint=rule, keep=keep)
        return jnp.sum(cotangent * sol.value)

    program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(weights, x).compile()
    return lambda: jax.block_until_ready(program(weights, x))[1]


def _torchdeq(case: Case) -> Callable[[], Any]:
    import torch
    import torchdeq

    torch.set_num_threads(case.threads)
    weights, x, cotangent = (torch.from_numpy(a) for a in arrays(PROBLEM))
    weights.requires_grad_()
    x.requires_grad_()
    steps, tau = PHANTOM if case.rule == "phantom" else (1, 1.0)
    deq = torchdeq.get_deq(
        core="indexing",
        ift=case.rule == "implicit",
        grad=steps,
        tau=tau,
        f_solver="broyden",
        b_solver="broyden",
        f_max_iter=STEPS,
        b_max_iter=STEPS,
        f_tol=NEVER,
        b_tol=NEVER,
    ).train()

    def run() -> Any:
        value = deq(lambda z: torch.tanh(z @ weights + x), torch.zeros_like(cotangent))[0][-1]
        return torch.autograd.grad((cotangent * value).sum(), (weights, x))

    return run


def measure(fields: dict, repeats: int) -> dict:
    """Builds a case and measures it.

    Args:
        fields: of `Case`.
        repeats: timed runs.

    Returns:
        The fields; ms, the median of value and gradient; peak_mb of the first run; error, the
        relative error of the gradient by the weights, and cosine, their angle to the exact one.
    """
    run = build(Case(**fields))
    peak = peak_mb(run)
    (times,) = times_ms([run], repeats)
    gradient = np.asarray(run()[0], np.float64)
    wanted = exact()[0]
    size = np.linalg.norm(wanted)
    return fields | {
        "ms": statistics.median(wall for wall, _ in times),
        "peak_mb": peak,
        "error": float(np.linalg.norm(gradient - wanted) / size),
        "cosine": float(np.sum(gradient * wanted) / size / np.linalg.norm(gradient)),
    }


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    limit_threads(request["case"]["threads"])
    print(json.dumps(measure(request["case"], request["repeats"])))
