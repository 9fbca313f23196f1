"""The table of several seeds, against numbers worked out by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deq_jax.errors import UsageError
from experiments.common import collect

ROOT = Path(__file__).parent.parent


@pytest.fixture
def runs(tmp_path):
    def write(name, **models):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps(models))
        return folder

    low = {"accuracy": {"2": 0.5, "8": 0.75}, "steps": float("inf"), "top5": None, "quarters": [1]}
    high = {"accuracy": {"2": 0.7, "8": 0.75}, "steps": 9, "top5": 1.0, "quarters": [2]}
    return write, [write("0", jr=low), write("1", jr=high)]


def test_a_command_shows_means_and_deviations(runs):
    _, folders = runs
    command = [sys.executable, "-m", "experiments.common.collect", *map(str, folders)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[:1] == [["mean ± deviation of 2 runs", "with JR"]], done.stderr
    assert cells[2:] == [
        ["accuracy 2", "0.6 ± 0.14"],
        ["accuracy 8", "0.75 ± 0"],
        ["steps", "9, and 1 of 2 not finite"],
        ["quarters 0", "1.5 ± 0.71"],
    ]


def test_what_does_not_belong_together_is_refused(runs, tmp_path):
    write, folders = runs
    other = write("2", model={})
    with pytest.raises(UsageError, match="got model in .*2 and jr in .*wanted runs of one"):
        collect.collect([*folders, other])
    with pytest.raises(UsageError, match=r"cannot read .*results.json: .*wanted the workdir"):
        collect.collect([tmp_path])
    for text in ("", "[1, 2]"):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(UsageError, match=r"cannot read .*results.json: .*wanted the workdir"):
            collect.collect([tmp_path])
