"""The same solve written for each library, at the settings its authors would choose.

Every library gets the same two problems, the same 20 steps without early stopping, the same
memories, and gradients for the weights and the injected input by the implicit rule with 20 steps of
the same method. PyTorch runs without a graph in the forward pass; the JAX libraries run as one
compiled program over the whole batch.

Where a library counts differently: torchdeq's and jaxopt's Broyden make one call more than their
steps, and optimistix has neither Anderson nor Broyden, so that it appears with plain iteration
forward and, because its rule takes a linear solver, GMRES with 20 basis vectors backward. jaxopt
and optimistix treat the batch as one vector, torchdeq and deq_jax each sample by itself.  deq_jax
returns the best iterate, "deq_jax-last" the last one, as the peers do.
"""

# The peers are installed by the extra [bench] only.
# pyright: reportMissingImports=false

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks._case import NEVER, cuda_peak_mb, jax_peak_mb


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        library: of `benchmarks.solvers.LIBRARIES`.
        method: "picard", "anderson" or "broyden".
        problem: of `SHAPES`.
        direction: "forward" or "backward".
        threads: on a CPU.
        device: "cpu" or "gpu".
        steps: evaluations of f.
        anderson_memory: iterates that Anderson's method keeps.
        broyden_memory: updates that Broyden's method keeps.
    """

    library: str
    method: str
    problem: str
    direction: str
    threads: int
    device: str = "cpu"
    steps: int = 20
    anderson_memory: int = 6
    broyden_memory: int = 20


@dataclasses.dataclass(frozen=True)
class Program:
    """What a library hands to the stopwatch; everything blocks until its numbers are there.

    Attributes:
        run: the forward solve or the backward pass, compiled.
        evaluate: `steps` evaluations of f (forward) or of its vector-Jacobian product (backward),
            one after another.
        answer: the arrays that `run` gives, as numpy, to check that the libraries agree.
        peak: on a GPU, gives the most memory in MiB that a call takes beyond what was in use.
    """

    run: Callable[[], Any]
    evaluate: Callable[[], Any]
    answer: Callable[[], list[np.ndarray]]
    peak: Callable[[Callable[[], Any]], float]


SHAPES = {"dense": (32, 1024), "cheap": (16, 100_000), "single": (1, 1_000_000)}
FORMULAS = {
    "dense": "tanh(z W + x)",
    "cheap": "tanh(w z + x), elementwise",
    "single": "tanh(w z + x), elementwise",
}


def arrays(problem: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The weights, the injected input and a cotangent of a problem, float32.

    Args:
        problem: "dense", f = tanh(z W + x) with W of spectral radius 0.9; "cheap", or "single" for
            a batch of one, f = tanh(w z + x) with w in [-0.9, 0.9].

    Returns:
        (weights [D, D] or [D], x [B, D], cotangent [B, D]).
    """
    rng = np.random.default_rng(0)
    batch, size = SHAPES[problem]
    if problem == "dense":
        weights = 0.9 / np.sqrt(size) * rng.standard_normal((size, size))
    else:
        weights = rng.uniform(-0.9, 0.9, size)
    x, cotangent = rng.standard_normal((2, batch, size))
    return weights.astype(np.float32), x.astype(np.float32), cotangent.astype(np.float32)


def build(case: Case) -> Program:
    """Compile one case without running it.

    Args:
        case: what to build; its library must be installed.

    Returns:
        The program.
    """
    return _torchdeq(case) if case.library == "torchdeq" else _jax(case)


def _jax(case: Case) -> Program:
    import jax
    import jax.numpy as jnp

    weights, x, cotangent = (jnp.asarray(a) for a in arrays(case.problem))
    makers = {
        "deq_jax": _deq_jax,
        "deq_jax-last": _deq_jax,
        "jaxopt": _jaxopt,
        "optimistix": _optimistix,
    }
    solve = makers[case.library](case, f_jax(case.problem))
    zeros = jnp.zeros_like(x)

    def chain(one, start):
        return jax.lax.fori_loop(0, case.steps, lambda _, z: one(z), start)

    f = f_jax(case.problem)
    if case.direction == "forward":
        program = jax.jit(solve).lower(weights, zeros, x).compile()
        evaluations = jax.jit(lambda w, z, x: chain(lambda z: f(w, z, x), z))
        evaluations = evaluations.lower(weights, zeros, x).compile()
        operands = (weights, zeros, x)
    else:
        linearised = jax.jit(lambda w, z, x: jax.vjp(lambda w, x: solve(w, z, x), w, x)[1])
        vjp = jax.block_until_ready(linearised(weights, zeros, x))
        program = jax.jit(lambda vjp, g: vjp(g)).lower(vjp, cotangent).compile()

        def adjoints(w, z, x, g):
            pull = jax.vjp(lambda z: f(w, z, x), z)[1]
            return chain(lambda u: pull(u)[0] + g, g)

        inner = jax.jit(adjoints).lower(weights, zeros, x, cotangent).compile()
        operands = (vjp, cotangent)

        def evaluations(*_):
            return inner(weights, zeros, x, cotangent)

    return Program(
        run=lambda: jax.block_until_ready(program(*operands)),
        evaluate=lambda: jax.block_until_ready(evaluations(*operands)),
        answer=lambda: [np.asarray(leaf) for leaf in jax.tree.leaves(program(*operands))],
        peak=jax_peak_mb,
    )


