"""Settings of every test: eight CPU devices, no silent broadcasting, float64 on request."""

import gc
import os
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
# Most of the suite's time goes into compiling programs that run for milliseconds.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache


def pytest_configure(config: pytest.Config) -> None:
    # Before any test module touches a device: afterwards the number of devices is fixed.
    if config.getoption("markexpr") != "accelerator":
        jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    # The cost tests count compilations, which a cache on disk would hide.
    jax.config.update("jax_enable_compilation_cache", False)


@pytest.fixture(scope="module", autouse=True)
def few_mappings():
    """Forgets compiled programs before their memory mappings reach the kernel's limit of 65,530.

    Beyond it the compiler crashes; a worker that runs half of the suite comes that far.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 30_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def x64():
    """Runs a test in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def compilation_cache(tmp_path_factory):
    """Programs that a module's tests compile again and again are kept on disk, for all workers."""
    folder = tmp_path_factory.getbasetemp().parent / "compilation_cache"
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_compilation_cache_dir", None)
    reset_cache()
