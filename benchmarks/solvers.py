"""deq_jax beside torchdeq, jaxopt and optimistix: time, cost over f alone, and peak memory.

    pip install -e .[bench,train]
    python -m benchmarks.solvers
    python -m benchmarks.solvers --device gpu

Every case runs in a process of its own, bound to its number of threads; the cases of one problem
follow one another, so that the libraries meet the same machine.  Writes solvers.json and
solvers.png and prints the tables.

Part "solves": every library gets the same problems, the same 20 steps without early stopping, the
same memories, and gradients for the weights and the injected input by the implicit rule with 20
steps of the same method.  PyTorch runs without a graph in the forward pass; the JAX libraries run
as one compiled program over the whole batch.  Where a library counts differently: torchdeq's and
jaxopt's Broyden make one call more than their steps, and optimistix has neither Anderson nor
Broyden, so that it appears with plain iteration forward and, because its rule takes a linear
solver, GMRES with 20 basis vectors backward.  jaxopt and optimistix treat the batch as one vector,
torchdeq and deq_jax each sample by itself.  deq_jax returns the best iterate, "deq_jax-last" the
last one, as the peers do.

Part "gradients": value and gradient of sum(c z*) by weights and input, for the problem "dense":
Broyden's method forward with 20 steps and all of them in memory, 20 products backward where a
linear system is solved.  Reversible and Backprop differentiate 20 steps of plain iteration.  The
error is that of the gradient against float64, with both systems solved to rounding.
"""

# The peers are installed by the extra [bench] only.
# pyright: reportMissingImports=false

import argparse
import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks._case import NEVER, compiled, machine, measured, serve, timed
from benchmarks._report import RESULTS, groups, plot_bars, records, require, table, write

LIBRARIES = ("deq_jax", "deq_jax-last", "torchdeq", "jaxopt", "optimistix")
METHODS = ("picard", "anderson", "broyden")
DIRECTIONS = ("forward", "backward")
PARTS = ("solves", "gradients")
COLUMNS = "library|method|forward ms|backward ms|f x|vjp x|forward MB|backward MB".split("|")
MODULE = "benchmarks.solvers"

SHAPES = {"dense": (32, 1024), "cheap": (16, 100_000), "single": (1, 1_000_000)}
FORMULAS = {
    "dense": "tanh(z W + x)",
    "cheap": "tanh(w z + x), elementwise",
    "single": "tanh(w z + x), elementwise",
}

STEPS, PHANTOM = 20, (5, 0.5)
RULES = {
    "deq_jax": ("implicit", "unroll", "phantom", "shine", "shine-2", "reversible", "backprop"),
    "torchdeq": ("implicit", "unroll", "phantom"),
}
"""Library -> its gradient rules; implicit is the exact one, unroll the Jacobian-free one."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the part "solves".

    Attributes:
        library: of `LIBRARIES`.
        method: of `METHODS`.
        problem: of `SHAPES`.
        direction: of `DIRECTIONS`.
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
    steps: int = STEPS
    anderson_memory: int = 6
    broyden_memory: int = 20


class Program(NamedTuple):
    """What a library hands to the stopwatch; everything blocks until its numbers are there.

    Attributes:
        run: the forward solve or the backward pass, compiled.
        evaluate: `steps` evaluations of f (forward) or of its vector-Jacobian product (backward),
            one after another.
        answer: the arrays that `run` gives, as numpy, to check that the libraries agree.
    """

    run: Callable[[], Any]
    evaluate: Callable[[], Any]
    answer: Callable[[], list[np.ndarray]]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line.

    Args:
        arguments: instead of sys.argv.

    Returns:
        The chosen libraries, methods, problems, threads, repeats and the output folder.
    """
    parser = argparse.ArgumentParser(description="Time deq_jax beside its peers.")
    for name, values in (
        ("libraries", LIBRARIES),
        ("methods", METHODS),
        ("problems", tuple(SHAPES)),
        ("directions", DIRECTIONS),
        ("parts", PARTS),
    ):
        parser.add_argument(f"--{name}", nargs="+", choices=values, default=values)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--threads", nargs="+", type=int, help="on a CPU; 1 and 2 if not given")
    parser.add_argument("--repeats", type=int, default=15, help="timed runs; the median is shown")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    options.threads = options.threads or ((1, 2) if options.device == "cpu" else (1,))
    if options.device == "gpu":  # the gradients are measured on a CPU only
        options.parts = [part for part in options.parts if part == "solves"]
    return options


