"""A whole program under faults: what it says, what it leaves, and that nothing is lost.

Every test runs tests/training_example.py as a user would.  After each fault the same command, run
again, must end with the very bits of a run that nothing happened to.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from launcher import Launcher

from deq_jax.training import Config, UsageError
from deq_jax.training import workdir as workdir_module

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("training_example.py")


# Sets the limit on the size of files, then becomes the command given.  A preexec_fn would do so
# too, but fork this process, whose threads JAX has started.
LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
os.execvp(sys.argv[2], sys.argv[2:])
"""


def limited(workdir, *args, prefix=(), limit=None):
    """Runs the example under a command of its own."""
    if limit is not None:
        prefix = [*prefix, sys.executable, "-c", LIMITED, str(limit)]
    command = [*prefix, sys.executable, str(PROGRAM), f"--workdir={workdir}", *args]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    # Orbax logs the trace of every thread that fails besides the one whose error it raises.
    traces = r"^E\d{4} .* future\.py.*\nTraceback .*\n(?: .*\n)+.*\n"
    ours = re.sub(traces, "", done.stderr, flags=re.MULTILINE)
    assert "Traceback" not in ours, done.stderr
    return done


@pytest.fixture(scope="module")
def launch():
    with Launcher() as launcher:

        def run(workdir, *args, signals=()):
            return launcher([f"--workdir={workdir}", *args], signals=signals)[0]

        run.launcher = launcher
        yield run


def final(workdir):
    with np.load(Path(workdir) / "final.npz") as leaves:
        return {name: leaves[name].tobytes() for name in leaves.files}


