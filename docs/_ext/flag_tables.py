"""The directive ``flags``: tables of an experiment's flags and presets, made with the site.

The rows are the absl flags that the program itself defines, so that no list is kept by hand.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags

from deq_jax.training import Config, fields, flags

if TYPE_CHECKING:
    from docutils import nodes
    from sphinx.application import Sphinx

TASKS = Path(__file__).parents[2] / "experiments"
COMMON = "common"
"""Stands for the flags that all experiments have."""


def tasks() -> list[str]:
    """The experiments that have a program."""
    return sorted(path.parent.name for path in TASKS.glob("*/main.py"))


def presets(task: str) -> dict[str, Any]:
    """The presets of an experiment."""
    return importlib.import_module(f"experiments.{task}.main").PRESETS


def define(config: Any) -> absl_flags.FlagValues:
    """The flags of a program whose defaults are those of the configuration."""
    values = absl_flags.FlagValues()
    flags.define("", config, [], values)
    return values


def differing(task: str) -> dict[str, dict[str, str]]:
    """Flag -> preset -> value, where a preset has another value than the flag's default."""
    found: dict[str, dict[str, str]] = {}
    for preset, config in presets(task).items():
        defaults = {leaf.name: leaf.value for leaf in fields.leaves(type(config)())}
        for leaf in fields.leaves(config):
            if leaf.value != defaults[leaf.name] and leaf.name != "workdir":
                found.setdefault(leaf.name, {})[preset] = written(leaf.value)
    return found


def written(value: Any) -> str:
    """A value as the command line takes it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def markdown(task: str) -> str:
    """The flags of an experiment and the values of its presets, or the flags of all experiments."""
    common = list(define(Config()))
    if task == COMMON:
        return _flag_table(Config(), common)
    named = presets(task)
    config = type(next(iter(named.values())))()
    own = _flag_table(config, [name for name in define(config) if name not in common])
    lines = [own, "", "| flag | values of the presets |", "| --- | --- |"]
    for name, of_preset in differing(task).items():
        groups: dict[str, list[str]] = {}
        for preset, text in of_preset.items():
            groups.setdefault(text, []).append(preset)
        cells = [
            f"{_code(text)} {'all' if len(some) == len(named) > 1 else ', '.join(some)}"
            for text, some in groups.items()
        ]
        lines.append(f"| `--{name}` | {'; '.join(cells)} |")
    return "\n".join(lines)


def _flag_table(config: Any, names: Iterable[str]) -> str:
    values = define(config)
    free = {leaf.name for leaf in fields.leaves(config) if leaf.may_change}
    lines = ["| flag | default | takes | what it does |", "| --- | --- | --- | --- |"]
    for name in names:
        flag = values[name]
        takes = "true or false" if flag.boolean else flag.parser.flag_type().replace("|", ", ")
        text = str(flag.help).removesuffix("\n(default: none)").removesuffix(": ")
        mark = "\\*" if name in free else ""
        default = _code(written(flag.default))
        lines.append(f"| `--{name}`{mark} | {default} | {_cell(takes)} | {_cell(text)} |")
    return "\n".join(lines)


def _code(text: str) -> str:
    return f"`{_cell(text)}`" if text else "(empty)"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", r"\|").split())


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx, which the tests of these tables do without."""
    from sphinx.util.docutils import SphinxDirective

    class Flags(SphinxDirective):
        """Its argument is an experiment, or ``common``."""

        required_arguments = 1

        def run(self) -> list[nodes.Node]:
            """Returns the tables."""
            (task,) = self.arguments
            if task not in (COMMON, *tasks()):
                raise self.error(f"got {task}; wanted one of {COMMON}, {', '.join(tasks())}")
            return self.parse_text_to_nodes(markdown(task))

    app.add_directive("flags", Flags)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
