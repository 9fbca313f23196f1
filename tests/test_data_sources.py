"""Image sets on disk and in memory: opening, changes of size and place, labels of pixels."""

import io
import multiprocessing
import sys
from pathlib import Path

import numpy as np
import pytest

from deq_jax.data import augment, images, pipeline, segmentation, sources
from deq_jax.errors import UsageError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "tfds"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="no image sets beside the project")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A TFDS set of 7 + 3 images in ArrayRecord format, written without TensorFlow."""
    import tensorflow_datasets as tfds
    from PIL import Image

    class Shapes(tfds.core.GeneratorBasedBuilder):
        """Random images."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "id": tfds.features.Text(),
                "image": tfds.features.Image(shape=(8, 8, 3)),
                "label": tfds.features.ClassLabel(num_classes=4),
            }
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, description="", features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._examples(0, 7), "test": self._examples(7, 10)}

        def _generate_examples(self):
            raise NotImplementedError

        def _examples(self, start, stop):
            for i in range(start, stop):
                file = io.BytesIO()
                Image.fromarray(picture(i)).save(file, format="png")
                file.seek(0)
                yield i, {"id": f"example {i}", "image": file, "label": i % 4}

    folder = tmp_path_factory.mktemp("tfds")
    builder = Shapes(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return folder


def picture(i, size=(8, 8)):
    return np.random.default_rng(i).integers(0, 256, (*size, 3)).astype(np.uint8)


def test_a_prepared_set_is_read_without_tensorflow(prepared):
    opened = sources.open_tfds("shapes", "train", str(prepared))
    assert len(opened) == 7 and sources.num_classes(opened) == 4
    source = sources.Fields(opened, {"image": "image", "label": "label"})
    held = sources.in_memory(source)
    assert held.images.shape == (7, 8, 8, 3) and held.images.dtype == np.uint8
    ids = [int(opened[i]["id"].decode().split()[1]) for i in range(7)]
    for i, image, label in zip(ids, held.images, held.labels, strict=True):
        np.testing.assert_array_equal(image, picture(i))
        assert label == i % 4
    assert set(source[0]) == {"image", "label"}
    assert len(sources.open_tfds("shapes", "train[:3]", str(prepared))) == 3
    assert len(sources.open_tfds("shapes", "train+test", str(prepared))) == 10


def test_sets_in_a_bucket_are_refused_in_one_sentence():
    for folder in ("gs://bucket/sets", "s3://bucket/sets"):
        with pytest.raises(UsageError, match=rf"got the folder {folder}; wanted a local"):
            sources.open_tfds("cifar10", "train", folder)


def test_missing_sets_are_told_with_the_command(prepared, tmp_path):
    with pytest.raises(sources.MissingData) as caught:
        sources.open_tfds("cifar10", "train", str(tmp_path))
    command = f"tfds build cifar10 --file_format=array_record --data_dir={tmp_path}"
    assert command in str(caught.value) and "TensorFlow" in str(caught.value)
    with pytest.raises(sources.MissingData, match="no data set nowhere in"):
        sources.open_tfds("nowhere", "train", str(tmp_path))
    for split in ("valid", "train[", "train[:x]", "train[5:3]", "train+valid[:2]"):
        with pytest.raises(UsageError, match=r"got split .* of shapes; wanted one of \['train"):
            sources.open_tfds("shapes", split, str(prepared))
    assert len(sources.open_tfds("shapes", "train[:2] + train[5:]", str(prepared))) == 4


def test_a_missing_package_is_told_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(sources.MissingData, match="not installed: pip install tensorflow-datasets"):
        sources.open_tfds("shapes", "train")


def test_a_set_in_another_format_is_told(prepared, tmp_path):
    import json
    import shutil

    shutil.copytree(prepared / "shapes", tmp_path / "shapes")
    (info,) = (tmp_path / "shapes").rglob("dataset_info.json")
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
    with pytest.raises(sources.MissingData, match="is stored as tfrecord.*array_record"):
        sources.open_tfds("shapes", "train", str(tmp_path))


def test_images_of_different_sizes_do_not_go_into_memory():
    records = [{"image": picture(0), "label": 0}, {"image": picture(0, (4, 4)), "label": 0}]
    with pytest.raises(ValueError, match=r"got images of \(8, 8, 3\) and of \(4, 4, 3\)"):
        sources.in_memory(records)
    with pytest.raises(ValueError, match="empty source"):
        sources.in_memory([])


def test_pad_crop_moves_and_fills_with_black():
    image = picture(0) | 1  # nothing in it is black
    seen = set()
    rng = np.random.default_rng(0)
    for _ in range(300):
        out = augment.PadCrop(2)({"image": image, "label": 1}, rng)["image"]
        rows, columns = np.nonzero(out.any(axis=2))
        down, right = 8 - len(set(rows)), 8 - len(set(columns))
        down, right = (down if out[-1].any() else -down), (right if out[:, -1].any() else -right)
        wanted = np.zeros_like(image)
        wanted[max(down, 0) : 8 + min(down, 0), max(right, 0) : 8 + min(right, 0)] = image[
            max(-down, 0) : 8 - max(down, 0), max(-right, 0) : 8 - max(right, 0)
        ]
        np.testing.assert_array_equal(out, wanted)
        seen.add((down, right))
    assert seen == {(i, j) for i in range(-2, 3) for j in range(-2, 3)}


def test_flip_mirrors_half_of_the_images():
    rng, image = np.random.default_rng(0), picture(0)
    flipped = 0
    for _ in range(400):
        out = augment.RandomFlip()({"image": image}, rng)["image"]
        same = np.array_equal(out, image)
        assert same or np.array_equal(out, image[:, ::-1])
        flipped += not same
    assert 160 < flipped < 240


def test_resized_crops_have_the_area_and_the_shape_asked_for():
    crop, rng = augment.RandomResizedCrop(16, (0.2, 0.5), (0.8, 1.25)), np.random.default_rng(0)
    for _ in range(200):
        left, top, right, bottom = crop._box(60, 90, rng)
        assert 0 <= left < right <= 90 and 0 <= top < bottom <= 60
        assert 0.19 < (right - left) * (bottom - top) / 5400 < 0.52
        assert 0.75 < (right - left) / (bottom - top) < 1.33
    # No box of this shape fits ten times: the largest central one that does.
    assert augment.RandomResizedCrop(8, (1.0, 1.0))._box(10, 100, rng) == (43, 0, 56, 10)
    flat = {"image": np.full((50, 70, 1), 9, np.uint8)}
    out = crop(flat, rng)["image"]
    assert out.shape == (16, 16, 3) and (out == 9).all()


def test_resize_crop_takes_the_centre():
    image = np.zeros((40, 80, 3), np.uint8)
    image[10:30, 30:50] = 200  # the central square of half the height
    out = augment.ResizeCrop(20, 10)({"image": image})["image"]
    assert out.shape == (10, 10, 3) and (out[1:-1, 1:-1] == 200).all()


def test_standardized_published_statistics():
    image = np.full((2, 2, 3), 255, np.uint8)
    out = images.CIFAR({"image": image, "label": 3})
    wanted = (1 - np.array([0.4914, 0.4822, 0.4465])) / np.array([0.2023, 0.1994, 0.2010])
    np.testing.assert_allclose(out["image"][0, 0], wanted, rtol=1e-5)
    assert out["image"].dtype == np.float32 and out["label"].dtype == np.int32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: augment.PadCrop(-1), "pixels=-1"),
        (lambda: augment.RandomResizedCrop(0), "size=0"),
        (lambda: augment.RandomResizedCrop(8, (0.5, 2)), "shares in"),
        (lambda: augment.RandomResizedCrop(8, ratio=(2, 1)), "ratio"),
        (lambda: augment.ResizeCrop(10, 12), "crop <= resize"),
        (lambda: segmentation.RandomScaleCropFlip(0, 8), "0 x 8"),
        (lambda: segmentation.RandomScaleCropFlip(8, 8, 2, 1), "scales 2 to 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_label_ids_become_classes():
    assert len(segmentation.CITYSCAPES.names) == 19
    table = segmentation.CITYSCAPES.table()
    assert table[[7, 8, 33, 0, 1, 29, 30, 255]].tolist() == [0, 1, 18, 255, 255, 255, 255, 255]
    assert segmentation.CAMVID.table()[[0, 10, 11]].tolist() == [0, 10, 255]
    assert segmentation.CITYSCAPES.weights.shape == (19,)


def test_image_and_label_are_cropped_together():
    """Labels that are written into the image stay where they belong."""
    rng = np.random.default_rng(0)
    label = np.repeat(np.repeat(rng.integers(0, 11, (6, 8)), 16, 0), 16, 1).astype(np.uint8)
    record = {"image": np.repeat(label[..., None] * 20, 3, 2), "label": label}
    change = segmentation.RandomScaleCropFlip(64, 80, 0.4, 2.0, fill=(1, 2, 3))
    flips = filled = 0
    for seed in range(60):
        out = change(record, np.random.default_rng(seed))
        assert out["image"].shape == (64, 80, 3) and out["label"].shape == (64, 80)
        inside = out["label"] != segmentation.IGNORE
        assert (out["image"][~inside] == (1, 2, 3)).all()
        filled += not inside.all()
        # Bilinear weights mix neighbours at the edges of the squares only.
        agree = np.abs(out["image"][..., 0] - 20.0 * out["label"])[inside] < 3
        assert agree.mean() > 0.7
        again = change(record, np.random.default_rng(seed))
        np.testing.assert_array_equal(out["image"], again["image"])
        flips += 1
    assert 0 < filled < 60


def test_class_weights_lift_rare_classes():
    label = np.zeros((10, 10), np.uint8)
    label[0, :5], label[1] = 1, segmentation.IGNORE
    weights = segmentation.class_weights([{"label": label}], 3)
    share = np.array([85, 5, 0]) / 90
    wanted = 1 / np.log(1.02 + share)
    np.testing.assert_allclose(weights, wanted / wanted.mean(), rtol=1e-6)


NUMBERS = [{"x": np.float32(i)} for i in range(10)]


def jitter(record, rng):
    return {"x": record["x"] + np.float32(rng.uniform(0, 0.5))}


def test_processes_share_one_order():
    """Two processes give together, batch by batch, what one gives; also over epochs' ends."""
    one = pipeline.train_iterator(NUMBERS, batch_size=4, seed=3, augment=jitter)
    two = [
        pipeline.train_iterator(NUMBERS, batch_size=2, seed=3, augment=jitter, shard=(p, 2))
        for p in range(2)
    ]
    for _ in range(8):
        parts = [next(it)["x"] for it in two]
        np.testing.assert_array_equal(next(one)["x"], np.concatenate(parts))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 12])
