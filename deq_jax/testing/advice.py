"""What a diagnosis means, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from deq_jax.solvers import Picard, Solver

if TYPE_CHECKING:
    from deq_jax.testing.diagnosis import Diagnosis

# Spectral radius from which on plain iteration is not expected to converge in reasonable time.
_EDGE = 0.99


def plain_iteration(solvers: Mapping[str, Solver]) -> str | None:
    """Finds the undamped iteration among some solvers.

    Args:
      solvers: name -> solver.

    Returns:
      The name of the first one, None if there is none.

    Example:
      >>> plain_iteration({"damped": Picard(damping=0.5), "plain": Picard()})
      'plain'
    """
    plain = [n for n, s in solvers.items() if isinstance(s, Picard) and s.damping == 1]
    return plain[0] if plain else None


def _in(mask: np.ndarray) -> str:
    return "" if mask.all() else f" in {mask.sum()} of {len(mask)} samples"


def advise(
    d: Diagnosis, solvers: Mapping[str, Solver], finite: np.ndarray, spoiled: Sequence[str]
) -> tuple[str, ...]:
    """Says what was found and what would help.

    Args:
      d: what was measured, without advice.
      solvers: those whose solves were measured.
      finite: bool ``[B]``, whether f(z0) is.
      spoiled: names of the operands of f that hold numbers which are not finite.

    Returns:
      At most four sentences, the most important first.
    """
    said = []
    if not finite.all():
        why = "look for an overflow in f, or start from another z0"
        if spoiled:
            why = f"see what is not finite in {' and '.join(dict.fromkeys(spoiled))}"
        said = [f"f(z0) is not finite{_in(~finite)}, where no solver can begin: {why}."]
    if not finite.any():
        return tuple(said)
    rho, sigma = d.spectral_radius, d.operator_norm
    stalled = {n: _stalled(d, n) for n in solvers}
    said += _of_rounding(d, stalled)
    said += _of_unsolved(d, solvers, finite & ~np.any([*stalled.values()], axis=0))
    said += _of_plain(d, solvers, finite, stalled)
    if (sigma[finite] < 1e-6).all():
        said.append(
            "f does not depend on z: its Jacobian is 0, and one evaluation of f is the answer; see "
            "that z enters f, through weights that are not 0 and units that are not dead."
        )
    elif not said:
        best = [n for n in solvers if d.converged[n].all()]
        each = ", ".join(f"{n} in {np.median(d.steps[n]):g}" for n in best) or "one or another"
        said.append(
            f"All is well: every sample is solved, by {each} steps (median), and the spectral "
            f"radius is at most {rho.max():.2f}."
        )
    skewed = finite & (rho < _EDGE) & (sigma > np.maximum(1, 1.5 * rho))
    if skewed.any():
        i = np.argmax(np.where(skewed, sigma, 0))
        said.append(
            f"The operator norm is {sigma[i]:.3g} where the spectral radius is {rho[i]:.2f}"
            f"{_in(skewed)}: f is not normal, and the first steps of plain iteration can grow "
            "before they shrink; orthogonal or symmetric weights (deq.init.orthogonal, "
            "deq.init.goe) keep the two together."
        )
    return tuple(said[:4])


def _stalled(d: Diagnosis, name: str) -> np.ndarray:
    """Whether a solve has ended in the rounding errors of f, ``[B]``."""
    halves = np.split(d.trace[name], [(len(d.trace[name]) + 1) // 2])
    first, second = (np.fmin.reduce(half, initial=np.inf) for half in halves)
    flat = (second > first / 2) & np.isfinite(second)
    return flat & ~d.converged[name] & (np.fmin(first, second) < 10 * d.rounding)


def _of_rounding(d: Diagnosis, stalled: Mapping[str, np.ndarray]) -> list[str]:
    names, mask = [n for n in stalled if stalled[n].any()], np.any([*stalled.values()], axis=0)
    if not names:
        return []
    floor = max(np.fmin.reduce(d.trace[n])[stalled[n]].max() for n in names)
    noise = np.median(d.rounding[mask])
    wider = "float32 with exact products (jax_default_matmul_precision)"
    return [
        f"{' and '.join(names)} stall{'s' * (len(names) == 1)} at a residual of {floor:.0e}"
        f"{_in(mask)}, as f is precise to {noise:.0e} only: set tol above {2 * floor:.0e}, or "
        f"compute f in {wider if noise > 1e-5 else 'float64'}."
    ]


def _of_unsolved(d: Diagnosis, solvers: Mapping[str, Solver], mask: np.ndarray) -> list[str]:
    mask = mask & ~np.any([*d.converged.values()], axis=0)
    if not mask.any():
        return []
    rest = {n: np.median(np.fmin.reduce(trace[:, mask])) for n, trace in d.trace.items()}
    name = min(rest, key=lambda n: rest[n])
    tol, budget = solvers[name].tol, solvers[name].max_steps
    start = (
        f"No solver reaches its tolerance{_in(mask)}; {name} comes closest, with a residual of "
        f"{rest[name]:.1g} (tolerance {tol:g}) in {budget} steps"
    )
    # Falling: from the middle to the end of the solve, the median of the least residual so far.
    least = np.median(np.fmin.accumulate(d.trace[name][:, mask]), axis=1)
    middle, end = least[budget // 2], least[-1]
    if budget > 3 and 0 < end < 0.7 * middle < np.inf:
        rate = np.log(end / middle) / (budget - 1 - budget // 2)
        return [f"{start}, and falling: about {budget + np.log(tol / end) / rate:.0f} would do."]
    if np.median(d.spectral_radius[mask]) >= _EDGE:
        return [f"{start}; there may be no fixed point."]  # what to do comes with the radius
    return [f"{start}: lower the scale of the weights, or give it more steps and memory."]


def _of_plain(
    d: Diagnosis,
    solvers: Mapping[str, Solver],
    finite: np.ndarray,
    stalled: Mapping[str, np.ndarray],
) -> list[str]:
    """What to say of samples that plain iteration does not solve, or others do not."""
    said, rho, plain = [], d.spectral_radius, plain_iteration(solvers)
    solved = np.any([*d.converged.values()], axis=0)
    left = finite & ~(d.converged[plain] | stalled[plain]) if plain else finite
    unstable = left & (rho >= _EDGE)
    if unstable.any():
        largest = rho[unstable].max()
        up_to = "up to " if rho[unstable].min() < 0.95 * largest else ""
        skewed = d.operator_norm[unstable].max() > 1.2 * largest
        said.append(
            f"The spectral radius at the {'' if solved[unstable].all() else 'would-be '}fixed "
            f"point is {up_to}{largest:.2f}{_in(unstable)}: plain iteration "
            f"{'diverges' if largest > 2 - _EDGE else 'does not settle'}; lower the scale of the "
            f"weights {f'by {largest:.2g} or more' if largest > 1.05 else 'a little'}"
            f"{', start from orthogonal weights (deq.init.orthogonal)' if skewed else ''}, or "
            "train with deq.frobenius_penalty."
        )
    if plain is None:
        return said
    tol, others = solvers[plain].tol, [n for n in solvers if n != plain]
    slow = left & solved & (rho < _EDGE)
    if slow.any():
        radius = np.median(rho[slow])
        need = np.log(tol) / np.log(radius) if tol < 1 and radius > 0 else 0
        said.append(
            f"At a spectral radius of {radius:.2f} plain iteration needs about {need:.0f} steps "
            f"to {tol:g}{_in(slow)}."
            if need > 0.8 * solvers[plain].max_steps
            else f"Plain iteration does not come from z0 to the fixed point{_in(slow)}, though the "
            f"spectral radius there is {radius:.2f}: start nearer to it."
        )
    helped = {n: d.converged[n] & left for n in others}
    best = max(others, key=lambda n: (helped[n].sum(), -np.median(d.steps[n])), default="")
    if best and helped[best].any():
        said.append(
            f"{best} solves what plain iteration does not{_in(helped[best])}, in "
            f"{np.median(d.steps[best][helped[best]]):g} steps (median): use it."
        )
    for name in others:
        missed = d.converged[plain] & ~d.converged[name]
        if missed.any() and not stalled[name].any():
            said.append(f"{name} does not solve what plain iteration does{_in(missed)}.")
    return said
