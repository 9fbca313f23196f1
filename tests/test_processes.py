"""Runs of several real processes, each with devices of its own, as a pod has them.

Every test runs tests/training_example.py.  Processes talk over the loopback interface, with gloo.
"""

import shutil
import signal

import numpy as np
import pytest
from launcher import Launcher

from deq_jax.training import distributed, read_history

pytestmark = pytest.mark.slow

AGAIN = "Run the same command again in all processes to resume from the newest checkpoint"


@pytest.fixture(scope="module")
def launcher():
    # Evaluations, at the end only, take most of the time.  Solves use up their budgets: a sample
    # near a larger tolerance would stop a step later, and at another value, in one of two runs.
    flags = ["--train.eval_every=0", "--solver.tol=1e-30", "--backward.tol=1e-30"]
    with Launcher(flags) as launcher:
        yield launcher


@pytest.fixture(scope="module")
def alone(launcher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    (done,) = launcher([f"--workdir={folder}"], devices=4)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pair(launcher, tmp_path_factory):
    """Two processes to which nothing happened."""
    folder = tmp_path_factory.mktemp("pair") / "run"
    return folder, launcher.together(2, f"--workdir={folder}")


@pytest.fixture(scope="module")
def halted(launcher, tmp_path_factory):
    """A run of two processes that stopped because one of them, not the first, was told to."""
    folder = tmp_path_factory.mktemp("halted") / "run"
    ends = launcher.together(2, f"--workdir={folder}", own={1: ["--data.die_at=14"]})
    assert [end.returncode for end in ends] == [128 + signal.SIGTERM] * 2
    assert "stopped by SIGTERM after step" in ends[0].stderr
    assert "stopped by" not in ends[1].stderr  # one of them talks
    return folder


@pytest.fixture
def workdir(halted, tmp_path):
    return shutil.copytree(halted, tmp_path / "run")


def finished(ends):
    for end in ends:
        assert end.returncode == 0, end.stderr
        assert "finished\n" in end.stdout


def assert_same(folder, wanted):
    """Equal but for the order of sums."""
    with np.load(folder / "final.npz") as got, np.load(wanted / "final.npz") as leaves:
        assert got.files == leaves.files
        for name in got.files:
            np.testing.assert_allclose(got[name], leaves[name], rtol=1e-4, atol=1e-6, err_msg=name)
    for got, expected in zip(read_history(folder), read_history(wanted), strict=True):
        assert got.pop("kind") == expected.pop("kind")
        got.pop("steps_per_second", None), expected.pop("steps_per_second", None)
        for name in list(got):  # rounding decides in which step a residual becomes exactly zero
            if name.endswith(("_steps", "unconverged")):
                assert got.pop(name) == pytest.approx(expected.pop(name), abs=0.1), name
        assert got == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_two_processes_learn_what_one_learns(alone, pair):
    folder, ends = pair
    finished(ends)
    assert "evaluation at step 30" in ends[0].stderr
    assert "step" not in ends[1].stderr
    assert_same(folder, alone)
    files = sorted(path.name.split(".")[0] for path in folder.iterdir())
    assert files == ["checkpoints", "config", "events", "final", "lock", "metrics"]


def test_four_processes_of_two_devices_learn_the_same(launcher, alone, tmp_path):
    ends = launcher.together(4, f"--workdir={tmp_path}", devices=2)
    finished(ends)
    assert_same(tmp_path, alone)


@pytest.mark.parametrize("processes", [1, 4])  # by two: after a kill, below
def test_a_checkpoint_of_two_processes_is_continued_by_any_number(
    launcher, alone, workdir, processes
):
    if processes == 1:
        ends = launcher([f"--workdir={workdir}"], devices=4)
    else:
        ends = launcher.together(processes, f"--workdir={workdir}", devices=4 // processes)
    finished(ends)
    assert "resuming" in ends[0].stderr
    assert_same(workdir, alone)


def test_tables_split_over_processes_are_saved_in_parts_and_joined_again(launcher, alone, tmp_path):
    flags = [f"--workdir={tmp_path}", "--shard_above=20"]
    ends = launcher.together(2, *flags, own={1: ["--data.die_at=14"]})
    assert [end.returncode for end in ends] == [128 + signal.SIGTERM] * 2
    newest = max((tmp_path / "checkpoints").iterdir())
    for process in range(2):  # each of them has written what it alone holds
        files = (newest / "state" / f"ocdbt.process_{process}" / "d").iterdir()
        assert sum(path.stat().st_size for path in files) > 100
    finished(launcher([f"--workdir={tmp_path}"], devices=2))
    assert_same(tmp_path, alone)


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_the_others_say_so_and_all_resume(launcher, alone, workdir, victim):
    fatal = ["--data.die_at=22", "--data.die_by=9"]
    ends = launcher.together(2, f"--workdir={workdir}", own={victim: fatal})
    survivor = ends[1 - victim]
    assert ends[victim].returncode == -signal.SIGKILL
    assert survivor.returncode == distributed.EXIT_CODE
    assert survivor.seconds - ends[victim].seconds < 60
    assert f"error: process {victim}" in survivor.stderr
    assert AGAIN in survivor.stderr
    finished(launcher.together(2, f"--workdir={workdir}"))
    assert_same(workdir, alone)


def test_an_error_of_one_ends_all(launcher, tmp_path):
    own = {1: ["--data.die_at=13", "--data.die_by=0"]}
    ends = launcher.together(2, f"--workdir={tmp_path}", "--train.checkpoint_every=1", own=own)
    assert [end.returncode for end in ends] == [distributed.EXIT_CODE, 1]
    assert "error: process 1: the data is gone" in ends[1].stderr
    assert "error: process 1 is gone" in ends[0].stderr


def test_sigterm_to_all_saves_and_resumes_exactly(launcher, pair, tmp_path):
    own = {i: [f"--data.die_at={13 + i}"] for i in range(2)}  # by SIGTERM, one shortly after
    ends = launcher.together(2, f"--workdir={tmp_path}", own=own)
    assert [end.returncode for end in ends] == [128 + signal.SIGTERM] * 2
    assert "run the same command again" in ends[0].stderr
    finished(launcher.together(2, f"--workdir={tmp_path}"))
    with np.load(tmp_path / "final.npz") as got, np.load(pair[0] / "final.npz") as wanted:
        for name in wanted.files:
            assert got[name].tobytes() == wanted[name].tobytes(), name


def test_processes_of_different_minds_are_refused(launcher, workdir, tmp_path):
    def refused(own, *flags):
        ends = launcher.together(2, *flags, own=own)
        assert [end.returncode for end in ends] == [1, 1]
        return [end.stderr for end in ends]

    said = refused({1: ["--optim.lr=0.3"]}, f"--workdir={workdir}")
    assert "process 1 was started with other flags than process 0: optim.lr" in said[1]
    assert "see what it says" in said[0]
    said = refused({i: [f"--workdir={tmp_path}/{i}"] for i in (0, 1)})
    assert "must be on storage that all processes share" in said[1]
    said = refused({}, f"--workdir={workdir}", "--optim.lr=0.3")
    assert all("optim.lr: 0.001 there, 0.3 now" in text for text in said)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--coordinator=10.0.0.1:1234"], "wanted all three of them, or none"),
        (["--coordinator=x", "--num_processes=2", "--process_id=0"], "wanted host:port"),
        (["--coordinator=x:1", "--num_processes=2", "--process_id=2"], "wanted 0 to 1"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(launcher, tmp_path, flags, words):
    (end,) = launcher([f"--workdir={tmp_path}/run", *flags])
    assert end.returncode == 1
    assert words in end.stderr
    assert not (tmp_path / "run").exists()
