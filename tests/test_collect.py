"""The table of several seeds, against numbers worked out by hand."""

import json
import math
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


def test_a_measure_is_drawn_over_its_budgets(runs, tmp_path, capsys):
    _, folders = runs
    out, names = tmp_path / "all", list(map(str, folders))
    collect.main(["--curve=accuracy", f"--out={out}", *names])
    assert out.with_suffix(".png").stat().st_size > 1000
    with pytest.raises(
        UsageError, match="got --curve='acc'; wanted a measure at budgets, of accuracy 2"
    ):
        collect.main(["--curve=acc", f"--out={out}", *names])
    with pytest.raises(SystemExit):
        collect.main(["--curve=accuracy", *names])
    assert "got --curve; wanted --out" in capsys.readouterr().err


def test_a_curve_has_the_budgets_of_all_runs(runs, tmp_path):
    write, _ = runs
    some = write("some", jr={"loss": {"1": 3.0, "2": 2.0}})
    more = write("more", jr={"loss": {"1": 3.5, "2": 2.5, "10": 1.0}})
    for order in ([some, more], [more, some]):
        collect.draw_curve(collect.gather(order), "loss", tmp_path / "loss.png")
        assert (tmp_path / "loss.png").stat().st_size > 1000
        (tmp_path / "loss.png").unlink()


def test_a_setting_makes_the_columns(runs, tmp_path, capsys):
    write, _ = runs
    for seed, gamma, score in [(0, 1.0, 0.5), (1, 1.0, 0.75), (0, 0.0, 0.25)]:
        folder = write(f"g{gamma}-{seed}", model={"score": score, "steps": math.inf})
        config = {"jac": {"gamma": gamma}, "train": {"seed": seed}}
        (folder / "config.json").write_text(json.dumps(config))
    folders = [str(path) for path in tmp_path.glob("g*")]
    out = tmp_path / "found" / "gamma"
    collect.main(["--by=jac.gamma", f"--out={out}", "--plot=score", "--plot=steps", *folders])
    lines = [
        [c.strip() for c in line.split("|")[1:-1]] for line in capsys.readouterr().out.split("\n")
    ]
    assert lines[0] == ["mean ± deviation of 3 runs", "jac.gamma = 0.0", "jac.gamma = 1.0"]
    assert lines[2] == ["score", "0.25", "0.625 ± 0.18"]
    assert json.loads(out.with_suffix(".json").read_text())["0.0"] == [
        {"score": 0.25, "steps": math.inf}
    ]
    assert (
        out.with_suffix(".md").read_text().startswith("| mean")
        and out.with_suffix(".png").stat().st_size
    )
    with pytest.raises(UsageError, match="got --by=jac.gama, which .* does not have"):
        collect.main(["--by=jac.gama", *folders])
    with pytest.raises(
        UsageError, match="got --plot='scores'; wanted a number of all runs: score, steps"
    ):
        collect.main(["--by=jac.gamma", f"--out={out}", "--plot=scores", *folders])
    both = write("both", jr={}, no_jr={})
    with pytest.raises(UsageError, match="got runs of 2 models; wanted one for --by"):
        collect.main(["--by=jac.gamma", str(both)])
    with pytest.raises(SystemExit):
        collect.main(["--plot=score", *folders])


def test_what_does_not_belong_together_is_refused(runs, tmp_path):
    write, folders = runs
    other = write("2", model={})
    with pytest.raises(UsageError, match="got model in .*2 and jr in .*wanted runs of one"):
        collect.gather([*folders, other])
    with pytest.raises(UsageError, match=r"cannot read .*results.json: .*wanted the workdir"):
        collect.gather([tmp_path])
    for text in ("", "[1, 2]"):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(UsageError, match=r"cannot read .*results.json: .*wanted the workdir"):
            collect.gather([tmp_path])
