"""Segmentation: loss and measures against numpy, and the experiment from records to its picture."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax.training import (
    BackwardConfig,
    EvalConfig,
    JacConfig,
    Mean,
    SolverConfig,
    UsageError,
    evaluate,
    train,
)
from deq_jax.training.parallel import make_mesh
from deq_jax.training.task import forward as task_forward
from deq_jax.training.task import init
from experiments.common import run as common_run
from experiments.common.mdeq import check_size
from experiments.image_classification.presets import PRESETS as IMAGE_PRESETS
from experiments.image_classification.task import build_task as build_image_task
from experiments.segmentation import data as seg_data
from experiments.segmentation import main as seg_main
from experiments.segmentation import report, task
from experiments.segmentation.presets import PRESETS

pixel_loss = jax.jit(task.pixel_loss)


@pytest.fixture
def pixels():
    """Scores, labels with some to ignore, the mask of a padded batch, and weights."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(3, 4, 5, 4)).astype(np.float32)
    labels = rng.integers(0, 4, size=(3, 4, 5)).astype(np.uint8)
    labels[rng.random(labels.shape) < 0.3] = 255
    labels[labels == 2] = 1  # class 2 never is the truth
    return scores, labels, np.asarray([1, 1, 0], np.float32), np.asarray([0.5, 2.0, 1.0, 3.0])


def test_loss_is_the_weighted_mean_over_labelled_pixels(pixels):
    scores, labels, mask, weights = pixels
    means = pixel_loss(scores, labels, mask, jnp.asarray(weights))
    total = weight = count = 0.0
    for b, i, j in np.ndindex(labels.shape):
        y = labels[b, i, j]
        if mask[b] and y != 255:
            row = scores[b, i, j].astype(np.float64)
            total += weights[y] * (np.log(np.exp(row).sum()) - row[y])
            weight, count = weight + weights[y], count + 1
    np.testing.assert_allclose(means["loss"].value, total / weight, rtol=1e-5)
    assert means["confusion"].count == means["confusion"].total.sum() == count


def test_padding_changes_nothing_whatever_it_holds(pixels):
    scores, labels, mask, weights = pixels
    scores[2] = np.inf
    padded = pixel_loss(scores, labels, mask, jnp.asarray(weights))
    alone = pixel_loss(scores[:2], labels[:2], mask[:2], jnp.asarray(weights))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), padded, alone)


def test_a_batch_without_a_label_costs_nothing(pixels):
    scores, labels, mask, weights = pixels
    nothing = np.full_like(labels, 255)

    def loss(scores):
        return pixel_loss(scores, nothing, mask, jnp.asarray(weights))["loss"].value

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(scores))
    assert value == 0 and not gradient.any()


def test_confusion_matrix_and_iou_match_numpy(pixels):
    scores, labels, mask, weights = pixels
    means = pixel_loss(scores, labels, mask, jnp.asarray(weights))
    guess = scores.argmax(-1)
    counted = (labels != 255) & (mask[:, None, None] > 0)
    expected = np.asarray(
        [[(counted & (labels == t) & (guess == p)).sum() for p in range(4)] for t in range(4)]
    )
    np.testing.assert_array_equal(means["confusion"].total, expected)
    for c, value in enumerate(task.iou(expected.astype(np.float64))):
        hit = (counted & (labels == c) & (guess == c)).sum()
        assert value == hit / (counted & ((labels == c) | (guess == c))).sum()


def tiny(folder):
    """camvid_small with what compiles fastest: one branch, plain iteration, no penalty."""
    preset = PRESETS["camvid_small"]
    model = dataclasses.replace(
        preset.model, channels=(8,), groups=2, expansion=1, downsample=1, dropout=0.0
    )
    steps = dataclasses.replace(
        preset.train,
        steps=4,
        batch_size=2,
        warmup_steps=0,
        log_every=3,  # so that the checkpoint of step 2 holds a confusion matrix
        eval_every=0,
        checkpoint_every=2,
    )
    return dataclasses.replace(
        preset,
        workdir=str(folder),
        model=model,
        data=dataclasses.replace(preset.data, crop=(16, 32), eval_batch_size=2),
        train=steps,
        solver=SolverConfig(name="picard", max_steps=3),
        backward=BackwardConfig(name="unroll", max_steps=1),
        eval=EvalConfig(max_steps=3, budgets=(2,), spectral_batches=1, spectral_iters=3),
        jac=JacConfig(),
        drawn=2,
    )


class Scenes:
    """Records as a TFDS source gives them: a label is the colour of a block, some are ignored."""

    def __init__(self, count):
        rng = np.random.default_rng(count)
        blocks = rng.integers(0, 12, size=(count, 4, 8))
        self.labels = blocks.repeat(8, 1).repeat(8, 2)[..., None].astype(np.uint8)  # 32 x 64
        noise = rng.integers(0, 20, size=(count, 32, 64, 3))
        self.images = (self.labels * 20 + noise).astype(np.uint8)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        name = f"frame {index}".encode()
        return {
            "image": self.images[index],
            "segmentation_label": self.labels[index],
            "image_id": name,
        }


