"""What `--dry_run` prints: size, memory and operations of a training step, compiled but not run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from deq_jax.training import Config, Task, make_train_step
from deq_jax.training.optim import make_optimizer
from deq_jax.training.parallel import batch_sharding, require_even
from deq_jax.training.state import TrainState, abstract_state
from deq_jax.training.step import TrainStep
from experiments.common import reporting


def run(parts: Mapping[str, Any], build_task: Callable[[Any], Task], mesh: Mesh) -> str:
    """Compiles the training step of every model of a command; needs no data and writes nothing.

    Args:
      parts: name of a model -> its configuration.
      build_task: builds a task.
      mesh: the devices.

    Returns:
      A table, in Markdown.

    Raises:
      UsageError: a batch does not divide by the devices.
    """
    header, columns = [f"a step on {mesh.size} {jax.devices()[0].platform}"], []
    for name, part in parts.items():
        header.append(name)
        columns.append(measure(part, build_task(part), mesh))
    rows = [[label, *(column[label] for column in columns)] for label in columns[0]]
    return reporting.table(header, rows) + (
        "\nMemory (MiB), FLOPs and bytes are those of one device; the body of a loop counts once,\n"
        "as one step of a solve.\n"
    )


def measure(config: Config, task: Task, mesh: Mesh) -> dict[str, str]:
    """Compiles one training step and reads the program.

    Args:
      config: the whole configuration.
      task: model and loss.
      mesh: the devices.

    Returns:
      What is measured -> its value in words.

    Raises:
      UsageError: the batch does not divide by the devices.
    """
    program, state, seconds = compile_step(config, task, mesh)
    memory, cost = program.memory_analysis(), program.cost_analysis()
    mib = 2.0**20
    return {
        "parameters": f"{sum(math.prod(a.shape) for a in jax.tree.leaves(state.params)):,}",
        "examples": f"{config.train.batch_size:,}",
        "memory: state and batch": f"{memory.argument_size_in_bytes / mib:,.1f}",
        "memory: while it runs": f"{memory.temp_size_in_bytes / mib:,.1f}",
        "GFLOPs": f"{cost['flops'] / 1e9:,.2f}",
        "GB read and written": f"{cost['bytes accessed'] / 1e9:,.2f}",
        "seconds to compile": f"{seconds:.1f}",
    }


def compile_step(config: Config, task: Task, mesh: Mesh) -> tuple[Any, TrainState, float]:
    """Compiles one training step.

    Args:
      config: the whole configuration.
      task: model and loss.
      mesh: the devices, which need not exist.

    Returns:
      The program, a `jax.stages.Compiled`; the state that it takes, of `jax.ShapeDtypeStruct`; and
      the seconds that XLA took.

    Raises:
      UsageError: the batch does not divide by the devices.
    """
    step, state = step_and_state(config, task, mesh)
    lowered = step.lower(state, batch(config, task, mesh))
    began = time.perf_counter()
    return lowered.compile(), state, time.perf_counter() - began


def step_and_state(config: Config, task: Task, mesh: Mesh) -> tuple[TrainStep, TrainState]:
    """Builds one training step.

    Args:
      config: the whole configuration.
      task: model and loss.
      mesh: the devices, which need not exist.

    Returns:
      The step, and the shapes of the state that it takes.
    """
    optimizer = make_optimizer(config.optim, config.train.steps)
    state = abstract_state(task, optimizer, mesh, shard_above=config.shard_above)
    return make_train_step(task, config, optimizer, mesh), state


def batch(config: Config, task: Task, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a training batch.

    Args:
      config: train.batch_size is read.
      task: names the arrays.
      mesh: the devices, over which it is split.

    Returns:
      Name -> shape, "mask" among them.

    Raises:
      UsageError: the batch does not divide by the devices.
    """
    size = config.train.batch_size
    require_even("train.batch_size", size, mesh.size)
    mask = jax.ShapeDtypeStruct((size,), np.float32)
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=batch_sharding(mesh))
        for name, leaf in {**task.sample, "mask": mask}.items()
    }
