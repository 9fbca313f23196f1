"""The loop: resuming, evaluation, requests to stop, and what it refuses."""

import dataclasses
import json
import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training_example as example

from deq_jax.training import (
    Config,
    EvalConfig,
    Evaluator,
    Interrupted,
    OptimConfig,
    TrainConfig,
    UsageError,
    make_train_step,
    metrics,
    parallel,
    read_history,
    train,
    workdir,
)
from deq_jax.training.evaluation import make_eval_step
from deq_jax.training.optim import make_optimizer
from deq_jax.training.parallel import place
from deq_jax.training.state import create_state

TINY = example.PRESETS["tiny"]


def config_for(path, **train_settings):
    settings = dataclasses.replace(TINY.train, **train_settings)
    return dataclasses.replace(TINY, workdir=str(path), train=settings)


def run(config, data=None, eval_data=example.eval_batches, devices=1):
    mesh = parallel.make_mesh(jax.devices()[:devices])
    data = data or example.Batches(config.train.batch_size)
    return train(example.Regression(config), config, data, eval_data, mesh=mesh)


def without_times(history):
    return [{k: v for k, v in record.items() if k != "steps_per_second"} for record in history]


def assert_same(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return run(config_for(tmp_path_factory.mktemp("straight") / "run"))


def test_a_run_writes_down_all_that_it_did(straight, tmp_path_factory):
    history = straight.history
    assert [r["step"] for r in history if r["kind"] == "train"] == [7, 14, 21, 28, 30]
    evaluations = [(r["step"], r["budget"]) for r in history if r["kind"] == "eval"]
    assert evaluations == [(10, 8), (20, 8), (30, 2), (30, 8), (30, 12)]
    first = history[0]
    assert first["gamma"] == pytest.approx(0.5 * 3 / 7)  # 4 steps of warm-up, 3 after it
    assert {"loss", "squared_error", "penalty", "bwd_steps", "lr", "grad_norm"} <= first.keys()
    assert straight.evaluation == {
        r["budget"]: {k: v for k, v in r.items() if k not in ("kind", "step", "budget")}
        for r in history[-3:]
    }
    main = straight.evaluation[TINY.eval_steps]
    assert {"spectral_radius", "penalty"} <= main.keys()
    assert straight.evaluation[2]["fwd_steps"] == 2
    assert straight.evaluation[2]["loss"] != straight.evaluation[12]["loss"]
    assert float(straight.state.extra["seen"]["total"]) == 30 * 16


@pytest.mark.slow
@pytest.mark.parametrize("at", [3, 12, 29])
def test_a_run_stopped_by_a_signal_resumes_exactly(straight, tmp_path, at, capsys):
    config = config_for(tmp_path / "run")
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as request:
        run(config, example.Batches(16, die_at=at, die_by=signal.SIGTERM))
    assert request.value.signal_number == signal.SIGTERM
    assert f"SIGTERM after step {at + 1} of 30; run the same command again" in str(request.value)
    assert signal.getsignal(signal.SIGTERM) is handler
    result = run(config)
    assert f"at step {at + 1}" in capsys.readouterr().err
    assert_same(result.state, straight.state)
    assert without_times(result.history) == without_times(straight.history)


def test_a_run_may_resume_with_another_rhythm_but_no_other_training(straight, tmp_path):
    config = config_for(tmp_path / "run")
    with pytest.raises(Interrupted):
        run(config, example.Batches(16, die_at=9, die_by=signal.SIGINT))
    other = dataclasses.replace(config, optim=OptimConfig(lr=0.5))
    before = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(UsageError) as error:
        run(other)
    assert "workdir" in str(error.value)
    assert "optim.lr: 0.001 there, 0.5 now" in str(error.value)
    assert (tmp_path / "run" / "config.json").read_text() == before
    rhythm = config_for(tmp_path / "run", log_every=3, checkpoint_every=100, eval_every=0)
    measured = EvalConfig(budgets=(5, 40), spectral_batches=2, spectral_iters=30)
    rhythm = dataclasses.replace(rhythm, eval=measured)
    result = run(rhythm)
    assert_same(result.state, straight.state)
    assert result.evaluation.keys() == {5, 8, 40}


def test_a_finished_run_is_only_evaluated_again(straight, tmp_path):
    config = config_for(tmp_path / "run")
    first = run(config)
    lines = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = run(config)
    assert again.evaluation == first.evaluation == straight.evaluation
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == lines


class Spoiled(example.Batches):
    """Gives batches with a NaN at some indices."""

    def __init__(self, *bad):
        super().__init__(16)
        self.bad = bad

    def __next__(self):
        batch = super().__next__()
        if self.index in self.bad:
            batch["y"][3] = np.nan
        return batch


def test_an_update_that_is_not_finite_is_left_out_counted_and_shown(tmp_path, capsys):
    result = run(config_for(tmp_path / "run", skip=2), Spoiled(9, 17, 18))
    shown = capsys.readouterr().err
    for step in (9, 17, 18):
        assert f"step {step}: loss or gradient is not finite, no update was made" in shown
    assert "updates left out 14%" in shown
    logged = {r["step"]: r for r in result.history if r["kind"] == "train"}
    assert [round(7 * logged[s]["skipped"]) for s in (7, 14, 21, 28)] == [0, 1, 2, 0]
    assert all(np.isfinite(r["loss"]) for r in logged.values())
    assert int(result.state.step) == 30
    assert (
        float(result.state.extra["seen"]["total"]) == 27 * 16
    )  # nothing at all is taken from them
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.state))


