"""One case of the scaling benchmark, given as JSON on the command line: prints one line of JSON.

A process for each case, because the number of simulated devices is fixed when JAX starts.
"""

import dataclasses
import itertools
import json
import statistics
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from benchmarks._case import NEVER, limit_threads, times_ms

MODELS = {"digits": 12, "prose": 4, "uneven": 64}
"""Name -> examples on each device."""

FORMS = ("shard_map", "plain jit")
VOCABULARY = 1600
"""Words of prose's text, about: Python 3.11's documentation has 1,586."""

WIDTH, SLOWEST = 384, 0.97
"""Of the made map of uneven."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What one process measures.

    Attributes:
        model: of `MODELS`.
        devices: simulated.
        examples: on each device.
        threads: CPUs.
        trained: steps before solver steps are counted; None for no count.
    """

    model: str
    devices: int
    examples: int
    threads: int
    trained: int | None = None


def configure(case: Case) -> Any:
    """The configuration of a case.

    Args:
        case: of `digits` and `prose` the presets, a penalty in every step and a fixed budget.

    Returns:
        A Config.
    """
    from deq_jax.training import BackwardConfig, Config, OptimConfig, SolverConfig
    from experiments.image_classification.presets import PRESETS as IMAGE_PRESETS
    from experiments.language_modeling.presets import PRESETS as LANGUAGE_PRESETS

    if case.model == "uneven":
        common: Any = {"tol": 1e-4, "max_steps": 60}
        solvers: Any = {
            "solver": SolverConfig(name="anderson", **common),
            "backward": BackwardConfig(solver="anderson", **common),
        }
        config = Config(optim=OptimConfig(name="sgd", lr=1e-6), **solvers)
    else:
        config = {**IMAGE_PRESETS, **LANGUAGE_PRESETS}[case.model]
        jac = dataclasses.replace(config.jac, prob=1.0, budget_low=0, budget_high=0)
        config = dataclasses.replace(config, jac=jac)
    size = case.devices * case.examples
    return dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=size))


def exhaustive(config: Any) -> Any:
    """Lets every solve take all of its steps, so that all devices do equal work.

    Args:
        config: whose tolerances are replaced.

    Returns:
        The same with tolerances that nobody reaches.
    """
    return dataclasses.replace(
        config,
        solver=dataclasses.replace(config.solver, tol=NEVER),
        backward=dataclasses.replace(config.backward, tol=NEVER),
    )


def make_task(case: Case, config: Any, mesh: Any, form: str) -> Any:
    """The experiment's task; in plain jit its solves are not wrapped in shard_map.

    Args:
        case: its model.
        config: from `configure`.
        mesh: the devices.
        form: of `FORMS`.

    Returns:
        A Task.
    """
    import deq_jax as deq
    from benchmarks._scaling_uneven import UnevenTask
    from deq_jax.training.parallel import sharded_fixed_point
    from experiments.image_classification.task import ImageTask
    from experiments.language_modeling.task import LanguageTask

    task: Any
    plain = form == "plain jit"
    if case.model == "uneven":
        solve = deq.fixed_point if plain else sharded_fixed_point(mesh)
        return UnevenTask(config, solve, WIDTH)
    if case.model == "digits":
        task = ImageTask(config, mesh)
    else:
        task = LanguageTask(config, mesh, VOCABULARY)
    if plain:
        task.model = task.model.clone(fixed_point=deq.fixed_point)
    return task


def batches(case: Case, config: Any) -> Iterator[Any]:
    """Training batches: scanned digits, words drawn by Zipf's law, or vectors of any difficulty.

    Args:
        case: its model and sizes.
        config: from `configure`.

    Yields:
        numpy arrays.
    """
    from experiments.image_classification.data import build_data

    if case.model == "digits":
        data = build_data(config)[0]
        while True:
            yield next(data)
    size, rng = case.devices * case.examples, np.random.default_rng(0)
    one = np.ones(size, np.float32)
    if case.model == "uneven":
        rate = np.linspace(0.1, SLOWEST, size, dtype=np.float32)  # rising from device to device
        while True:
            noise = rng.standard_normal((size, WIDTH), np.float32)
            yield {"input": noise, "rate": rate, "mask": one}
    share = 1 / np.arange(1, VOCABULARY + 1)
    while True:
        shape = (size, config.data.length + 1)
        text = rng.choice(VOCABULARY, shape, p=share / share.sum()).astype(np.int32)
        words, targets = text[:, :-1], text[:, 1:]
        weight = np.ones(words.shape, np.float32)
        yield {"words": words, "targets": targets, "weight": weight, "fresh": 0 * one, "mask": one}