def plan(options: argparse.Namespace) -> list[Case]:
    """Lists the cases that exist, the libraries of one problem next to each other.

    Args:
        options: from `parse`.

    Returns:
        The cases in running order.
    """
    order = itertools.product(
        options.problems, options.threads, options.methods, options.directions, options.libraries
    )
    return [
        Case(library, method, problem, direction, threads, options.device)
        for problem, threads, method, direction, library in order
        if library not in ("optimistix", "deq_jax-last") or method == "picard"
    ]


def tables(rows: list[dict]) -> str:
    """Writes the solves as Markdown, one table for each problem and number of threads.

    Args:
        rows: each with the fields of its case.

    Returns:
        The text.
    """
    text = []
    for (problem, _), group in groups(rows, "problem", "threads").items():
        shape = ", ".join(f"{n:,}" for n in SHAPES[problem])
        digits = {"ms": 2 if _on_gpu(group[0]) else 1, "ratio": 2, "peak_mb": 0}
        lines = []
        for (method, library), pair in groups(group, "method", "library").items():
            way = {row["direction"]: row for row in pair}
            lines.append([library, method])
            for (key, places), direction in itertools.product(digits.items(), DIRECTIONS):
                row = way.get(direction, {})
                missing = "failed" if "error" in row else "-"
                lines[-1].append(f"{row[key]:,.{places}f}" if key in row else missing)
        text.append(f"\n{FORMULAS[problem]} at [{shape}], {_place(group[0])}\n")
        text.append(table(COLUMNS, lines))
    return "\n".join(text)


def gradient_tables(rows: list[dict]) -> str:
    """Writes the gradient rules as Markdown, one table for each number of threads.

    Args:
        rows: with library, rule and threads.

    Returns:
        The text.
    """
    columns = {
        "library": "{library}",
        "rule": "{rule}",
        "ms": "{ms:.1f}",
        "MB": "{peak_mb:.0f}",
        "relative error": "{error:.1e}",
        "cosine": "{cosine:.4f}",
    }
    text = []
    for group in groups(rows, "threads").values():
        text.append(f"\nvalue and gradient, {_place(group[0])}\n")
        text.append(records(columns, group))
    return "\n".join(text)


def _on_gpu(row: dict) -> bool:
    """Whether a case ran on a GPU; gradients and earlier results have no device."""
    return row.get("device") == "gpu"


def _place(row: dict) -> str:
    return "GPU" if _on_gpu(row) else f"{row['threads']} thread{'s'[: row['threads'] - 1]}"


