"""Checkpoints: what is saved comes back bit for bit, or is refused; nothing is ever overwritten."""

import contextlib
import functools
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from deq_jax.training import TrainConfig, TrainState, UsageError
from deq_jax.training.checkpoint import CheckpointError, Checkpoints
from deq_jax.training.parallel import make_mesh, replicated

HOST = {"config": {"solver": {"tol": 1e-3}}, "data": {"next_index": 5}, "window": {}}


def make_state(seed=0, size=2000):
    def create():
        return TrainState(
            step=jnp.int32(seed),
            params={"w": jax.random.normal(jax.random.key(seed), (size,)), "b": jnp.bfloat16(1.5)},
            opt_state=(jnp.arange(3), jnp.array([True, False]), ()),
            extra={"mean": jnp.float32(seed)},
        )

    return jax.jit(create, out_shardings=replicated(make_mesh()))()


def template_of(state):
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
    )


TEMPLATE = functools.cache(lambda: template_of(make_state()))


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@contextlib.contextmanager
def opened(directory, keep=2, misfit="", said=None, **settings):
    said = said if said is not None else []
    with Checkpoints(
        directory, keep=keep, fits=lambda host: misfit, say=said.append, **settings
    ) as checkpoints:
        yield checkpoints


def restore(checkpoints, template=None):
    restored = checkpoints.restore(TEMPLATE() if template is None else template)
    assert restored is not None
    return restored


def write(directory, *steps, keep=10, host=HOST):
    with opened(directory, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), host)


def snapshot(directory):
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
    with opened(tmp_path / "none") as checkpoints:
        assert checkpoints.steps() == []
        assert checkpoints.restore(TEMPLATE()) is None


def test_state_host_and_sharding_come_back(tmp_path):
    write(tmp_path, 3)
    with opened(tmp_path) as checkpoints:
        restored = restore(checkpoints)
    assert_same(restored.state, make_state(3))
    assert restored.host == HOST
    assert restored.state.params["w"].sharding == replicated(make_mesh())


def test_a_checkpoint_of_other_devices_is_restored_onto_these(tmp_path):
    mesh = make_mesh(jax.devices()[:1])
    state = jax.device_put(make_state(1), NamedSharding(mesh, PartitionSpec()))
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, state, HOST)
    with opened(tmp_path) as checkpoints:
        restored = restore(checkpoints)
    assert_same(restored.state, make_state(1))


def test_the_newest_n_are_kept(tmp_path):
    write(tmp_path, 1, 2, 3, 4, 10, keep=2)
    with opened(tmp_path) as checkpoints:
        assert checkpoints.steps() == [4, 10]
        assert int(restore(checkpoints).state.step) == 10


def test_every_nth_is_kept_besides(tmp_path):
    with opened(tmp_path, keep=1, keep_every=4) as checkpoints:
        for step in (2, 4, 6, 8, 10):
            checkpoints.save(step, make_state(step), HOST)
    with opened(tmp_path, keep=1, keep_every=4) as checkpoints:
        assert checkpoints.steps() == [4, 8, 10]


@pytest.mark.parametrize(
    ("best", "kept"), [("min:loss", 2), ("max:accuracy", 3), ("min:none", None)]
)
def test_the_best_is_kept_besides(tmp_path, best, kept):
    """Over two runs; neither equal, nor infinite, nor missing values displace it."""
    measured = {
        1: {"loss": 0.5, "accuracy": 0.5},
        2: {"loss": np.float32(0.25), "accuracy": 0.25},
        3: {"loss": 0.5, "accuracy": 0.75},
        4: None,
        5: {"loss": 0.25, "accuracy": 0.75},
        6: {"loss": float("nan"), "accuracy": float("inf")},
        7: {"loss": float("-inf")},
    }
    for run in (range(1, 4), range(4, 8)):
        with opened(tmp_path, keep=1, keep_best=best) as checkpoints:
            for step in run:
                checkpoints.save(step, make_state(step), HOST, measured[step])
    with opened(tmp_path, keep=1, keep_best=best) as checkpoints:
        assert checkpoints.best() == kept
        assert checkpoints.steps() == [*([kept] if kept else []), 7]
        assert_same(restore(checkpoints).state, make_state(7))


