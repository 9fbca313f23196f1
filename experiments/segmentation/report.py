"""Table and picture of segmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from deq_jax.data.pipeline import Record, Source
from deq_jax.models.layers import resize_bilinear
from deq_jax.training.parallel import place, replicated
from deq_jax.training.task import forward
from experiments.common import reporting
from experiments.common.reporting import NAMES, Trained
from experiments.segmentation.config import SegmentationConfig
from experiments.segmentation.data import NORMALIZE, Sets, choose_classes

IGNORED = np.asarray([40, 40, 40], np.uint8)
"""Colour of pixels without a label."""


def measure(config: SegmentationConfig, model: Trained) -> dict[str, Any]:
    """The numbers of one column of the table.

    Args:
      config: the whole configuration.
      model: a trained model.

    Returns:
      "miou" (budget -> share), "accuracy" and "iou" (class -> share) at the main budget, "steps",
      "unconverged", "spectral_radius", "penalty", None for what was not measured; and
      `reporting.training_numbers`.
    """
    final = model.result.evaluation
    main = final[config.eval_steps]
    return reporting.training_numbers(config, model.result) | {
        "miou": {budget: values.get("miou") for budget, values in final.items()},
        "accuracy": main.get("accuracy"),
        "iou": {name: main.get(f"iou/{name}") for name in choose_classes(config).names},
        "steps": main.get("fwd_steps"),
        "unconverged": main.get("unconverged"),
        "spectral_radius": main.get("spectral_radius"),
        "penalty": main.get("penalty"),
    }


def write(
    folder: Path,
    config: SegmentationConfig,
    trained: Mapping[str, Trained],
    sets: Sets,
    mesh: Mesh,
) -> str:
    """Writes results.md, results.json and predictions.png.

    Args:
      folder: of the experiment.
      config: the whole configuration.
      trained: name -> model.
      sets: evaluation images, and colours of the classes.
      mesh: the devices.

    Returns:
      The table, for the screen.
    """
    columns = {name: measure(config, model) for name, model in trained.items()}
    text = make_table(config, columns)
    reporting.write(folder, text, columns)
    draw(folder / "predictions.png", config, trained, sets, mesh)
    return text


def make_table(config: SegmentationConfig, columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Lays out the measures, one column for each model.

    Args:
      config: the whole configuration.
      columns: name -> what `measure` returned.

    Returns:
      A Markdown table with its explanation.
    """
    at = reporting.at_steps(config.eval_steps)

    def shares(label: str, values: Sequence[float | None]) -> list[str]:
        return [label, *("-" if v is None else f"{v:.1%}" for v in values)]

    rows = [
        shares(f"mIoU {reporting.at_steps(b)}", [c["miou"][b] for c in columns.values()])
        for b in config.eval_budgets
    ]
    rows.append(shares(f"pixel accuracy {at}", [c["accuracy"] for c in columns.values()]))
    for name in next(iter(columns.values()))["iou"]:
        rows.append(shares(f"IoU {name}", [c["iou"][name] for c in columns.values()]))
    missed = f"not at {config.solver.tol:g} in {config.eval_steps} steps"
    rows += [
        reporting.row(columns, "steps forward in evaluation (NFE)", "steps", ".1f"),
        reporting.row(columns, missed, "unconverged", ".1%"),
        *reporting.cost_rows(columns, "images"),
    ]
    part = config.data
    text = reporting.table_of(columns, f"{part.name}, {part.eval_split}", rows)
    text += (
        f"\nA step is one evaluation of f.  IoU of the classes {at}; mIoU is their "
        "mean, over the pixels\nof the whole set at once.  Penalty: norm(df/dz)_F^2 / number of "
        "elements of z."
    )
    if config.jac.gamma:
        text += f"  JR: gamma {config.jac.gamma:g} on {config.jac.prob:.0%} of the updates."
    return text + "\n"


def pick(config: SegmentationConfig, source: Source) -> list[Record]:
    """Takes a few evaluation images, evenly spread over the set.

    Args:
      config: drawn is read.
      source: the evaluation images.

    Returns:
      At most config.drawn examples.
    """
    total = len(source)
    wanted = np.linspace(0, total, min(config.drawn, total), endpoint=False, dtype=int)
    return [source[int(i)] for i in wanted]


def predict(
    config: SegmentationConfig, model: Trained, chosen: Sequence[Record], mesh: Mesh
) -> list[np.ndarray]:
    """Classes that a model gives to every pixel, at the main budget.

    Args:
      config: the evaluation budget is read.
      model: a trained model.
      chosen: from `pick`.
      mesh: the devices.

    Returns:
      For each example int32 [H, W].
    """

    @partial(jax.jit, out_shardings=replicated(mesh))
    def step(params: Any, extra: Any, batch: Any) -> jax.Array:
        scores = forward(model.task, config, params, extra, None, batch).output
        return jnp.argmax(resize_bilinear(scores, batch["label"].shape[1:]), -1).astype(jnp.int32)

    state, found = model.result.state, []
    for record in chosen:  # one at a time, a copy on each device: they may be large
        copies = {
            name: np.stack([value] * mesh.local_mesh.size)
            for name, value in NORMALIZE(record).items()
        }
        batch = place({**copies, "mask": np.ones(mesh.local_mesh.size, np.float32)}, mesh)
        found.append(np.asarray(step(state.params, state.extra, batch))[0])
    return found


def draw(
    path: Path,
    config: SegmentationConfig,
    trained: Mapping[str, Trained],
    sets: Sets,
    mesh: Mesh,
) -> None:
    """Draws images, their truth and the predictions, one image in a row.

    Args:
      path: of the PNG.
      config: the whole configuration.
      trained: name -> model.
      sets: evaluation images, and colours of the classes.
      mesh: the devices.
    """
    from matplotlib.patches import Patch

    palette, chosen = sets.classes.palette, pick(config, sets.source)
    columns = {
        "image": [record["image"] for record in chosen],
        "truth": [paint(record["label"], palette) for record in chosen],
    }
    for name, model in trained.items():
        title = "prediction" if len(trained) == 1 else f"prediction {NAMES[name]}"
        found = predict(config, model, chosen, mesh)
        columns[title] = [paint(labels, palette) for labels in found]
    count, (height, width) = len(chosen), chosen[0]["label"].shape
    size = (3.3 * len(columns), 3.3 * height / width * count + 1.0)
    figure, axes = reporting.new_figure(count, len(columns), size)
    for j, (title, pictures) in enumerate(columns.items()):
        axes[0, j].set_title(title)
        for i, shown in enumerate(pictures):
            axes[i, j].imshow(shown, interpolation="nearest")
            axes[i, j].set_axis_off()
    names = [*sets.classes.names, "no label"]
    patches = [
        Patch(facecolor=tuple((np.asarray(color) / 255).tolist()), edgecolor="0.4", label=name)
        for name, color in zip(names, [*palette, IGNORED], strict=True)
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    reporting.save(figure, path)


def paint(labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Colours of classes.

    Args:
      labels: integers [...]; what is no class is painted dark grey.
      palette: uint8 [classes, 3].

    Returns:
      uint8 [..., 3].

    Example:
      >>> paint(np.asarray([0, 255]), np.asarray([[9, 9, 9]], np.uint8)).tolist()
      [[9, 9, 9], [40, 40, 40]]
    """
    colors = np.concatenate([palette, IGNORED[None]])
    known = (labels >= 0) & (labels < len(palette))
    return colors[np.where(known, labels, len(palette))]