@pytest.fixture
def scenes(monkeypatch):
    def open_tfds(name, split, data_dir):
        assert (name, data_dir) == ("camvid", "")
        return Scenes({"train": 6, "test": 5}[split])

    monkeypatch.setattr(seg_data.sources, "open_tfds", open_tfds)
    mesh = make_mesh(jax.devices()[:2])
    monkeypatch.setattr(common_run, "make_mesh", lambda: mesh)
    return mesh


@pytest.mark.slow
def test_it_trains_reports_and_resumes(tmp_path, capsys, scenes):
    config = tiny(tmp_path / "run")
    trained = seg_main.run(config)["model"]
    table = capsys.readouterr().out
    names = seg_data.CLASSES["camvid"].names
    for row in (
        "mIoU at 2 steps",
        "mIoU at 3 steps",
        "pixel accuracy",
        "spectral radius",
        "images",
    ):
        assert f"| {row}" in table
    assert all(f"| IoU {name}" in table for name in names)
    numbers = json.loads((tmp_path / "run" / "results.json").read_text())["model"]
    main = trained.result.evaluation[3]
    assert numbers["miou"]["3"] == main["miou"] == np.mean([main[f"iou/{n}"] for n in names])
    assert (tmp_path / "run" / "predictions.png").stat().st_size > 10_000
    kinds = [record["kind"] for record in trained.result.history]
    assert kinds.count("train") == 2 and all("miou" in r for r in trained.result.history)
    _check_evaluation_over_devices(config, trained)
    _check_resuming(config, trained, scenes)


def _check_evaluation_over_devices(config, trained):
    """5 images: on 2 devices in batches of 2, the last one padded; on one device 3 and 2 + 1."""
    data = dataclasses.replace(config.data, eval_batch_size=3)
    alone = dataclasses.replace(
        config, data=data, eval=dataclasses.replace(config.eval, budgets=(), spectral_batches=0)
    )
    mesh = make_mesh(jax.devices()[:1])
    sets = seg_data.open_data(alone)
    seen = task.build_task(alone, mesh, sets)
    state = jax.device_put(trained.result.state, mesh.devices[0])
    again = evaluate(seen, alone, state, sets.eval, mesh=mesh)[3]
    before = trained.result.evaluation[3]
    for name, value in again.items():
        # The class of a pixel whose best two scores are equal is a matter of rounding.
        pixels = 2e-3 * name.startswith(("accuracy", "miou", "iou/"))
        assert value == pytest.approx(before[name], rel=1e-4, abs=pixels), name


def _check_resuming(config, trained, mesh):
    """From the checkpoint of step 2: the same bits, without what follows it."""
    part = dataclasses.replace(config, workdir=config.workdir + "/model")
    shutil.rmtree(f"{part.workdir}/checkpoints/{4:09d}")
    sets = seg_data.open_data(part)
    result = train(trained.task, part, sets.train, mesh=mesh)
    first, second = (jax.tree.leaves(s) for s in (trained.result.state, result.state))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(trained.result.history, result.history, strict=False):
        assert a["loss"] == b["loss"] and a["miou"] == b["miou"]


def test_evaluation_is_of_whole_images_counted_once(tmp_path, scenes):
    sets = seg_data.open_data(tiny(tmp_path))
    batches = list(sets.eval())
    assert [batch["mask"].tolist() for batch in batches] == [[1, 1], [1, 1], [1, 0]]
    assert batches[0]["image"].shape == (2, 32, 64, 3)
    raw = Scenes(5).labels[:2, ..., 0]
    np.testing.assert_array_equal(batches[0]["label"], np.where(raw == 11, 255, raw))


def test_loss_of_a_summary_is_over_all_pixels_at_once():
    names = [f"class {i}" for i in range(11)]
    matrix = np.zeros((11, 11))
    matrix[:2, :2] = [[3, 1], [0, 4]]
    values = task.summarize(
        names,
        {
            "loss": Mean(6.0, 12.0),
            "fwd_steps": Mean(8.0, 2.0),
            "confusion": Mean(matrix, 8.0),
        },
    )
    assert values == {
        "loss": 0.5,
        "fwd_steps": 4.0,
        "miou": (3 / 4 + 4 / 5) / 2,
        "accuracy": 7 / 8,
        "iou/class 0": 3 / 4,
        "iou/class 1": 4 / 5,
    }


def test_the_pictures_are_of_different_images_and_the_right_colours(scenes, tmp_path):
    config = tiny(tmp_path)
    chosen = report.pick(config, seg_data.open_data(config).source)
    for record, index in zip(chosen, (0, 2), strict=True):
        np.testing.assert_array_equal(record["image"], Scenes(5).images[index])
    palette = seg_data.CLASSES["camvid"].palette
    painted = report.paint(np.asarray([3, 255]), palette)
    np.testing.assert_array_equal(painted, [palette[3], report.IGNORED])


