"""How near Shine's gradient is to the exact one on a trained model, and what its factors save.

    python -m benchmarks.shine --task=digits --weights=runs/digits/jr
    python -m benchmarks.shine --task=prose --weights=runs/prose/jr

For batches of the training set and the cotangent of the task's loss, sample by sample: the cosine
between the adjoint of Shine (Broyden's factors alone, then with refining products) and the exact
one, beside the Jacobian-free adjoint's; and the products with the Jacobian until the relative
residual of the adjoint system is 1e-3.  Prints a table.
"""

import argparse
import dataclasses
import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import deq_jax as deq
from benchmarks._report import table
from deq_jax import tree
from deq_jax.solvers.loop import Settings, iterate
from deq_jax.training import weights
from deq_jax.training.optim import make_optimizer
from deq_jax.training.parallel import make_mesh, place
from deq_jax.training.state import create_state
from deq_jax.training.task import forward

TOLERANCE, MOST = 1e-3, 40
TASKS = {"digits": "image_classification", "prose": "language_modeling"}
"""Preset -> its experiment."""


def _capture(task: Any, config: Any, state: Any, batch: Any, solver: deq.Broyden) -> dict[str, Any]:
    """Solves for a batch in evaluation mode: f of z alone, z0, and the loss's cotangent v."""
    box: dict[str, Any] = {}

    def fixed_point(f: Any, params: Any, z0: Any, x: Any, **options: Any) -> deq.Solution:
        del options
        sol = deq.fixed_point(f, params, z0, x, solver=solver)
        box.update(f=lambda z: f(params, z, x), z0=z0)
        moved = jax.tree.map(lambda a, d: jax.lax.stop_gradient(a) + d, sol.value, box["delta"])
        return dataclasses.replace(sol, value=moved)

    own = dataclasses.replace(task, model=task.model.clone(fixed_point=fixed_point))
    given: Any = (config, state.params, state.extra, state.carry, batch)

    def loss(delta: Any) -> jax.Array:
        box["delta"] = delta
        return forward(own, *given).loss

    shapes: Any = jax.eval_shape(lambda: forward(task, *given).solution)
    box["v"] = jax.grad(loss)(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes.value))
    return box


def _cosine(a: Any, b: Any) -> jax.Array:
    return tree.dot(a, b) / (tree.norm(a) * tree.norm(b))


def _measure(f: Callable[[Any], Any], z0: Any, v: Any, solver: deq.Broyden) -> dict[str, jax.Array]:
    """Name -> a number for each sample: cosines, and products to `TOLERANCE`."""
    settings = Settings(solver, solver.max_steps, "best", False)
    found = iterate(settings, f, z0, carry=True)
    last: Any = found.last
    usable = found.stats.converged
    moves = jnp.where(usable, last.num_steps - 1, 0)
    vjp = jax.vjp(f, found.value)[1]

    def image(u: Any) -> Any:
        return jax.tree.map(jnp.add, vjp(u)[0], v)

    def precondition(r: Any) -> Any:
        return solver.transposed_inverse(r, last.state, moves)

    def refined(u: Any) -> Any:
        r = jax.tree.map(jnp.subtract, image(u), u)
        return jax.tree.map(jnp.add, u, precondition(r))

    def residual(u: Any) -> jax.Array:
        target = image(u)
        return tree.norm(jax.tree.map(jnp.subtract, target, u)) / tree.norm(target)

    long = deq.Broyden(tol=1e-6, max_steps=200, memory=100)
    exact = iterate(Settings(long, 200, "best", False), image, v).value
    picard, broyden = (
        kind(tol=1e-9, max_steps=MOST) for kind in (deq.Picard, partial(deq.Broyden, memory=MOST))
    )

    def products(solver: Any, g: Any, start: Any, keep: Any) -> jax.Array:
        def at(k: jax.Array) -> jax.Array:
            plan = Settings(solver, None, keep, False)
            return residual(iterate(plan, g, start, k).value) <= TOLERANCE

        reached = jax.lax.map(at, jnp.arange(MOST + 1))  # [k, B]
        return jnp.where(reached.any(axis=0), jnp.argmax(reached, axis=0), MOST)

    start = precondition(v)
    figures = {
        "forward steps": found.stats.num_steps,
        "forward converged": found.stats.converged,
        "exact residual": residual(exact),
        "cosine, Jacobian-free": _cosine(v, exact),
        "cosine, Shine(0)": _cosine(start, exact),
    }
    for k in (1, 2, 4):
        for kind in (deq.Picard, deq.Anderson):
            refiner = kind(tol=1e-9, max_steps=MOST)
            one = iterate(Settings(refiner, k, "last", False), refined, start).value
            one = tree.where(usable, one, v)
            figures[f"cosine, Shine({k}) by {kind.__name__}"] = _cosine(one, exact)
    for k in (2, 4):
        one = iterate(Settings(picard, k, "last", False), image, v).value
        figures[f"cosine, {k} products of Neumann's series"] = _cosine(one, exact)
    figures["products, Broyden from v"] = products(broyden, image, v, "best")
    figures["products, Neumann's series"] = products(picard, image, v, "last")
    figures["products, Shine refined by Picard"] = products(picard, refined, start, "last")
    figures["products, Shine(Broyden)"] = products(broyden, refined, start, "best")
    figures["products, Broyden from Shine's u"] = products(broyden, image, start, "best")
    return figures


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description="Shine on a trained model.")
    parser.add_argument("--task", choices=tuple(TASKS), default="digits")
    parser.add_argument("--weights", type=Path, required=True, help="folder of a trained model")
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--max_steps", type=int, default=30, help="of the forward solve")
    parser.add_argument("--tol", type=float, default=1e-3, help="of the forward solve")
    options = parser.parse_args()
    module = importlib.import_module(f"experiments.{TASKS[options.task]}.main")
    config, mesh = module.PRESETS[options.task], make_mesh(jax.devices()[:1])
    data = module.EXPERIMENT.open_data(config)
    task = module.EXPERIMENT.build_task(config, mesh, data)
    state = create_state(task, make_optimizer(config.optim, 1), 0, mesh)
    params, extra = weights.load(options.weights)
    state = dataclasses.replace(state, params=params, extra={**state.extra, **extra})
    solver = deq.Broyden(tol=options.tol, max_steps=options.max_steps, memory=options.max_steps)
    rows: list[dict[str, np.ndarray]] = []
    for _ in range(options.batches):
        box = _capture(task, config, state, place(next(data.train), mesh), solver)
        figures = jax.jit(partial(_measure, box["f"], solver=solver))(box["z0"], box["v"])
        rows.append(jax.tree.map(np.asarray, figures))
    lines = []
    for name in rows[0]:
        values = np.concatenate([row[name] for row in rows]).astype(float)
        low, middle, high = np.quantile(values, (0.1, 0.5, 0.9))
        lines.append([name, *(f"{n:.4g}" for n in (middle, low, high, values.mean()))])
    heads = (f"{options.task}, {options.weights}", "median", "10 %", "90 %", "mean")
    print(table(heads, lines))


if __name__ == "__main__":
    main()
