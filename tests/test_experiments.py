"""Every experiment in its real configuration, shrunk: it runs, reports, resumes bit for bit."""

import dataclasses
import functools
import json
import math
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from deq_jax.training import Interrupted, train
from deq_jax.training.parallel import make_mesh
from deq_jax.training.task import init
from experiments.common import run as common_run
from experiments.image_classification import data as image_data
from experiments.image_classification import main as image_main
from experiments.image_classification import presets as image_presets
from experiments.image_classification import task as image_task
from experiments.spirals import main as spirals_main
from experiments.toy_regression import config as toy_config
from experiments.toy_regression import main as toy_main
from experiments.toy_regression import task as toy_task

pytestmark = pytest.mark.slow


def shrink(config, workdir, **parts):
    """The preset with few steps, one of them warm-up, and all its other settings."""
    train_part = dataclasses.replace(
        config.train,
        steps=4,
        warmup_steps=min(1, config.train.warmup_steps),
        warmup_layers=2,
        batch_size=16,
        log_every=1,
        eval_every=2,
        checkpoint_every=2,
    )
    return dataclasses.replace(config, workdir=str(workdir), train=train_part, **parts)


def digits(workdir, **parts):
    preset = image_presets.PRESETS["digits"]
    model = dataclasses.replace(
        preset.model, channels=(4, 4), groups=2, expansion=1, head=(2, 2), final=8
    )
    return shrink(preset, workdir, model=model, **parts)


def toy(workdir, **parts):
    preset = toy_config.PRESETS["paper"]
    data = dataclasses.replace(preset.data, train_pairs=64, test_pairs=40)
    return shrink(preset, workdir, data=data, gammas=(0.0, 2.0), **parts)


@pytest.fixture
def two_devices(monkeypatch):
    """As many as main.py asks for."""
    mesh = make_mesh(jax.devices()[:2])
    monkeypatch.setattr(common_run, "make_mesh", lambda: mesh)
    return mesh


def test_digits_trains_both_models_and_reports(tmp_path, capsys, two_devices):
    config = digits(tmp_path / "run")  # the warm-up phase is another test's
    train_part = dataclasses.replace(config.train, warmup_steps=0)
    trained = image_main.run(dataclasses.replace(config, train=train_part))
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
    passes = image_data.open_data(config).eval
    assert sum(batch["mask"].sum() for batch in passes()) == 360


def test_toy_regression_draws_its_map_and_table(tmp_path, capsys, two_devices):
    toy_main.run(toy(tmp_path / "run"))
    table = capsys.readouterr().out
    assert "| 0 " in table and "| 2 " in table and "penalty" in table
    assert (tmp_path / "run" / "fixed_point_map.png").stat().st_size > 10_000


