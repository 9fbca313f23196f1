"""Image sets of Hugging Face's `datasets`: stored in the test, opened without a network."""

import io
import pickle
import sys

import numpy as np
import pytest
from numpy.testing import assert_array_equal  # datasets replaces np of the module of a builder
from test_corrupt import equal, take

from deq_jax.data import hub, images, pipeline, sources
from deq_jax.data.records import CorruptRecord
from deq_jax.training import UsageError, fields

COUNT, CLASSES = 20, 4
BAD = {3, 11}


@pytest.fixture(scope="module")
def datasets():
    """The package, quiet."""
    package = pytest.importorskip("datasets")
    package.disable_progress_bars()
    return package


def picture(i):
    return np.random.default_rng(i).integers(0, 256, (8, 8, 3)).astype(np.uint8)


def encoded(i, bad=()):
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture(i)).save(file, format="png")
    return {"bytes": file.getvalue()[:-60] if i in bad else file.getvalue(), "path": None}


def make(datasets, places, bad=(), names=("img", "label")):
    kinds = datasets.Image(), datasets.ClassLabel(num_classes=CLASSES)
    columns = [encoded(i, bad) for i in places], [i % CLASSES for i in places]
    features = datasets.Features(
        {"id": datasets.Value("string"), **dict(zip(names, kinds, strict=True))}
    )
    table = {"id": [f"example {i}" for i in places], **dict(zip(names, columns, strict=True))}
    return datasets.Dataset.from_dict(table, features=features)


@pytest.fixture(scope="module")
def folder(datasets, tmp_path_factory):
    """Two splits, and a set with damaged images."""
    folder = tmp_path_factory.mktemp("hub")
    parts = datasets.DatasetDict(
        train=make(datasets, range(COUNT)), test=make(datasets, range(COUNT, COUNT + 8))
    )
    parts.save_to_disk(str(folder / "shapes"))
    make(datasets, range(COUNT), BAD).save_to_disk(str(folder / "specks"))
    return folder


def test_a_saved_set_is_a_source(folder):
    source = hub.open_hub("shapes", "train", str(folder))
    assert len(source) == COUNT and source.num_classes == sources.num_classes(source) == CLASSES
    assert source.name == "hf:shapes/train"
    for i in (0, COUNT - 1):
        assert_array_equal(source[i]["image"], picture(i))
        assert source[i]["label"] == i % CLASSES and source[i]["label"].dtype == np.int32
        assert set(source[i]) == {"image", "label"}
    first, second = source.__getitems__(np.array([7, 2]))
    assert_array_equal(first["image"], picture(7))
    assert_array_equal(second["image"], picture(2))
    copy = pickle.loads(pickle.dumps(source))  # to a process that decodes
    assert_array_equal(copy[5]["image"], picture(5))
    assert hub.open_hub(str(folder / "shapes"), "test")[0]["label"] == COUNT % CLASSES


@pytest.mark.parametrize(
    ("split", "places"),
    [
        ("train[:10%]", [0, 1]),
        ("train[18:]", [18, 19]),
        ("test[-2:]+train[:1]", [26, 27, 0]),
    ],
)
def test_splits_are_sliced_and_joined(folder, split, places):
    source = hub.open_hub("shapes", split, str(folder))
    assert len(source) == len(places)
    for record, place in zip(source.__getitems__(range(len(source))), places, strict=True):
        assert_array_equal(record["image"], picture(place))


def test_a_set_of_one_part_is_named_train(folder):
    assert len(hub.open_hub("specks", "train[:5]", str(folder))) == 5
    for split in ("test", "train[half]"):
        with pytest.raises(ValueError, match=r"got split .* of specks; wanted one of \['train'\]"):
            hub.open_hub("specks", split, str(folder))


