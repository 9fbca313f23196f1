"""Looped reasoning: puzzles, loss, arms, measurements, and what its default command shows."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax.training import make_train_step, parallel
from deq_jax.training.optim import make_optimizer
from deq_jax.training.state import create_state
from experiments.reasoning import data, main, measure, task
from experiments.reasoning.config import PRESETS, WORDS, variants

ADDITION = PRESETS["addition"]


def value(digits):
    """Of digits [N, n], most significant first."""
    return digits @ 10 ** np.arange(digits.shape[1])[::-1]


@pytest.mark.parametrize("masked", [False, True])
def test_sums_are_right_and_laid_out_as_documented(masked):
    puzzles = data.addition(2, 500, 3, test=False, masked=masked)
    if masked:
        text, hidden = puzzles.targets, puzzles.words == data.HIDDEN
        np.testing.assert_array_equal(hidden, puzzles.scored > 0)
        np.testing.assert_array_equal(np.where(hidden, 0, text), np.where(hidden, 0, puzzles.words))
    else:
        text = np.concatenate([puzzles.words[:, :1], puzzles.targets], axis=1)
        np.testing.assert_array_equal(puzzles.words[:, 1:], puzzles.targets[:, :-1])
    assert (text[:, 2] == data.PLUS).all() and (text[:, 5] == data.EQUALS).all()
    a, b, total = value(text[:, :2]), value(text[:, 3:5]), value(text[:, :5:-1])
    np.testing.assert_array_equal(a + b, total)
    assert puzzles.scored.sum(axis=1).tolist() == [3] * 500
    assert a.min() < 10 and b.max() > 90 and not data.held_out(a, b).any()


def test_pairs_kept_from_training_are_symmetric_and_a_tenth():
    a, b = np.meshgrid(np.arange(100), np.arange(100))
    out = data.held_out(a, b)
    np.testing.assert_array_equal(out, out.T)
    assert 0.08 < out.mean() < 0.12
    test = data.addition(2, 300, 0, test=True)
    a, b = value(test.words[:, :2]), value(test.words[:, 3:5])
    assert data.held_out(a, b).all() and data.held_out(b, a).all()


@pytest.mark.parametrize("passing", [None, 0.9])
def test_binary_sums_are_right(passing):
    puzzles = data.carry(40, 200, 1, passing=passing)
    powers = 2 ** np.arange(40)
    a, b = puzzles.words % 2 @ powers, puzzles.words // 2 @ powers
    np.testing.assert_array_equal((a + b) % 2**40, puzzles.targets @ powers)
    share = np.isin(puzzles.words, (1, 2)).mean(axis=1)
    if passing is None:
        assert share.min() < 0.1 and share.max() > 0.9
    else:
        np.testing.assert_allclose(share.mean(), 0.9, atol=0.01)


def solutions(cells):
    """All ways to fill the empty cells of a 4 x 4 grid, by trying them."""
    units = [range(4 * i, 4 * i + 4) for i in range(4)] + [range(i, 16, 4) for i in range(4)]
    units += [(a, a + 1, a + 4, a + 5) for a in (0, 2, 8, 10)]
    empty = np.flatnonzero(cells == 0)
    if not empty.size:
        yield cells
        return
    place = empty[0]
    taken = {cells[i] for unit in units if place in unit for i in unit}
    for number in {1, 2, 3, 4} - taken:
        grown = cells.copy()
        grown[place] = number
        yield from solutions(grown)


def test_sudokus_have_one_solution_and_test_grids_are_never_trained_on():
    assert data.grids().shape == (288, 16)
    train, test = (data.sudoku4(150, seed, test=test) for seed, test in ((0, False), (1, True)))
    for puzzle in itertools.chain(*(map(p.__getitem__, range(40)) for p in (train, test))):
        (only,) = solutions(puzzle["words"])
        np.testing.assert_array_equal(only, puzzle["targets"])
        np.testing.assert_array_equal(puzzle["scored"], puzzle["words"] == 0)
    known = {tuple(grid) for grid in train.targets}
    assert not known & {tuple(grid) for grid in test.targets}
    assert (train.words > 0).sum(axis=1).min() == 4


def test_denoising_shows_a_part_of_the_answer_and_scores_the_rest():
    puzzle = data.addition(2, 1, 0, test=False, masked=True)[0]
    rng = np.random.default_rng(0)
    drawn = [data.reveal(puzzle, rng) for _ in range(4000)]
    shown = np.array([record["shown"] for record in drawn])
    assert not shown[:, puzzle["scored"] == 0].any()
    counts = shown.sum(axis=1)
    assert set(counts) == {0, 1, 2}  # of three, one at least stays hidden
    # Hidden with probability c = cos(pi u / 2): none of three is shown with E[c^3] = 4 / (3 pi).
    assert (counts == 0).mean() == pytest.approx(4 / (3 * np.pi), abs=0.02)
    batch = task.shown({k: np.stack([r[k] for r in drawn]) for k in drawn[0]})
    right = np.broadcast_to(puzzle["targets"], shown.shape)
    np.testing.assert_array_equal(batch["words"][shown > 0], right[shown > 0])
    np.testing.assert_array_equal(batch["scored"], puzzle["scored"] - shown)


def test_the_loss_and_what_counts_as_solved():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(3, 4, 5)).astype(np.float32)
    targets = scores.argmax(axis=-1)
    targets[1, 2] = (targets[1, 2] + 1) % 5
    targets[2, 0] = 12  # not scored: outside of the answers
    scored = np.array([[1, 1, 1, 1], [0, 1, 1, 0], [0, 1, 1, 1]], np.float32)
    batch = {"targets": targets, "scored": scored, "mask": np.array([1, 1, 1], np.float32)}
    got = {name: float(mean.value) for name, mean in task.cross_entropy(scores, batch).items()}
    logs = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    wanted = 0
    for i in range(3):
        places = np.flatnonzero(scored[i])
        wanted -= np.mean([logs[i, t, targets[i, t]] for t in places]) / 3
    assert got["loss"] == pytest.approx(wanted, rel=1e-5)
    assert got["accuracy"] == pytest.approx(2 / 3)
    assert got["words"] == pytest.approx((1 + 0.5 + 1) / 3)


def test_arms_are_words_that_change_the_configuration():
    def only(arm):
        (part,) = variants(dataclasses.replace(ADDITION, arms=(arm,), seeds=(5,))).values()
        assert part.train.seed == 5 and part.workdir.endswith(f"{arm}-5")
        return part

    fixed, stars = only("fixed"), only("random_penalty")
    assert (fixed.model, fixed.jac, fixed.solver) == (ADDITION.model, ADDITION.jac, ADDITION.solver)
    assert (stars.jac.gamma, stars.jac.blend, stars.jac.start) == (0.1, True, 0.5)
    assert (stars.solver.max_steps, stars.jac.budget_draw) == (16, "lognormal")
    assert not stars.model.recall and only("random_recall").model.recall
    low = only("uniform_recall_sequence").jac
    assert (low.budget_low, low.budget_high, low.budget_per) == (-15, 0, "example")
    for arm, rule in (("deq", "implicit"), ("deq_unroll", "unroll"), ("deq_shine", "shine")):
        part = only(arm)
        assert part.backward.name == rule and part.model.recall
        part.backward.build_adjoint().check(part.build_solver(), part.solver.keep)
    assert only("deq_reversible").solver.keep == "last"
    assert only("fixed_pre").model.norm == "pre"
    with pytest.raises(ValueError, match="arms must be words of fixed, random, "):
        dataclasses.replace(ADDITION, arms=("fixed_fast",))
    for preset in PRESETS.values():
        assert variants(preset)
    assert {word for p in PRESETS.values() for arm in p.arms for word in arm.split("_")} <= set(
        WORDS
    )


def small(preset="addition", **changes):
    """A preset in seconds."""
    base = PRESETS[preset]
    shrunk = dataclasses.replace(
        base,
        train=dataclasses.replace(base.train, steps=3, batch_size=8, checkpoint_every=3),
        optim=dataclasses.replace(base.optim, warmup_steps=1),
        data=dataclasses.replace(base.data, examples=50, test_examples=12),
        model=dataclasses.replace(base.model, features=8, heads=2, hidden=8),
        report=dataclasses.replace(base.report, loops=(1, 4), at=4, starts=2, radius_examples=2),
    )
    return dataclasses.replace(shrunk, **changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "arms"),
    [
        ("addition", ("random_recall_penalty_sequence",)),
        ("carry", ("deq_shine",)),
        ("denoising", ("fixed_recall_denoise",)),
    ],
)
def test_a_command_leaves_tables_numbers_and_a_picture(preset, arms, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    seeds = (0, 1) if preset == "addition" else (0,)
    trained = main.run(small(preset, workdir=str(tmp_path), arms=arms, seeds=seeds))
    assert len(trained) == len(seeds)
    text = (tmp_path / "results.md").read_text()
    assert text in capsys.readouterr().out
    numbers = json.loads((tmp_path / "results.json").read_text())
    assert len(numbers) == (2 if preset == "carry" else 1)
    for by_model in numbers.values():
        assert list(by_model) == list(trained)
        for found in by_model.values():
            assert ("rounds" in found) == (preset == "denoising")
            assert list(found["last"]) == ["1", "4"] and len(found["quarters"]) == 4
    assert text.count("Solved (%), last iterate:") == len(numbers)
    assert ("±" in text) == (len(seeds) > 1)
    assert (tmp_path / "reasoning.png").stat().st_size > 20_000


SHRUNK = dataclasses.replace(
    ADDITION,
    train=dataclasses.replace(ADDITION.train, steps=110, batch_size=64),
    optim=dataclasses.replace(ADDITION.optim, lr=3e-3, warmup_steps=40),
    data=dataclasses.replace(ADDITION.data, size=1, examples=2000),
)
"""Sums of one digit, which a few seconds teach."""


def learn(arm):
    """Trains an arm; returns loops -> solved sums of the training set, which 110 steps fit."""
    (part,) = variants(dataclasses.replace(SHRUNK, arms=(arm,))).values()
    mesh = parallel.make_mesh(jax.devices()[:1])
    made, source = task.build_task(part, mesh), data.open_data(part).train
    optimizer = make_optimizer(part.optim, part.train.steps)
    state = create_state(made, optimizer, 0, mesh)
    step = make_train_step(made, part, optimizer, mesh)
    for _ in range(part.train.steps):
        state, _ = step(state, parallel.place(next(source), mesh))
    examine = measure.Examination(made.model, jax.device_get(state.params), part)
    batch = data.addition(1, 200, 9, test=False).arrays()
    looks = examine.on(batch, examine.begin(batch), (8, 16, 32, 128))
    return {loops: look["right"].mean() for loops, look in looks.items()}


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["random_recall", "deq"])
def test_more_loops_than_trained_harm_a_fixed_count_and_neither_recall_nor_a_deq(arm, fixed):
    assert fixed[8] >= 0.95 and fixed[32] <= 0.3
    assert min(learn(arm)[loops] for loops in (16, 32, 128)) >= 0.97


@pytest.fixture(scope="module")
def fixed():
    return learn("fixed")


@pytest.mark.slow
def test_the_examination_is_right_about_a_model_whose_answers_are_known():
    """Beside the model's own layers, called by hand."""
    settings = small(data=dataclasses.replace(ADDITION.data, size=1, test_examples=40))
    (part,) = variants(dataclasses.replace(settings, arms=("fixed",))).values()
    made = task.build_task(part, parallel.make_mesh(jax.devices()[:1]))
    puzzles = data.addition(1, 40, 0, test=False)
    params = made.model.init(jax.random.key(3), puzzles.words, train=False)["params"]
    found = measure.Examination(made.model, params, part)(puzzles, hidden=False)
    z = x = params["embed"]["embedding"][puzzles.words] + params["positions"][None]
    cell = jax.jit(lambda z: made.model.cell.apply({"params": params["equilibrium"]["f"]}, z, x))
    for loops in (1, 4):
        while loops > found.setdefault("done", 0):
            z, found["done"] = cell(z), found["done"] + 1
        answers = jnp.argmax(
            z @ params["readout"]["kernel"] + params["readout"]["bias"][None, None], -1
        )
        right = ((answers == puzzles.targets) | (puzzles.scored == 0)).all(axis=1)
        assert found["last"][loops] == pytest.approx(right.mean())
        assert found["rms"][loops] == pytest.approx(float(jnp.sqrt((z**2).mean((1, 2))).mean()))
        gap = jnp.sqrt(jnp.square(cell(z) - z).sum((1, 2)) / jnp.square(cell(z)).sum((1, 2)))
        assert found["residual"][loops] == pytest.approx(float(gap.mean()), rel=1e-4)
    jacobian = jax.jacobian(lambda one: cell(z.at[0].set(one))[0])(z[0])
    matrix = np.asarray(jacobian).reshape(z[0].size, -1)
    radius = np.abs(np.linalg.eigvals(matrix)).max()
    assert 0.3 * radius < found["radius"][4] < 3 * radius
