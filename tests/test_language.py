"""The language experiment: it trains, reports, resumes bit for bit, generates; what it refuses."""

import dataclasses
import functools
import json
import math
import signal

import jax
import numpy as np
import pytest

from deq_jax.convert import transformer as convert
from deq_jax.data.sources import MissingData
from deq_jax.training import Interrupted, UsageError, fields, train, weights
from deq_jax.training.evaluation import Evaluator
from deq_jax.training.optim import make_optimizer
from deq_jax.training.parallel import batch_sharding, make_mesh
from deq_jax.training.state import create_state
from deq_jax.training.task import forward, init
from experiments.common import collect
from experiments.common import run as common_run
from experiments.language_modeling import data, generate, main
from experiments.language_modeling.presets import PRESETS
from experiments.language_modeling.task import build_model, build_task

pytestmark = pytest.mark.slow

TEXT = "the cat sat on the mat .\nthe dog sat on the cat .\na mat is a mat .\n"


def prose(workdir, **change):
    """The preset, shrunk."""
    small = {
        "workdir": str(workdir),
        "model.features": 8,
        "model.heads": 2,
        "model.hidden": 12,
        "model.memory": 4,
        "model.attention_dropout": 0.1,
        "data.length": 4,
        "data.eval_length": 4,
        "data.eval_memory": 6,
        "data.eval_batch_size": 4,
        "data.watched": 100,
        "train.steps": 4,
        "train.batch_size": 4,
        "train.log_every": 1,
        "train.eval_every": 2,
        "train.checkpoint_every": 2,
        "solver.max_steps": 4,
        "backward.max_steps": 4,
        "eval.max_steps": 6,
        "eval.budgets": (3,),
        "eval.spectral_iters": 4,
    }
    return fields.replace(PRESETS["prose"], small | change)


def draw(task, seed):
    return jax.jit(functools.partial(init, task))(jax.random.key(seed))


@pytest.fixture
def two_devices(monkeypatch):
    """As many as main.py asks for."""
    mesh = make_mesh(jax.devices()[:2])
    monkeypatch.setattr(common_run, "make_mesh", lambda: mesh)
    return mesh


@pytest.fixture
def small_text(tmp_path):
    """A corpus of a few words, so that evaluations are short."""
    folder = tmp_path / "text"
    folder.mkdir()
    for split, repeats in (("train", 8), ("valid", 2), ("test", 3)):
        (folder / f"wiki.{split}.tokens").write_text(TEXT * repeats)
    return {"data.name": "text", "data.dir": str(folder), "data.cache": "none"}


def test_it_trains_reports_and_generates(tmp_path, capsys, two_devices, small_text):
    config = prose(tmp_path / "run", compare=False, **small_text)
    trained = main.run(config)
    table = capsys.readouterr().out
    assert set(trained) == {"model"}
    for row in (
        "unigram perplexity, test", "validation perplexity at 3 steps", "test perplexity at 6",
        "spectral radius", "words per second", "steps backward in training", "Over training:",
    ):  # fmt: skip
        assert row in table
    (numbers,) = json.loads((tmp_path / "run" / "results.json").read_text()).values()
    columns = collect.gather([tmp_path / "run"], by="jac.gamma")
    assert list(columns) == [str(config.jac.gamma)]
    tokens = {"valid": 2 * 23 - 1, "test": 3 * 23 - 1}
    assert numbers["predicted"] == tokens
    assert numbers["words"] == len(set(TEXT.split())) + 1
    assert (tmp_path / "run" / "results.png").stat().st_size > 10_000
    history = trained["model"].result.history
    assert all(r["perplexity"] == pytest.approx(math.exp(r["loss"])) for r in history)
    assert any("penalty" in r for r in history if r["kind"] == "train")

    main.run(dataclasses.replace(config, generate="the cat"))
    out = capsys.readouterr().out
    assert f"weights of {tmp_path / 'run' / 'model'}" in out
    assert out.count("the cat |") == config.sample.count