def test_spirals_are_separated(tmp_path, capsys, two_devices):
    """The experiment that is one file, shortened."""
    preset = spirals_main.PRESETS["spirals"]
    part = dataclasses.replace(preset.train, steps=600, log_every=200, eval_every=0)
    solver = dataclasses.replace(preset.solver, max_steps=8)
    config = dataclasses.replace(
        preset, workdir=str(tmp_path / "run"), train=part, turns=0.8, solver=solver
    )
    trained = spirals_main.run(config)
    assert "| accuracy at 30 steps" in capsys.readouterr().out
    assert trained["jr"].result.evaluation[30]["accuracy"] > 0.9
    assert (tmp_path / "run" / "boundary.png").stat().st_size > 10_000
    lines = Path(spirals_main.__file__).read_text().splitlines()
    assert len(lines) <= 150


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
    make, module = {"digits": (digits, image_data), "toy": (toy, toy_task)}[which]
    mesh = two_devices

    def run(folder, interrupt):
        config = make(tmp_path / folder)
        config = dataclasses.replace(config, jac=dataclasses.replace(config.jac, gamma=2.0))
        if which == "digits":
            # With masks, which must come back the same too; one branch, which compiles faster.
            model = dataclasses.replace(config.model, dropout=0.2, channels=(4,), head=(2,))
            config = dataclasses.replace(config, model=model)
        kind = image_task if which == "digits" else toy_task
        data = module.open_data(config).train
        data = StopAfter(data, 2) if interrupt else data
        return train(kind.build_task(config, mesh), config, data, mesh=mesh).state

    straight = run("straight", False)
    with pytest.raises(Interrupted, match="after step 3 of 4"):
        run("broken", True)
    resumed = run("broken", False)
    for a, b in zip(jax.tree.leaves(straight), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("presets", [image_presets.PRESETS, toy_config.PRESETS])
def test_presets_are_valid_and_say_where_they_write(presets):
    for name, config in presets.items():
        assert config.workdir.startswith("runs/"), name
        assert config.build_eval_solver().max_steps >= max(config.eval_budgets)


# Name -> parameters in millions and training steps, both from the published settings.
PUBLISHED = {
    "cifar10_tiny": (0.17, 50 * 781),
    "cifar10_large": (10, 220 * 1562),
    "cifar10_large_jr": (10, 220 * 520),
    "cifar10_resnet18": (11, 220 * 520),
    "imagenet_small": (18, 100 * 10_009),
    "imagenet_small_jr": (18, 100 * 10_009),
    "imagenet_large_jr": (63, 100 * 10_009),
    "imagenet_xl": (81, 100 * 10_009),
    "imagenet_resnet50": (26, 100 * 5004),
    "imagenet_resnet101": (45, 100 * 5004),
}


def parameters(config):
    task = image_task.build_task(config, make_mesh(jax.devices()[:1]))
    params, _ = jax.eval_shape(functools.partial(init, task), jax.random.key(0))
    return sum(math.prod(a.shape) for a in jax.tree.leaves(params))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    config = image_presets.PRESETS[name]
    assert config.workdir == f"runs/{name}"
    millions, steps = PUBLISHED[name]
    assert config.train.steps == steps
    assert parameters(config) / 1e6 == pytest.approx(millions, rel=0.12)


def test_a_resnet_may_be_as_small_as_the_model_it_is_compared_with():
    preset = image_presets.PRESETS["cifar10_resnet18"]
    model = dataclasses.replace(preset.model, width=13)
    assert parameters(dataclasses.replace(preset, model=model)) == pytest.approx(454e3, rel=0.05)


def test_an_explicit_rival_trains_in_the_same_loop(tmp_path, capsys, two_devices):
    preset = image_presets.PRESETS["cifar10_resnet18"]
    data = image_presets.PRESETS["digits"].data
    config = shrink(preset, tmp_path / "run", data=data)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, warmup_steps=0))
    trained = image_main.run(config)["model"].result
    table = capsys.readouterr().out
    assert "| accuracy " in table and "images per second" in table and "steps to" not in table
    assert (tmp_path / "run" / "results.png").stat().st_size > 10_000
    assert all("fwd_steps" not in record for record in trained.history)


def test_what_does_not_fit_is_refused_before_anything_is_built():
    preset = image_presets.PRESETS["digits"]
    with pytest.raises(ValueError, match=r"data.size must be a multiple of 2 .* got \(9, 9\)"):
        dataclasses.replace(preset, data=dataclasses.replace(preset.data, size=9))
    with pytest.raises(ValueError, match="head must be one width for each of the 2 branches"):
        dataclasses.replace(preset.model, head=(2,))
    with pytest.raises(ValueError, match="jac.gamma must be 0 for resnet18"):
        dataclasses.replace(
            preset, compare=False, model=dataclasses.replace(preset.model, name="resnet18")
        )
    with pytest.raises(ValueError, match="jac.gamma must be above 0 for --compare"):
        dataclasses.replace(preset, jac=dataclasses.replace(preset.jac, gamma=0.0))
