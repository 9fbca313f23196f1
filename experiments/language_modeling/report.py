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
from experiments.common.reporting import NAMES, STYLES, Trained
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
      "valid" and "test" (budget -> perplexity), `experiments.report.training_numbers`,
      "tokens_per_second", and of an equilibrium "steps", "unconverged" (share), "residual",
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
    rate = numbers["examples_per_second"]
    return numbers | {
        "valid": {budget: values["perplexity"] for budget, values in valid.items()},
        "test": {budget: values["perplexity"] for budget, values in test.items()},
        "tokens_per_second": None if rate is None else rate * config.data.length,
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
    reporting.write(folder, text, columns | facts)
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
    solves = config.model.name == "deq"

    def row(label: str, key: str, form: str) -> list[str]:
        cells = [c[key] for c in columns.values()]
        if all(cell is None for cell in cells):
            return []
        return [label, *("-" if c is None else format(c, form) for c in cells)]

    rows = []
    for split, name in (("valid", "validation"), ("test", "test")):
        rows.append([f"unigram perplexity, {name}", *(f"{unigram[split]:.1f}" for _ in columns)])
        for budget in config.eval_budgets if solves else (config.eval_steps,):
            at = f" at {budget} step{'s' * (budget > 1)}" if solves else ""
            cells = [f"{c[split][budget]:.1f}" for c in columns.values()]
            rows.append([f"{name} perplexity{at}", *cells])
    if solves:
        limit = config.eval_steps
        rows += [
            row(f"steps to {config.solver.tol:g}, at most {limit}", "steps", ".1f"),
            row(f"not at {config.solver.tol:g} in {limit} steps", "unconverged", ".1%"),
            row(f"residual after at most {limit} steps", "residual", ".2e"),
            row("spectral radius of df/dz", "spectral_radius", ".2f"),
            row("penalty", "penalty", ".4f"),
            row("steps forward in training (NFE)", "train_steps", ".1f"),
            row("steps backward in training", "backward_steps", ".1f"),
        ]
    rows += [
        row("seconds per training step", "seconds_per_step", ".4f"),
        row("words per second in training", "tokens_per_second", ",.0f"),
    ]
    return reporting.table(["text", *(NAMES[n] for n in columns)], [r for r in rows if r])


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
            budgets = sorted(columns[name]["valid"])
            values = [columns[name]["valid"][b] for b in budgets]
            axes[1].plot(budgets, values, label=NAMES[name], **STYLES[name])
            reporting.draw_history(axes[2], name, history, "train", "fwd_residual")
            reporting.draw_history(axes[3], name, history, "eval", "spectral_radius")
        else:
            reporting.draw_history(axes[1], name, history, "eval", "perplexity")
    axes[0].set(xlabel="training step", ylabel="perplexity", yscale="log")
    axes[0].axhline(unigram, color="0.4", linewidth=1, linestyle=":", label="unigram, validation")
    axes[0].set_title("Training")
    axes[1].set(ylabel="validation perplexity")
    low, high = axes[1].get_ylim()
    if high > 3 * max(low, 1):  # a model that blows up when it is stopped early
        axes[1].set_yscale("log")
    if solves:
        _label_solves(axes, config)
    else:
        axes[1].set(xlabel="training step", title="Validation")
    for axis in axes:
        axis.legend(frameon=False)
    reporting.save(figure, path)


def _label_solves(axes: Any, config: LanguageConfig) -> None:
    _, stopped, residual, radius = axes
    stopped.set(xlabel="solver steps (evaluations of f)", title="Perplexity when stopped early")
    stopped.set_xticks(config.eval_budgets, [str(b) for b in config.eval_budgets])
    residual.axhline(config.solver.tol, color="0.4", linewidth=1, linestyle=":", label="tolerance")
    residual.set(xlabel="training step", yscale="log", title="Residual at the end of a solve")
    residual.set_ylabel("relative residual" if config.solver.stop == "rel" else "residual")
    radius.axhline(1, color="0.4", linewidth=1, linestyle=":")
    radius.set(xlabel="training step", ylabel="spectral radius of df/dz at z*")
    radius.set_ylim(bottom=0)
    radius.set_title("Stability over training")