def test_missing_data_says_the_command(tmp_path):
    config = tiny(tmp_path / "run")
    away = dataclasses.replace(config.data, dir=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"tfds build camvid .*{tmp_path}"):
        seg_main.run(dataclasses.replace(config, data=away))
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_is_refused_in_words(scenes, tmp_path):
    config = tiny(tmp_path)
    deep = dataclasses.replace(config.model, channels=(4,) * 6)
    wide = dataclasses.replace(config.data, crop=(64, 64))
    with pytest.raises(UsageError, match=r"camvid at full size: .*multiple of 64"):
        seg_data.open_data(dataclasses.replace(config, model=deep, data=wide))
    with pytest.raises(UsageError, match="has 11 classes; set model.classes"):
        many = dataclasses.replace(config.model, classes=19)
        seg_data.open_data(dataclasses.replace(config, model=many))
    with pytest.raises(UsageError, match="class_weights to frequency or none"):
        published = dataclasses.replace(config.data, class_weights="published")
        seg_data.open_data(dataclasses.replace(config, data=published))
    with pytest.raises(ValueError, match="multiple of 2"):
        dataclasses.replace(config, data=dataclasses.replace(config.data, crop=(16, 31)))
    with pytest.raises(ValueError, match="scale_high must be at least scale_low"):
        dataclasses.replace(config.data, scale_high=0.1)


def test_presets_are_what_was_published():
    published = {  # channels, steps, images, crop, dropout, weight decay
        "cityscapes_small": ((32, 64, 128, 256), 500 * 247, 12, (512, 1024), 0.05, 2e-4),
        "cityscapes_large": ((80, 160, 320, 640), 500 * 247, 12, (512, 1024), 0.03, 3e-4),
        "cityscapes_xl": ((88, 176, 352, 704), 500 * 371, 8, (768, 1024), 0.04, 3e-4),
    }
    assert set(PRESETS) == {*published, "camvid_small"}
    for name, config in PRESETS.items():
        assert config.workdir == f"runs/{name}"
        assert len(seg_data.CLASSES[config.data.name].names) == config.model.classes
        if name in published:
            found = (
                config.model.channels,
                config.train.steps,
                config.train.batch_size,
                config.data.crop,
                config.model.dropout,
                config.optim.weight_decay,
            )
            assert found == published[name], name
            check_size(config.model, 1024, 2048)
            assert config.model.momentum == 0.01 and config.data.class_weights == "published"


@pytest.mark.parametrize("name", ["cityscapes_xl", "camvid_small"])
def test_presets_trace_at_their_own_sizes(name):
    """Shapes only: a training pass of the warm-up on crops, and an evaluation of whole frames."""
    config = PRESETS[name]
    count = config.model.classes
    seen = task.build_task(config, make_mesh(jax.devices()[:1]))
    params, extra = jax.eval_shape(functools.partial(init, seen), jax.random.key(0))
    frame = (192, 256) if config.data.name == "camvid" else (1024, 2048)

    def forward(size, train):
        batch = {
            "image": jax.ShapeDtypeStruct((1, *size, 3), np.float32),
            "label": jax.ShapeDtypeStruct((1, *size), np.int32),
            "mask": jax.ShapeDtypeStruct((1,), np.float32),
        }

        def run(params, extra, batch):
            key = jax.random.key(0) if train else None
            found = task_forward(
                seen, config, params, extra, None, batch, key=key, train=train, warmup=train
            )
            return found.loss, found.means["confusion"]

        return jax.eval_shape(run, params, extra, batch)

    for loss, confusion in (forward(config.data.crop, True), forward(frame, False)):
        assert loss.shape == () and loss.dtype == np.float32
        assert confusion.total.shape == (count, count)
        assert confusion.total.dtype == confusion.count.dtype == np.int32


@pytest.mark.parametrize("size", ["small", "large", "xl"])
def test_the_trunk_of_an_imagenet_model_fits(size):
    """What --init_from takes over: every array of stem and equilibrium, none of the head."""
    mesh = make_mesh(jax.devices()[:1])
    theirs = build_image_task(IMAGE_PRESETS[f"imagenet_{size}"], mesh)
    ours = task.build_task(PRESETS[f"cityscapes_{size}"], mesh)
    there, here = (
        jax.eval_shape(functools.partial(init, t), jax.random.key(0)) for t in (theirs, ours)
    )
    for part in ("stem", "equilibrium"):
        assert there[0][part] == here[0][part]
    assert there[1]["batch_stats"]["stem"] == here[1]["batch_stats"]["stem"]
    assert not set(there[0]["head"]) & set(here[0]["head"])
