"""Damaged image sets on disk: in batches, in memory, and in the experiments that read them."""

import io
import re

import numpy as np
import pytest
from test_corrupt import Holey, equal, take

from deq_jax.data import images, pipeline, segmentation, sources
from deq_jax.data.pipeline import CorruptRecord
from deq_jax.training import UsageError, fields

COUNT, BAD = 14, {2, 4, 9, 11}


def picture(i):
    return np.random.default_rng(i).integers(0, 256, (8, 8, 3)).astype(np.uint8)


def encoded(i):
    """The image of an example as a file; those of some examples are damaged."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture(i)).save(file, format="jpeg" if i == 4 else "png")
    data = file.getvalue()
    return {2: data[:-60], 4: data[: len(data) // 2], 9: b"\x89PNG nothing"}.get(i, data)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A TFDS set with a cut PNG, a cut JPEG, bytes that are no image, and a damaged file."""
    import tensorflow_datasets as tfds

    class Specks(tfds.core.GeneratorBasedBuilder):
        """Random images."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "id": tfds.features.Text(),
                "image": tfds.features.Image(shape=(8, 8, 3)),
                "label": tfds.features.ClassLabel(num_classes=COUNT),
            }
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, description="", features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(COUNT):
                image = io.BytesIO(encoded(i))
                yield i, {"id": f"example <{i}>", "image": image, "label": i}

    folder = tmp_path_factory.mktemp("tfds")
    Specks(data_dir=folder, file_format="array_record").download_and_prepare()
    (file,) = (path for path in folder.rglob("*array_record*") if path.is_file())
    data = bytearray(file.read_bytes())
    data[data.index(b"example <11>")] ^= 255
    file.write_bytes(data)
    return folder


@pytest.fixture
def specks(prepared):
    opened = sources.open_tfds("specks", "train", str(prepared))
    return sources.Fields(opened, {"image": "image", "label": "label"})


def bad_places(source):
    """Where the damaged records stand, found without the code under test."""
    bad = set()
    for i in range(len(source)):
        try:
            source[i]
        except Exception:
            bad.add(i)
    return bad


@pytest.mark.parametrize("threads", [0, 2])
def test_stop_names_the_first_damaged_record(specks, threads):
    bad = bad_places(specks)
    assert len(bad) == len(BAD)
    with pytest.raises(CorruptRecord) as caught:
        list(pipeline.eval_batches(specks, batch_size=3, threads=threads))
    assert re.fullmatch(
        rf"record {min(bad)} of specks/train cannot be read \(\w+: [^;]+\); repair the set, or "
        r"leave such records out with --data\.on_corrupt=skip",
        str(caught.value),
    )
    it = pipeline.train_iterator(specks, batch_size=COUNT, seed=0)
    for _ in range(2):  # also when it is asked again
        with pytest.raises(CorruptRecord, match="record (.*) of specks/train") as caught:
            next(it)
    assert int(str(caught.value).split()[1]) in bad and it.get_state() == {"batches": 0}
    it.close()


def test_skip_tells_each_damaged_record_once_and_why(specks, capsys):
    it = pipeline.train_iterator(specks, batch_size=COUNT, seed=0, on_corrupt="skip")
    take(it, 3)
    it.close()
    for _ in range(2):
        list(pipeline.eval_batches(specks, batch_size=4, on_corrupt="skip"))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("record ")]
    form = re.compile(r"record (\d+) of specks/train cannot be read \((.+)\): left out")
    told = dict(form.fullmatch(line).groups() for line in lines)
    assert len(lines) == len(BAD) and {int(i) for i in told} == bad_places(specks)
    reasons = " ".join(told.values())
    for reason in ("UnidentifiedImageError", "truncated", "RuntimeError: Corrupted Riegeli"):
        assert reason in reasons
    assert " at 0x" not in reasons


def test_skip_trains_on_another_example_instead(specks):
    batch_size = 7
    it = pipeline.train_iterator(specks, batch_size=batch_size, seed=3, on_corrupt="skip")
    for _ in range(3):
        epoch = take(it, COUNT // batch_size)
        assert epoch["image"].shape == (COUNT, 8, 8, 3) and epoch["mask"].all()
        assert epoch["corrupt"].dtype == np.float32 and epoch["corrupt"].sum() == len(BAD)
        own = epoch["label"][epoch["corrupt"] == 0]
        assert sorted(own) == sorted(set(range(COUNT)) - BAD)
        for image, label in zip(epoch["image"], epoch["label"], strict=True):
            np.testing.assert_array_equal(image, picture(label))
    it.close()


def test_a_prepared_set_is_evaluated_without_its_damaged_records(specks):
    batches = pipeline.eval_batches(specks, batch_size=4, transform=images.CIFAR, on_corrupt="skip")
    batches = list(batches)
    labels = np.concatenate([b["label"][b["mask"] > 0] for b in batches])
    assert sorted(labels) == sorted(set(range(COUNT)) - BAD)
    assert sum(b["corrupt"].sum() for b in batches) == len(BAD)


def test_a_set_in_memory_keeps_the_places_of_its_damaged_records(specks, capsys):
    with pytest.raises(CorruptRecord, match="of specks/train cannot be read"):
        sources.in_memory(specks)
    bad = bad_places(specks)
    held = sources.in_memory(specks, "skip")
    assert len(held) == COUNT and set(held.unreadable) == bad and held.name == "specks/train"
    with pytest.raises(CorruptRecord, match=rf"record {min(bad)} of specks/train"):
        held[min(bad)]
    good = np.stack([picture(i) for i in range(COUNT) if i not in BAD]).astype(float)
    np.testing.assert_allclose(images.Standardize.of(held).mean, good.mean((0, 1, 2)))

    def batches(source):
        make = {"batch_size": 5, "seed": 0, "on_corrupt": "skip", "transform": images.CIFAR}
        return take(pipeline.train_iterator(source, **make), 6)

    equal(batches(specks), batches(held))
    told = capsys.readouterr().err.splitlines()
    assert 0 < len(told) == len(set(told)) <= len(BAD)
    with pytest.raises(CorruptRecord, match="none of the 3 records of empty can be read"):
        sources.in_memory(Holey(3, range(3), "empty"), "skip")


class Scenes(Holey):
    """Frames of two classes, some of which cannot be read."""

    def __getitem__(self, index):
        super().__getitem__(index)
        label = np.full((32, 64, 1), index % 2, np.uint8)
        return {"image": np.repeat(label, 3, 2), "segmentation_label": label}


def test_class_frequencies_leave_damaged_records_out():
    names = {"label": "segmentation_label"}
    source = sources.Fields(Scenes(6, {1, 3}), names)
    with pytest.raises(CorruptRecord, match="record 1 of holey"):
        segmentation.class_weights(source, 2)
    share = np.array([3, 1]) / 4
    wanted = 1 / np.log(1.02 + share)
    given = segmentation.class_weights(source, 2, "skip")
    np.testing.assert_allclose(given, wanted / wanted.mean(), rtol=1e-6)


@pytest.mark.slow
def test_workers_give_the_same_batches_and_the_same_error(specks):
    def make(workers, on_corrupt="skip"):
        return pipeline.train_iterator(
            specks, batch_size=5, seed=1, workers=workers, on_corrupt=on_corrupt
        )

    alone, crowd = make(0), make(2)
    alone.set_state({"batches": 2})
    crowd.set_state({"batches": 2})
    for _ in range(4):
        equal(next(alone), next(crowd))
    crowd.close()
    stop = make(2, "stop")
    with pytest.raises(CorruptRecord) as caught:
        [next(stop) for _ in range(4)]
    with pytest.raises(CorruptRecord) as same:
        [next(make(0, "stop")) for _ in range(4)]
    assert str(caught.value) == str(same.value) and "of specks/train cannot" in str(same.value)
    again = make(2)
    again.set_state(stop.get_state())
    assert next(again)["corrupt"].any()  # what stopped the other is skipped here
    again.close()


def image_config(folder, **data):
    from experiments.image_classification.presets import PRESETS

    changes = {"name": "specks", "dir": str(folder), "eval_split": "train", "colors": 3}
    changes |= {"augment": "none", "eval_batch_size": 4, **data}
    changes = {f"data.{name}": value for name, value in changes.items()}
    return fields.replace(
        PRESETS["digits"], changes | {"model.classes": COUNT, "train.batch_size": 5}
    )


def test_image_classification_stops_in_words_or_skips(prepared):
    from experiments.image_classification.data import open_data

    for change in ({"in_memory": True}, {"in_memory": False, "statistics": "cifar"}):
        config = image_config(prepared, on_corrupt="stop", **change)
        with pytest.raises(UsageError, match=r"record \d+ of specks/train cannot be read"):
            sets = open_data(config)
            take(sets.train, 3)
    with pytest.raises(UsageError, match=r"record \d+ of specks/train cannot be read"):
        list(sets.eval())
    sets.train.close()
    found = []
    for in_memory in (True, False):
        config = image_config(prepared, on_corrupt="skip", in_memory=in_memory, statistics="cifar")
        sets = open_data(config)
        state = sets.train.get_state()
        found.append(take(sets.train, 3))
        sets.train.set_state(state)
        equal(found[-1], take(sets.train, 3))
        sets.train.close()
        assert sum(b["mask"].sum() for b in sets.eval()) == COUNT - len(BAD)
    equal(*found)
    open_data(image_config(prepared, on_corrupt="skip"))  # statistics of the set itself


def test_segmentation_stops_in_words_or_skips(monkeypatch):
    from experiments.segmentation import data
    from experiments.segmentation.presets import PRESETS

    monkeypatch.setattr(data.sources, "open_tfds", lambda name, split, _: Scenes(6, {0, 5}, split))
    changes = {"data.crop": (32, 32), "data.eval_batch_size": 2, "train.batch_size": 3}
    skip = fields.replace(PRESETS["camvid_small"], changes | {"data.on_corrupt": "skip"})
    for in_memory in (True, False):
        config = fields.replace(skip, {"data.in_memory": in_memory})
        sets = data.open_data(config)
        assert take(sets.train, 2)["corrupt"].sum() == 2
        assert sum(batch["mask"].sum() for batch in sets.eval()) == 4
        shown = [sets.source[i]["label"][0, 0] for i in range(len(sets.source))]
        assert shown == [1, 1, 0, 1, 0, 1], "the next one, after the last the first"
        sets.train.close()
        with pytest.raises(UsageError, match="record 0 of (train|test) cannot be read"):
            data.open_data(fields.replace(config, {"data.on_corrupt": "stop"}))