def test_a_skipped_update_leaves_the_state_as_it_was():
    mesh = parallel.make_mesh(jax.devices()[:1])
    task, optimizer = example.Regression(TINY), make_optimizer(TINY.optim, 30)
    state = create_state(task, optimizer, 0, mesh)
    before = jax.device_get(state)
    step = make_train_step(task, TINY, optimizer, mesh)
    state, measured = step(state, place(next(Spoiled(1)), mesh))
    assert_same(jax.device_get(state), before.replace(step=before.step + 1))
    measured = jax.device_get(measured)
    assert measured.pop("skipped").total == 1
    assert all(mean.count == 0 for mean in measured.values())


def test_too_many_in_a_row_stop_the_run_and_spare_the_checkpoint(tmp_path, capsys):
    config, data = config_for(tmp_path / "run", skip=3), Spoiled(9, 17, 18, 19, 20, 21)
    with pytest.raises(UsageError) as error:
        run(config, data)
    for words in ("at steps 17 to 20: more than train.skip = 3", "checkpoint of step 18 is good"):
        assert words in str(error.value)
    with pytest.raises(UsageError, match="at steps 17 to 20"):  # counted on from the checkpoint
        run(config, Spoiled(9, 17, 18, 19, 20, 21))
    assert "resuming" in capsys.readouterr().err
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["000000012", "000000018"]
    with pytest.raises(UsageError, match=r"at step 9: more than train.skip = 0"):
        run(config_for(tmp_path / "strict", skip=0), Spoiled(9))


def test_solves_that_diverge_are_shown_and_do_no_harm(tmp_path, capsys):
    config = config_for(tmp_path / "run", warmup_steps=0)
    mesh = parallel.make_mesh(jax.devices()[:1])
    result = train(
        example.Regression(config, gain=30.0),
        config,
        example.Batches(16),
        example.eval_batches,
        mesh=mesh,
    )
    shown = capsys.readouterr().err
    assert "unconverged 100%" in shown
    assert result.evaluation[8]["unconverged"] > 0.9
    assert result.evaluation[8]["fwd_steps"] > 7.9  # the whole budget
    assert result.evaluation[8]["fwd_residual"] < 2  # of the best iterate
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.state))


def test_all_budgets_share_one_compilation():
    mesh = parallel.make_mesh()
    task = example.Regression(TINY)
    state = create_state(task, make_optimizer(TINY.optim, 10), 0, mesh)
    step = make_eval_step(task, TINY, mesh)
    steps = {}
    for budget in (1, 5, 12):
        measured, _ = jax.device_get(
            step(state, place(example.make_batch(0, 16), mesh), jnp.int32(budget))
        )
        steps[budget] = metrics.compute(measured)["fwd_steps"]
    assert steps[1] == 1 < steps[5] <= 5 < steps[12] <= 12
    assert step._cache_size() == 1


def test_every_example_is_evaluated_once(straight):
    """Batches of 16 with 5 padded examples, and one batch of the 27 real ones."""
    mesh = parallel.make_mesh(jax.devices()[:1])

    def whole():
        first, second = example.eval_batches()
        return [{k: np.concatenate([first[k], second[k][:11]]) for k in first}]

    config = dataclasses.replace(TINY, eval=EvalConfig(budgets=(3,)))
    task = example.Regression(config)
    state = jax.device_put(straight.state, parallel.replicated(mesh))
    split = Evaluator(task, config, example.eval_batches, mesh=mesh)(state)
    joined = Evaluator(task, config, whole, mesh=mesh)(state)
    for budget in (3, 8):
        assert split[budget] == pytest.approx(joined[budget], rel=1e-4)


def test_numbers_can_be_summarised_in_a_tasks_own_way(straight):
    def summarize(sums):
        return {"rmse": float(np.sqrt(sums["squared_error"].total / sums["squared_error"].count))}

    config = dataclasses.replace(TINY, eval=EvalConfig())
    mesh = parallel.make_mesh(jax.devices()[:1])
    task = example.Regression(config, summarize=summarize)
    got = Evaluator(task, config, example.eval_batches, mesh=mesh)(straight.state)
    assert got[8]["rmse"] ** 2 == pytest.approx(straight.evaluation[8]["squared_error"])


class Finite(example.Batches):
    """Ends after four batches."""

    def __next__(self):
        if self.index == 4:
            raise StopIteration
        return super().__next__()


