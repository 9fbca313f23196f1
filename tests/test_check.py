"""`check` raises where nothing has converged, and says what to do."""

import jax
import jax.numpy as jnp
import pytest

import deq_jax as deq
from deq_jax import ConvergenceError, check

X = jnp.array([[0.1], [0.5], [0.5], [0.5]])


def run(x=X, budget=20, **options):
    """Sample 0 converges at once, because its start is nearly its solution."""
    solver = deq.Picard(tol=1e-3, max_steps=budget)
    z0 = jnp.where(x == 0.1, 0.2, 10.0)
    return deq.fixed_point(lambda p, z, x: 0.5 * z + x, None, z0, x, solver=solver, **options)


def test_a_solution_is_returned_if_enough_has_converged():
    sol = run()
    assert check(sol) is sol and check(sol, share=1.0) is sol
    some = run(budget=3)
    assert some.stats.converged.tolist() == [True, False, False, False]
    assert check(some) is some and check(some, share=0.25) is some
    one = run(jnp.array([0.1]), batched=False)
    assert check(one) is one


def test_a_failure_raises_with_numbers_and_advice():
    with pytest.raises(ConvergenceError, match="1 of 4 samples converged; wanted at least 50%"):
        check(run(budget=3), share=0.5)
    with pytest.raises(ConvergenceError) as error:
        check(run(X[1:], budget=3))
    words = str(error.value)
    residual = run(X[1:], budget=3).stats.residual
    assert words.startswith("0 of 3 samples converged: the residual is ")
    assert f"{residual.min():.2g} at best" in words and "after 3 steps" in words
    assert "deq.diagnose(f, params, z0, x, key=key)" in words and "max_steps" in words
    with pytest.raises(ConvergenceError, match="took no step"):
        check(run(max_steps=0))
    with pytest.raises(ConvergenceError, match="not finite"):
        check(run(X * jnp.nan))
    with pytest.raises(ConvergenceError, match="0 of 1 samples"):
        check(run(jnp.array([0.5]), budget=3, batched=False))
    assert issubclass(ConvergenceError, RuntimeError)


def test_bad_calls_raise():
    with pytest.raises(ValueError, match="got share=1.5; wanted a number in"):
        check(run(), share=1.5)
    for transform in (jax.jit, jax.grad):
        with pytest.raises(ValueError, match=r"outside, or use sol\.stats\.converged"):
            transform(lambda x: check(run(x)).value.sum())(X)


def test_a_solution_of_many_solves_counts_all_samples():
    many = jax.vmap(lambda x: run(x, budget=3))(jnp.stack([X, X[::-1]]))
    assert check(many, share=0.25) is many
    with pytest.raises(ConvergenceError, match="2 of 8 samples"):
        check(many, share=0.5)
