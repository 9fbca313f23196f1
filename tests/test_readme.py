"""README.md is true: its Python runs, its commands are those of CI, its files exist."""

import configparser
import re
from pathlib import Path

import jax.numpy as jnp
import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_python_blocks_run_in_order(capsys):
    names: dict = {"__name__": "readme"}
    for number, block in enumerate(blocks("python")):
        exec(compile(block, f"README.md, Python block {number}", "exec"), names)
    assert jnp.all(jnp.isfinite(names["grads"]["W"]))
    assert bool(names["stats"].converged.all())
    assert names["penalty"] > 0
    assert names["rho"].shape == (8,)
    capsys.readouterr()


def test_two_commands_set_up_from_nothing():
    fresh = [block for block in blocks("bash") if "git clone" in block]
    assert len(fresh) == 2
    job, tests = (block.replace("\\\n", " ") for block in fresh)
    assert "-m venv" in job and 'pip install -e ".[examples]"' in job
    assert "experiments.image_classification.main --preset=digits" in job
    assert "-m venv" in tests and "-m pytest" in tests


def test_ci_runs_the_commands_of_the_readme():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (tests,) = [block for block in blocks("bash") if "pytest" in block]
    install = re.search(r"pip (install .*?) *\\?\n", tests)
    command = re.search(r"python (-m pytest.*)\n", tests)
    assert install and command
    assert f"pip {install[1]}\n" in ci
    assert f"python {command[1]} | tee " in ci


def test_extras_are_those_of_setup_cfg():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = {
        name: {line for line in text.split("\n") if line}
        for name, text in setup["options.extras_require"].items()
    }
    parts = set().union(*(extras[name] for name in ("train", "data", "plot", "hub")))
    assert {line.split(">")[0] for line in extras["examples"] - parts} == {"scikit-learn"}
    assert parts < extras["examples"] < extras["test"]
    (table,) = re.findall(r"^\| extra \|.*?\n\n", README, flags=re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)) == extras.keys() - {
        "test",
        "bench",
    }


def test_extras_that_are_named_exist():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    kinds = ("*.md", ".ci/run", "notebooks/*", "deq_jax/**/*.py", "experiments/**/*.py")
    texts = [p.read_text(encoding="utf-8") for kind in kinds for p in ROOT.glob(kind)]
    named = re.findall(r"(?:\.|deq_jax)\[([a-z,]+)\]|with its extra (\w+)", "\n".join(texts))
    extras = set(",".join(",".join(names) for names in named).split(",")) - {""}
    assert {"examples", "test", "hub"} <= extras <= set(setup["options.extras_require"])


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_linked_files_exist(target):
    assert (ROOT / target).exists()


def test_modules_named_in_commands_exist():
    for module in re.findall(r"python -m ((?:experiments|benchmarks)\.[\w.]+)", README):
        if "TASK" not in module:
            assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module
