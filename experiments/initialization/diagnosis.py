"""What `--diagnose` shows here: the fully connected DEQ as every family and scale start it."""

from __future__ import annotations

import sys

import jax.numpy as jnp
import numpy as np

from experiments.common import diagnose, reporting
from experiments.initialization.config import InitConfig
from experiments.initialization.sweep import Sweep


def run(config: InitConfig) -> str:
    """Diagnoses the grid of the sweep before training, with progress on stderr; writes nothing.

    Args:
      config: the whole configuration; train.seed is the seed of all weights.

    Returns:
      A table, and the advice that there is for each.
    """
    sweep = Sweep(config)
    examples = sweep.train_set.batch(jnp.arange(diagnose.EXAMPLES))
    rows, advice, names = [], "", []
    for family in config.sweep.families:
        for scale in config.sweep.scales:
            sys.stderr.write(f"{family} {scale:g}\n")
            solution = sweep.forward(
                sweep.start(scale, config.train.seed, family).params, examples
            ).solution
            assert solution is not None
            found = diagnose.look(config, solution)
            numbers = [found.spectral_radius, found.operator_norm]
            solved = [f"{share.mean():.0%}" for share in found.converged.values()]
            names = list(found.converged)
            rows.append([family, f"{scale:g}", *(f"{np.median(n):.2f}" for n in numbers)])
            rows[-1] += [f"{found.penalty:.3f}", *solved]
            advice += f"\n{family} {scale:g}:\n" + "".join(f"- {said}\n" for said in found.advice)
    header = ["family", "scale", "radius", "norm", "penalty", *(f"{n} solves" for n in names)]
    count = f"{diagnose.EXAMPLES} examples of {config.data.name}, from z = 0, untrained\n\n"
    return count + reporting.table(header, rows) + advice
