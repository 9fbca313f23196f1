"""The code cells of the notebooks run in order, without Jupyter."""

import json
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


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, capsys):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    names: dict = {"__name__": "notebook"}
    for number, cell in enumerate(cells(path)):
        exec(compile(cell, f"{path.name}, code cell {number}", "exec"), names)
        pyplot.close("all")
    if path.stem == "quickstart":
        assert names["error"] < 1e-3
        assert names["results"][4.0] < 0.5 * names["results"][0.0]
    capsys.readouterr()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_saved_without_output(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert all(not cell.get("outputs") for cell in notebook["cells"])
