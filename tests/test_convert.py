"""Published weights: a state dict written backwards from our own tree comes in again."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deq_jax as deq
from deq_jax.convert import mdeq as convert
from deq_jax.convert.torch_state import read
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


def written_backwards(net, prefix="module.", segmentation=False):
    """The PyTorch state dict of a model with random weights, and the tree it must become."""
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), shapes_of(net))
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    state = {}
    for module in convert.modules(3, 2, segmentation=segmentation):
        for name, collection, ours in module.leaves():
            leaf = leaves.pop(f"{collection}/{ours}", None)
            if leaf is None:
                assert module.group, name
                continue
            if name.endswith("weight_g"):
                leaf = leaf.reshape(-1, 1, 1, 1)
            elif leaf.ndim == 4:
                leaf = leaf.transpose(3, 2, 0, 1)  # HWIO to OIHW
            elif leaf.ndim == 2:
                leaf = leaf.T
            state[f"{prefix}{name}"] = leaf
    assert not leaves, f"without a name in PyTorch: {sorted(leaves)}"
    state[f"{prefix}downsample.1.num_batches_tracked"] = np.array(7)
    for copy in ("fullstage_copy", "deq.func", "deq.func_copy"):
        state[f"{prefix}{copy}.branches.0.blocks.0.conv1.weight_v"] = np.zeros(3)
    state["loss.criterion.weight"] = np.ones(19)
    return state, tree


@pytest.mark.parametrize("segmentation", [False, True])
@pytest.mark.parametrize("prefix", ["", "model.", "module.model."])
def test_every_weight_finds_its_place(tmp_path, segmentation, prefix):
    state, tree = written_backwards(model(segmentation), prefix, segmentation)
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


def test_what_only_some_models_have_is_there_as_a_whole():
    state, _ = written_backwards(model(), "")
    without = {n: a for n, a in state.items() if not re.search(r"post_fuse.*gnorm", n)}
    assert convert.settings(convert.convert_state(without))["post_affine"] is False
    half = {n: a for n, a in state.items() if not n.endswith("post_fuse_layers.1.gnorm.bias")}
    with pytest.raises(ValueError, match=r"missing \['fullstage.post_fuse_layers.1.gnorm.bias'\]"):
        convert.convert_state(half)
    # Branch 0 goes from 4 channels to 4 * 2: its bottleneck cannot be without a projection.
    bare = {n: a for n, a in state.items() if not n.startswith("incre_modules.0.0.downsample")}
    with pytest.raises(ValueError, match=r"missing \['incre_modules.0.0.downsample.0.weight'"):
        convert.convert_state(bare)


def test_command_line_writes_what_init_from_loads(tmp_path, capsys):
    state, tree = written_backwards(model())
    np.savez(tmp_path / "weights.npz", **state)
    out = tmp_path / "out"
    convert.main([str(tmp_path / "weights.npz"), str(out)])
    shown = capsys.readouterr().out
    count = sum(a.size for a in jax.tree.leaves(tree["params"]))
    assert f"{count:,} parameters" in shown
    assert "--model.channels=4,8,8" in shown and "--model.post_affine=true" in shown
    params, extra = weights.load(out)
    jax.tree.map(np.testing.assert_array_equal, {"params": params, **extra}, tree)
    with pytest.raises(SystemExit, match="has checkpoints already"):
        convert.main([str(tmp_path / "weights.npz"), str(out)])


def test_safetensors_come_in_and_go_out(tmp_path, capsys):
    from safetensors.numpy import save_file

    state, tree = written_backwards(model())
    there, out = tmp_path / "there.safetensors", tmp_path / "out.safetensors"
    save_file({name: np.asarray(a, order="C") for name, a in state.items()}, there)
    np.savez(tmp_path / "there.npz", **state)
    for source, target in ((there, out), (tmp_path / "there.npz", tmp_path / "folder")):
        convert.main([str(source), str(target)])
        params, extra = weights.load(target)
        jax.tree.map(np.testing.assert_array_equal, {"params": params, **extra}, tree)
    assert f"written to {out}" in capsys.readouterr().out
    assert '"there.safetensors"' in weights.read_file(out)[1]["source"]
    with pytest.raises(SystemExit, match="exists already"):
        convert.main([str(there), str(out)])
    content = there.read_bytes()
    there.write_bytes(content[:-5])
    with pytest.raises(SystemExit, match="cannot be read as safetensors"):
        convert.main([str(there), str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()
    # As from a pickle: 16-bit floats become float32, other dtypes stay.
    kinds = {"a": jnp.bfloat16, "b": np.float16, "c": np.float64, "d": np.int64}
    save_file(
        {f"module.{name}": np.array([1.5]).astype(kind) for name, kind in kinds.items()}, there
    )
    found = read(there)
    assert {name: a.dtype.name for name, a in found.items()} == {
        "a": "float32", "b": "float32", "c": "float64", "d": "int64"
    }  # fmt: skip
    assert found["a"].tolist() == found["b"].tolist() == [1.5]


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
    np.savez(tmp_path / "b.npz", **{"last_layer.0.bias": np.zeros(3)})
    with pytest.raises(SystemExit, match="head of a segmentation model, .*--segmentation"):
        convert.main([str(tmp_path / "b.npz"), str(tmp_path / "out")])
    np.savez(tmp_path / "c.npz", **{"module.a": np.zeros(3), "a": np.zeros(3)})
    with pytest.raises(SystemExit, match=r"got a twice in .*c\.npz"):
        convert.main([str(tmp_path / "c.npz"), str(tmp_path / "out")])
    for content in (b"PK", b""):
        (tmp_path / "d.npz").write_bytes(content)
        with pytest.raises(SystemExit, match=r"d\.npz cannot be read as an \.npz"):
            convert.main([str(tmp_path / "d.npz"), str(tmp_path / "out")])


@pytest.mark.slow
def test_a_pickle_of_pytorch(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: only .npz was tested")
    state, tree = written_backwards(model())
    path = tmp_path / "weights.pkl"
    tensors = {name: torch.from_numpy(np.asarray(a)) for name, a in state.items()}
    torch.save(tensors, path)
    params = convert.convert_state(read(path)).params
    jax.tree.map(np.testing.assert_array_equal, params, tree["params"])
    # As parameters of a module, in a training checkpoint; in half precision.
    torch.save({"epoch": 3, "state_dict": {"a": torch.nn.Parameter(torch.ones(2))}}, path)
    np.testing.assert_array_equal(read(path)["a"], np.ones(2))
    torch.save({"a": torch.ones(2, dtype=torch.bfloat16)}, path)
    assert read(path)["a"].dtype == np.float32
    torch.save({"a": Path("code")}, path)
    with pytest.raises(ValueError, match="tensors, and no objects of other classes"):
        read(path)


def test_it_is_a_module_with_help():
    done = subprocess.run(
        [sys.executable, "-m", "deq_jax.convert.mdeq", "--help"],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"COLUMNS": "80"},
    )  # fmt: skip
    assert done.returncode == 0 and "--segmentation" in done.stdout
