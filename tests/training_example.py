"""A tiny experiment, real in every part: a DEQ that regresses a smooth function of four numbers.

Imported by the tests of training/, and run by them as a program of its own, which can be told to
die at a given step.
"""

import dataclasses
import os
import signal
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import deq_jax as deq
from deq_jax.training import (
    BackwardConfig,
    Config,
    EvalConfig,
    JacConfig,
    Mean,
    SolverConfig,
    Task,
    TrainConfig,
    UsageError,
    distributed,
    flags,
    option,
    parallel,
    train,
)

WIDTH = 6


def cell(params, z, x):
    injected, mask = x
    return mask * jnp.tanh(z @ params["W"] + injected)


class Network(nn.Module):
    """f(z; x) = mask * tanh(W z + U x + b), prediction v z*; counts the examples it has seen."""

    solver: Any
    adjoint: Any = None
    keep: str = "best"
    fixed_point: Any = deq.fixed_point
    masked: bool = True
    gain: float = 0.8

    @nn.compact
    def __call__(self, x, real, *, train, max_steps=None, probe=None):
        w = self.param("W", deq.init.gaussian(self.gain), (WIDTH, WIDTH))
        u = self.param("U", nn.initializers.normal(0.5), (4, WIDTH))
        v = self.param("v", nn.initializers.normal(1.0), (WIDTH,))
        bias = self.param("b", nn.initializers.zeros, (WIDTH,))
        injected = x @ u + jnp.broadcast_to(bias, (len(x), WIDTH))
        seen = self.variable("seen", "total", lambda: jnp.float32(0))
        mask = jnp.ones_like(injected)
        if train:
            seen.value += real.sum()
            if self.masked:
                mask = deq.masks.bernoulli(self.make_rng("dropout"), injected.shape, 0.1)
        operands = {"W": w}
        solution = self.fixed_point(
            cell,
            operands,
            jnp.zeros_like(injected),
            (injected, mask),
            solver=self.solver,
            adjoint=self.adjoint,
            keep=self.keep,
            max_steps=max_steps,
            probe=probe,
        )
        equation = deq.Equation(cell, operands, (injected, mask))
        return solution.value @ v, dataclasses.replace(solution, equation=equation)


def squared_error(predicted, batch):
    error = (predicted - batch["y"]) ** 2 * batch["mask"]
    mean = Mean(error.sum(), batch["mask"].sum())
    return {"loss": mean, "squared_error": mean}


def Regression(config, fixed_point=deq.fixed_point, **changes):
    """Squared error of a `Network`; changes are of fields of the network or of the task."""
    fields = {name: changes.pop(name) for name in ("masked", "gain") if name in changes}
    size = config.train.batch_size
    task = Task(
        model=Network(
            config.build_solver(),
            config.backward.build_adjoint(),
            config.solver.keep,
            fixed_point,
            **fields,
        ),
        inputs=lambda batch, carry: (batch["x"], batch["mask"]),
        loss=squared_error,
        sample={
            "x": jax.ShapeDtypeStruct((size, 4), jnp.float32),
            "y": jax.ShapeDtypeStruct((size,), jnp.float32),
            "mask": jax.ShapeDtypeStruct((size,), jnp.float32),
        },
    )
    return dataclasses.replace(task, **changes)


def make_batch(index, size, padding=0):
    rng = np.random.default_rng([7, index])
    x = rng.normal(size=(size, 4)).astype(np.float32)
    y = np.sin(x.sum(1)).astype(np.float32)
    mask = np.ones(size, np.float32)
    if padding:
        mask[-padding:] = 0
        x[-padding:], y[-padding:] = 1e3, 1e3
    return {"x": x, "y": y, "mask": mask}


def own(batch):
    """The part of a batch that is this process's: neighbours, as one process would place them."""
    part = len(batch["mask"]) // jax.process_count()
    start = jax.process_index() * part
    return {name: array[start : start + part] for name, array in batch.items()}


class Batches:
    """Endless batches whose content follows from their number."""

    def __init__(self, size, die_at=-1, die_by=0):
        self.size, self.die_at, self.die_by, self.index = size, die_at, die_by, 0

    def __next__(self):
        if self.index == self.die_at:
            if not self.die_by:
                raise UsageError("the data is gone")
            os.kill(os.getpid(), self.die_by)
        self.index += 1
        return own(make_batch(self.index - 1, self.size))

    def get_state(self):
        return {"index": self.index}

    def set_state(self, state):
        self.index = state["index"]


def eval_batches():
    return [own(make_batch(1_000_000, 16)), own(make_batch(1_000_001, 16, padding=5))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    die_at: int = option(-1, "batch before which the program kills itself", may_change=True)
    die_by: int = option(int(signal.SIGTERM), "signal by which it does; 0: error", may_change=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExampleConfig(Config):
    data: DataConfig = DataConfig()


PRESETS = {
    "tiny": ExampleConfig(
        solver=SolverConfig(name="picard", max_steps=8, tol=1e-2),
        backward=BackwardConfig(solver="picard", max_steps=8),
        jac=JacConfig(gamma=0.5, prob=0.5, budget_low=-2, budget_high=1),
        train=TrainConfig(
            steps=30,
            batch_size=16,
            warmup_steps=4,
            warmup_layers=3,
            log_every=7,
            eval_every=10,
            checkpoint_every=6,
        ),
        eval=EvalConfig(budgets=(2, 12), spectral_batches=1, spectral_iters=20),
    )
}


def main(config):
    mesh = parallel.make_mesh()
    task = Regression(config, parallel.sharded_fixed_point(mesh))
    data = Batches(config.train.batch_size, config.data.die_at, config.data.die_by)
    result = train(task, config, data, eval_batches, mesh=mesh)
    leaves = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(distributed.fetch(result.state))[0]
    }
    if distributed.is_first() and "://" not in config.workdir:
        np.savez(os.path.join(config.workdir, "final.npz"), allow_pickle=False, **leaves)
    print("finished")


def launch():
    jax.config.update("jax_platforms", "cpu")
    flags.run(main, PRESETS, default="tiny")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)
    launch()
    sys.exit()
