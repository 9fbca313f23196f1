"""Published weights: a state dict written backwards from our own tree comes in again."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deq_jax as deq
from deq_jax.convert import mdeq as convert
from deq_jax.convert.torch_state import LEAVES, read
from deq_jax.models.heads import ClassificationHead, SegmentationHead
from deq_jax.models.mdeq import MDEQ
from deq_jax.models.mdeq_cell import MDEQCell
from deq_jax.training import weights

ROOT = Path(__file__).resolve().parents[1]


def model(segmentation=False):
    head = ClassificationHead(classes=5, widths=(2, 3, 4), final=6)
    return MDEQ(
        cell=MDEQCell(
            channels=(4, 8, 8), expansion=2, blocks=2, big_kernels=(1, 0, 2), groups=2,
            post_affine=True,
        ),
        head=SegmentationHead(7) if segmentation else head,
        solver=deq.Broyden(),
    )  # fmt: skip


def shapes_of(net):
    return jax.eval_shape(
        lambda key: net.init(key, jnp.zeros((1, 8, 8, 3)), train=False), jax.random.key(0)
    )


def written_backwards(net, prefix="module."):
    """The PyTorch state dict of a model with random weights, and the tree it must become."""
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), shapes_of(net))
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    state = {}
    for module in convert.modules(3, 2):
        for kind in module.kinds:
            for theirs, collection, ours in LEAVES[kind]:
                leaf = leaves.pop(f"{collection}/{module.ours}/{ours}", None)
                if leaf is None:
                    assert module.optional or module.ours.startswith("head"), module
                    continue
                if theirs == "weight_g":
                    leaf = leaf.reshape(-1, 1, 1, 1)
                elif leaf.ndim == 4:
                    leaf = leaf.transpose(3, 2, 0, 1)  # HWIO to OIHW
                elif leaf.ndim == 2:
                    leaf = leaf.T
                state[f"{prefix}{module.theirs}.{theirs}"] = leaf
    assert not leaves, f"without a name in PyTorch: {sorted(leaves)}"
    state[f"{prefix}downsample.1.num_batches_tracked"] = np.array(7)
    state[f"{prefix}fullstage_copy.branches.0.blocks.0.conv1.weight_v"] = np.zeros(3)
    return state, tree


@pytest.mark.parametrize("segmentation", [False, True])
@pytest.mark.parametrize("prefix", ["", "model.", "module.model."])
def test_every_weight_finds_its_place(tmp_path, segmentation, prefix):
    state, tree = written_backwards(model(segmentation), prefix)
    np.savez(tmp_path / "weights.npz", **state)
    ours = convert.convert_state(read(tmp_path / "weights.npz"), segmentation=segmentation)
    assert ours.missing == ours.unknown == []
    jax.tree.map(
        np.testing.assert_array_equal,
        {"params": ours.params, "batch_stats": ours.batch_stats},
        tree,
    )
    found = convert.settings(ours)
    assert found["channels"] == (4, 8, 8) and found["expansion"] == 2 and found["blocks"] == 2
    assert found["big_kernels"] == (1, 0, 2) and found["post_affine"] is True
    assert found["classes"] == (7 if segmentation else 5)
    assert segmentation or (found["head"], found["final"]) == ((2, 3, 4), 6)


def test_missing_and_unknown_names_are_listed():
    state, _ = written_backwards(model(), "")
    del state["classifier.bias"]
    state["surprise.weight"] = np.zeros(2)
    with pytest.raises(ValueError) as caught:
        convert.convert_state(state)
    assert "missing ['classifier.bias']" in str(caught.value)
    assert "unknown ['surprise.weight']" in str(caught.value)
    partial = convert.convert_state(state, partial=True)
    assert partial.missing == ["classifier.bias"] and partial.unknown == ["surprise.weight"]
    assert "bias" not in partial.params["head"]["classifier"]
    # Of the other task: the trunk fits, the head does not.
    with pytest.raises(ValueError, match=r"missing \['last_layer.0.weight'"):
        convert.convert_state(written_backwards(model(), "")[0], segmentation=True)


def test_command_line_writes_what_init_from_loads(tmp_path, capsys):
    state, tree = written_backwards(model())
    np.savez(tmp_path / "weights.npz", **state)
    out = tmp_path / "out"
    convert.main([str(tmp_path / "weights.npz"), str(out)])
    shown = capsys.readouterr().out
    assert "--model.channels=4,8,8" in shown and "--model.post_affine=true" in shown
    params, extra = weights.load(out)
    jax.tree.map(np.testing.assert_array_equal, {"params": params, **extra}, tree)
    with pytest.raises(SystemExit, match="has checkpoints already"):
        convert.main([str(tmp_path / "weights.npz"), str(out)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "which is no file"),
        (b"not a pickle", "needs PyTorch|cannot be read as PyTorch weights"),
    ],
)
def test_files_that_are_no_weights_are_refused_in_words(tmp_path, content, message):
    path = tmp_path / "weights.pkl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        convert.main([str(path), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_files_of_another_model_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", conv=np.zeros(3))
    with pytest.raises(SystemExit, match=r"unknown \['conv'\]"):
        convert.main([str(tmp_path / "a.npz"), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="got no array of a multiscale DEQ"):
        convert.main([str(tmp_path / "a.npz"), str(tmp_path / "out"), "--partial"])


@pytest.mark.slow
def test_a_pickle_of_pytorch(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: only .npz was tested")
    state, tree = written_backwards(model())
    path = tmp_path / "weights.pkl"
    torch.save({name: torch.from_numpy(np.asarray(a)) for name, a in state.items()}, path)
    params = convert.convert_state(read(path)).params
    jax.tree.map(np.testing.assert_array_equal, params, tree["params"])


def test_it_is_a_module_with_help():
    done = subprocess.run(
        [sys.executable, "-m", "deq_jax.convert.mdeq", "--help"],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"COLUMNS": "80"},
    )  # fmt: skip
    assert done.returncode == 0 and "--segmentation" in done.stdout
