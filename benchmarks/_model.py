"""What the benchmarks of models share: command line, deq_jax's side, and the whole run."""

import argparse
import dataclasses
import importlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._case import PENALTY, compiled, machine, measured, same_networks
from benchmarks._report import RESULTS, require, write

TASKS = ("train", "train with JR", "infer")


def presets(experiments: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """Looks up the presets of some experiments.

    Args:
        experiments: their packages.

    Returns:
        Name -> experiment, configuration.
    """
    mains = [importlib.import_module(f"experiments.{name}.main") for name in experiments]
    return {n: (main.EXPERIMENT, preset) for main in mains for n, preset in main.PRESETS.items()}


def read(
    arguments: Sequence[str] | None = None,
    *,
    about: str,
    name: str,
    default: Sequence[str],
    forms: dict[str, dict[str, tuple[str, ...]]],
    batches: dict[str, dict[str, int]],
    parts: Sequence[str] = (),
) -> argparse.Namespace:
    """Reads the command line.

    Args:
        arguments: instead of sys.argv.
        about: what the benchmark does.
        name: of the flag that chooses networks.
        default: networks, if none are chosen.
        forms: device -> library -> how it can run.
        batches: device -> network -> batch.
        parts: choices of the flag --parts, if there is one.

    Returns:
        The options; "batch" is network -> batch, "forms" is library -> forms.
    """
    parser = argparse.ArgumentParser(description=about)
    known = itertools.chain(*(own for one in forms.values() for own in one.values()))
    parser.add_argument(f"--{name}", nargs="+", choices=tuple(batches["cpu"]), default=default)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--batch", nargs="+", type=int, help=f"one for each of --{name}")
    parser.add_argument("--forms", nargs="+", choices=tuple(dict.fromkeys(known)))
    parser.add_argument("--steps", type=int, default=5, help="timed runs; the median is shown")
    parser.add_argument("--device", choices=tuple(forms), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU")
    parser.add_argument("--out", type=Path, default=RESULTS)
    if parts:
        parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    options = parser.parse_args(arguments)
    names = getattr(options, name)
    sizes = options.batch or [batches[options.device][one] for one in names]
    if len(sizes) != len(names):
        parser.error(f"--batch: got {len(sizes)} for {len(names)} {name}; give one for each")
    options.batch = dict(zip(names, sizes, strict=True))
    options.forms = {
        library: [form for form in own if options.forms is None or form in options.forms]
        for library, own in forms[options.device].items()
    }
    return options


Make = Callable[[Any], tuple[Any, Any, Mapping[str, np.ndarray], Any]]
"""From a mesh to a `deq_jax.training.Task`, its configuration, of which the solvers are read, a
batch of arrays [B, ...], and what the batch before has left."""


def build(case: Any, make: Make) -> tuple[Callable[[], Any], Callable[[], dict[str, float]]]:
    """Compiles the path of a training run for one case.

    Args:
        case: task, device, and form: over how many devices the batch is split.
        make: what is to be run.

    Returns:
        What runs it, and what gives the evaluations of f in the forward solve and the products with
        its Jacobian in the backward one, 0 where there is none.
    """
    import jax

    import deq_jax as deq
    from deq_jax.training.parallel import batch_sharding, make_mesh, replicated
    from deq_jax.training.task import forward, init

    devices = int(case.form.split()[0])
    if case.device == "cpu":
        jax.config.update("jax_num_cpu_devices", devices)
    mesh = make_mesh(jax.devices()[:devices])
    task, config, batch, carry = make(mesh)
    train = case.task != "infer"
    budget = config.solver.max_steps if train else config.eval_steps

    def objective(params, probe, extra, carry, batch, key):
        found = forward(
            task,
            config,
            params,
            extra,
            carry,
            batch,
            key=key,
            train=train,
            max_steps=budget,
            probe=probe,
        )
        loss = found.loss
        if case.task == "train with JR":
            solution: Any = found.solution
            loss = loss + PENALTY * deq.frobenius_penalty(*solution.at, key=key)
        return loss, found

    def step(params, *operands):
        # What comes out for the probe are the statistics of the backward solve.
        probe = deq.backward_probe(operands[2]["mask"])
        if train:
            gradient = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
            (loss, found), (grads, backward) = gradient(params, probe, *operands)
            results = loss, grads, found.extra, found.carry
        else:
            found, backward = objective(params, None, *operands)[1], probe
            results = found.output
        evaluations = 0.0 if found.solution is None else found.solution.stats.num_steps
        return evaluations, backward.num_steps, results

    batch, carry = jax.device_put((batch, carry), batch_sharding(mesh))
    start = jax.jit(lambda key: init(task, key))
    params, extra = jax.device_put(start(jax.random.key(0)), replicated(mesh))
    run = compiled(step, params, extra, carry, batch, jax.random.key(1))

    def counts() -> dict[str, float]:
        evaluations, products, _ = run()
        return {"evaluations": float(np.mean(evaluations)), "products": float(np.mean(products))}

    return run, counts


def compare(
    make: Make, weights: Any, z: Any, image: Any, head: Callable[[Any, Any], Any], output: Any
) -> tuple[float, float, int]:
    """Compares f and the head with PyTorch's, at a state.

    Args:
        make: see `build`.
        weights: those of PyTorch, converted.
        z: the state.
        image: f(z) of PyTorch.
        head: (model, z) -> output, as a method of the model.
        output: that of PyTorch.

    Returns:
        The largest differences of f and of the output, over their largest values; and the number of
        parameters.
    """
    import jax

    from deq_jax.training.parallel import make_mesh
    from deq_jax.training.task import forward

    task, config, batch, carry = make(make_mesh(jax.devices()[:1]))

    def evaluate(params, extra, z):
        found: Any = forward(task, config, params, extra, carry, batch, max_steps=1)
        f, own, _, x = found.solution.at
        return f(own, z, x), task.model.apply({"params": params, **extra}, z, method=head)

    def difference(ours, theirs):
        return float(abs(ours - theirs).max() / abs(theirs).max())

    extra = {"batch_stats": weights.batch_stats} if weights.batch_stats else {}
    ours, scores = jax.jit(evaluate)(weights.params, extra, z)
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(image), strict=True)
    f = max(difference(*pair) for pair in pairs)
    size = sum(np.size(a) for a in jax.tree.leaves(weights.params))
    return f, difference(scores, output), size


def measure_all(
    module: str,
    options: argparse.Namespace,
    packages: Sequence[str],
    networks: Sequence[str],
    parts: Mapping[str, Sequence[Any]],
) -> dict[str, list[dict]]:
    """Compares the networks, measures all cases, and writes the results as JSON.

    Args:
        module: of the benchmark; it calls `benchmarks._case.serve`.
        options: from `read`.
        packages: whose versions are written.
        networks: to compare.
        parts: part of the results -> cases.

    Returns:
        part -> rows.
    """
    require((*packages, "optax", "matplotlib"), "pip install -e .[bench,train]")
    same = same_networks(module, networks)
    rows = {
        part: [measured(module, dataclasses.asdict(case), options.steps) for case in cases]
        for part, cases in parts.items()
    }
    write(
        options.out / f"{module.rpartition('.')[2]}.json",
        packages,
        device=options.device,
        machine=machine(options.device),
        threads=options.threads,
        compared=same,
        **rows,
    )
    return rows