def test_a_checkpoint_whose_metrics_cannot_be_read_is_kept_as_it_may_be_the_best(tmp_path):
    with opened(tmp_path, keep=2, keep_best="min:loss") as checkpoints:
        checkpoints.save(1, make_state(1), HOST, {"loss": 0.1})
        checkpoints.save(2, make_state(2), HOST, {"loss": 0.2})
    (tmp_path / "000000001" / "host" / "data.json").write_text("[")
    with opened(tmp_path, keep=1, keep_best="min:loss") as checkpoints:
        checkpoints.save(3, make_state(3), HOST, {"loss": 0.3})
        checkpoints.finish()
        assert checkpoints.steps() == [1, 2, 3]


def test_an_unknown_metric_is_told_once(tmp_path):
    said = []
    with opened(tmp_path, keep=1, keep_best="min:los", said=said) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), HOST, {"loss": 0.1, "accuracy": 1})
    assert said == ["got keep_best=min:los, wanted one of accuracy, loss; no best is kept"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keep_every": 700}, "keep_every must be a multiple of checkpoint_every = 500, or none"),
        ({"keep_every": 0}, "keep_every must be a multiple"),
        ({"keep_best": "loss"}, "keep_best must be min:NAME or max:NAME, or empty, got 'loss'"),
        ({"keep_best": "min:", "eval_every": 5}, "keep_best must be min:NAME"),
        ({"keep_best": "min:loss"}, "eval_every must be at least 1 for keep_best"),
    ],
)
def test_settings_that_keep_nothing_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(**settings)
    assert TrainConfig(keep_every=1000, keep_best="max:accuracy", eval_every=7).keep == 2


def test_the_state_may_be_donated_and_the_dict_changed_while_the_save_runs(tmp_path):
    @functools.partial(jax.jit, donate_argnums=0)
    def advance(state):
        return jax.tree.map(lambda a: a if a.dtype == jnp.bool_ else a + 1, state)

    host = {"data": {"position": 1}}
    state = make_state(1, size=1_000_000)
    expected, template = jax.device_get(state), template_of(state)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, state, host)
        host["data"]["position"] = 2
        for _ in range(20):
            state = advance(state)
        jax.block_until_ready(state)
        checkpoints.finish()
        restored = restore(checkpoints, template)
    assert_same(restored.state, expected)
    assert restored.host["data"]["position"] == 1


def damage(kind, path):
    data = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "flipped":
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :])
    else:
        path.unlink()


@pytest.mark.parametrize("kind", ["truncated", "flipped", "missing"])
def test_damage_to_any_file_gives_the_older_checkpoint_or_does_no_harm(tmp_path, kind):
    pristine = tmp_path / "pristine"
    write(pristine, 1, 2)
    names = sorted(p.relative_to(pristine) for p in (pristine / "000000002").rglob("*"))
    fallbacks = []
    names = [n for n in names if (pristine / n).is_file()]
    if kind != "truncated":  # one kind on every file will do
        names = [n for n in names if n.name in ("_METADATA", "data.json", "manifest.ocdbt")]
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        shutil.copytree(pristine, folder)
        if not (folder / name).read_bytes():
            continue
        damage(kind, folder / name)
        said = []
        with opened(folder, said=said) as checkpoints:
            restored = restore(checkpoints)
        step = int(restored.state.step)
        assert_same(restored.state, make_state(step))
        if step == 1:
            fallbacks.append(name)
            assert "checkpoint of step 2 cannot be used (" in said[0]
            assert "falling back to the checkpoint of step 1" in said[1]
            assert sorted(p.name for p in folder.iterdir()) == ["000000001", "damaged-000000002-0"]
    assert any("state" in name.parts for name in fallbacks)
    assert any("host" in name.parts for name in fallbacks)


