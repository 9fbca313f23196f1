"""Runs in a folder on gs://, with the stand-in of fake_store.py; it says what this cannot show."""

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import fake_store
import jax.numpy as jnp
import numpy as np
import pytest
import training_example as example
from test_checkpoint import HOST, assert_same, make_state, opened, restore, write
from test_training_loop import config_for, run, without_times

from deq_jax import folders
from deq_jax.data import corpora
from deq_jax.data.sources import MissingData
from deq_jax.training import Interrupted, UsageError, read_history, weights, workdir
from deq_jax.training.writers import MetricWriter


@pytest.fixture
def store(tmp_path, monkeypatch):
    """The folder behind gs://; nothing may appear in the current one."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with fake_store.installed(tmp_path / "store"):
        yield tmp_path / "store"
    assert not list((tmp_path / "here").iterdir())


@pytest.fixture
def directory(store):
    return folders.parse("gs://bucket/run/checkpoints")


@pytest.mark.parametrize("name", ["s3://bucket/run", "http://host/run", "gs://", "GS://b/run"])
def test_other_schemes_are_refused_in_a_sentence_and_create_nothing(store, name):
    config = config_for("ignored")
    for use in (
        lambda: folders.parse(name),
        lambda: read_history(name),
        lambda: weights.load(name),
        lambda: weights.save(name, {}, {}, {}),
        lambda: run(config.__class__(workdir=name)),
    ):
        with pytest.raises(UsageError) as error:
            use()
        wanted = f"got the folder {name}; wanted a local folder or gs://BUCKET/FOLDER"
        assert str(error.value) == wanted
    assert not store.exists()


def test_a_name_whose_slashes_pathlib_has_merged_is_still_remote():
    assert str(folders.parse(Path("gs://bucket/run"))) == "gs://bucket/run"
    assert folders.parse("c:/run") == Path("c:/run").absolute()


def test_texts_are_read(store):
    folder = store / "bucket" / "text"
    folder.mkdir(parents=True)
    for split in ("train", "valid", "test"):
        (folder / f"wiki.{split}.tokens").write_text(f"{split} the end\n")
    found = corpora.wiki_files("gs://bucket/text")
    assert found["valid"] == b"valid the end\n"
    with pytest.raises(MissingData, match=r"gs://bucket/other/wiki.train.tokens cannot be read"):
        corpora.wiki_files("gs://bucket/other")


def test_a_run_is_stopped_and_resumed_exactly(store, tmp_path):
    straight = run(config_for(tmp_path / "straight"))
    config = config_for("gs://bucket/run")
    with pytest.raises(Interrupted, match=r"resume from there \(gs://bucket/run\)"):
        run(config, example.Batches(16, die_at=12, die_by=signal.SIGTERM))
    assert [r["step"] for r in read_history("gs://bucket/run")][0] == 7
    resumed = run(config)
    assert_same(resumed.state, straight.state)
    assert without_times(resumed.history) == without_times(straight.history)
    assert without_times(read_history("gs://bucket/run")) == without_times(straight.history)
    found = sorted(p.name.split(".")[0] for p in (store / "bucket" / "run").iterdir())
    assert found == ["checkpoints", "config", "events", "events", "metrics"]
    with pytest.raises(UsageError, match="solver.tol: 0.01 there, 0.5 now"):
        other = {"solver": example.SolverConfig(name="picard", max_steps=8, tol=0.5)}
        run(config.__class__(**{**vars(config), **other}))
    params, _ = weights.load("gs://bucket/run")
    assert_same(params, straight.state.params)


@pytest.mark.slow
def test_kill_9_while_a_checkpoint_is_written_then_the_same_command(tmp_path):
    program = Path(fake_store.__file__)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}

    def launch(folder, *flags):
        command = [sys.executable, program, tmp_path / "store", f"--workdir=gs://bucket/{folder}"]
        flags = [*flags, "--train.checkpoint_every=1"]
        return subprocess.run(
            [*command, *flags], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    for number in (4, 9, 17):
        done = launch("run", f"--data.die_at={number}", "--data.die_by=9")
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert "cannot be used" not in done.stderr
    states = {}
    for name in ("run", "straight"):
        done = launch(name)
        assert (done.returncode, done.stdout) == (0, "finished\n"), done.stderr
        with fake_store.installed(tmp_path / "store"):
            states[name] = weights.load(f"gs://bucket/{name}")
            history = without_times(read_history(f"gs://bucket/{name}"))
            assert [r["step"] for r in history if r["kind"] == "train"] == [7, 14, 21, 28, 30]
    assert_same(states["run"], states["straight"])


def test_checkpoints_rotate_fall_back_and_are_set_aside(directory, store):
    with opened(directory, keep=2, keep_every=4, keep_best="min:loss") as checkpoints:
        for step in range(1, 8):
            checkpoints.save(step, make_state(step), HOST, {"loss": abs(step - 2)})
    place = store / "bucket" / "run" / "checkpoints"
    assert sorted(p.name for p in place.iterdir()) == [f"{n:09d}" for n in (2, 4, 6, 7)]
    for path in (place / "000000007" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:5])
    said = []
    with opened(directory, said=said) as checkpoints:
        assert_same(restore(checkpoints).state, make_state(6))
    assert "moved to gs://bucket/run/checkpoints/damaged-000000007-0" in said[0]
    assert (place / "damaged-000000007-0" / "host").is_dir()


def test_what_is_not_complete_does_not_count_and_goes_but_nothing_foreign(directory, store):
    write(directory, 1, 2)
    place = store / "bucket" / "run" / "checkpoints"
    (place / "000000002" / "commit_success.txt").unlink()
    (place / "000000003" / "host").mkdir(parents=True)  # a save killed a moment after it began
    (place / "000000003" / "host" / "data.json").write_text("{")
    (place / "000000009").mkdir()
    (place / "000000009" / "mine.txt").write_text("mine")
    with opened(directory) as checkpoints:
        assert checkpoints.steps() == [1, 9]
        assert not (place / "000000002").exists() and not (place / "000000003").exists()
        assert_same(restore(checkpoints).state, make_state(1))
    (kept,) = place.glob("damaged-000000009-0/*")
    assert kept.read_text() == "mine"


def test_a_store_that_cannot_be_written_is_told_and_training_metrics_wait(store, monkeypatch):
    said, full = [], False
    whole = fake_store.Store.open

    def refused(self, path, mode):
        if full and "w" in mode:
            raise RuntimeError("403 Forbidden\nand more")
        return whole(self, path, mode)

    monkeypatch.setattr(fake_store.Store, "open", refused)
    with workdir.claimed(config_for("gs://bucket/run")) as folder:
        with MetricWriter(folder, 0, said.append) as writer:
            writer.write("train", 1, {"loss": 1.0})
            assert read_history(folder) == []
            writer.flush()
            full = True
            writer.write("train", 2, {"loss": 2.0})
            writer.flush()
            assert [r["step"] for r in read_history(folder)] == [1]
            full = False
            writer.write("train", 3, {"loss": 3.0})
        assert [r["step"] for r in read_history(folder)] == [1, 2, 3]
        with MetricWriter(folder, 2, said.append):
            assert [r["step"] for r in read_history(folder)] == [1, 2]
    assert said == ["metrics wait in memory: gs://bucket/run/metrics.jsonl: 403 Forbidden"]
    full = True
    with pytest.raises(UsageError, match="cannot write to workdir gs://bucket/run: 403 Forbidden;"):
        with workdir.claimed(config_for("gs://bucket/run")):
            pass


# Orbax leaves coroutines and a closed loop behind when a save fails at its beginning.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_store_that_is_gone_for_a_while_costs_the_checkpoints_of_that_while(
    store, tmp_path, monkeypatch, capsys
):
    gone, at = False, fake_store.Store.at

    def maybe(self, path):
        if gone:
            raise ConnectionError("503 try again")
        return at(self, path)

    class Batches(example.Batches):
        def __next__(self):
            nonlocal gone
            gone = 10 <= self.index < 20
            return super().__next__()

    monkeypatch.setattr(fake_store.Store, "at", maybe)
    straight = run(config_for(tmp_path / "straight", eval_every=0))
    result = run(config_for("gs://bucket/run", eval_every=0), Batches(16))
    shown = capsys.readouterr().err
    # That of step 6 may still be under way when the store goes.
    assert shown.count("could not be written to gs://bucket/run/checkpoints") in (2, 3), shown
    assert "older ones, which cannot be listed now, are as they were; training goes on" in shown
    assert "metrics wait in memory: gs://bucket/run/metrics.jsonl: 503 try again" in shown
    assert_same(result.state, straight.state)
    assert without_times(result.history) == without_times(straight.history)
    with opened(folders.parse("gs://bucket/run/checkpoints")) as checkpoints:
        assert checkpoints.steps() == [24, 30]
    gc.collect()  # while what Orbax has left behind may warn


def test_weights_are_saved_and_loaded(store):
    weights.save("gs://bucket/w", {"a": jnp.arange(3.0)}, {}, {"file": "a.pkl"})
    np.testing.assert_array_equal(weights.load("gs://bucket/w")[0]["a"], [0, 1, 2])
    with pytest.raises(UsageError, match="gs://bucket/w has checkpoints already"):
        weights.save("gs://bucket/w", {}, {}, {})
    with pytest.raises(UsageError, match="no checkpoint in gs://bucket/none/checkpoints"):
        weights.load("gs://bucket/none")
