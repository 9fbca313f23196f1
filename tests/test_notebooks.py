"""The code cells of the notebooks run in order, without Jupyter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells(path: Path) -> list[str]:
    """The code cells, without IPython's own commands, which install what is already here."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [
        "".join(line for line in cell["source"] if not line.startswith(("%", "!")))
        for cell in notebook["cells"]
        if cell["cell_type"] == "code"
    ]


# What must hold at the end, by notebook.
TRUE = {"quickstart": "error < 1e-3 and results[4.0] < 0.5 * results[0.0]"}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path):
    """In a process of its own, compiled as for a user: it trains for longer than tests do."""
    pytest.importorskip("matplotlib")
    script = "\n".join([*cells(path), f"assert {TRUE.get(path.stem, True)}"])
    environment = {n: v for n, v in os.environ.items() if n != "XLA_FLAGS"} | {
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_saved_without_output(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert all(not cell.get("outputs") for cell in notebook["cells"])