def test_evaluation_counts_every_example_once_over_all_processes(count):
    passes = [
        list(pipeline.eval_batches(NUMBERS, batch_size=3, shard=(p, count), threads=p % 2))
        for p in range(count)
    ]
    assert len({len(batches) for batches in passes}) == 1, "all processes take part in every batch"
    seen = [
        x
        for batches in passes
        for b in batches
        for x, m in zip(b["x"], b["mask"], strict=True)
        if m
    ]
    assert sorted(seen) == list(range(10))
    assert {b["x"].shape for batches in passes for b in batches} == {(3,)}


class Counting(list):
    """A source that says how it is read."""

    calls = 0

    def __getitems__(self, indices):
        self.calls += 1
        return [self[i] for i in indices]


def test_a_source_that_reads_many_examples_at_once_is_let():
    source = Counting(NUMBERS)
    given = next(pipeline.train_iterator(source, batch_size=4, seed=3))["x"]
    one_by_one = next(pipeline.train_iterator(NUMBERS, batch_size=4, seed=3))["x"]
    np.testing.assert_array_equal(given, one_by_one)
    assert source.calls >= 1
    part = Counting([{"image": picture(i), "label": i} for i in range(600)])
    assert sources.in_memory(part).labels.tolist() == list(range(600)) and part.calls == 3