def test_prose_itself_is_cut(tmp_path):
    texts = data.open_data(prose(tmp_path))
    batch = next(texts.train)
    assert batch["words"].shape == (4, 4)
    assert sum(b["weight"].sum() for b in texts.eval()) == 99
    test = texts.corpus.splits["test"]
    assert sum(b["weight"].sum() for b in texts.test()) == len(test) - 1


def test_unknown_words_of_a_prompt(tmp_path, small_text, capsys):
    config = prose(tmp_path / "run", compare=False, **small_text)
    texts, mesh = data.open_data(config), make_mesh(jax.devices()[:1])
    task = build_task(config, mesh, texts)
    weights.save(tmp_path / "run" / "model", draw(task, 0)[0], {}, {})
    with pytest.raises(UsageError, match="the vocabulary has not: jumped"):
        generate.run(dataclasses.replace(config, generate="the cat jumped"))
    with pytest.raises(UsageError, match="got no word in --generate=' '"):
        generate.run(dataclasses.replace(config, generate=" "))
    out = generate.run(dataclasses.replace(config, generate="the cat"))
    assert len(out.split("\n\n")) >= config.sample.count and out.startswith("the cat |")
    greedy = fields.replace(config, {"generate": "the", "sample.temperature": 0.0})
    first, second = generate.sample(
        greedy, task.model, generate.load(greedy, task.model), np.array([1])
    )
    np.testing.assert_array_equal(first, second)
    everything = range(1, len(texts.corpus.vocabulary))
    drawn = generate.sample(
        greedy, task.model, generate.load(greedy, task.model), np.array([1]), everything
    )
    assert not drawn.any()  # what is left is the end of a line
    wider = fields.replace(config, {"model.hidden": 16, "generate": "the"})
    with pytest.raises(UsageError, match="are of another model: .* give the preset"):
        generate.run(wider)
    with pytest.raises(UsageError, match="no checkpoint in .*nowhere"):
        generate.run(
            fields.replace(config, {"workdir": str(tmp_path / "nowhere"), "generate": "a"})
        )


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