def _arrays(problem: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights [D, D] of spectral radius 0.9, or [D] in [-0.9, 0.9]; x and a cotangent [B, D]."""
    rng = np.random.default_rng(0)
    batch, size = SHAPES[problem]
    if problem == "dense":
        weights = 0.9 / np.sqrt(size) * rng.standard_normal((size, size))
    else:
        weights = rng.uniform(-0.9, 0.9, size)
    x, cotangent = rng.standard_normal((2, batch, size))
    return weights.astype(np.float32), x.astype(np.float32), cotangent.astype(np.float32)


def measure(request: dict) -> dict:
    """Measures one case.

    Args:
        request: "case", fields of `Case`, or library, rule and threads of a gradient; "repeats".

    Returns:
        "ms", "best_ms", "cpu_ms" and "peak_mb" as `benchmarks._case.timed` has them.  Of a solve:
        "evaluation_ms", the median for one evaluation; "ratio", the time over that of its
        evaluations alone; "check", sums of the answer.  Of a gradient: "error", the relative error
        of the gradient by the weights, and "cosine", of its angle to the exact one.
    """
    case, repeats = request["case"], request["repeats"]
    if "rule" in case:
        return _measure_gradient(repeats=repeats, **case)
    return _measure_solve(Case(**case), repeats)


def _measure_solve(case: Case, repeats: int) -> dict:
    program = _torchdeq(case) if case.library == "torchdeq" else _jax(case)
    program.evaluate()
    beside = [program.evaluate]
    found = timed(program.run, repeats, case.device, beside=beside)
    (evaluations_ms,) = found.pop("beside_ms")
    return found | {
        "evaluation_ms": evaluations_ms / case.steps,
        "ratio": found["ms"] / evaluations_ms,
        "check": [float(abs(a.astype("float64")).sum()) for a in program.answer()],
    }


def _jax(case: Case) -> Program:
    import jax
    import jax.numpy as jnp

    weights, x, cotangent = (jnp.asarray(a) for a in _arrays(case.problem))
    f = _f(case.problem, jnp.tanh)
    make = {"jaxopt": _jaxopt, "optimistix": _optimistix}.get(case.library, _deq_jax)
    solve = make(case, f)
    zeros = jnp.zeros_like(x)

    def chain(one, start):
        return jax.lax.fori_loop(0, case.steps, lambda _, z: one(z), start)

    if case.direction == "forward":
        run = compiled(solve, weights, zeros, x)
        evaluate = compiled(lambda w, z, x: chain(lambda z: f(w, z, x), z), weights, zeros, x)
    else:
        linearised = jax.jit(lambda w, z, x: jax.vjp(lambda w, x: solve(w, z, x), w, x)[1])
        vjp = jax.block_until_ready(linearised(weights, zeros, x))
        run = compiled(lambda vjp, g: vjp(g), vjp, cotangent)

        def adjoints(w, z, x, g):
            pull = jax.vjp(lambda z: f(w, z, x), z)[1]
            return chain(lambda u: pull(u)[0] + g, g)

        evaluate = compiled(adjoints, weights, zeros, x, cotangent)
    return Program(run, evaluate, lambda: [np.asarray(leaf) for leaf in jax.tree.leaves(run())])


def _f(problem: str, tanh: Callable) -> Callable:
    """The problem's f(weights, z, x), of the arrays that a library's tanh takes."""
    if problem == "dense":
        return lambda w, z, x: tanh(z @ w + x)
    return lambda w, z, x: tanh(w * z + x)


def _deq_jax(case: Case, f: Callable) -> Callable:
    import deq_jax as deq

    common: Any = {"tol": NEVER, "max_steps": case.steps}
    solver = {
        "picard": deq.Picard(**common),
        "anderson": deq.Anderson(memory=case.anderson_memory, **common),
        "broyden": deq.Broyden(memory=case.broyden_memory, **common),
    }[case.method]
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
    from torchdeq.solver import get_solver

    torch.set_num_threads(case.threads)
    on_gpu = case.device == "gpu"
    torch.backends.cuda.matmul.allow_tf32 = on_gpu  # as JAX's default is
    place = "cuda" if on_gpu else "cpu"
    weights, x, cotangent = (torch.from_numpy(a).to(place) for a in _arrays(case.problem))
    weights.requires_grad_()
    x.requires_grad_()
    zeros = torch.zeros_like(cotangent)
    name = {"picard": "fixed_point_iter"}.get(case.method, case.method)

    f = partial(_f(case.problem, torch.tanh), weights, x=x)

    def chain(one, z):
        for _ in range(case.steps):
            z = one(z)
        return z

    if case.direction == "forward":
        memory = {"m": case.anderson_memory, "LBFGS_thres": case.broyden_memory}

        @torch.no_grad()
        def run() -> Any:
            return [get_solver(name)(f, zeros, max_iter=case.steps, tol=NEVER, **memory)[0]]

        @torch.no_grad()
        def evaluate():
            return chain(f, zeros)
    else:
        # Its backward solver takes no memory option: its defaults are 6 for Anderson and the number
        # of steps for Broyden, which are ours.
        value = _get_deq(name, case.steps)(f, zeros)[0][-1]
        point = value.detach().requires_grad_()
        image = f(point)

        def run() -> Any:
            return torch.autograd.grad(value, (weights, x), cotangent, retain_graph=True)

        def evaluate():
            def pull(u):
                return torch.autograd.grad(image, point, u, retain_graph=True)[0]

            return chain(lambda u: pull(u) + cotangent, cotangent)

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
    )


def _get_deq(solver: str, steps: int, **options: Any) -> Any:
    """One of torchdeq's layers, with the implicit gradient if nothing else is said."""
    import torchdeq

    return torchdeq.get_deq(
        core="indexing",
        f_solver=solver,
        b_solver=solver,
        f_max_iter=steps,
        b_max_iter=steps,
        f_tol=NEVER,
        b_tol=NEVER,
        **{"ift": True, **options},
    ).train()


def _measure_gradient(library: str, rule: str, threads: int, repeats: int) -> dict:
    run = _torchdeq_gradient(rule, threads) if library == "torchdeq" else _deq_jax_gradient(rule)
    found = timed(run, repeats)
    gradient, wanted = np.asarray(run()[0], np.float64), _exact_gradient()
    size = np.linalg.norm(wanted)
    return found | {
        "error": float(np.linalg.norm(gradient - wanted) / size),
        "cosine": float(np.sum(gradient * wanted) / size / np.linalg.norm(gradient)),
    }


def _exact_gradient() -> np.ndarray:
    """The gradient by the weights, in float64."""
    weights, x, cotangent = (a.astype(np.float64) for a in _arrays("dense"))
    z, u = np.zeros_like(x), cotangent
    for _ in range(300):
        z = np.tanh(z @ weights + x)
    slope = 1 - z**2
    for _ in range(300):
        u = cotangent + (slope * u) @ weights.T
    return z.T @ (slope * u)


def _deq_jax_gradient(rule: str) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp

    import deq_jax as deq

    weights, x, cotangent = (jnp.asarray(a) for a in _arrays("dense"))
    broyden = deq.Broyden(tol=NEVER, max_steps=STEPS, memory=STEPS)
    # Shine uses the factors of samples that have converged only.
    converged = deq.Broyden(tol=1e-3, max_steps=STEPS, memory=STEPS)
    picard = deq.Picard(tol=NEVER, max_steps=STEPS)
    adjoint, solver, keep = {
        "implicit": (deq.Implicit(broyden), broyden, "best"),
        "unroll": (deq.Unroll(1), broyden, "best"),
        "phantom": (deq.Unroll(*PHANTOM), broyden, "best"),
        "shine": (deq.Shine(0), converged, "best"),
        "shine-2": (deq.Shine(2), converged, "best"),
        "reversible": (deq.Reversible(0.5), picard, "last"),
        "backprop": (deq.Backprop(), picard, "last"),
    }[rule]
    f: Any = _f("dense", jnp.tanh)

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        z0 = jnp.zeros_like(x)
        sol = deq.fixed_point(f, w, z0, x, solver=solver, adjoint=adjoint, keep=keep)
        return jnp.sum(cotangent * sol.value)

    run = compiled(jax.value_and_grad(loss, (0, 1)), weights, x)
    return lambda: run()[1]


def _torchdeq_gradient(rule: str, threads: int) -> Callable[[], Any]:
    import torch

    torch.set_num_threads(threads)
    weights, x, cotangent = (torch.from_numpy(a) for a in _arrays("dense"))
    weights.requires_grad_()
    x.requires_grad_()
    steps, tau = PHANTOM if rule == "phantom" else (1, 1.0)
    deq = _get_deq("broyden", STEPS, ift=rule == "implicit", grad=steps, tau=tau)

    def run() -> Any:
        value = deq(lambda z: torch.tanh(z @ weights + x), torch.zeros_like(cotangent))[0][-1]
        return torch.autograd.grad((cotangent * value).sum(), (weights, x))

    return run


def main() -> None:
    """Runs everything and writes the results."""
    options = parse()
    packages = list(dict.fromkeys(name.split("-")[0] for name in options.libraries))
    require(packages, "pip install -e .[bench,train] or choose --libraries")
    rows, gradients = [], []
    if "solves" in options.parts:
        cases = map(dataclasses.asdict, plan(options))
        rows = [measured(MODULE, case, options.repeats) for case in cases]
    if "gradients" in options.parts:
        gradients = [
            measured(MODULE, {"library": name, "rule": rule, "threads": threads}, options.repeats)
            for threads in options.threads
            for name in options.libraries
            for rule in RULES.get(name, ())
        ]
    peers = [name for name in packages if name != "deq_jax"]  # it may not be installed
    write(
        options.out / "solvers.json",
        (*peers, "jax", *(["torch"] if "torchdeq" in peers else [])),
        machine=machine(options.device),
        rows=rows,
        gradients=gradients,
    )
    print(tables(rows))
    print(gradient_tables(gradients))
    most = [row for row in rows if row["threads"] == max(options.threads) and "error" not in row]
    panels = {
        f"{method}, {problem}, {_place(group[0])}": group
        for (method, problem), group in groups(most, "method", "problem").items()
    }
    plot_bars(options.out / "solvers.png", panels, lambda row: row["library"], "direction")


if __name__ == "__main__":
    serve(measure, main)