def test_batches_hold_numbers_of_one_shape():
    images_of_two_sizes = [{"image": picture(0)}, {"image": picture(0, (4, 4))}]
    with pytest.raises(ValueError, match=r"'image' of \(4, 4, 3\) and of \(8, 8, 3\)"):
        next(pipeline.eval_batches(images_of_two_sizes, batch_size=2))
    with pytest.raises(ValueError, match="'id' of type .* leave it out"):
        next(pipeline.train_iterator([{"id": b"a"}], batch_size=2, seed=0))
    with pytest.raises(ValueError, match="image of 1 channels; wanted 3"):
        images.CIFAR({"image": picture(0)[..., :1], "label": 0})


def test_shards_that_do_not_exist_are_refused():
    for shard in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="wanted \\(p, n\\)"):
            pipeline.train_iterator(NUMBERS, batch_size=2, seed=0, shard=shard)
        with pytest.raises(ValueError, match="wanted \\(p, n\\)"):
            next(pipeline.eval_batches(NUMBERS, batch_size=2, shard=shard))


@pytest.mark.slow
def test_workers_change_nothing(prepared):
    """Decoding processes give the batches of one thread, from any position."""
    opened = sources.open_tfds("shapes", "train", str(prepared))
    source = sources.Fields(opened, {"image": "image", "label": "label"})

    def make(workers):
        return pipeline.train_iterator(
            source,
            batch_size=3,
            seed=1,
            augment=augment.Chain((augment.RandomResizedCrop(8), augment.RandomFlip())),
            transform=images.IMAGENET,
            workers=workers,
        )

    alone, crowd = make(0), make(2)
    wanted = [next(alone) for _ in range(6)]
    for batch in wanted[:3]:
        other = next(crowd)
        assert set(other) == {"image", "label", "mask"}
        for name, array in batch.items():
            np.testing.assert_array_equal(array, other[name])
    assert crowd.get_state() == {"batches": 3}
    later = make(0)
    later.set_state(crowd.get_state())
    np.testing.assert_array_equal(next(later)["image"], wanted[3]["image"])
    # A scheduler ends a run by a signal to all its processes: there are batches until it has saved.
    started = multiprocessing.active_children()
    for worker in started:
        worker.terminate()
    for batch in wanted[3:]:
        np.testing.assert_array_equal(next(crowd)["image"], batch["image"])
    crowd.close()
    assert len(started) == 2 and not multiprocessing.active_children()


@needs_shared
@pytest.mark.parametrize(
    ("name", "counts", "classes"),
    [
        ("cifar10", (50_000, 10_000), 10),
        ("mnist", (10_000, 2_000), 10),
        ("tiny_imagenet20", (2_000, 1_000), 20),
    ],
)
def test_the_sets_beside_the_project_open(name, counts, classes):
    for split, count in zip(("train", "test"), counts, strict=True):
        split = "validation" if name == "tiny_imagenet20" and split == "test" else split
        opened = sources.open_tfds(name, split, str(SHARED))
        assert len(opened) == count and sources.num_classes(opened) == classes
        assert opened[0]["image"].dtype == np.uint8
