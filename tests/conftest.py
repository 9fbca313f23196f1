"""Settings of every test: eight CPU devices, no silent broadcasting, float64 on request."""

import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
# Workers share a GPU: each takes memory as it needs it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

# Files whose tests state what programs cost.  They run in a process of their own, compiled as for a
# user.  To choose among their tests set the variable:
#     DEQ_JAX_TESTS_DEFAULT_FLAGS=1 python -m pytest tests/test_cost.py -k memory
AS_COMPILED_FOR_USERS = ("test_cost.py",)
DEFAULT_FLAGS = "DEQ_JAX_TESTS_DEFAULT_FLAGS"


def compile_fast() -> None:
    """Sets XLA's flags before its first use: the suite mostly compiles what runs for milliseconds.

    Without optimisation compiling takes half the time.  jaxlib 0.10 saves a third of the rest if it
    fuses loops in its former way; later versions know no other way, and end at an unknown flag.
    """
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "")
        + " --xla_backend_optimization_level=0"
        + " --xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.10.")
    )


def pytest_configure(config: pytest.Config) -> None:
    if DEFAULT_FLAGS not in os.environ and config.getoption("markexpr") != "accelerator":
        compile_fast()
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


class AsCompiledForUsers(pytest.Module):
    """A file of tests that another process collects and runs."""

    def collect(self) -> Iterator[pytest.Item]:
        yield OwnProcess.from_parent(self, name="in_a_process_of_its_own")


class OwnProcess(pytest.Item):
    """Passes if all tests of the file pass."""

    def runtest(self) -> None:
        flags = os.environ.get("XLA_FLAGS", "").split()
        ours = ("--xla_backend_optimization_level", "--xla_cpu_use_fusion_emitters")
        environment = os.environ | {
            "XLA_FLAGS": " ".join(flag for flag in flags if not flag.startswith(ours)),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            DEFAULT_FLAGS: "1",
        }
        chosen = ["-n", "0", "-p", "no:cacheprovider", "-m", self.config.getoption("markexpr")]
        command = [sys.executable, "-m", "pytest", *chosen, str(self.path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            pytest.fail(done.stdout + done.stderr, pytrace=False)


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Module | None:
    if module_path.name in AS_COMPILED_FOR_USERS and DEFAULT_FLAGS not in os.environ:
        return AsCompiledForUsers.from_parent(parent, path=module_path)
    return None


@pytest.fixture(autouse=True)
def few_mappings():
    """Forgets compiled programs before their memory mappings reach the kernel's limit of 65,530.

    Beyond it the compiler crashes; a worker that runs test_adjoints.py comes that far.
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


@pytest.fixture
def compilations():
    """Names of programs that are compiled, as they come."""
    names = []

    def listen(event, duration, **facts):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(facts.get("fun_name", event))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)
