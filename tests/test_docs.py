"""Pages of docs/ that list or quote what the code has."""

import re
import sys
from pathlib import Path

import pytest
from absl import flags as absl_flags

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
    marked = set(re.findall(r"`--([\w.]+)` \\\*", table))
    assert marked == {leaf.name for leaf in flags.fields.leaves(Config()) if leaf.may_change}
