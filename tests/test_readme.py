"""README.md and docs/ are true: their Python runs, their commands and links exist."""

import configparser
import re
from pathlib import Path

import jax.numpy as jnp
import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def run(page: Path) -> dict:
    """The names that the page's Python blocks leave, run one after the other."""
    names: dict = {"__name__": "page"}
    for number, block in enumerate(blocks("python", page.read_text(encoding="utf-8"))):
        exec(compile(block, f"{page.name}, Python block {number}", "exec"), names)
    return names


@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in p.read_text("utf-8")])
def test_python_blocks_run_in_order(page, capsys):
    names = run(page)
    if page.name in ("README.md", "library.md"):
        assert jnp.all(jnp.isfinite(names["grads"]["W"]))
        assert bool(names["stats"].converged.all())
        (advice,) = blocks("text", page.read_text(encoding="utf-8"))
        assert advice.split() == names["diagnosis"].advice[0].split()
    capsys.readouterr()


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150 and len(README.split()) <= 950


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
        "docs",
    }


def test_every_part_with_public_names_is_in_the_reference():
    pages = "".join(page.read_text("utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    found = set(re.findall(r"^\.\. automodule:: (\S+)$", pages, flags=re.MULTILINE))
    listed = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "deq_jax").rglob("__init__.py")
        if "__all__" in path.read_text(encoding="utf-8")
    }
    # The core takes over the names of these, and its page has their two types.
    assert listed - {f"deq_jax.{name}" for name in ("adjoints", "diagnosis", "solvers")} <= found
    assert {"deq_jax.linen", "deq_jax.nnx", "deq_jax.init", "deq_jax.masks"} <= found


def test_extras_that_are_named_exist():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    kinds = (
        "*.md",
        "docs/**/*.md",
        ".ci/run",
        "docs/tutorials/*",
        "deq_jax/**/*.py",
        "experiments/**/*.py",
    )
    texts = [p.read_text(encoding="utf-8") for kind in kinds for p in ROOT.glob(kind)]
    named = re.findall(r"(?:\.|deq_jax)\[([a-z,]+)\]|with its extra (\w+)", "\n".join(texts))
    extras = set(",".join(",".join(names) for names in named).split(",")) - {""}
    assert {"examples", "test", "hub"} <= extras <= set(setup["options.extras_require"])


def links():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text(encoding="utf-8")):
            yield pytest.param(page, target, id=f"{page.name}-{target}")


@pytest.mark.parametrize(("page", "target"), list(links()))
def test_links_lead_somewhere(page, target):
    name, _, heading = target.partition("#")
    file = page.parent / name if name else page
    assert file.exists()
    if heading:
        heads = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert heading in [head.lower().replace(" ", "-") for head in heads]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_named_in_commands_exist(page):
    text = page.read_text(encoding="utf-8")
    for module in re.findall(r"python -m ((?:experiments|benchmarks|deq_jax)\.[\w.]+)", text):
        if "TASK" not in module:
            assert (ROOT / (module.rstrip(".").replace(".", "/") + ".py")).exists(), module
