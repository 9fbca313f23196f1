"""--dry_run tells what a step needs, from shapes alone."""

import dataclasses

import jax
import numpy as np
import pytest

from deq_jax.training import UsageError
from deq_jax.training.parallel import make_mesh
from experiments.image_classification import data as image_data
from experiments.image_classification import main as image_main
from experiments.image_classification.presets import PRESETS as IMAGES
from experiments.initialization import main as initialization_main
from experiments.initialization.config import PRESETS as INITIALIZATIONS
from experiments.language_modeling import data as language_data
from experiments.language_modeling.presets import PRESETS as TEXTS
from experiments.segmentation import data as segmentation_data
from experiments.segmentation.presets import PRESETS as SCENES


@pytest.mark.slow
def test_a_dry_run_counts_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(image_main, "make_mesh", lambda: make_mesh(jax.devices()[:2]))
    preset = IMAGES["cifar10_small"]
    model = dataclasses.replace(preset.model, channels=(4,), head=(2,), final=8, groups=2)
    config = dataclasses.replace(
        preset,
        model=model,
        data=dataclasses.replace(preset.data, dir=str(tmp_path / "nowhere")),
        workdir=str(tmp_path / "run"),
        dry_run=True,
    )
    assert image_main.run(config) == {}
    table = capsys.readouterr().out
    lines = [line.split("|") for line in table.split("\n")]
    rows = {cells[1].strip(): cells[2:4] for cells in lines if len(cells) > 4}
    assert [cell.strip() for cell in rows["a step on 2 cpu"]] == ["no_jr", "jr"]
    plain, penalised = (
        [
            float(rows[name][i].replace(",", ""))
            for name in ("parameters", "memory: state and batch", "memory: while it runs", "GFLOPs")
        ]
        for i in (0, 1)
    )
    assert plain[:2] == penalised[:2] and plain[3] < penalised[3]
    images = 48 * 32 * 32 * 3 * 4 / 2**20  # of one device; Adam holds the parameters three times
    assert plain[1] == pytest.approx(images + 3 * 4 * plain[0] / 2**20, rel=0.05, abs=0.1)
    assert list(tmp_path.iterdir()) == []
    uneven = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=15))
    with pytest.raises(UsageError, match="batch_size=15 for 2 devices"):
        image_main.run(uneven)


@pytest.mark.parametrize("task", ["digits", "prose"])
def test_the_shapes_are_those_of_the_data(task):
    if task == "digits":
        config, module = IMAGES["digits"], image_data
        batch = next(module.build_data(config)[0])
    else:
        config, module = TEXTS["prose"], language_data
        batch = next(module.build_data(config).train)
    found = {name: (array.shape, array.dtype) for name, array in batch.items() if name != "mask"}
    assert found == {
        name: (shape, np.dtype(d)) for name, (shape, d) in module.shapes(config).items()
    }


def test_published_sizes_are_known_without_their_data():
    assert language_data.count_words(TEXTS["wikitext103_jr"].data) == 267_735
    assert image_data.shapes(IMAGES["imagenet_small_jr"])["image"][0] == (128, 224, 224, 3)
    assert segmentation_data.shapes(SCENES["cityscapes_small"])["label"][0][1:] == (512, 1024)


def test_a_task_without_a_single_step_says_so(tmp_path):
    config = dataclasses.replace(
        INITIALIZATIONS["digits"], dry_run=True, workdir=str(tmp_path / "r")
    )
    with pytest.raises(UsageError, match="wanted another task"):
        initialization_main.run(config)
