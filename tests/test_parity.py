"""Iterates beside those recorded from the published PyTorch solvers."""

import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

import deq_jax as deq

HERE = pathlib.Path(__file__).parent
REFERENCE = HERE.parents[1] / "shared" / "reference"
CASES = [
    "broyden_t30_eps0",
    "broyden_t80_abs1e-10",
    "anderson_m6_t30_eps0",
    "anderson_m6_lam1e-10_t40_eps0",
    "anderson_m3_b0.7_t30_eps0",
]


class AbsoluteRidge(deq.Anderson):
    """The published regularisation, which depends on the scale of the state."""

    def weights(self, gram, valid):
        pair = (valid[:, None] & valid[None, :])[None]
        other = jnp.diag(jnp.where(valid, self.ridge, 1.0))[None]
        rhs = jnp.broadcast_to(valid.astype(gram.dtype)[None], gram.shape[:2])
        a = jnp.linalg.solve(jnp.where(pair, gram, 0) + other, rhs[:, :, None])[:, :, 0]
        return a / a.sum(axis=1, keepdims=True)


def make_solver(case: str):
    if case.startswith("broyden"):
        return deq.Broyden(max_steps=90, memory=90)
    number = r"([0-9.]+(?:e-?\d+)?)"
    memory = int(re.search(r"_m(\d+)", case)[1])
    ridge = re.search(f"lam{number}", case)
    damping = re.search(f"_b{number}", case)
    return AbsoluteRidge(
        memory=memory,
        ridge=float(ridge[1]) if ridge else 1e-4,
        damping=float(damping[1]) if damping else 1.0,
        max_steps=90,
    )


@pytest.fixture(scope="module")
def recorded():
    with np.load(HERE / "data" / "solver_iterates.npz") as arrays:
        return dict(arrays)


def setting(arrays, prefix):
    w, x, z0 = (jnp.asarray(arrays[prefix + k], jnp.float64) for k in ("W", "x", "z0"))
    shape = z0.shape

    def f(flat):
        return jnp.tanh(jnp.einsum("ij,njl->nil", w, flat.reshape(shape)) + x).reshape(shape[0], -1)

    return f, z0.reshape(shape[0], -1)


@pytest.mark.parametrize("norm", ["0.5", "0.9"])
@pytest.mark.parametrize("case", CASES)
def test_each_step_is_the_recorded_one(x64, recorded, case, norm):
    """Started from the recorded iterates, every step leads to the next recorded one."""
    f, z0 = setting(recorded, f"s{norm}/")
    wanted = recorded[f"s{norm}/f64/{case}/f_args"].reshape(-1, *z0.shape)
    solver = make_solver(case)
    state, errors = solver.init(z0), []
    for z, following in zip(wanted[:-1], wanted[1:], strict=True):
        proposed, state = solver.step(jnp.asarray(z), f(jnp.asarray(z)), state)
        errors.append(np.abs(np.asarray(proposed) - following).max())
        if np.abs(following - z).max() < 1e-12:
            break  # converged: what follows is a walk among rounding errors
    # The published Anderson leaves its first step undamped.  Late steps mix rounding errors: the
    # Gram matrix is singular to working precision by then.
    start = 1 if case == "anderson_m3_b0.7_t30_eps0" else 0
    assert len(errors) > 12
    assert max(errors[start:15]) < 1e-10
    assert max(errors[start:]) < 1e-6


@pytest.mark.parametrize("norm", ["0.5", "0.9"])
@pytest.mark.parametrize("case", [c for c in CASES if "b0.7" not in c])
def test_free_running_iterates_stay_together(x64, recorded, case, norm):
    f, z = setting(recorded, f"s{norm}/")
    wanted = recorded[f"s{norm}/f64/{case}/f_args"].reshape(-1, *z.shape)
    solver = make_solver(case)
    state = solver.init(z)
    for following in wanted[1:15]:
        z, state = solver.step(z, f(z), state)
        np.testing.assert_allclose(z, following, atol=1e-7)


def test_our_defaults_need_no_more_steps_than_the_published_solvers(x64, recorded):
    f, z0 = setting(recorded, "s0.9/")
    truth = recorded["s0.9/z_true"].reshape(z0.shape)
    for solver in (deq.Anderson(tol=1e-10, memory=6), deq.Broyden(tol=1e-10)):
        sol = deq.solve(solver, f, z0)
        assert sol.stats.converged.all()
        np.testing.assert_allclose(sol.value, truth, atol=1e-8)
        assert sol.stats.num_steps.max() <= 30  # the absolute ridge is at 5e-6 after 30


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the full recordings are not beside the clone")
@pytest.mark.parametrize("sigma", ["0.5", "0.9"])
@pytest.mark.parametrize("kind", ["broyden", "anderson"])
def test_full_recordings_at_the_larger_size(x64, kind, sigma):
    """Relative residuals of the whole batch, [4, 32], step by step."""
    with np.load(REFERENCE / f"solvers_b4_d32_L1_s{sigma}.npz") as arrays:
        f, z = setting(arrays, "")
        case = {"broyden": "broyden_t30_eps0", "anderson": "anderson_m6_t30_eps0"}[kind]
        trace = arrays[f"f64/{case}/rel_trace"]
        truth = arrays["z_true"].reshape(z.shape)
    solver = make_solver(case)
    state, residuals = solver.init(z), []
    for _ in range(17):
        fz = f(z)
        floor = 1e-9 if kind == "broyden" else 1e-5
        residuals.append(float(jnp.linalg.norm(fz - z) / (floor + jnp.linalg.norm(fz))))
        z, state = solver.step(z, fz, state)
    # Broyden's trace starts after its first step, Anderson's after its first two evaluations, and
    # both keep the residual of the iterate proposed last.
    offset = {"broyden": 1, "anderson": 2}[kind]
    ours = np.array(residuals[offset:16])
    np.testing.assert_allclose(ours, trace[: len(ours)], rtol=1e-4)
    assert np.abs(np.asarray(z) - truth).max() < 1e-2
