"""The built wheel, installed where nothing but the core dependencies can be imported."""

import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# jax, jaxlib, flax, numpy and what these import when `flax.linen` is imported. Flax names optax,
# orbax and tensorstore as its dependencies too, which `import deq_jax` must get by without.
CORE = """jax jaxlib numpy scipy ml_dtypes opt_einsum flax msgpack rich Pygments markdown-it-py
mdurl PyYAML treescope typing_extensions absl-py""".split()

PROGRAM = """
import importlib.metadata, importlib.util, sys
import deq_jax as deq

assert not {"absl", "flax"} & set(sys.modules)  # only the Flax layers bring Flax, and it absl
import jax, jax.numpy as jnp
import deq_jax.linen

absent = "optax orbax tensorstore tensorflow_datasets grain tensorboardX tqdm sklearn torch"
assert not [name for name in absent.split() if importlib.util.find_spec(name)]
assert "site-packages" in deq.__file__, deq.__file__

def f(params, z, x):
    return jnp.tanh(z @ params["W"] + x)

params, x = {"W": 0.3 * jnp.eye(4)}, jnp.ones((2, 4))

def loss(params, x):
    sol = deq.fixed_point(f, params, jnp.zeros_like(x), x, solver=deq.Anderson(tol=1e-5))
    return jnp.sum(sol.value**2), sol.stats.converged

(_, converged), grads = jax.value_and_grad(loss, has_aux=True)(params, x)
assert converged.all() and jnp.isfinite(grads["W"]).all()
requires = importlib.metadata.requires("deq_jax")
print(sorted(line.split(">")[0] for line in requires if "extra" not in line))
"""


def run(*command: str | Path, cwd: Path) -> str:
    result = subprocess.run(
        [str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_wheel_needs_the_core_dependencies_only(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(
        ROOT / "deq_jax", source / "deq_jax", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # Neither step may reach for the network: what they need is installed with the tests.
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", ".", cwd=source)
    (wheel,) = (source / "dist").glob("*.whl")
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"deq_jax"}

    run(sys.executable, "-m", "venv", "--without-pip", "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", wheel]
    run(sys.executable, "-m", "pip", "--python", python, *install, cwd=tmp_path)
    (packages,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    for distribution in map(importlib.metadata.distribution, CORE):
        files = distribution.files or ()
        for top in {file.parts[0] for file in files} - {"..", "__pycache__", "bin"}:
            (packages / top).symlink_to(Path(str(distribution.locate_file(top))))

    printed = run(python, "-I", "-c", PROGRAM, cwd=tmp_path)
    assert printed.strip() == "['flax', 'jax', 'jaxlib', 'numpy']"