def f_jax(problem: str) -> Callable:
    """The problem's f(weights, z, x) in JAX.

    Args:
        problem: of `SHAPES`.

    Returns:
        f.
    """
    import jax.numpy as jnp

    if problem == "dense":
        return lambda w, z, x: jnp.tanh(z @ w + x)
    return lambda w, z, x: jnp.tanh(w[None] * z + x)


def _deq_jax(case: Case, f: Callable) -> Callable:
    import deq_jax as deq

    solver = {
        "picard": lambda: deq.Picard(tol=NEVER, max_steps=case.steps),
        "anderson": lambda: deq.Anderson(
            tol=NEVER, max_steps=case.steps, memory=case.anderson_memory
        ),
        "broyden": lambda: deq.Broyden(tol=NEVER, max_steps=case.steps, memory=case.broyden_memory),
    }[case.method]()
    keep = "last" if case.library.endswith("-last") else "best"
    return lambda w, z, x: deq.fixed_point(f, w, z, x, solver=solver, keep=keep).value


def _jaxopt(case: Case, f: Callable) -> Callable:
    import jaxopt

    def make(g, **options):  # g: (z, *operands) -> z
        options |= {"maxiter": case.steps, "tol": NEVER}
        if case.method == "picard":
            return jaxopt.FixedPointIteration(g, **options)
        if case.method == "anderson":
            return jaxopt.AndersonAcceleration(g, history_size=case.anderson_memory, **options)
        # stepsize 1 switches the line search off: it would cost calls that the others do not make.
        return jaxopt.Broyden(
            lambda z, *operands: z - g(z, *operands),
            history_size=case.broyden_memory,
            stepsize=1.0,
            **options,
        )

    # It asks for A^T u = b: for a root function f - z that is J^T u - u = b, for Broyden's z - f
    # the negative of that.
    sign = -1.0 if case.method == "broyden" else 1.0

    def solve_adjoint(matvec, b):
        def step(u):
            return u + sign * (matvec(u) - b)

        return make(step, implicit_diff=False).run(b * 0).params

    solver = make(lambda z, w, x: f(w, z, x), implicit_diff_solve=solve_adjoint)
    return lambda w, z, x: solver.run(z, w, x).params


def _optimistix(case: Case, f: Callable) -> Callable:
    import lineax
    import optimistix

    if case.method != "picard":
        raise ValueError(f"optimistix has no {case.method}: leave that case out")
    # With tolerances of 0 it runs max_steps cycles; its first one only computes the residual.
    adjoint = optimistix.ImplicitAdjoint(
        lineax.GMRES(rtol=0.0, atol=0.0, restart=case.steps, max_steps=2)
    )
    solver = optimistix.FixedPointIteration(rtol=NEVER, atol=NEVER)

    def solve(w, z, x):
        return optimistix.fixed_point(
            lambda z, args: f(args[0], z, args[1]),
            solver,
            z,
            (w, x),
            max_steps=case.steps,
            throw=False,
            adjoint=adjoint,
        ).value

    return solve


def _torchdeq(case: Case) -> Program:
    import torch
    import torchdeq
    from torchdeq.solver import get_solver

    torch.set_num_threads(case.threads)
    on_gpu = case.device == "gpu"
    torch.backends.cuda.matmul.allow_tf32 = on_gpu  # as JAX's default is
    place = "cuda" if on_gpu else "cpu"
    weights, x, cotangent = (torch.from_numpy(a).to(place) for a in arrays(case.problem))
    weights.requires_grad_()
    x.requires_grad_()
    zeros = torch.zeros_like(cotangent)
    name = {"picard": "fixed_point_iter"}.get(case.method, case.method)

    def f(z):
        return torch.tanh(z @ weights + x if case.problem == "dense" else weights * z + x)

    if case.direction == "forward":
        memory = {"m": case.anderson_memory, "LBFGS_thres": case.broyden_memory}

        def run():
            with torch.no_grad():
                return [
                    get_solver(name)(f, zeros, max_iter=case.steps, tol=NEVER, **memory)[0],
                ]

        def evaluate():
            with torch.no_grad():
                z = zeros
                for _ in range(case.steps):
                    z = f(z)
                return z
    else:
        run, evaluate = _torchdeq_backward(case, name, f, (weights, x), zeros, cotangent, torchdeq)

    def finished(work: Callable[[], Any]) -> Callable[[], Any]:
        def wait() -> Any:
            found = work()
            torch.cuda.synchronize()
            return found

        return wait if on_gpu else work

    return Program(
        run=finished(run),
        evaluate=finished(evaluate),
        answer=lambda: [a.detach().cpu().numpy() for a in run()],
        peak=cuda_peak_mb,
    )


def _torchdeq_backward(case, name, f, wanted, zeros, cotangent, torchdeq):
    import torch

    # Its backward solver takes no memory option: its defaults are 6 for Anderson and the number of
    # steps for Broyden, which are ours.
    deq = torchdeq.get_deq(
        core="indexing",
        ift=True,
        f_solver=name,
        b_solver=name,
        f_max_iter=case.steps,
        b_max_iter=case.steps,
        f_tol=NEVER,
        b_tol=NEVER,
    ).train()
    value = deq(f, zeros)[0][-1]
    point = value.detach().requires_grad_()
    image = f(point)

    def run():
        return torch.autograd.grad(value, wanted, cotangent, retain_graph=True)

    def evaluate():
        u = cotangent
        for _ in range(case.steps):
            u = torch.autograd.grad(image, point, u, retain_graph=True)[0] + cotangent
        return u

    return run, evaluate
