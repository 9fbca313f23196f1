"""Weights from elsewhere: a run's, saved ones; what does not fit is told, damage is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_example as example

from deq_jax.training import Evaluator, UsageError, parallel, train, weights
from deq_jax.training.checkpoint import Checkpoints

TINY = example.PRESETS["tiny"]


def run(path, steps, init_from="", task=None):
    mesh = parallel.make_mesh(jax.devices()[:1])
    settings = dataclasses.replace(TINY.train, steps=steps, warmup_steps=0)
    config = dataclasses.replace(TINY, workdir=str(path), train=settings, init_from=str(init_from))
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
    np.testing.assert_array_equal(extra["seen"], state.extra["seen"])

    class Same(example.Regression):
        """A run that is one step long, and whose step changes nothing."""

        def forward(self, params, *args, **kwargs):
            output = super().forward(jax.lax.stop_gradient(params), *args, **kwargs)
            return output.replace(loss=output.loss + 0 * sum(map(jnp.sum, params.values())))

    settings = dataclasses.replace(TINY, jac=dataclasses.replace(TINY.jac, gamma=0.0))
    begun = run(tmp_path / "second", 1, folder, Same(settings)).state
    jax.tree.map(np.testing.assert_array_equal, begun.params, state.params)
    assert int(begun.step) == 1
    assert float(begun.extra["seen"]) == float(state.extra["seen"]) + TINY.train.batch_size
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
