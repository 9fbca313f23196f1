"""Settings of every test: eight CPU devices, no silent broadcasting, float64 on request."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest


def pytest_configure(config: pytest.Config) -> None:
    # Before any test module touches a device: afterwards the number of devices is fixed.
    if config.getoption("markexpr") != "accelerator":
        jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    # The cost tests count compilations, which a cache on disk would hide.
    jax.config.update("jax_enable_compilation_cache", False)


@pytest.fixture
def x64():
    """Runs a test in float64."""
    with jax.enable_x64(True):
        yield
