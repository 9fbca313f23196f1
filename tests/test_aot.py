"""Training steps compiled for four TPU chips that need not exist, and what their programs show."""

import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from experiments.common import dry_run

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = ROOT / "benchmarks" / "results" / "accelerators" / "tpu-v5e-2x2.json"
PRESETS = {"digits": "image_classification", "prose": "language_modeling"}

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason='pip install -e ".[aot]"'
    ),
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aot")
    command = [sys.executable, "-W", "error", "-m", "benchmarks.accelerators"]
    command += ["--target=tpu-v5e:2x2", f"--out={folder}", "--cases", *PRESETS]
    names = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (folder / "tpu-v5e-2x2.png").stat().st_size > 0
    return steps(folder / COMMITTED.name)


def steps(path):
    return {row["case"]: row for row in json.loads(path.read_text(encoding="utf-8"))["steps"]}


def gradient_bytes(name):
    main = importlib.import_module(f"experiments.{PRESETS[name]}.main")
    config = main.PRESETS[name]
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    task = main.EXPERIMENT.build_task(config, mesh, None)
    _, state = dry_run.step_and_state(config, task, mesh)
    return sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize("name", PRESETS)
def test_a_step_communicates_in_no_loop_and_its_gradient_once(rows, name):
    """That of the penalty with that of the loss, and of a table once for both of its uses."""
    row = rows[name]
    assert row["collectives_inside"] == 0
    # Beside it there are sums of batch statistics; what positions become is summed, not their map.
    assert row["bytes_once"] == pytest.approx(gradient_bytes(name), rel=0.05)


@pytest.mark.parametrize("name", PRESETS)
def test_memory_is_that_of_the_committed_table(rows, name):
    wanted = steps(COMMITTED)[name]
    for kind in ("arguments", "temporaries"):
        assert rows[name][kind] == pytest.approx(wanted[kind], rel=0.1)


@pytest.mark.parametrize(
    "name", ["tpu", "tpu-v5e", "v5e:2x2", "tpu-v9:2x2", "h100:8x8", "tpu-v5e:2xy"]
)
def test_an_unknown_target_ends_in_one_sentence(name):
    command = [sys.executable, "-m", "benchmarks.accelerators", f"--target={name}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert (
        done.stderr.startswith(f"got --target={name}; wanted h100, ")
        and "Traceback" not in done.stderr
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cases", "Picard", "nothing"], "got --cases nothing; wanted Picard, "),
        (["--cases", "prose", "--per_device=0"], "got --per_device=0; wanted at least 1"),
        (["--cases", "prose", "--shard_above=0"], "got --shard_above=0; wanted at least 1"),
        (["--target=tpu-v5e:4x8", "--cases", "prose"], "error: got --train.batch_size=16 for 32"),
    ],
)
def test_cases_that_cannot_be_compiled_end_in_one_sentence(flags, message):
    command = [sys.executable, "-m", "benchmarks.accelerators", "--target=tpu-v5e:2x2", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (1, 2)
    assert message in done.stderr and "Traceback" not in done.stderr
