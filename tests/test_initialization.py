"""Initial weights: matrices against their predictions, and the grid of trained models."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags as absl_flags

import deq_jax as deq
from deq_jax.training import Diverged, TrainResult, UsageError, fields, flags
from deq_jax.training.optim import make_optimizer
from deq_jax.training.parallel import make_mesh
from deq_jax.training.state import create_state
from deq_jax.training.step import make_update
from experiments.common import families
from experiments.initialization import data, main, models, report, theory, verdict
from experiments.initialization.config import FAMILIES, PRESETS, SweepConfig, TheoryConfig
from experiments.initialization.sweep import Sweep

DIGITS = PRESETS["digits"]


def shrink(**parts):
    """A grid of 2 scales and 2 seeds, one of which cannot be solved."""
    sweep = dataclasses.replace(DIGITS.sweep, scales=(0.5, 4.0), seeds=2, together=2, rise=1.5)
    small = {
        "mode": "sweep",
        "sweep": sweep,
        "model": dataclasses.replace(DIGITS.model, width=16),
        "train": dataclasses.replace(DIGITS.train, steps=4, log_every=2, batch_size=16),
        "solver": dataclasses.replace(DIGITS.solver, max_steps=12),
    }
    return dataclasses.replace(DIGITS, **small | parts)


@pytest.mark.slow
def test_matrices_are_as_predicted_within_their_error_bars():
    config = TheoryConfig(sizes=(512,), fractions=(0.3, 0.7), seeds=4, inputs=4)
    records = theory.measure(config)
    assert len(records) == 6
    for record in records:
        family, scale = record["family"], record["scale"]
        predicted = dict(
            zip(
                ("L1", "L2", "radius", "norm"),
                deq.init.predicted_gain(family, scale) + deq.init.predicted_norms(family, scale),
                strict=True,
            )
        )
        for name, wanted in predicted.items():
            values = np.array(record[name])
            # The limit N = infinity is left by terms in 1 / N, for eigenvalues in N^(-1/2).
            slack = 3 * values.std(ddof=1) + wanted * (6 / 512 if name[0] == "L" else 512**-0.5)
            assert abs(values.mean() - wanted) < slack, (record["family"], scale, name)
        assert np.mean(record["gain"]) == pytest.approx(predicted["L1"], rel=0.15)
        steps = theory.predicted_picard(family, scale, config.tol)
        assert np.mean(record["picard_steps"]) == pytest.approx(steps, abs=1.5)
        for name in theory.SOLVERS:
            assert np.mean(record[f"{name}_solved"]) == 1
        assert np.mean(record["anderson_steps"]) <= np.mean(record["picard_steps"])


@pytest.mark.parametrize("family", FAMILIES)
def test_matrix_numbers_against_eigenvalues(family):
    """Gelfand's formula and the gains, computed another way."""
    unit = {"gaussian": deq.init.gaussian, "orthogonal": deq.init.orthogonal, "goe": deq.init.goe}
    w = np.asarray(unit[family](0.4)(jax.random.key(1), (60, 60)), np.float64)
    wanted = np.abs(np.linalg.eigvals(w)).max()
    assert theory.spectral_radius(w) == pytest.approx(wanted, rel=1e-3)
    singular = np.linalg.svd(np.eye(60) - w, compute_uv=False)
    expected = ((singular**-2.0).mean(), (singular**-4.0).mean())
    assert theory.gains(w) == pytest.approx(expected, rel=1e-9)


def test_a_nilpotent_matrix_has_radius_zero():
    assert theory.spectral_radius(np.array([[0.0, 3.0], [0.0, 0.0]])) == 0


