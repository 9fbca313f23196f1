"""Weights from elsewhere: a run's, saved ones; what does not fit is told, damage is refused."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_example as example

from deq_jax import __version__
from deq_jax.convert import export
from deq_jax.training import Evaluator, Mean, UsageError, parallel, train, weights
from deq_jax.training.checkpoint import Checkpoints

TINY = example.PRESETS["tiny"]


def run(path, steps, init_from="", task=None, base=TINY):
    mesh = parallel.make_mesh(jax.devices()[:1])
    settings = dataclasses.replace(TINY.train, steps=steps, warmup_steps=0)
    config = dataclasses.replace(base, workdir=str(path), train=settings, init_from=str(init_from))
    data = example.Batches(config.train.batch_size)
    return train(task or example.Regression(config), config, data, mesh=mesh)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first") / "run"
    return folder, run(folder, 2).state


def test_a_run_starts_from_the_weights_of_another(first, tmp_path, capsys):
    folder, state = first
    params, extra = weights.load(folder)
    jax.tree.map(np.testing.assert_array_equal, params, state.params)
    np.testing.assert_array_equal(extra["seen"]["total"], state.extra["seen"]["total"])

    def nothing(predicted, batch):
        return {"loss": Mean(0 * predicted.sum(), batch["mask"].sum())}

    # A run that is one step long, and whose step changes nothing.
    settings = dataclasses.replace(TINY, jac=dataclasses.replace(TINY.jac, gamma=0.0))
    task = example.Regression(settings, loss=nothing)
    begun = run(tmp_path / "second", 1, folder, task, settings).state
    jax.tree.map(np.testing.assert_array_equal, begun.params, state.params)
    assert int(begun.step) == 1
    seen = float(state.extra["seen"]["total"])
    assert float(begun.extra["seen"]["total"]) == seen + TINY.train.batch_size
    shown = capsys.readouterr().err
    assert f"starting from the weights in {folder}" in shown
    assert "5 of 5 arrays of the model were loaded" in shown


def test_no_steps_evaluate_the_weights_of_another_run(first, tmp_path):
    folder, state = first
    mesh = parallel.make_mesh(jax.devices()[:1])
    settings = dataclasses.replace(TINY.train, steps=0)
    config = dataclasses.replace(
        TINY, workdir=str(tmp_path / "run"), train=settings, init_from=str(folder)
    )
    task, data = example.Regression(config), example.Batches(config.train.batch_size)
    result = train(task, config, data, example.eval_batches, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, result.state.params, state.params)
    direct = Evaluator(task, config, example.eval_batches, mesh=mesh)(state)
    assert result.evaluation == direct and result.history == []


def test_a_resumed_run_keeps_its_own_weights(first, tmp_path, capsys):
    folder, _ = first
    once = run(tmp_path / "run", 2, folder).state
    capsys.readouterr()
    again = run(tmp_path / "run", 2, folder).state
    assert "starting from" not in capsys.readouterr().err
    jax.tree.map(np.testing.assert_array_equal, once.params, again.params)
    with pytest.raises(UsageError, match="init_from"):
        run(tmp_path / "run", 2)


def test_a_head_of_another_size_stays_as_it_is():
    def tree(classes, value):
        params = {"stem": jnp.full(2, value), "head": {"kernel": jnp.full((3, classes), value)}}
        return params, {"batch_stats": {"stem": jnp.full(2, value)}}

    said = []
    params, extra = weights.adopt(tree(5, 0.0), tree(7, 1.0), said.append)
    assert params["stem"].tolist() == extra["batch_stats"]["stem"].tolist() == [1, 1]
    assert params["head"]["kernel"].shape == (3, 5) and not params["head"]["kernel"].any()
    assert said == [
        "2 of 3 arrays of the model were loaded (incomplete: head 0/1)",
        "  of another shape, not loaded: head/kernel ([3, 7] there, [3, 5] here)",
    ]
    loaded = ({"stem": jnp.ones(2), "other": jnp.ones(1)}, {})
    weights.adopt(tree(5, 0.0), loaded, said.append)
    assert said[2] == "1 of 3 arrays of the model were loaded (incomplete: stem 1/2, head 0/1)"
    assert said[3:] == [
        "  not there, left as initialised: head/kernel, batch_stats/stem",
        "  there, but not in the model: other",
    ]


def test_weights_of_another_model_are_refused():
    with pytest.raises(UsageError, match="none of the 1 arrays loaded has a place"):
        weights.adopt(({"a": jnp.ones(2)}, {}), ({"b": jnp.ones(2)}, {}), print)


def test_a_head_without_its_equilibrium_is_refused():
    def model(channels):
        tree = {"equilibrium": {"f": jnp.ones(channels)}, "head": jnp.ones(5)}
        return tree, {"batch_stats": {"head": jnp.ones(5)}}

    with pytest.raises(UsageError) as caught:
        weights.adopt(model(4), model(8), print)
    assert 'none of the 3 arrays loaded has a place in "equilibrium" of' in str(caught.value)
    assert "here: equilibrium/f ([8] there, [4] here)" in str(caught.value)
    said = []
    weights.adopt(model(4), model(4), said.append)
    assert said == ["3 of 3 arrays of the model were loaded"]


def test_an_older_checkpoint_is_taken_when_the_newest_is_damaged(tmp_path):
    def write(step, tree):
        with Checkpoints(tmp_path / "checkpoints", keep=9, fits=str, say=print) as checkpoints:
            checkpoints.save(step, tree, {})

    write(1, {"params": {"a": jnp.ones(3)}})
    write(2, {"params": {"a": jnp.ones(3)}})
    write(3, {"weights": jnp.ones(3)})
    (tmp_path / "checkpoints" / "000000002" / "host" / "data.json").unlink()
    said = []
    assert weights.load(tmp_path, said.append)[0]["a"].tolist() == [1.0] * 3
    assert len(said) == 1 and "step 3: it holds no params; step 2: its file " in said[0]
    assert said[0].endswith("is missing; taking the checkpoint of step 1")


def test_no_weights_and_damaged_weights_are_refused(first, tmp_path):
    with pytest.raises(UsageError, match="no checkpoint in .*nowhere"):
        weights.load(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="no checkpoint in"):
        run(tmp_path / "run", 1, tmp_path / "nowhere")
    folder = tmp_path / "saved"
    weights.save(folder, {"a": jnp.ones(500)}, {}, {"file": "x"})
    with pytest.raises(UsageError, match="has checkpoints already"):
        weights.save(folder, {"a": jnp.ones(500)}, {}, {"file": "x"})
    checkpoint = folder / "checkpoints" / "000000000"
    files = [p for p in checkpoint.rglob("*") if p.is_file() and p.name != "files.json"]
    victim = max(files, key=lambda p: p.stat().st_size)
    content = victim.read_bytes()
    victim.write_bytes(content[:-5])
    with pytest.raises(UsageError, match=r"can be read: step 0: its file .* bytes instead of"):
        weights.load(folder)
    victim.write_bytes(content)
    assert weights.load(folder)[0]["a"].tolist() == [1.0] * 500
    (checkpoint / "files.json").write_text("{")
    with pytest.raises(UsageError, match="its list of files, files.json, is damaged"):
        weights.load(folder)


MANY_KINDS = {
    "stem": {
        name: np.arange(6).reshape(2, 3).astype(jnp.dtype(name))
        for name in sorted(weights.DTYPES - {"float32"})
    },
    "number": np.float32(1 / 3),
    "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "empty": np.zeros((0, 2), np.float32),
}


def bits(tree):
    """Name -> dtype, shape and bytes of every array."""
    return {
        jax.tree_util.keystr(path): (a.dtype.name, a.shape, np.asarray(a).tobytes())
        for path, a in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_a_file_gives_back_every_bit(tmp_path):
    path = tmp_path / "new" / "a.safetensors"
    odd = np.array([np.nan, -0.0, 1e-45, np.inf], np.float32)
    params, extra = MANY_KINDS | {"odd": odd}, {"batch_stats": {"stem": odd[::-1]}, "seen": odd[0]}
    weights.save(path, params, extra, {"file": "x"})
    assert bits(weights.load(path)) == bits((params, extra))
    arrays, metadata = weights.read_file(path)
    assert {"params/stem/bfloat16", "batch_stats/stem", "seen"} <= set(arrays)
    assert metadata["format"] == "flax" and metadata["deq_jax"] == __version__
    assert json.loads(metadata["source"]) == {"file": "x"}


def test_a_run_starts_from_the_file_of_another(first, tmp_path, capsys):
    folder, state = first
    path = tmp_path / "first.safetensors"
    export.main([str(folder), str(path)])
    assert f"written to {path}: the weights of {folder} after step 2" in capsys.readouterr().out
    params, extra = weights.load(path)
    assert bits((params, extra)) == bits(weights.load(folder)) == bits((state.params, state.extra))
    source = json.loads(weights.read_file(path)[1]["source"])
    assert (source["run"], source["step"]) == ("run", 2)
    task, evaluated = example.Regression(TINY), []
    for number, start in enumerate((folder, path)):
        settings = dataclasses.replace(TINY.train, steps=0)
        config = dataclasses.replace(
            TINY, workdir=str(tmp_path / f"{number}"), train=settings, init_from=str(start)
        )
        data, mesh = example.Batches(config.train.batch_size), parallel.make_mesh(jax.devices()[:1])
        result = train(task, config, data, example.eval_batches, mesh=mesh)
        evaluated.append((bits(result.state.params), result.evaluation))
    assert evaluated[0] == evaluated[1]
    assert f"starting from the weights in {path}" in capsys.readouterr().err


def test_export_names_the_settings_of_the_model(tmp_path):
    host = {"config": {"model": {"width": 7}, "workdir": "elsewhere"}}
    with Checkpoints(tmp_path / "checkpoints", keep=9, fits=str, say=print) as checkpoints:
        checkpoints.save(3, {"params": {"a": jnp.ones(3)}}, host)
    source = weights.export(tmp_path, tmp_path / "a.safetensors")
    assert source == {"run": tmp_path.name, "step": 3, "model": {"width": 7}}


def test_no_file_is_overwritten_nor_half_a_file_left(first, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"mine")
    for write in (
        lambda: weights.save(path, {"a": jnp.ones(2)}, {}, {}),
        lambda: weights.export(first[0], path),
    ):
        with pytest.raises(UsageError, match="exists already; choose another name, nothing is"):
            write()
    assert path.read_bytes() == b"mine"
    with pytest.raises(SystemExit, match=r"wanted the name of a file that ends in \.safetensors"):
        export.main([str(first[0]), str(tmp_path / "a.npz")])
    with pytest.raises(UsageError, match="cannot write to .*a.safetensors/b"):
        weights.save(path / "b.safetensors", {"a": jnp.ones(2)}, {}, {})

    class Full:
        """A disk that is full when half of a file is written."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, content):
            self.file.write(content[: len(content) // 2])
            raise OSError(28, "No space left on device")

    opened = type(path).open
    monkeypatch.setattr(type(path), "open", lambda self, mode: Full(opened(self, mode)))
    with pytest.raises(UsageError, match="cannot write to .*: No space left on device"):
        weights.save(tmp_path / "c.safetensors", {"a": jnp.ones(2)}, {}, {})
    assert not (tmp_path / "c.safetensors").exists()


def test_damaged_and_foreign_files_are_refused_in_words(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "a.safetensors"
    with pytest.raises(UsageError, match="a.safetensors, which is no file"):
        weights.load(path)
    weights.save(path, {"a": jnp.ones(500)}, {}, {})
    whole = path.read_bytes()
    altered = whole[:-1] + bytes([whole[-1] ^ 1])
    for content in (whole[:-5], whole[:100], b"", b"PK" + whole):
        path.write_bytes(content)
        with pytest.raises(UsageError, match="cannot be read as safetensors .*copy or export it"):
            weights.load(path)
    path.write_bytes(altered)
    with pytest.raises(UsageError, match=r"were altered: their CRC-32 is \d+, and \d+ was rec"):
        weights.load(path)
    for names in (["conv1.weight", "fc.bias"], [], ["params"], ["params/a", "params/a/b"]):
        save_file({name: np.ones(2) for name in names}, path)
        with pytest.raises(UsageError, match="wanted the names of a model of deq_jax, params/"):
            weights.load(path)
    # Of another program, but under our names.
    save_file({"params/a/b": np.ones(2), "batch_stats/c": np.ones(1, np.float32)}, path)
    params, extra = weights.load(path)
    assert params["a"]["b"].tolist() == [1, 1] and extra["batch_stats"]["c"].tolist() == [1]


def test_what_a_file_cannot_hold_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    for params, message in (
        ({"a": [jnp.ones(2)]}, r"array at \['params'\]\['a'\]\[0\]; wanted nested dicts"),
        ({"a/b": jnp.ones(2)}, "without a slash"),
        ({"a": jnp.ones(2, jnp.float8_e5m2)}, "params/a of float8_e5m2; wanted one of bfloat16"),
    ):
        with pytest.raises(UsageError, match=message):
            weights.save(path, params, {}, {})
    assert not path.exists()


def test_without_the_package_its_name_is_told(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for action in (lambda: weights.load(path), lambda: weights.save(path, {}, {}, {})):
        with pytest.raises(UsageError, match="not installed: pip install safetensors, or .* hub"):
            action()
