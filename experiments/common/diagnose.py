"""What `--diagnose` prints: `deq_jax.diagnosis.diagnose` of the equilibria of one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import deq_jax as deq
from deq_jax import folders, tree
from deq_jax.diagnosis import Diagnosis, diagnose
from deq_jax.solvers import Solution
from deq_jax.training import Config, DataIterator, Task, UsageError, weights
from deq_jax.training.checkpoint import saved_steps
from deq_jax.training.parallel import batch_sharding, place, replicated, split_leaves
from deq_jax.training.state import once, split_seed
from deq_jax.training.task import forward, has_solver, init

EXAMPLES = 16
"""Examples of the batch that are diagnosed, at most."""

SEGMENTS = 4
"""Batches that a task which carries a memory reads, the last of which is diagnosed."""


def run(
    parts: Mapping[str, Any],
    build_task: Callable[[Any], Task],
    train_data: DataIterator,
    mesh: Mesh,
) -> str:
    """Diagnoses the models of a command; writes nothing.

    Args:
      parts: name of a model -> its configuration, whose workdir is the model's own folder.  Models
        that have checkpoints are diagnosed; where none has, the first one at the weights that its
        training would start from.
      build_task: builds a task.
      train_data: endless batches.
      mesh: the devices.

    Returns:
      A report, in Markdown.

    Raises:
      UsageError: for several processes, a model without an equilibrium, or weights that do not fit.
    """
    if jax.process_count() > 1:
        raise UsageError(
            f"got --diagnose in a run of {jax.process_count()} processes; wanted one: a few "
            "examples are diagnosed, on one device; start it again in a single process"
        )
    trained = {
        n: p for n, p in parts.items() if saved_steps(folders.parse(p.workdir) / "checkpoints")
    }
    chosen = trained or dict([next(iter(parts.items()))])
    start, reports = train_data.get_state(), []
    for name, part in chosen.items():
        task = build_task(part)
        params, extra, source = load(part, task, mesh)
        train_data.set_state(start)
        solution = solve(part, task, params, extra, train_data, mesh)
        reports.append(f"# {name}, {source}\n\n{report(part, solution, task.x_axes)}")
    return "\n".join(reports)


def load(config: Config, task: Task, mesh: Mesh) -> tuple[Any, Any, str]:
    """The weights of a model's newest checkpoint, else those that its training would start from.

    Args:
      config: workdir, init_from and train.seed are read.
      task: draws the initial weights.
      mesh: the devices, each of which gets all of them.

    Returns:
      (params, extra), and where they are from.

    Raises:
      UsageError: they cannot be read, or are of another model.
    """
    folder = folders.parse(config.workdir)
    if not saved_steps(folder / "checkpoints"):
        key = split_seed(config.train.seed)[0]
        params, extra = once(partial(init, task), mesh, replicated(mesh))(key)
        if not config.init_from:
            return params, extra, f"at its initial weights (no checkpoint in {folder})"
        loaded = weights.load(config.init_from)
        return *weights.adopt((params, extra), loaded, print), f"weights of {config.init_from}"
    loaded = weights.load(folder)
    wanted = jax.eval_shape(partial(init, task), jax.random.key(0))
    advice = "give the preset and the settings of model that it was trained with, or another "
    weights.require_fit(loaded, wanted, folder, advice + "--workdir")
    return *jax.device_put(loaded, replicated(mesh)), f"weights of {folder}"


def solve(
    config: Config, task: Task, params: Any, extra: Any, data: DataIterator, mesh: Mesh
) -> Solution:
    """The equilibria of one training batch, as in an evaluation: without dropout.

    Args:
      config: the evaluation's budget is read.
      task: model and loss.
      params: its parameters.
      extra: its untrained collections.
      data: training batches.
      mesh: the devices.

    Returns:
      The solution of the batch, with its equation.

    Raises:
      UsageError: the model has no equilibrium.
    """
    if not has_solver(task.model):
        raise UsageError(
            "got --diagnose for a model without an equilibrium (an explicit network: see "
            "model.name); wanted one that solves z = f(z, x)"
        )

    @jax.jit
    def step(params: Any, extra: Any, carry: Any, batch: Any) -> tuple[Solution | None, Any]:
        found = forward(task, config, params, extra, carry, batch)
        return found.solution, found.carry

    solution, carry = None, jax.device_put(task.first_carry(train=True), batch_sharding(mesh))
    for _ in range(1 if task.carry is None else SEGMENTS):
        solution, carry = step(params, extra, carry, place(next(data), mesh))
    assert solution is not None
    return solution


def look(config: Config, solution: Solution, x_axes: Any = 0) -> Diagnosis:
    """Diagnoses an equation from z = 0, on one device.

    Args:
      config: solver, the evaluation's budget, eval.spectral_iters and train.seed are read.
      solution: of a batch.
      x_axes: which operands of f hold one entry for each example, as for
        `deq_jax.training.parallel.sharded_fixed_point`.

    Returns:
      The diagnosis of its first examples.
    """
    f, *operands = solution.at
    params, z, x = jax.tree.map(jnp.asarray, jax.device_get(operands))
    own_rows = split_leaves(x, tree.batch_size(z), x_axes)
    x = jax.tree.map(lambda leaf, own: leaf[:EXAMPLES] if own else leaf, x, own_rows)
    z = jax.tree.map(lambda leaf: leaf[:EXAMPLES], z)
    own, budget = config.solver, config.eval_steps
    common: Any = {"tol": own.tol, "max_steps": budget, "stop": own.stop}
    solvers = {kind.__name__: kind(**common) for kind in (deq.Picard, deq.Anderson, deq.Broyden)}
    configured = own.build(budget)
    label = type(configured).__name__
    if configured != solvers[label]:
        solvers[f"{label}, as configured"] = configured
    return diagnose(
        jax.jit(f),
        params,
        jax.tree.map(jnp.zeros_like, z),
        x,
        key=jax.random.key(config.train.seed),
        solvers=solvers,
        iters=max(2, config.eval.spectral_iters),
    )


def report(config: Config, solution: Solution, x_axes: Any = 0) -> str:
    """The same in words.

    Args:
      config: see `look`.
      solution: of a batch.
      x_axes: see `look`.

    Returns:
      The report of `deq_jax.diagnosis.diagnose`.
    """
    found = look(config, solution, x_axes)
    examples = tree.batch_size(found.value)
    return f"{examples} examples of a training batch, from z = 0:\n\n{found}"
