"""Table and pictures of language modelling: perplexity, cost and stability of the models."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from deq_jax.data.text import unigram_perplexity
from deq_jax.training import Batch, EvalData, Evaluator, distributed
from experiments.common import reporting
from experiments.common.reporting import NAMES, Trained
from experiments.language_modeling.config import LanguageConfig
from experiments.language_modeling.data import Texts


def measure(config: LanguageConfig, model: Trained, texts: Texts, mesh: Mesh) -> dict[str, Any]:
    """The numbers of one column of the table.

    Args:
      config: the whole configuration.
      model: a trained model.
      texts: whose validation and test splits are evaluated.
      mesh: the devices.

    Returns:
      "valid" and "test" (budget -> perplexity), `reporting.training_numbers` with words
      "per_second", and of an equilibrium "steps", "unconverged" (share), "residual",
      "spectral_radius", "penalty", at the largest budget on the validation text.
    """
    task, state = model.task, model.result.state
    evaluator = Evaluator(task, config, texts.valid, mesh=mesh)
    valid, test = (
        evaluator(state, _told(f"{name} text", data))
        for name, data in (("validation", texts.valid), ("test", texts.test))
    )
    main = valid[config.eval_steps]
    numbers = reporting.training_numbers(config, model.result)
    rate = numbers["per_second"]  # of segments
    return numbers | {
        "valid": {budget: values["perplexity"] for budget, values in valid.items()},
        "test": {budget: values["perplexity"] for budget, values in test.items()},
        "per_second": None if rate is None else rate * config.data.length,
        "steps": main.get("fwd_steps"),
        "unconverged": main.get("unconverged"),
        "residual": main.get("fwd_residual"),
        "spectral_radius": main.get("spectral_radius"),
        "penalty": main.get("penalty"),
    }


def _told(label: str, data: EvalData) -> EvalData:
    """Says when a pass begins, since one may take minutes."""

    def one_pass() -> Iterable[Batch]:
        if distributed.is_first():
            sys.stderr.write(f"reading the {label}\n")
        return data()

    return one_pass


def write(
    folder: Path,
    config: LanguageConfig,
    trained: Mapping[str, Trained],
    texts: Texts,
    mesh: Mesh,
) -> str:
    """Writes results.md, results.json and results.png.

    Args:
      folder: of the experiment.
      config: the whole configuration.
      trained: name -> model.
      texts: the corpus.
      mesh: the devices.

    Returns:
      The table, for the screen.
    """
    columns = {name: measure(config, model, texts, mesh) for name, model in trained.items()}
    splits, words = texts.corpus.splits, len(texts.corpus.vocabulary)
    unigram = {
        split: unigram_perplexity(splits["train"], splits[split], words)
        for split in ("valid", "test")
    }
    predicted = {split: len(splits[split]) - 1 for split in unigram}
    text = make_table(config, columns, unigram)
    text += (
        f"\nPerplexity per word, line ends included, of {predicted['valid']:,} validation and "
        f"{predicted['test']:,} test words out of\n{words:,}; segments of "
        f"{config.data.eval_length} words see {config.data.eval_memory} before them.  Unigram: "
        "every word guessed by its frequency.\n"
    )
    if stability := over_training(trained):
        text += f"\nOver training:\n\n{stability}"
    facts = {"unigram": unigram, "words": words, "predicted": predicted}
    reporting.write(folder, text, {name: column | facts for name, column in columns.items()})
    draw(folder / "results.png", config, trained, columns, unigram["valid"])
    return text


def make_table(
    config: LanguageConfig, columns: Mapping[str, Mapping[str, Any]], unigram: Mapping[str, float]
) -> str:
    """Lays out the comparison, one column for each model.

    Args:
      config: the whole configuration.
      columns: name -> what `measure` returned.
      unigram: split -> unigram perplexity.

    Returns:
      A Markdown table.
    """
    solves, limit, tol = config.model.name == "deq", config.eval_steps, config.solver.tol
    rows = []
    for split, name in (("valid", "validation"), ("test", "test")):
        rows.append([f"unigram perplexity, {name}", *(f"{unigram[split]:.1f}" for _ in columns)])
        for budget in config.eval_budgets if solves else (limit,):
            at = f" {reporting.at_steps(budget)}" if solves else ""
            cells = [f"{c[split][budget]:.1f}" for c in columns.values()]
            rows.append([f"{name} perplexity{at}", *cells])
    rows += [
        reporting.row(columns, f"steps to {tol:g}, at most {limit}", "steps", ".1f"),
        reporting.row(columns, f"not at {tol:g} in {limit} steps", "unconverged", ".1%"),
        reporting.row(columns, f"residual after at most {limit} steps", "residual", ".2e"),
        *reporting.cost_rows(columns, "words"),
    ]
    return reporting.table_of(columns, "text", rows)


def over_training(trained: Mapping[str, Trained]) -> str:
    """Lays out how each model's solves went in the course of training.

    Args:
      trained: name -> model.

    Returns:
      A Markdown table, a row for each evaluation: perplexity of the watched text and spectral
      radius at its largest budget, and the residual that training's own budget left; "" where
      there is no solve.
    """
    columns: dict[str, dict[int, Any]] = {}
    for name, model in trained.items():
        history = model.result.history
        left = {r["step"]: r.get("fwd_residual") for r in history if r["kind"] == "train"}
        measured = [r for r in history if r["kind"] == "eval" and "spectral_radius" in r]
        columns[name] = {
            r["step"]: (r["perplexity"], left[r["step"]], r["spectral_radius"])
            for r in measured
            if left.get(r["step"]) is not None
        }
    steps = sorted(set.intersection(*(set(rows) for rows in columns.values())))
    header = ["training step"]
    for name in columns:
        header += [f"perplexity {NAMES[name]}", "residual", "radius"]
    rows = []
    for step in steps:
        cells = [columns[name][step] for name in columns]
        rows.append(
            [str(step), *(c for p, r, s in cells for c in (f"{p:.1f}", f"{r:.4f}", f"{s:.2f}"))]
        )
    return reporting.table(header, rows) if rows else ""


def draw(
    path: Path,
    config: LanguageConfig,
    trained: Mapping[str, Trained],
    columns: Mapping[str, Mapping[str, Any]],
    unigram: float,
) -> None:
    """Draws the training curves and, for equilibria, what the number of solver steps does.

    Args:
      path: of the PNG.
      config: the whole configuration.
      trained: name -> model.
      columns: name -> what `measure` returned.
      unigram: unigram perplexity of the validation text.
    """
    solves = config.model.name == "deq"
    count = 4 if solves else 2
    figure, (axes,) = reporting.new_figure(1, count, (4.6 * count, 4.2))
    for name, model in trained.items():
        history = model.result.history
        reporting.draw_history(axes[0], name, history, "train", "perplexity")
        if solves:
            reporting.draw_history(axes[2], name, history, "train", "fwd_residual")
        else:
            reporting.draw_history(axes[1], name, history, "eval", "perplexity")
    axes[0].set(xlabel="training step", ylabel="perplexity", yscale="log", title="Training")
    axes[0].axhline(unigram, color="0.4", linewidth=1, linestyle=":", label="unigram, validation")
    axes[1].set(xlabel="training step", ylabel="validation perplexity", title="Validation")
    if solves:
        reporting.draw_budgets(axes[1], config, columns, "valid")
        axes[1].set_title("Perplexity when stopped early")
        reporting.label_residual(axes[2], config)
        axes[2].set(xlabel="training step", title="Residual at the end of a solve")
        reporting.draw_radius(axes[3], trained)
    low, high = axes[1].get_ylim()
    if high > 3 * max(low, 1):  # a model that blows up when it is stopped early
        axes[1].set_yscale("log")
    for axis in axes:
        axis.legend(frameon=False)
    reporting.save(figure, path)