class Bare(example.Batches):
    """Has no mask."""

    def __next__(self):
        return {"x": super().__next__()["x"]}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (example.Batches(15), ["batch of 15 examples for 2 devices", "another batch size"]),
        (example.Batches(0), ["batch of 0 examples"]),
        (Finite(16), ["data ended at step 4 of 30", "repeat the data"]),
        (Bare(16), ['wanted "mask"']),
    ],
)
def test_unfit_data_is_refused(tmp_path, data, words):
    with pytest.raises(UsageError) as error:
        run(config_for(tmp_path / "run"), data, None, devices=2)
    for word in words:
        assert word in str(error.value)


def test_a_workdir_that_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="choose another with --workdir"):
        with workdir.claimed(Config(workdir=str(tmp_path / "file" / "run"))):
            pass
    (tmp_path / "config.json").write_text("[1, 2")
    with pytest.raises(UsageError, match="is not the configuration of a run"):
        with workdir.claimed(Config(workdir=str(tmp_path))):
            pass
    assert (tmp_path / "config.json").read_text() == "[1, 2"


def test_where_the_system_has_no_locks_a_workdir_is_used_without(tmp_path, monkeypatch):
    """As on Windows."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with workdir.claimed(config_for(tmp_path / "run")) as folder:
        assert (folder / "config.json").exists()


def test_a_full_disk_during_training_delays_checkpoints_only(
    straight, tmp_path, monkeypatch, capsys
):
    from orbax.checkpoint import v1 as ocp

    save, calls = ocp.save_checkpointables_async, []

    def full_at_first(path, checkpointables):
        calls.append(path)
        if len(calls) <= 2:
            raise OSError(28, os.strerror(28))
        return save(path, checkpointables)

    monkeypatch.setattr(ocp, "save_checkpointables_async", full_at_first)
    result = run(config_for(tmp_path / "run"))
    shown = capsys.readouterr().err
    assert shown.count("the disk is full; there is no older one; training goes on") == 2
    assert_same(result.state, straight.state)
    calls.clear()
    with pytest.raises(UsageError, match="checkpoint of step 30 could not be written"):
        run(config_for(tmp_path / "other", checkpoint_every=1000))


def test_config_json_holds_the_whole_configuration(tmp_path):
    with workdir.claimed(config_for(tmp_path / "run")):
        pass
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["solver"]["max_steps"] == 8
    assert saved["train"] == dataclasses.asdict(TINY.train)
    assert read_history(tmp_path / "run") == []
    assert TrainConfig(**saved["train"]) == TINY.train


class Recorder:
    def __init__(self):
        self.lines = []

    def write(self, kind, step, values, *, budget=None):
        self.lines.append({"kind": kind, "step": step, "budget": budget, **values})


def test_a_run_takes_writers_callbacks_and_an_optimizer(tmp_path):
    config = config_for(tmp_path / "run", steps=8, log_every=4, eval_every=4)
    recorder, called = Recorder(), []
    result = train(
        example.Regression(config),
        config,
        example.Batches(16),
        example.eval_batches,
        mesh=parallel.make_mesh(jax.devices()[:1]),
        optimizer=optax.sgd(0.0),
        writers=[recorder],
        callbacks=[lambda *event: called.append((event[0], int(event[1].step), event[2]))],
    )
    written = [{k: v for k, v in line.items() if v is not None} for line in recorder.lines]
    assert written == result.history
    assert all("lr" not in line for line in written)
    assert [(step, now) for step, now, _ in called] == [(k, k) for k in range(1, 9)]
    assert [evaluation is not None for *_, evaluation in called] == [
        k in (4, 8) for k in range(1, 9)
    ]
    assert called[-1][-1] == result.evaluation
    start = create_state(
        example.Regression(config), optax.sgd(0.0), 0, parallel.make_mesh(jax.devices()[:1])
    )
    assert_same(result.state.params, start.params)


def test_some_steps_are_profiled(tmp_path, capsys):
    config = dataclasses.replace(config_for(tmp_path / "run", steps=6), profile="2:3")
    run(config, eval_data=None)
    assert "trace of the steps 2 to 4: " in capsys.readouterr().err
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    for wrong in ("2", "2:0", "a:b"):
        with pytest.raises(ValueError, match="profile must be START:COUNT"):
            dataclasses.replace(config, profile=wrong)


def test_an_evaluation_reads_its_batches_once_for_all_budgets(straight):
    passes = []

    def batches():
        passes.append(0)
        for batch in example.eval_batches():
            passes[-1] += 1
            yield batch

    mesh = parallel.make_mesh(jax.devices()[:1])
    evaluator = Evaluator(example.Regression(TINY), TINY, batches, mesh=mesh)
    found = evaluator(straight.state)
    assert passes == [2]
    for budget, values in found.items():
        assert values == pytest.approx(straight.evaluation[budget], rel=1e-5)
    assert evaluator(straight.state, budgets=(2,)).keys() == {2}
    with pytest.raises(ValueError, match="got no batch from eval_data"):
        evaluator(straight.state, lambda: [])