def snapshot(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def straight(launch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "run"
    done = launch(folder)
    assert (done.returncode, done.stdout) == (0, "finished\n"), done.stderr
    return final(folder)


@pytest.fixture(scope="module")
def halted(launch, tmp_path_factory):
    """A run that SIGTERM stopped after step 15, with checkpoints of steps 12 and 15."""
    folder = tmp_path_factory.mktemp("halted") / "run"
    done = launch(folder, "--data.die_at=14", f"--data.die_by={signal.SIGTERM}")
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "stopped by SIGTERM after step 15 of 30; run the same command again" in done.stderr
    assert done.stdout == ""
    return folder


@pytest.fixture
def workdir(halted, tmp_path):
    return shutil.copytree(halted, tmp_path / "run")


def test_sigterm_then_the_same_command(launch, workdir, straight):
    done = launch(workdir)
    assert (done.returncode, done.stdout) == (0, "finished\n"), done.stderr
    assert "at step 15" in done.stderr
    assert final(workdir) == straight


def test_kill_9_at_any_time_even_while_a_checkpoint_is_written(launch, tmp_path, straight):
    for number in np.sort(np.random.default_rng(3).choice(28, size=4, replace=False)) + 1:
        # A checkpoint at every step: one is always under way when the program dies.
        done = launch(
            tmp_path, "--train.checkpoint_every=1", f"--data.die_at={number}", "--data.die_by=9"
        )
        assert done.returncode == -signal.SIGKILL
    done = launch(tmp_path, "--train.checkpoint_every=1")
    assert done.returncode == 0, done.stderr
    assert "cannot be used" not in done.stderr
    assert final(tmp_path) == straight


OFTEN = ["--train.steps=100", "--train.checkpoint_every=2", "--train.eval_every=0"]


def test_twenty_signals_at_random_moments(launch, tmp_path):
    done = launch(tmp_path / "straight", *OFTEN)
    assert done.returncode == 0, done.stderr
    rng, codes = np.random.default_rng(0), []
    while len(codes) < 20:
        kind = int(rng.choice([signal.SIGTERM, signal.SIGKILL]))
        # From before the checkpoint is read to some steps, and saves, after it.
        moment = rng.uniform(0.1, 1.0) * min(done.seconds, 1.6)
        hit = launch(tmp_path / "run", *OFTEN, signals=[[moment, 0, kind]])
        assert "cannot be used" not in hit.stderr
        codes.append(hit.returncode)
        if hit.returncode == 0:  # the end, before the last of the signals: begin anew
            assert final(tmp_path / "run") == final(tmp_path / "straight")
            shutil.rmtree(tmp_path / "run")
    assert {-signal.SIGKILL, 128 + signal.SIGTERM} <= set(codes)
    done = launch(tmp_path / "run", *OFTEN)
    assert done.returncode == 0, done.stderr
    assert final(tmp_path / "run") == final(tmp_path / "straight")


def test_a_workdir_in_use_is_refused(launch, tmp_path):
    shared = [f"--workdir={tmp_path}", "--train.steps=2000"]
    ends = launch.launcher(shared, shared, signals=[[None, i, signal.SIGTERM] for i in (0, 1)])
    refused, stopped = sorted(ends, key=lambda end: end.returncode)
    assert (refused.returncode, stopped.returncode) == (1, 128 + signal.SIGTERM)
    assert f"workdir {tmp_path} is in use by another run (process " in refused.stderr
    assert "stopped by SIGTERM after step" in stopped.stderr


@pytest.mark.parametrize("late", [True, False])
def test_a_run_that_has_just_taken_its_workdir_is_named_all_the_same(tmp_path, late):
    """It has the lock, and writes who it is a moment later, or not in time."""
    fcntl = pytest.importorskip("fcntl")
    with (tmp_path / workdir_module.LOCK).open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writing = threading.Timer(0.2, lambda: print("process 7", file=file, flush=True))
        if late:
            writing.start()
        with (
            pytest.raises(UsageError) as error,
            workdir_module.claimed(Config(workdir=str(tmp_path))),
        ):
            pass
        writing.cancel()
    who = "process 7" if late else "which has just begun"
    assert f"in use by another run ({who}); wait for it to end" in str(error.value)


def truncate(checkpoint):
    for path in checkpoint.rglob("*"):
        if path.is_file() and path.stat().st_size > 100:
            os.truncate(path, path.stat().st_size // 2)


def test_a_truncated_checkpoint_gives_the_one_before(launch, workdir, straight):
    os.truncate(workdir / "checkpoints" / "000000015" / "state" / "_METADATA", 40)
    done = launch(workdir)
    assert done.returncode == 0, done.stderr
    assert "checkpoint of step 15 cannot be used (its file state/_METADATA has 40" in done.stderr
    assert "falling back to the checkpoint of step 12" in done.stderr
    assert (workdir / "checkpoints" / "damaged-000000015-0").is_dir()
    assert final(workdir) == straight


def test_when_all_checkpoints_are_truncated_it_says_so_and_touches_nothing(launch, workdir):
    for checkpoint in (workdir / "checkpoints").iterdir():
        truncate(checkpoint)
    before = snapshot(workdir / "checkpoints")
    done = launch(workdir)
    assert done.returncode == 1
    assert "error: no checkpoint in" in done.stderr
    assert "nothing was changed; move that folder away" in done.stderr
    assert snapshot(workdir / "checkpoints") == before


def test_a_workdir_of_another_configuration_is_refused(launch, workdir):
    before = snapshot(workdir)
    done = launch(workdir, "--solver.tol=0.5")
    assert done.returncode == 1
    assert done.stderr.startswith("error: workdir")
    assert "solver.tol: 0.01 there, 0.5 now" in done.stderr
    assert snapshot(workdir) == before


@pytest.mark.parametrize("limit", [2_000, 4_000])
def test_files_that_cannot_be_written_in_full_lose_nothing(launch, workdir, straight, limit):
    """A limit on the size of files fails in the same place as a full disk, for every user."""
    done = limited(workdir, limit=limit)
    assert done.returncode == 1, done.stderr
    assert "could not be written" in done.stderr
    assert "the checkpoint of step 15 is intact" in done.stderr
    done = launch(workdir)
    assert done.returncode == 0, done.stderr
    assert final(workdir) == straight


def own_disk(size, folder):
    """Command prefix: a file system of its own, of `size` bytes, that nobody else sees."""
    script = f'mount -t tmpfs -o size={size} tmpfs {folder} && cp -r "$0"/. {folder} && exec "$@"'
    return ["unshare", "--map-root-user", "--mount", "sh", "-c", script]


def test_a_disk_that_is_really_full(launch, workdir, tmp_path):
    if not shutil.which("unshare"):
        pytest.skip("needs unshare, to mount a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    probe = subprocess.run([*own_disk("1m", disk), str(workdir), "true"], capture_output=True)
    if probe.returncode:
        pytest.skip("this user may not mount a small disk")
    files = [path.stat().st_size for path in workdir.rglob("*") if path.is_file()]
    used = 4 * sum(-(-size // 4096) for size in files)  # KiB, in pages
    done = limited(disk, prefix=[*own_disk(f"{used + 20}k", disk), str(workdir)])
    assert done.returncode == 1, done.stderr
    assert "the disk is full" in done.stderr
    assert "the checkpoint of step 15 is intact" in done.stderr
