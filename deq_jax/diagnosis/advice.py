"""What a diagnosis means, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from deq_jax.solvers import Picard, Solver

if TYPE_CHECKING:
    from deq_jax.diagnosis.measures import Diagnosis

_Arrays = Mapping[str, np.ndarray]
_Finding = tuple[str, np.ndarray, dict[str, Any]]  # key in _SENTENCES, samples, values

# Spectral radius from which on plain iteration is not expected to converge in reasonable time.
_EDGE = 0.99
# Cosine below which two fixed points count as different.
_ALIGNED = 0.9
_MOST_ADVICE = 5

_SENTENCES = {
    "dependent": (
        "The samples depend on each other: f(z) of one sample changes with the state of another, "
        "so steps and residuals per sample mean little. If z0 has no batch axis, pass "
        "batched=False; if f uses statistics of the batch, hold them constant during the solve."
    ),
    "not_finite": (
        "f(z0) is not finite, and no solver can start: look for an overflow in f, or choose "
        "another z0."
    ),
    "spoiled": (
        "f(z0) is not finite, and no solver can start: replace the values that are not finite in "
        "{operands}."
    ),
    "runaway": (
        "Do not use the answers of {solvers}: the residuals are small only because z runs away. "
        "norm(z) has grown {growth:,.0f} times, and no fixed point is near. f may have none: "
        "normalise its output, or lower the scale of its weights."
    ),
    "stalled_coarse": (
        "The residual stalls at {floor:.0e} ({solvers}), because f is precise to {noise:.0e} only: "
        "set tol above {tol:.0e}, or compute f in float32 with exact products "
        "(jax_default_matmul_precision)."
    ),
    "stalled_fine": (
        "The residual stalls at {floor:.0e} ({solvers}), because f is precise to {noise:.0e} only: "
        "set tol above {tol:.0e}, or compute f in float64."
    ),
    "falling": (
        "No solver reaches its tolerance, but the residual of {solver} still falls: {residual:.1g} "
        "(tolerance {tol:g}) after {steps} steps; about {need:.0f} steps would do."
    ),
    "no_solution": (
        "No solver reaches its tolerance; {solver} comes closest, with a residual of "
        "{residual:.1g} (tolerance {tol:g}) in {steps} steps. There may be no fixed point."
    ),
    "unsolved": (
        "No solver reaches its tolerance; {solver} comes closest, with a residual of "
        "{residual:.1g} (tolerance {tol:g}) in {steps} steps. Lower the scale of the weights, or "
        "allow more steps and memory."
    ),
    "diverges": (
        "Plain iteration diverges: the spectral radius at the returned values is up to "
        "{radius:.2f}. Lower the scale of the weights by a factor of {radius:.2g} or more, or "
        "train with deq.frobenius_penalty."
    ),
    "diverges_skewed": (
        "Plain iteration diverges: the spectral radius at the returned values is up to "
        "{radius:.2f}. Lower the scale of the weights by a factor of {radius:.2g} or more, start "
        "from orthogonal weights (deq.init.orthogonal), or train with deq.frobenius_penalty."
    ),
    "marginal": (
        "Plain iteration does not settle: the spectral radius at the returned values is up to "
        "{radius:.2f}. Lower the scale of the weights a little, or train with "
        "deq.frobenius_penalty."
    ),
    "slow": (
        "Plain iteration needs about {need:.0f} steps to {tol:g} at a spectral radius of "
        "{radius:.2f}."
    ),
    "far_start": (
        "Plain iteration does not get from z0 to the fixed point, although the spectral radius "
        "there is {radius:.2f}: start nearer to it."
    ),
    "use": "{solver} solves what plain iteration does not, in {steps:g} steps (median): use it.",
    "misses": "{solver} does not solve what plain iteration does.",
    "constant": (
        "f does not depend on z: its Jacobian is 0, and one evaluation of f is the answer. Check "
        "that z enters f, through weights that are not 0 and units that are not dead."
    ),
    "well": (
        "All is well: every sample is solved (median steps: {solvers}), and the spectral radius "
        "is at most {radius:.2f}."
    ),
    "skewed": (
        "The operator norm is {norm:.3g} where the spectral radius is {radius:.2f}: f is not "
        "normal, and the first steps of plain iteration can grow before they shrink. Orthogonal "
        "or symmetric weights (deq.init.orthogonal, deq.init.goe) keep the two together."
    ),
    "paths": (
        "The answer depends on the start: from another z0, {solver} reaches another fixed point "
        "(cosine {cosine:.2f}). Use the same z0 in training and evaluation, or train from random "
        "starts."
    ),
}


def plain_iteration(solvers: Mapping[str, Solver]) -> str | None:
    """Returns the name of the first undamped iteration, or None.

    Args:
      solvers: name -> solver.

    Returns:
      A name.

    Example:
      >>> plain_iteration({"damped": Picard(damping=0.5), "plain": Picard()})
      'plain'
    """
    plain = [n for n, s in solvers.items() if isinstance(s, Picard) and s.damping == 1]
    return plain[0] if plain else None


def advise(
    d: Diagnosis,
    solvers: Mapping[str, Solver],
    ends: Mapping[str, _Arrays],
    finite: np.ndarray,
    spoiled: Sequence[str],
) -> tuple[str, ...]:
    """Returns sentences about what was measured, the most important first.

    Args:
      d: what was measured, without advice.
      solvers: those whose solves were measured.
      ends: solver -> ``growth`` of norm(z) and ``fall`` of norm(f(z) - z), each ``[B]``.
      finite: bool ``[B]``, whether f(z0) is.
      spoiled: names of the operands of f that hold numbers which are not finite.

    Returns:
      At most five sentences.
    """
    findings = list(_findings(d, solvers, ends, finite, spoiled))
    return tuple(_sentence(*finding) for finding in findings[:_MOST_ADVICE])


def _findings(
    d: Diagnosis,
    solvers: Mapping[str, Solver],
    ends: Mapping[str, _Arrays],
    finite: np.ndarray,
    spoiled: Sequence[str],
) -> Iterator[_Finding]:
    if d.dependent.any():
        yield "dependent", d.dependent, {}
    if not finite.all():
        operands = " and ".join(dict.fromkeys(spoiled))
        yield "spoiled" if spoiled else "not_finite", ~finite, {"operands": operands}
    if not finite.any():
        return
    runs = [n for n in solvers if d.runaway[n].any()]
    if runs:
        growth = np.concatenate([ends[n]["growth"][d.runaway[n]] for n in runs])
        values = {"solvers": _listed(runs), "growth": np.median(growth)}
        yield "runaway", np.any([d.runaway[n] for n in runs], axis=0), values
    problems = [
        *_of_rounding(d),
        *_of_unsolved(d, solvers, ends, finite),
        *_of_plain(d, solvers, finite),
    ]
    yield from problems
    rho, sigma = d.spectral_radius, d.operator_norm
    if (sigma[finite] < 1e-6).all():
        yield "constant", np.full_like(finite, True), {}
    elif finite.all() and not (runs or problems):
        each = [f"{n} {np.median(d.steps[n]):g}" for n in solvers if d.converged[n].all()]
        values = {"solvers": ", ".join(each) or "not by one solver alone", "radius": rho.max()}
        yield "well", finite, values
    skewed = finite & (rho < _EDGE) & (sigma > np.maximum(1, 1.5 * rho))
    if skewed.any():
        i = np.argmax(np.where(skewed, sigma, 0))
        yield "skewed", skewed, {"norm": sigma[i], "radius": rho[i]}
    worst = {n: cosine < _ALIGNED for n, cosine in d.alignment.items()}  # NaN: False
    name = max(worst, key=lambda n: worst[n].sum())
    if worst[name].any():
        cosine = np.median(d.alignment[name][worst[name]])
        yield "paths", worst[name], {"solver": name, "cosine": cosine}


def _stalled(d: Diagnosis, name: str) -> np.ndarray:
    """Returns whether a solve has ended in the rounding errors of f, ``[B]``."""
    halves = np.split(d.trace[name], [(len(d.trace[name]) + 1) // 2])
    first, second = (np.fmin.reduce(half, initial=np.inf) for half in halves)
    flat = (second > first / 2) & np.isfinite(second)
    return flat & ~d.converged[name] & (np.fmin(first, second) < 10 * d.rounding)


def _of_rounding(d: Diagnosis) -> Iterator[_Finding]:
    stalled = {n: _stalled(d, n) for n in d.trace}
    names, mask = [n for n in stalled if stalled[n].any()], np.any([*stalled.values()], axis=0)
    if names:
        floor = max(np.fmin.reduce(d.trace[n])[stalled[n]].max() for n in names)
        noise = np.median(d.rounding[mask])
        key = "stalled_coarse" if noise > 1e-5 else "stalled_fine"
        values = {"solvers": _listed(names), "floor": floor, "tol": 2 * floor, "noise": noise}
        yield key, mask, values


def _of_unsolved(
    d: Diagnosis,
    solvers: Mapping[str, Solver],
    ends: Mapping[str, _Arrays],
    finite: np.ndarray,
) -> Iterator[_Finding]:
    mask = finite & ~np.any([_stalled(d, n) | d.converged[n] for n in solvers], axis=0)
    if not mask.any():
        return
    tried = {n: np.fmin.reduce(d.trace[n])[mask] for n in solvers if not d.runaway[n][mask].all()}
    if not tried:
        return
    name = min(tried, key=lambda n: np.median(tried[n]))
    tol, budget = solvers[name].tol, solvers[name].max_steps
    values = {"solver": name, "residual": np.median(tried[name]), "tol": tol, "steps": budget}
    # Falling: from the middle to the end of the solve, the median of the least residual so far,
    # and norm(f(z) - z), which a growing norm(z) cannot hide.
    least = np.median(np.fmin.accumulate(d.trace[name][:, mask]), axis=1)
    middle, end = least[budget // 2], least[-1]
    ran = np.any([d.runaway[n][mask] for n in solvers])
    falls = budget > 3 and 0 < end < 0.7 * middle < np.inf and not ran
    if falls and np.median(ends[name]["fall"][mask]) < 0.7:
        rate = np.log(end / middle) / (budget - 1 - budget // 2)
        yield "falling", mask, {**values, "need": budget + np.log(tol / end) / rate}
    elif ran or np.median(d.spectral_radius[mask]) >= _EDGE:
        yield "no_solution", mask, values
    else:
        yield "unsolved", mask, values


def _of_plain(
    d: Diagnosis, solvers: Mapping[str, Solver], finite: np.ndarray
) -> Iterator[_Finding]:
    """Compares plain iteration with the other solvers."""
    rho, plain = d.spectral_radius, plain_iteration(solvers)
    solved = np.any([*d.converged.values()], axis=0)
    left = finite & ~(d.converged[plain] | _stalled(d, plain)) if plain else finite
    unstable = left & (rho >= _EDGE)
    if unstable.any():
        radius = rho[unstable].max()
        skewed = "_skewed" * bool(d.operator_norm[unstable].max() > 1.2 * radius)
        yield f"diverges{skewed}" if radius > 1.05 else "marginal", unstable, {"radius": radius}
    if plain is None:
        return
    slow = left & solved & (rho < _EDGE)
    if slow.any():
        tol, radius = solvers[plain].tol, np.median(rho[slow])
        need = np.log(tol) / np.log(radius) if tol < 1 and radius > 0 else 0
        enough = need <= 0.8 * solvers[plain].max_steps
        values = {"radius": radius, "need": need, "tol": tol}
        yield "far_start" if enough else "slow", slow, values
    others = [n for n in solvers if n != plain]
    helped = {n: d.converged[n] & left for n in others}
    best = max(others, key=lambda n: (helped[n].sum(), -np.median(d.steps[n])), default="")
    if best and helped[best].any():
        steps = np.median(d.steps[best][helped[best]])
        yield "use", helped[best], {"solver": best, "steps": steps}
    for name in others:
        missed = d.converged[plain] & ~d.converged[name] & ~d.runaway[name]
        if missed.any() and not _stalled(d, name).any():
            yield "misses", missed, {"solver": name}


def _sentence(key: str, samples: np.ndarray, values: Mapping[str, Any]) -> str:
    share = "" if samples.all() else f"{samples.sum()} of {samples.size} samples: "
    return share + _SENTENCES[key].format(**values)


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
