"""Settings of every test: eight CPU devices, no silent broadcasting, float64 on request."""

import gc
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
# Most of the suite's time goes into compiling programs that run for milliseconds.  JAX 0.10 can do
# without the slowest of XLA's ways to fuse loops; later ones end at a flag that they do not know.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.10.")
)

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache


def pytest_configure(config: pytest.Config) -> None:
    # Before any test module touches a device: afterwards the number of devices is fixed.
    if config.getoption("markexpr") != "accelerator":
        jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    # What one process has compiled, the other workers and the programs that tests start read from
    # disk: from a folder of this run, or a lasting one that JAX_COMPILATION_CACHE_DIR names.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="deq_jax_tests_", ignore_cleanup_errors=True)
        config.add_cleanup(folder.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    for name, all_of_them in (("min_compile_time_secs", 0), ("min_entry_size_bytes", -1)):
        jax.config.update(f"jax_persistent_cache_{name}", all_of_them)
        os.environ[f"JAX_PERSISTENT_CACHE_{name.upper()}"] = str(all_of_them)


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
def compilation_cache_off():
    """For tests of what compiling does or how often it happens."""
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    reset_cache()