def test_theory_writes_its_files(tmp_path, capsys):
    part = TheoryConfig(sizes=(24,), fractions=(0.3, 0.5, 0.9), seeds=2, max_steps=50)
    main.run(dataclasses.replace(DIGITS, workdir=str(tmp_path), theory=part))
    shown, folder = capsys.readouterr(), tmp_path / "theory"
    assert "| orthogonal |" in shown.out and "N = 24  goe" in shown.err
    assert (folder / "results.md").read_text() in shown.out
    records = json.loads((folder / "results.json").read_text())["records"]
    assert len(records) == 9 and all(len(r["L1"]) == 2 for r in records)
    assert records[0]["predicted_L1"] == pytest.approx(1 / (1 - 0.09))
    assert (folder / "theory.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_grid_is_diagnosed_before_training(tmp_path, capsys):
    config = shrink(workdir=str(tmp_path / "run"), diagnose=True)
    sweep = dataclasses.replace(config.sweep, families=("orthogonal",), scales=(0.5, 4.0))
    main.run(dataclasses.replace(config, sweep=sweep))
    shown = capsys.readouterr()
    assert "16 examples of digits" in shown.out and "orthogonal 4\n" in shown.err
    small, large = (r.split("|")[1:-1] for r in re.findall(r"^\| orth.*", shown.out, re.MULTILINE))
    assert small[-1].strip() == "100%" and large[5].strip() == "0%"  # the last; plain iteration
    assert float(small[2]) < 0.5 < 1 < float(large[2])
    assert "orthogonal 0.5:\n- All is well" in shown.out and "plain iteration" in shown.out
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A small sweep through main.run: its folder, and what was shown."""
    folder, shown = tmp_path_factory.mktemp("sweep"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main.reporting, "show", shown.append)
        made = []
        patch.setattr(main, "Sweep", lambda config: made.append(Sweep(config)) or made[0])
        main.run(shrink(workdir=str(folder)))
    return folder / "sweep", shown[0], made[0]


@pytest.mark.slow
def test_a_sweep_runs_and_writes_its_files(swept):
    folder, shown, _ = swept
    assert shown == (folder / "results.md").read_text()
    assert (folder / "sweep.png").stat().st_size > 10_000
    numbers = json.loads((folder / "results.json").read_text())
    for family in FAMILIES:
        assert f"| {family} " in shown
        cells = numbers[family]["cells"]
        assert [(c["scale"], c["seed"]) for c in cells] == [(0.5, 0), (0.5, 1), (4, 0), (4, 1)]
        assert all(np.isfinite(c["end"]["loss"]) for c in cells)
        # Twelve steps solve the small scale but not the large one, which is said so.
        assert [c["start"]["solved"] > 0.9 for c in cells] == [True, True, False, False]
        assert [c["cause"] for c in cells[2:]] == ["solver", "solver"]
        assert [c["diverged"] for c in cells] == [0, 0, 1, 1]
        assert not any(c["trained"] for c in cells[2:])
        assert cells[0]["training"]["fwd_steps"] < 12 and cells[0]["skipped"] == 0
        assert cells[2]["start"]["radius"] > 1 > cells[0]["start"]["radius"]


@pytest.mark.slow
def test_one_program_trains_all_families(swept):
    _, shown, sweep = swept
    assert {n: p.compiled for n, p in sweep.programs.items()} == {
        "initial weights": 3,
        "training": 1,
        "evaluation": 1,
    }
    assert "1 for training" in shown


@pytest.mark.slow
def test_a_cell_is_a_plain_run_of_the_training_step(swept):
    """One scale and seed alone: the state of `create_state`, the step of `make_update`."""
    _, _, sweep = swept
    config, family = sweep.config, "goe"
    trained = sweep.run(family)
    optimizer = make_optimizer(config.optim, config.train.steps)

    def scaled(*shape):
        return 0.5 * families.FAMILIES[family](1.0)(*shape)

    task = dataclasses.replace(sweep.task, model=sweep.task.model.clone(kernel_init=scaled))
    state = create_state(task, optimizer, 1, make_mesh(jax.devices()[:1]))
    update = jax.jit(make_update(task, config, optimizer))
    places = data.order(1437, 16, 4, seed=0)
    for k in range(4):
        state, measured = update(state, sweep.train_set.batch(places[k]))
        for name in ("loss", "grad_norm", "fwd_steps"):
            alone = float(measured[name].total / measured[name].count)
            assert trained.history[name][1, k] == pytest.approx(alone, rel=1e-4), (name, k)


def test_scale_multiplies_the_same_draw():
    sweep = Sweep(shrink())
    for family in FAMILIES:
        small, large = (sweep.start(s, 0, family).params for s in (0.5, 1.5))
        kernel = [p["equilibrium"]["f"]["kernel"] for p in (small, large)]
        np.testing.assert_allclose(3 * kernel[0], kernel[1], rtol=1e-6)
        assert float(jnp.var(kernel[1]) * 16) == pytest.approx(2.25, rel=0.35)
        np.testing.assert_array_equal(small["encoder"]["kernel"], large["encoder"]["kernel"])


def test_every_kind_of_divergence_is_found():
    config = SweepConfig(rise=2.0, unsolved=0.5)
    loss = np.ones((5, 30))
    loss[1, 12:] = 4.0  # the 10-step mean passes 2 with the fourth of these
    loss[2, 7] = np.nan
    loss[4, 3], loss[4, 10:] = 5.0, 0.5  # one bad batch is no divergence
    skipped, unconverged = np.isnan(loss).astype(float), np.zeros((5, 30))
    unconverged[3, 20:] = 0.6
    history = {"loss": loss, "skipped": skipped, "unconverged": unconverged}
    steps, causes = verdict.first_divergence(config, history)
    assert steps.tolist() == [0, 16, 8, 21, 0]
    assert causes.tolist() == ["", "loss", "update", "solver", ""]


def test_widths_count_scales_and_octaves():
    config = SweepConfig(scales=(0.5, 1.0, 2.0, 4.0), seeds=2)
    chosen = np.array([[1, 1], [1, 1], [1, 0], [0, 0]], bool)
    number, range_ = verdict.widths(config, chosen)
    assert number.tolist() == [3, 2] and range_.tolist() == [3, 2]


def test_batches_hold_every_example_once_before_any_again():
    places = data.order(10, 4, 5, seed=3)
    assert sorted(places.ravel()[:10]) == sorted(places.ravel()[10:]) == list(range(10))
    assert (places != data.order(10, 4, 5, seed=4)).any()


def test_pixels_are_standardised_and_padding_is_marked():
    train, test, classes = data.build_data(dataclasses.replace(DIGITS.data, eval_batch_size=100))
    assert (train.x.shape, test.x.shape, classes) == ((1437, 64), (400, 64), 10)
    assert float(train.x.mean()) == pytest.approx(0, abs=1e-4)
    assert float(train.x.std()) == pytest.approx(1, abs=1e-4)
    assert float(test.mask.sum()) == 360 and float(test.mask[360:].sum()) == 0


BAD = [
    ("--mode=sweeps", "expected one of theory|sweep.*did you mean sweep"),
    ("--model.activation=gelu", "expected one of tanh|relu"),
    ("--sweep.families=wigner", "families must be some of"),
    ("--sweep.scales=2,1", "scales must be rising numbers above 0"),
    ("--sweep.seeds=1", "seeds must be at least 2, for a deviation"),
    ("--theory.fractions=0.5,1", "fractions must be rising numbers above 0 and below 1"),
    ("--train.steps=150", "train.steps must be a multiple of train.log_every = 100"),
    ("--train.warmup_steps=5", "train.warmup_steps must be 0 here"),
    ("--init_from=x", "init_from must be empty here"),
    ("--swep.seeds=3", "unknown flag --swep.seeds; did you mean sweep.seeds"),
]


@pytest.mark.parametrize(("flag", "words"), BAD)
def test_bad_flags_are_refused_in_words(flag, words):
    values = absl_flags.FlagValues()
    flags.define("digits", DIGITS, PRESETS, values)
    with pytest.raises(UsageError, match=words.replace("|", r"\|")):
        flags.parse_config(DIGITS, ["program", flag], values)


def test_a_folder_of_another_configuration_and_missing_data_are_refused(tmp_path):
    (tmp_path / "theory").mkdir()
    (tmp_path / "theory" / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="holds a run of another configuration"):
        main.run(dataclasses.replace(DIGITS, workdir=str(tmp_path)))
    mnist = PRESETS["mnist"]
    absent = dataclasses.replace(mnist.data, dir=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="mnist"):
        main.run(dataclasses.replace(mnist, mode="sweep", data=absent, workdir=str(tmp_path)))
    assert not (tmp_path / "sweep").exists()


@pytest.fixture
def shrunk(monkeypatch):
    """The presets of --mode=models, smaller."""
    short = models._short

    def shrink(config, steps):
        small = {"train.steps": 2, "train.log_every": 1, "train.checkpoint_every": 2}
        if "length" in vars(config.data):
            small |= {"model.features": 8, "model.heads": 2, "model.hidden": 16, "model.memory": 4}
            small |= {"data.length": 4, "data.eval_length": 4, "data.watched": 60}
            small |= {"data.eval_memory": 4, "data.cache": "none"}
        return fields.replace(short(config, steps), small | {"eval.max_steps": 6})

    monkeypatch.setattr(models, "_short", shrink)


@pytest.mark.slow
@pytest.mark.usefixtures("shrunk")
def test_a_language_model_is_trained_from_the_families(tmp_path, capsys):
    """Two updates of each: the weights differ, the files are there."""
    part = dataclasses.replace(
        DIGITS.models, names=("prose",), families=("goe",), scales=(0.5,), seeds=1
    )
    main.run(dataclasses.replace(DIGITS, mode="models", workdir=str(tmp_path), models=part))
    shown, folder = capsys.readouterr().out, tmp_path / "models"
    assert re.search(r"prose +\|.* goe +\|.* 0.5 +\| perplexity .*0 of 1", shown)
    records = json.loads((folder / "results.json").read_text())["records"]
    assert [r["family"] for r in records] == ["published", "goe"]
    assert records[0]["score"] != records[1]["score"]
    assert all(np.isfinite(r["score"][0]) and r["radius"][0] > 0 for r in records)
    assert (folder / "models.png").stat().st_size > 10_000
    config = json.loads((folder / "prose" / "goe_0.5_seed0" / "config.json").read_text())
    assert config["model"]["init"] == "goe" and config["jac"]["gamma"] == 0


@pytest.mark.usefixtures("shrunk")
def test_trainings_that_come_apart_are_counted_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    """Every second one of the multiscale DEQ; the others return what training would."""
    seen = []

    def train(task, config, *data, **settings):
        seen.append((config.model.init, config.model.init_scale, config.train.seed))
        assert config.model.init_centre == (config.model.init == "gaussian")
        if config.train.seed % 2:
            raise Diverged("loss or gradient is not finite")
        final = {"accuracy": 0.5, "unconverged": 0.25, "spectral_radius": 2.0}
        history = [{"kind": "train", "step": 1, "unconverged": 1.0}]
        return TrainResult(None, {config.eval_steps: final}, history)

    monkeypatch.setattr(models, "train", train)
    part = dataclasses.replace(
        DIGITS.models, names=("digits",), scales=(0.5, 2.0), seeds=2, centre=True
    )
    main.run(dataclasses.replace(DIGITS, mode="models", workdir=str(tmp_path), models=part))
    assert seen[:3] == [("published", 1, 0), ("published", 1, 1), ("gaussian", 0.5, 0)]
    assert len(seen) == 2 * (1 + 3 * 2)
    assert capsys.readouterr().out.count("1 of 2") == 7
    record = json.loads((tmp_path / "models" / "results.json").read_text())["records"][0]
    assert record["score"] == [0.5, None] and record["diverged"] == [0, 1]
    assert "digits: " not in (tmp_path / "models" / "results.md").read_text()  # no pairs are left
    assert record["start_unsolved"] == [1, None] and record["end_unsolved"] == [0.25, None]


def test_scores_are_compared_seed_by_seed():
    def record(family, scale, score, diverged=(0, 0)):
        names = {"model": "digits", "family": family, "scale": scale, "metric": "accuracy"}
        return names | {"score": score, "diverged": list(diverged)}

    records = [
        record("gaussian", 0.5, [0.5, 0.6]),
        record("gaussian", 1.0, [0.5, 0.6]),
        record("orthogonal", 0.5, [0.6, 0.8]),  # by .1 and .2
        record("orthogonal", 1.0, [0.7, 0.78]),  # by .2 and .18
        record("goe", 0.5, [0.9, None], diverged=(0, 1)),
        record("goe", 1.0, [0.4, 0.4]),  # by -.1 and -.2
    ]
    first, second = report._paired(records)
    assert first.startswith("digits: orthogonal minus gaussian +17 ± 2 (accuracy in %, mean ")
    assert "mean over 2 scales" in first and "mean over 1 scales" in second
    assert second.startswith("digits: goe minus gaussian -15 ± 5 ")
