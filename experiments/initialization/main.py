"""Studies the initial weights of DEQs: gaussian, orthogonal and symmetric (goe) ones.

    python -m experiments.initialization.main --mode=theory|sweep|models
    python -m experiments.initialization.main --mode=sweep --preset=mnist --data.dir=DIR

`theory` measures random matrices and linear DEQs beside what random-matrix theory predicts; `sweep`
trains fully connected DEQs from them, family x scale x seed; `models` trains the presets prose and
digits from them.  WORKDIR/MODE gets results.md, results.json and a picture.  On 2 CPU cores theory
takes 2.5 minutes, sweep 2 (mnist 6), models 20, --diagnose 1.5.
"""

from __future__ import annotations

import dataclasses
import os

import jax

from deq_jax.training import UsageError, flags, workdir
from deq_jax.training.parallel import make_mesh
from experiments.common import reporting
from experiments.initialization import diagnosis, models, report, theory
from experiments.initialization.config import PRESETS, InitConfig
from experiments.initialization.sweep import Sweep


def run(config: InitConfig) -> None:
    """Measures or trains, and writes the report."""
    if jax.process_count() > 1:
        raise UsageError(f"got {jax.process_count()} processes; wanted one: nothing is split here")
    if config.dry_run:
        raise UsageError("got --dry_run; wanted another task: many models train here at once")
    if config.diagnose:
        return reporting.show(diagnosis.run(config))
    part = dataclasses.replace(config, workdir=os.path.join(config.workdir, config.mode))
    sweep = Sweep(config) if config.mode == "sweep" else None  # its data may be missing
    with workdir.claimed(part) as folder:
        if config.mode == "theory":
            text = report.write_theory(folder, config, theory.measure(config.theory))
        elif sweep is None:
            records = models.measure(config.models, folder, make_mesh(), config.train.seed)
            text = report.write_models(folder, config, records)
        else:
            families = {name: sweep.run(name) for name in config.sweep.families}
            compiled = {what: program.compiled for what, program in sweep.programs.items()}
            text = report.write_sweep(folder, config, families, compiled)
        reporting.show(text)


if __name__ == "__main__":
    flags.run(run, PRESETS, default="digits")