def test_a_bit_flipped_anywhere_in_the_arrays_is_noticed(tmp_path):
    """Orbax alone returns other values for most of these."""
    write(tmp_path / "pristine", 1, 2)
    files = [p for p in (tmp_path / "pristine" / "000000002").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size).relative_to(tmp_path / "pristine")
    for part in range(1, 10):
        folder = tmp_path / str(part)
        shutil.copytree(tmp_path / "pristine", folder)
        data = bytearray((folder / largest).read_bytes())
        data[part * len(data) // 10] ^= 4
        (folder / largest).write_bytes(data)
        said = []
        with opened(folder, said=said) as checkpoints:
            assert_same(restore(checkpoints).state, make_state(1))
        assert "was altered" in said[0]


def test_a_run_killed_before_it_could_list_the_files_loses_nothing(tmp_path):
    write(tmp_path, 1, 2)
    (tmp_path / "000000002" / "files.json").unlink()
    with opened(tmp_path) as checkpoints:
        assert_same(restore(checkpoints).state, make_state(2))


def test_a_damaged_checkpoint_is_moved_aside_and_its_step_saved_again(tmp_path):
    write(tmp_path, 1, 2)
    shutil.rmtree(tmp_path / "000000002" / "state")
    with opened(tmp_path) as checkpoints:
        checkpoints.restore(TEMPLATE())
        checkpoints.save(2, make_state(2), HOST)
        checkpoints.finish()
        assert_same(restore(checkpoints).state, make_state(2))
    assert (tmp_path / "damaged-000000002-0" / "host").exists()


def test_when_none_can_be_used_all_stay_as_they_are(tmp_path):
    write(tmp_path, 1, 2)
    for step in ("000000001", "000000002"):
        for path in (tmp_path / step / "state").rglob("*"):
            if path.is_file():
                path.write_bytes(path.read_bytes()[:5])
    before = snapshot(tmp_path)
    with opened(tmp_path) as checkpoints, pytest.raises(UsageError) as error:
        checkpoints.restore(TEMPLATE())
    for words in (str(tmp_path), "step 1:", "step 2:", "nothing was changed", "--workdir"):
        assert words in str(error.value)
    assert snapshot(tmp_path) == before


FOREIGN = {
    "shape": lambda s: s.replace(params={"w": jnp.zeros(7), "b": s.params["b"]}),
    "dtype": lambda s: s.replace(extra={"mean": jnp.float16(1)}),
    "tree": lambda s: s.replace(params={"other": jnp.zeros(7)}),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, kind):
    state = jax.device_put(FOREIGN[kind](make_state(1)), replicated(make_mesh()))
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, state, HOST)
    with opened(tmp_path) as checkpoints, pytest.raises(UsageError, match="step 1:"):
        checkpoints.restore(TEMPLATE())


def test_a_checkpoint_of_another_configuration_or_program_is_refused(tmp_path):
    write(tmp_path, 1)
    with opened(tmp_path, misfit="it is of another run") as checkpoints:
        with pytest.raises(UsageError, match="it is of another run"):
            checkpoints.restore(TEMPLATE())
    shutil.rmtree(tmp_path / "000000001")
    (tmp_path / "000000007").mkdir()
    (tmp_path / "000000007" / "weights.txt").write_text("mine")
    with opened(tmp_path) as checkpoints, pytest.raises(UsageError, match="step 7:"):
        checkpoints.restore(TEMPLATE())
    assert (tmp_path / "000000007" / "weights.txt").read_text() == "mine"


def test_what_a_killed_save_left_behind_is_removed(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "000000002.orbax-checkpoint-tmp").mkdir()
    with opened(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["000000001"]


@contextlib.contextmanager
def no_large_files(limit):
    """Writes beyond `limit` bytes fail, as on a full disk; needs no privileges."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_save_that_cannot_be_written_leaves_the_older_ones_and_can_be_repeated(tmp_path, caplog):
    big = make_state(2, size=500_000)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), HOST)
        checkpoints.finish()
        with no_large_files(100_000), pytest.raises(CheckpointError) as error:
            checkpoints.save(2, big, HOST)
            checkpoints.finish()
        assert "step 2 could not be written" in str(error.value)
        assert "checkpoint of step 1 is intact" in str(error.value)
        assert [p.name for p in tmp_path.iterdir()] == ["000000001"]
        assert_same(restore(checkpoints).state, make_state(1))
        checkpoints.save(2, big, HOST)
        checkpoints.finish()
        assert_same(restore(checkpoints, template_of(big)).state, big)
    assert "Traceback" not in caplog.text