def test_columns_are_found_by_their_types(datasets, tmp_path):
    def opened(data):
        data.save_to_disk(str(tmp_path / "set"))
        return hub.open_hub("set", "train", str(tmp_path))

    source = opened(make(datasets, range(3), names=("photo", "species")))
    assert (source.image, source.label, source.num_classes) == ("photo", "species", CLASSES)
    # Of several the one that is called so; integers of that name, if there are no classes.
    two = make(datasets, range(3), names=("img", "coarse"))
    two = two.add_column("labels", [0, 2, 5]).add_column("image", ["a"] * 3)
    assert opened(two.remove_columns("coarse")).num_classes is None
    assert opened(two.remove_columns("coarse"))[2]["label"] == 5
    assert opened(two).label == "coarse"
    coarse = two.cast_column("labels", datasets.ClassLabel(num_classes=9))
    assert opened(coarse).num_classes == 9
    # What a set was last used with does not matter.
    raw = make(datasets, range(3)).cast_column("img", datasets.Image(decode=False))
    assert_array_equal(opened(raw.with_format("numpy"))[1]["image"], picture(1))
    for missing, listed in (("img", r"id \(Value\), label \(Cl"), ("label", r"id \(Value\), img")):
        with pytest.raises(ValueError, match=rf"got the columns {listed}.*wanted one of type Ima"):
            opened(make(datasets, range(3)).remove_columns(missing))
    fine = coarse.rename_column("labels", "fine")
    with pytest.raises(ValueError, match=r"coarse \(ClassLabel\), fine \(ClassLabel\).*rename_col"):
        opened(fine)


@pytest.mark.parametrize(
    ("mode", "shape"),
    [
        ("L", (2, 4, 1)),
        ("1", (2, 4, 1)),
        ("I;16", (2, 4, 1)),
        ("RGBA", (2, 4, 3)),
        ("P", (2, 4, 3)),
    ],
)
def test_every_kind_of_image_has_channels(datasets, mode, shape):
    from PIL import Image

    image = Image.new(mode, (4, 2), 1)
    if mode == "P":
        image.putpalette([0, 0, 0, 200, 100, 50])
    features = datasets.Features({"a": datasets.Image(), "b": datasets.Value("int64")})
    data = datasets.Dataset.from_dict({"a": [image], "b": [1]}, features=features)
    pixels = hub.HubImages(data, "a", "b")[0]["image"]
    assert pixels.shape == shape and pixels.dtype == (np.uint16 if mode == "I;16" else np.uint8)
    first = {"1": [255], "RGBA": [1, 0, 0], "P": [200, 100, 50]}.get(mode, [1])
    assert pixels[0, 0].tolist() == first


def test_damaged_records_stop_or_are_left_out(folder, capsys):
    source = hub.open_hub("specks", "train", str(folder))
    with pytest.raises(CorruptRecord, match=r"record 3 of hf:specks/train cannot be read \(\w+: "):
        list(pipeline.eval_batches(source, batch_size=5))
    held = sources.in_memory(source, "skip")
    assert set(held.unreadable) == BAD and held.name == "hf:specks/train"

    def batches(source):
        given = {"batch_size": 5, "seed": 0, "on_corrupt": "skip", "transform": images.CIFAR}
        it = pipeline.train_iterator(source, **given)
        found = take(it, 8)
        it.close()
        return found

    from_disk = batches(source)
    equal(from_disk, batches(held))
    assert from_disk["corrupt"].sum() == 2 * len(BAD)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(BAD) and all("hf:specks/train" in line for line in lines)


@pytest.mark.parametrize("label", [None, -1, CLASSES])
def test_a_record_without_an_image_or_a_class_is_damaged(datasets, label):
    data = make(datasets, range(2)).cast_column("label", datasets.Value("int64"))
    rows = [row | ({"label": label} if i else {"img": None}) for i, row in enumerate(data)]
    source = hub.HubImages(
        datasets.Dataset.from_list(rows, features=data.features), "img", "label", CLASSES
    )
    with pytest.raises(ValueError, match="got no image"):
        source[0]
    with pytest.raises(ValueError, match=f"got the label {label}; wanted a class, 0 to 3"):
        source[1]


