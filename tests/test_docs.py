"""Pages of docs/ that list or quote what the code has."""

import ast
import importlib
import json
import re
import sys
from pathlib import Path

import jax
import pytest
from absl import flags as absl_flags

import deq_jax
from deq_jax.training import Config, flags

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
sys.path.append(str(DOCS / "_ext"))
import flag_tables  # noqa: E402


def rows(table: str) -> dict[str, list[str]]:
    """Flag -> the other cells of its row."""
    lines = [re.split(r" (?<!\\)\| ", line.strip("| ")) for line in table.splitlines()]
    return {m[1]: cells[1:] for cells in lines if (m := re.match(r"`--([\w.]+)`", cells[0]))}


def test_every_experiment_has_its_flags_on_the_page():
    page = (DOCS / "flags.md").read_text(encoding="utf-8")
    asked = re.findall(r"^```\{flags\} (\w+)$", page, flags=re.MULTILINE)
    assert sorted(asked) == sorted([flag_tables.COMMON, *flag_tables.tasks()])
    heads = re.findall(r"^## (\w+)$", page, flags=re.MULTILINE)
    assert set(heads) == set(flag_tables.tasks())


@pytest.mark.parametrize("task", flag_tables.tasks())
def test_tables_have_every_flag_and_make_every_preset(task):
    """The flags of the program are all listed; given as listed, they are the preset."""
    own, _, values = flag_tables.markdown(task).partition("\n\n")
    listed = {**rows(flag_tables.markdown(flag_tables.COMMON)), **rows(own)}
    for preset, config in flag_tables.presets(task).items():
        program = absl_flags.FlagValues()
        flags.define(preset, config, [preset], program)
        assert list(listed) and set(listed) == set(program)
        assert all(len(cells) == 3 and cells[2] for cells in listed.values())
        words = [f"--{name}={cells[0]}" for name, cells in listed.items() if "." in name]
        words += [f"--workdir={config.workdir}"]
        for name, (cell,) in rows(values).items():
            for group in cell.split("; "):
                text, _, names = group.partition(" ")
                if preset in names.split(", ") or names == "all":
                    words.append(f"--{name}={text}")
        plain = [word.replace("`", "").replace("(empty)", "") for word in words]
        fresh = absl_flags.FlagValues()
        flags.define(preset, type(config)(), [preset], fresh)
        assert flags.parse_config(type(config)(), ["program", *plain], fresh) == config


def test_the_mark_is_on_what_a_resumed_run_may_change():
    table = flag_tables.markdown(flag_tables.COMMON)
    marked = set(re.findall(r"`--([\w.]+)`\\\*", table))
    assert marked == {leaf.name for leaf in flags.fields.leaves(Config()) if leaf.may_change}


def messages() -> list[str]:
    """All texts of the code; what is formatted into one is a line break."""
    found = []
    for part in ("deq_jax", "experiments"):
        for path in (ROOT / part).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = (v.value if isinstance(v, ast.Constant) else "\n" for v in node.values)
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def test_quoted_messages_are_those_of_the_code():
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    tables = page.split("| message | what to do |\n")[1:]
    lines = [line for table in tables for line in table.split("\n\n")[0].splitlines()[1:]]
    quoted = [line.split("`")[1] for line in lines if line.startswith("| `")]
    assert len(quoted) > 25
    texts = messages()
    for message in quoted:
        parts = [re.escape(part.strip()) for part in re.split(r"(?:\.\.\.)+", message)]
        pattern = re.compile(r"[\s\S]*".join(parts))
        assert any(pattern.search(text) for text in texts), message


PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def resolve(path: str) -> object:
    """What a dotted name below deq_jax is; raises if it is nothing."""
    name, found = "deq_jax", deq_jax
    for part in path.split("."):
        name = f"{name}.{part}"
        # As the import system does, a module comes after an attribute of its name.
        found = getattr(found, part) if hasattr(found, part) else importlib.import_module(name)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_of_the_library_and_flags_exist(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"\bdeq(?:_jax)?\.((?:\w+\.)*\w+)", text):
        resolve(path)
    names = set(flag_tables.define(Config()))
    for task in flag_tables.tasks():
        names |= set(flag_tables.define(next(iter(flag_tables.presets(task).values()))))
    used = re.findall(r"--(\w+\.\w+)", text)
    assert set(used) <= names


def test_papers_that_the_code_names_are_on_the_page():
    page = (DOCS / "references.md").read_text(encoding="utf-8")
    number = re.compile(r"arXiv (\d{4}\.\d{4,5}|math-ph/\d+)")
    sources = [p for part in ("deq_jax", "experiments") for p in (ROOT / part).rglob("*.py")]
    named = {m for path in sources for m in number.findall(path.read_text(encoding="utf-8"))}
    assert named and named <= set(number.findall(page))


def test_accuracies_of_a_section_are_those_of_its_numbers():
    page = DOCS / "results" / "cifar10_small.md"
    for section in re.split(r"(?m)^## ", page.read_text(encoding="utf-8")):
        files = re.findall(r"\((\w+\.json)\)", section)
        texts = [(page.parent / file).read_text(encoding="utf-8") for file in files]
        leaves = jax.tree.leaves(list(map(json.loads, texts)))
        recorded = [100 * leaf for leaf in leaves if isinstance(leaf, int | float)]
        tables = "\n".join(line for line in section.splitlines() if line.startswith("|"))
        shown = [float(percent) for percent in re.findall(r"([\d.]+) %", tables)]
        assert shown
        for percent in shown:
            assert any(abs(percent - number) < 0.0501 for number in recorded), percent