@pytest.mark.parametrize("name", ["deq", "explicit"])
def test_a_resumed_run_ends_with_the_same_bits_and_memory(tmp_path, name, two_devices, small_text):
    change = {"compare": False, "model.name": name, "model.layers": 2} | small_text
    change |= {"train.warmup_steps": 0}
    if name == "explicit":
        change |= {"jac.gamma": 0.0}

    def run(folder, interrupt):
        config = prose(tmp_path / folder, **change)
        texts = data.open_data(config)
        task = build_task(config, two_devices, texts)
        stream = StopAfter(texts.train, 2) if interrupt else texts.train
        return train(task, config, stream, mesh=two_devices).state

    straight = run("straight", False)
    with pytest.raises(Interrupted, match="after step 3 of 4"):
        run("broken", True)
    resumed = run("broken", False)
    for a, b in zip(jax.tree.leaves(straight), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    assert straight.carry.filled.tolist() == [4] * 4 and np.any(straight.carry.z)
    # Every device keeps the memory of its own streams.
    assert straight.carry.z.sharding.is_equivalent_to(batch_sharding(two_devices), 3)
    assert straight.params["inject"]["kernel"].sharding.is_fully_replicated


def test_perplexity_does_not_depend_on_devices_or_cuts(tmp_path, small_text, x64):
    """One stream with a memory as long as the text: one long conditional, however it is cut."""
    tight = {"compare": False, "eval.max_steps": 300, "solver.tol": 1e-12, "solver.name": "picard",
             "eval.spectral_batches": 0, "eval.budgets": (), "data.eval_memory": 48}  # fmt: skip
    losses = []
    params = None
    for length, streams, devices in ((4, 1, 1), (9, 1, 1), (6, 4, 1), (6, 4, 4)):
        change = {"data.eval_length": length, "data.eval_batch_size": streams, "data.watched": None}
        config = prose(tmp_path, **small_text, **tight, **change)
        texts, mesh = data.open_data(config), make_mesh(jax.devices()[:devices])
        task = build_task(config, mesh, texts)
        if params is None:
            params = draw(task, 0)[0]
            params = jax.tree.map(lambda a: 0.4 * a.astype(np.float64), params)
        optimizer = make_optimizer(config.optim, 1)
        state = create_state(task, optimizer, 0, mesh)
        state = dataclasses.replace(state, params=jax.device_put(params))
        values = Evaluator(task, config, texts.valid, mesh=mesh)(state)
        losses.append(values[300]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[2] == pytest.approx(losses[3], abs=1e-6)
    # Four streams: three of them begin without what stands before.
    assert abs(losses[0] - losses[2]) > 1e-5


def test_streams_that_begin_anew_forget(tmp_path, small_text):
    config = prose(tmp_path, compare=False, **small_text)
    texts, mesh = data.open_data(config), make_mesh(jax.devices()[:1])
    task = build_task(config, mesh, texts)
    params, _ = draw(task, 0)
    batch = next(texts.train)

    @jax.jit
    def loss(memory, fresh):
        begun = batch | {"fresh": fresh * np.ones(4, np.float32)}
        return forward(task, config, params, {}, memory, begun, max_steps=6).loss

    empty = task.carry(True)
    old = jax.tree.map(lambda a: a + 1, empty)
    old = dataclasses.replace(old, filled=np.full(4, 4, np.int32))
    assert float(loss(old, 1.0)) == pytest.approx(float(loss(empty, 0.0)), rel=1e-6)
    assert abs(loss(old, 0.0) - loss(empty, 0.0)) > 1e-6


def test_presets_are_valid_and_say_where_they_write():
    for name, config in PRESETS.items():
        assert config.workdir == f"runs/{name}"
        assert config.build_eval_solver().max_steps >= max(config.eval_budgets)


# Name -> parameters in millions: 98 and 110 are the paper's.
PUBLISHED = {
    "wikitext103": 98, "wikitext103_jr": 98, "wikitext103_preln_jr": 98,
    "wikitext103_transformer": 110,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    config = PRESETS[name]
    task = build_task(config, make_mesh(jax.devices()[:1]))
    params, _ = jax.eval_shape(functools.partial(init, task), jax.random.key(0))
    count = sum(math.prod(a.shape) for a in jax.tree.leaves(params))
    assert count / 1e6 == pytest.approx(PUBLISHED[name], rel=0.08)
    assert config.train.steps == 300_000 and config.optim.clip == 0.25


def test_converted_weights_start_a_run(tmp_path, small_text, capsys):
    """A state dict under the published names, written backwards from a tree of ours."""
    config = prose(tmp_path / "run", compare=False, **small_text)
    config = fields.replace(config, {"model.cutoffs": (4,), "model.div_val": 2, "train.steps": 0})
    texts, mesh = data.open_data(config), make_mesh(jax.devices()[:1])
    task = build_task(config, mesh, texts)
    params = jax.device_get(draw(task, 5)[0])
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    state = {"module.pos_emb.inv_freq": np.ones(4)}
    for module in convert.modules(2):
        for name, _, ours in module.leaves():
            tied = ours.replace("out_table", "table").replace("out_projection1", "projection1")
            leaf = leaves.get(ours, leaves.get(tied))
            if leaf is None:
                assert module.group, name
                continue
            matrix = not isinstance(module, convert.Array) or module.transposed
            leaf = leaf.T if matrix and leaf.ndim == 2 else leaf
            if name.endswith("weight_g"):
                leaf = leaf.reshape(-1, 1, 1)
            elif name.endswith("weight_v") and "ff" not in name:
                leaf = leaf[..., None]
            state[f"module.{name}"] = leaf
    np.savez(tmp_path / "weights.npz", **state)
    convert.main([str(tmp_path / "weights.npz"), str(tmp_path / "converted")])
    out = capsys.readouterr().out
    for line in ("--model.features=8", "--model.heads=2", "--model.cutoffs=4", "--model.div_val=2"):
        assert line in out
    config = dataclasses.replace(config, init_from=str(tmp_path / "converted"))
    state = train(task, config, texts.train, mesh=mesh).state
    assert "arrays of the model were loaded" in capsys.readouterr().err
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert weights.load(tmp_path / "converted")[0].keys() == params.keys()
    np.savez(tmp_path / "strange.npz", conv=np.zeros(3))
    with pytest.raises(SystemExit, match="got no array of a DEQ-Transformer"):
        convert.main([str(tmp_path / "strange.npz"), str(tmp_path / "x"), "--partial"])
    with pytest.raises(SystemExit, match=r"unknown \['conv'\]"):
        convert.main([str(tmp_path / "strange.npz"), str(tmp_path / "x")])


def test_one_table_for_several_clusters_needs_cutoffs():
    state = {
        "word_emb.emb_layers.0.weight": np.arange(20.0).reshape(10, 2),
        "crit.out_layers.0.weight": np.arange(20.0).reshape(10, 2),
        "crit.out_layers.0.bias": np.arange(10.0),
        "crit.cluster_weight": np.ones((1, 2)),
        "crit.cluster_bias": np.ones(1),
    }
    with pytest.raises(
        ValueError, match=r"got one table for 2 clusters and cutoffs \(\); wanted 1"
    ):
        convert.convert_state(state, partial=True)
    vocab = convert.convert_state(state, cutoffs=(4,), partial=True).params["vocab"]
    assert {n: a.shape for n, a in vocab.items()} == {
        "table0": (4, 2), "table1": (6, 2), "bias0": (4,), "bias1": (6,),
        "tails": (1, 2), "tails_bias": (1,),
    }  # fmt: skip


def test_what_does_not_fit_is_refused_in_words(tmp_path, small_text):
    with pytest.raises(ValueError, match="jac.gamma must be 0 for an explicit network"):
        prose(tmp_path, compare=False, **{"model.name": "explicit"})
    with pytest.raises(ValueError, match="features must be even and divide by the heads"):
        prose(tmp_path, **{"model.heads": 3})
    with pytest.raises(UsageError, match="cutoffs must rise .* set model.cutoffs"):
        build_model(prose(tmp_path, **{"model.cutoffs": (50,)}), None, 20)
    config = prose(tmp_path, **small_text)
    mesh = make_mesh(jax.devices()[:2])
    with pytest.raises(UsageError, match=r"--data.eval_batch_size=15 for 2 devices; wanted a mul"):
        build_task(fields.replace(config, {"data.eval_batch_size": 15}), mesh)
    uneven = fields.replace(config, {"train.batch_size": 15})
    with pytest.raises(UsageError, match=r"--train.batch_size=15 for 2 devices; wanted a multiple"):
        train(build_task(uneven, mesh), uneven, iter(()), mesh=mesh)
    with pytest.raises(UsageError, match="wanted at least .* take fewer streams"):
        data.open_data(fields.replace(config, {"train.batch_size": 100}))
    for change, message in (
        ({"data.dir": str(tmp_path / "nowhere")}, "wiki.train.tokens cannot be read"),
        ({"data.name": "wikitext-103", "data.dir": str(tmp_path)}, "wikitext/103 is not prepared"),
    ):
        with pytest.raises(MissingData, match=message):
            data.open_data(fields.replace(config, change))
    (tmp_path / "text" / "wiki.test.tokens").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="test is not UTF-8 text"):
        data.open_data(config)
    with pytest.raises(UsageError, match="words and line ends in train of .*truncated"):
        data.open_data(fields.replace(config, {"data.name": "wikitext-2"}))
