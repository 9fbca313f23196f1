"""Every experiment in its real configuration, shrunk: it runs, reports, resumes bit for bit."""

import dataclasses
import json
import signal

import jax
import numpy as np
import pytest

from deq_jax.training import Interrupted, train
from deq_jax.training.parallel import make_mesh
from experiments.image_classification import config as image_config
from experiments.image_classification import main as image_main
from experiments.image_classification import task as image_task
from experiments.toy_regression import config as toy_config
from experiments.toy_regression import main as toy_main
from experiments.toy_regression import task as toy_task

pytestmark = pytest.mark.slow


def shrink(config, workdir, **parts):
    """The preset with few steps, one of them warm-up, and all its other settings."""
    train_part = dataclasses.replace(
        config.train,
        steps=4,
        warmup_steps=1,
        warmup_layers=2,
        batch_size=16,
        log_every=1,
        eval_every=2,
        checkpoint_every=2,
    )
    return dataclasses.replace(config, workdir=str(workdir), train=train_part, **parts)


def digits(workdir, **parts):
    preset = image_config.PRESETS["digits"]
    model = dataclasses.replace(preset.model, channels=8)
    return shrink(preset, workdir, model=model, **parts)


def toy(workdir, **parts):
    preset = toy_config.PRESETS["paper"]
    data = dataclasses.replace(preset.data, train_pairs=64, test_pairs=40)
    return shrink(preset, workdir, data=data, gammas=(0.0, 2.0), **parts)


@pytest.fixture
def two_devices(monkeypatch):
    """As many as main.py asks for."""
    mesh = make_mesh(jax.devices()[:2])
    for module in (image_main, toy_main):
        monkeypatch.setattr(module, "make_mesh", lambda: mesh)
    return mesh


def test_digits_trains_both_models_and_reports(tmp_path, capsys, two_devices):
    trained = image_main.run(digits(tmp_path / "run"))
    table = capsys.readouterr().out
    assert set(trained) == {"no_jr", "jr"}
    for budget in (1, 2, 3, 4, 6, 8, 12):
        assert f"| accuracy at {budget} step" in table
    for row in ("steps to", "spectral radius", "penalty", "seconds per training step"):
        assert row in table
    assert (tmp_path / "run" / "results.md").read_text() in table
    numbers = json.loads((tmp_path / "run" / "results.json").read_text())
    assert numbers["jr"]["converged_accuracy"] == pytest.approx(
        trained["jr"].result.evaluation[30]["accuracy"]
    )
    assert (tmp_path / "run" / "results.png").stat().st_size > 10_000
    assert list((tmp_path / "run" / "jr").glob("events.out.tfevents.*"))
    kinds = [record["kind"] for record in trained["jr"].result.history]
    assert kinds.count("train") == 4 and "eval" in kinds
    # The penalty was drawn, and only in the model that has one.
    assert all("penalty" not in r for r in trained["no_jr"].result.history if r["kind"] == "train")
    assert any("penalty" in r for r in trained["jr"].result.history if r["kind"] == "train")


def test_digits_test_set_is_counted_once(tmp_path):
    config = digits(tmp_path)
    _, passes = image_task.build_data(config)
    assert sum(batch["mask"].sum() for batch in passes()) == 360


def test_toy_regression_draws_its_map_and_table(tmp_path, capsys, two_devices):
    toy_main.run(toy(tmp_path / "run"))
    table = capsys.readouterr().out
    assert "| 0 " in table and "| 2 " in table and "penalty" in table
    assert (tmp_path / "run" / "fixed_point_map.png").stat().st_size > 10_000


class StopAfter:
    """A data iterator that asks the process to stop before a given batch, as a scheduler would."""

    def __init__(self, inner, count):
        self.inner, self.left = inner, count

    def __next__(self):
        if self.left == 0:
            signal.raise_signal(signal.SIGTERM)
        self.left -= 1
        return next(self.inner)

    def get_state(self):
        return self.inner.get_state()

    def set_state(self, state):
        self.inner.set_state(state)


@pytest.mark.parametrize("which", ["digits", "toy"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, which, two_devices):
    make, module = {"digits": (digits, image_task), "toy": (toy, toy_task)}[which]
    mesh = two_devices

    def run(folder, interrupt):
        config = make(tmp_path / folder)
        config = dataclasses.replace(config, jac=dataclasses.replace(config.jac, gamma=2.0))
        kind = image_task.ImageTask if which == "digits" else toy_task.ToyTask
        data, _ = module.build_data(config)
        data = StopAfter(data, 2) if interrupt else data
        return train(kind(config, mesh), config, data, mesh=mesh).state

    straight = run("straight", False)
    with pytest.raises(Interrupted, match="after step 3 of 4"):
        run("broken", True)
    resumed = run("broken", False)
    for a, b in zip(jax.tree.leaves(straight), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("presets", [image_config.PRESETS, toy_config.PRESETS])
def test_presets_are_valid_and_say_where_they_write(presets):
    for name, config in presets.items():
        assert config.workdir.startswith("runs/"), name
        assert config.build_solver().max_steps >= max(config.eval_budgets)
