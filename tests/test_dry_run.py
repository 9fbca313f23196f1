"""--dry_run tells what a step needs, from shapes alone."""

import dataclasses

import jax
import pytest

from deq_jax.training import UsageError
from deq_jax.training.parallel import make_mesh
from experiments.common import run as common_run
from experiments.image_classification import main as image_main
from experiments.image_classification.presets import PRESETS as IMAGES
from experiments.initialization import main as initialization_main
from experiments.initialization.config import PRESETS as INITIALIZATIONS
from experiments.language_modeling import data as language_data
from experiments.language_modeling import main as text_main
from experiments.language_modeling.presets import PRESETS as TEXTS
from experiments.segmentation import main as segmentation_main
from experiments.segmentation.presets import PRESETS as SCENES


@pytest.mark.slow
def test_a_dry_run_counts_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common_run, "make_mesh", lambda: make_mesh(jax.devices()[:2]))
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
    # Images of one device; Adam holds the parameters three times.
    images = config.train.batch_size // 2 * 32 * 32 * 3 * 4 / 2**20
    assert plain[1] == pytest.approx(images + 3 * 4 * plain[0] / 2**20, rel=0.05, abs=0.1)
    assert list(tmp_path.iterdir()) == []
    uneven = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=15))
    with pytest.raises(UsageError, match="batch_size=15 for 2 devices"):
        image_main.run(uneven)


@pytest.mark.parametrize("task", ["digits", "prose"])
def test_the_sample_is_that_of_the_data(task):
    config, main = (
        (IMAGES["digits"], image_main) if task == "digits" else (TEXTS["prose"], text_main)
    )
    data, mesh = main.EXPERIMENT.open_data(config), make_mesh(jax.devices()[:1])
    batch = next(data.train)
    found = {name: (array.shape, array.dtype) for name, array in batch.items() if name != "mask"}
    sample = main.EXPERIMENT.build_task(config, mesh, data).sample
    assert found == {name: (leaf.shape, leaf.dtype) for name, leaf in sample.items()}


def test_published_sizes_are_known_without_their_data():
    assert language_data.count_words(TEXTS["wikitext103_jr"].data) == 267_735
    mesh = make_mesh(jax.devices()[:1])
    task = image_main.EXPERIMENT.build_task(IMAGES["imagenet_small_jr"], mesh, None)
    assert task.sample["image"].shape == (128, 224, 224, 3)
    task = segmentation_main.EXPERIMENT.build_task(SCENES["cityscapes_small"], mesh, None)
    assert task.sample["label"].shape[1:] == (512, 1024)


def test_a_task_without_a_single_step_says_so(tmp_path):
    config = dataclasses.replace(
        INITIALIZATIONS["digits"], dry_run=True, workdir=str(tmp_path / "r")
    )
    with pytest.raises(UsageError, match="wanted another task"):
        initialization_main.run(config)
