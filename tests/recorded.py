"""Arrays recorded from the published PyTorch code, for the parity tests.

A few of them are in tests/data; all of them may lie beside the project.
"""

import functools
from pathlib import Path

import numpy as np
import pytest

TESTS = Path(__file__).resolve().parent
FOLDERS = (TESTS / "data", TESTS.parents[1] / "shared" / "reference")


@functools.cache
def _load(name):
    for folder in FOLDERS:
        if (folder / f"{name}.npz").exists():
            with np.load(folder / f"{name}.npz") as arrays:
                return dict(arrays)
    return None


def recorded(name):
    """The arrays of a file; without the file the test that wants them is skipped."""
    arrays = _load(name)
    if arrays is None:
        pytest.skip(f"no recorded arrays {name} beside the project")
    return arrays