def test_a_cached_set_is_opened(datasets, tmp_path, monkeypatch):
    class Dots(datasets.GeneratorBasedBuilder):
        """What `load_dataset` would have stored."""

        def _info(self):
            return datasets.DatasetInfo(features=make(datasets, range(1)).features)

        def _split_generators(self, dl_manager):
            return [datasets.SplitGenerator("train")]

        def _generate_examples(self):
            yield from enumerate(make(datasets, range(5)))

    place = {"repo_id": "somebody/dots", "dataset_name": "dots", "hash": "0123"}
    Dots(cache_dir=str(tmp_path), **place).download_and_prepare()
    for data_dir in (str(tmp_path), ""):
        if not data_dir:
            monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
        source = hub.open_hub("somebody/dots", "train[1:]", data_dir)
        assert len(source) == 4 and source.num_classes == CLASSES
        assert_array_equal(source[0]["image"], picture(1))


def test_missing_and_damaged_sets_are_told_with_the_command(folder, tmp_path, monkeypatch):
    with pytest.raises(sources.MissingData) as caught:
        hub.open_hub("somebody/cats", "train", str(tmp_path))
    command = f"load_dataset('OWNER/NAME').save_to_disk('{tmp_path}/somebody/cats')"
    assert "no image set somebody/cats: " in str(caught.value) and command in str(caught.value)
    (tmp_path / "broken").mkdir()
    for file in (folder / "specks").iterdir():
        cut = 100 if file.suffix == ".arrow" else None
        (tmp_path / "broken" / file.name).write_bytes(file.read_bytes()[:cut])
    with pytest.raises(sources.MissingData, match=r"cannot be opened \(.*\); save it again by"):
        hub.open_hub("broken", "train", str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(sources.MissingData, match="not installed: pip install datasets pillow, or"):
        hub.open_hub("specks", "train", str(folder))


def config(folder, **data):
    from experiments.image_classification.presets import PRESETS

    changes = {"name": "hf:shapes", "dir": str(folder), "colors": 3, "eval_batch_size": 4} | data
    changes = {f"data.{name}": value for name, value in changes.items()}
    return fields.replace(
        PRESETS["digits"], changes | {"model.classes": CLASSES, "train.batch_size": 5}
    )


def test_image_classification_reads_it(folder):
    from experiments.image_classification.data import open_data

    found = []
    for in_memory in (True, False):
        sets = open_data(config(folder, in_memory=in_memory, statistics="cifar"))
        found.append(take(sets.train, 4))
        sets.train.close()
        labels = np.concatenate([batch["label"] for batch in sets.eval()])
        assert labels.tolist() == [i % CLASSES for i in range(COUNT, COUNT + 8)]
    equal(*found)
    assert found[0]["image"].shape == (COUNT, 8, 8, 3)
    assert sorted(found[0]["label"]) == sorted(i % CLASSES for i in range(COUNT))
    open_data(config(folder))  # statistics of the set itself


def test_image_classification_tells_what_is_wrong(datasets, folder, tmp_path):
    from experiments.image_classification.data import open_data

    make(datasets, range(3)).remove_columns("label").save_to_disk(str(tmp_path / "bare"))
    for changes, error, message in (
        ({"name": "hf:nowhere"}, sources.MissingData, "no image set nowhere"),
        ({"train_split": "valid"}, UsageError, "got split 'valid' of shapes"),
        ({"name": "hf:bare", "dir": str(tmp_path)}, UsageError, "wanted one of type Image"),
        ({"name": "hf:specks", "eval_split": "train"}, UsageError, "record 3 of hf:specks/train"),
    ):
        with pytest.raises(error, match=message):
            open_data(config(folder, **changes))
    with pytest.raises(UsageError, match="hf:shapes has 4 classes; set model.classes, which is 3"):
        open_data(fields.replace(config(folder), {"model.classes": 3}))
    with pytest.raises(ValueError, match="the name of a set"):
        config(folder, name="hf:")