class Runner:
    """A compiled training step with its state."""

    def __init__(self, lowered: Any, state: Any) -> None:
        """Compiles.

        Args:
            lowered: the training step.
            state: a copy of its own, which is donated.
        """
        self.state = state
        self._program = lowered.compile()
        self.text = self._program.as_text() or ""
        self.losses: list[float] = []

    def __call__(self, batch: dict) -> None:
        """Takes a step and waits for it."""
        self.state, measured = self._program(self.state, batch)
        self.losses.append(float(measured["loss"].total / measured["loss"].count))


def build(case: Case, config: Any, mesh: Any, batch: dict) -> list[Runner]:
    """Compiles the training step in both forms, at once.

    Args:
        case: what to build.
        config: its configuration.
        mesh: the devices.
        batch: one batch, placed.

    Returns:
        A runner for each of `FORMS`, from the same initial state.
    """
    import jax
    import jax.numpy as jnp

    from deq_jax.training.optim import make_optimizer
    from deq_jax.training.state import create_state
    from deq_jax.training.step import make_train_step

    optimizer = make_optimizer(config.optim, config.train.steps)
    tasks = [make_task(case, config, mesh, form) for form in FORMS]
    state = create_state(tasks[0], optimizer, config.train.seed, mesh)
    steps = [make_train_step(task, config, optimizer, mesh) for task in tasks]
    lowered = [step.lower(state, batch) for step in steps]  # type: ignore[attr-defined]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda one: Runner(one, jax.tree.map(jnp.copy, state)), lowered))


def count_steps(task: Any, state: Any, batch: dict, budget: int) -> dict[str, list[int]]:
    """What the solves of one batch take, sample by sample.

    Args:
        task: with its real tolerances.
        state: of training.
        batch: placed.
        budget: of the forward solve.

    Returns:
        "forward" and "backward", in the order of the batch.
    """
    import jax

    import deq_jax as deq

    def run(state: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        def objective(params: Any, probe: Any) -> Any:
            output = task.forward(
                params,
                state.collections(),
                batch,
                key=jax.random.key(0),
                train=True,
                warmup=False,
                max_steps=budget,
                probe=probe,
            )
            return output.loss, output.solution.stats.num_steps

        derivative = jax.grad(objective, argnums=(0, 1), has_aux=True)
        (_, backward), forward = derivative(state.params, deq.backward_probe(batch["mask"]))
        return forward, backward.num_steps

    forward, backward = jax.jit(run)(state, batch)
    lists = {"forward": forward, "backward": backward}
    return {name: np.asarray(steps).astype(int).tolist() for name, steps in lists.items()}


def measure(case: Case, repeats: int) -> list[dict]:
    """Measures both forms of a case, in turns.

    Args:
        case: what to run.
        repeats: timed steps.

    Returns:
        A row for each form: milliseconds of a step (median and best) and of CPU time of all
        threads; the summary of its collectives; with `case.trained` the solver
        steps of every sample, under "steps".
    """
    import jax

    jax.config.update("jax_num_cpu_devices", case.devices)
    from benchmarks._scaling_program import collectives, summary
    from deq_jax.training.parallel import make_mesh
    from deq_jax.training.parallel import place

    mesh, config = make_mesh(), configure(case)
    stream = (place(batch, mesh) for batch in batches(case, config))
    first = next(stream)
    timed = config if case.model == "uneven" else exhaustive(config)
    runners = build(case, timed, mesh, first)
    times = times_ms([lambda one=one: one(first) for one in runners], repeats)
    losses = [one.losses for one in runners]
    # The two compute the same: otherwise this would be no comparison.
    np.testing.assert_allclose(*losses, rtol=2e-2)

    budget, steps = config.eval_steps, None
    if case.trained is not None:
        for batch in itertools.islice(stream, case.trained):
            runners[0](batch)
        task = make_task(case, config, mesh, FORMS[0])
        steps = count_steps(task, runners[0].state, next(stream), budget)
    full = (config.solver.max_steps, config.backward.max_steps)
    if steps and case.model == "uneven":  # the others take all of their budget
        full = (max(steps["forward"]), max(steps["backward"]))
    rows = []
    for form, runner, rounds in zip(FORMS, runners, times, strict=True):
        walls, cpus = zip(*rounds, strict=True)
        found = collectives(runner.text)
        leaves = jax.tree.leaves(runner.state.params)
        rows.append(
            dataclasses.asdict(case)
            | {"form": form, "ms": statistics.median(walls), "best_ms": min(walls)}
            | {"cpu_ms": statistics.median(cpus)}
            | {"parameters": sum(leaf.size for leaf in leaves), "iterations": full}
            | {"collectives": summary(found, *full), "steps": steps, "budget": budget}
        )
    return rows


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    limit_threads(request["case"]["threads"])
    print(json.dumps({"rows": measure(Case(**request["case"]), request["repeats"])}))
