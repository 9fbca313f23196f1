"""The tutorials of docs/: what can be read off their files; the build of the site executes them."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "tutorials"
TUTORIALS = sorted(FOLDER.glob("*.ipynb"))
INSTALL = (FOLDER / "install_cell.py").read_text(encoding="utf-8").rstrip("\n")


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def is_hidden(cell: dict) -> bool:
    return "remove-cell" in cell["metadata"].get("tags", [])


each = pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)


@each
def test_no_output_is_stored(path):
    for cell in cells(path):
        assert not cell.get("outputs") and cell.get("execution_count") is None


@each
def test_begins_with_a_title(path):
    first = cells(path)[0]
    assert first["cell_type"] == "markdown" and source(first).startswith("# ")


@each
def test_installs_as_all_do(path):
    same = [cell for cell in cells(path) if source(cell) == INSTALL]
    assert len(same) == 1 and is_hidden(same[0])
    others = "".join(source(cell) for cell in cells(path) if cell not in same)
    assert "pip install" not in others and "google.colab" not in others


@each
def test_ends_with_a_hidden_assertion(path):
    last = cells(path)[-1]
    assert last["cell_type"] == "code" and is_hidden(last)
    statements = list(ast.walk(ast.parse(source(last))))
    assert any(isinstance(statement, ast.Assert) for statement in statements)


@each
def test_hides_nothing_else(path):
    assert sum(map(is_hidden, cells(path))) == 2


def test_the_site_lists_every_tutorial():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    listed = re.findall(r"^tutorials/(\S+)$", index, flags=re.MULTILINE)
    assert listed == [path.stem for path in TUTORIALS]


def test_numbers_count_from_one():
    assert [int(path.stem[:2]) for path in TUTORIALS] == list(range(1, len(TUTORIALS) + 1))


def test_the_site_runs_them_and_stops_at_errors():
    path = ROOT / "docs" / "conf.py"
    settings: dict = {"__file__": str(path)}
    exec(path.read_text(encoding="utf-8"), settings)
    assert settings["nb_execution_mode"] in ("cache", "force")
    assert settings["nb_execution_raise_on_error"]
    assert not settings.get("nb_execution_excludepatterns")
    assert "sphinx-build" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_formatted():
    command = [sys.executable, "-m", "ruff", "format", "--check", str(FOLDER)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_install_cell_has_the_address_of_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (address,) = set(re.findall(r"@ git\+([^\"\s]+)\"", readme))
    (own,) = re.findall(r'^REPOSITORY = "(.*?)"', INSTALL, flags=re.MULTILINE)
    assert own == address
    assert "git+{REPOSITORY}" in INSTALL


def test_the_install_cell_does_nothing_outside_of_colab(tmp_path):
    # No pip and no JAX can be found: a call of either would fail.
    script = f"import sys\nsys.executable = 'none'\nsys.modules['jax'] = None\n{INSTALL}\n"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0 and not done.stdout and not done.stderr, done.stderr


COLAB = """
import os, subprocess, sys, types
files, calls, answer = {files!r}, [], {answer!r}
os.path.exists = files.__contains__
os.environ.pop("TPU_ACCELERATOR_TYPE", None)
subprocess.run = lambda command, check: calls.append(command)
sys.modules["google.colab"] = types.ModuleType("google.colab")
sys.modules["jax"] = types.SimpleNamespace(default_backend=lambda: answer)
sys.modules["deq_jax"] = None  # no such package
exec(compile({install!r}, "install cell", "exec"))
(command,) = calls
print(*command, sep="\\n")
"""


@pytest.mark.parametrize(
    ("files", "chip", "package"),
    [
        (["/dev/nvidia0"], "gpu", "jax[cuda12]"),
        (["/dev/accel0"], "tpu", "jax[tpu]"),
        ([], "cpu", "jax"),
    ],
)
@pytest.mark.parametrize("found", ["right", "wrong"])
def test_on_colab_jax_and_its_plugin_are_installed_together(tmp_path, files, chip, package, found):
    answer = chip if found == "right" else "another"
    script = COLAB.format(files=files, answer=answer, install=INSTALL)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    if found == "wrong":
        assert done.returncode != 0 and "Restart session" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    assert words[1:4] == ["-m", "pip", "install"] and "--upgrade" in words
    assert package in words and any(word.startswith("deq_jax[") for word in words)
