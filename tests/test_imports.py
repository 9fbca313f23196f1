"""The import table, the sizes and the docstrings that DESIGN promises, read from the source."""

import ast
import doctest
import importlib
import inspect
import subprocess
import sys
import typing
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = sorted((ROOT / "deq_jax").rglob("*.py"))
SOURCES = LIBRARY + sorted((ROOT / "experiments").rglob("*.py"))
SOURCES += sorted((ROOT / "benchmarks").rglob("*.py"))

CORE = {"tree", "traced", "solvers", "adjoints", "fixed_point", "jacobian"}
CORE |= {"correction", "reparam", "masks", "init"}
LAYERS = CORE | {"linen", "nnx"}
PARTS = {
    "errors",
    "folders",
    "testing",
    "diagnosis",
    "check",
    "models",
    "data",
    "training",
    "convert",
}
# Part of the library -> (parts it may import, other packages it may import).
TABLE = {
    "": (LAYERS | PARTS, set()),
    "tree": (set(), {"jax"}),
    "traced": ({"tree"}, {"jax"}),
    "solvers": ({"traced", "tree"}, {"jax"}),
    "adjoints": ({"solvers", "traced", "tree"}, {"jax"}),
    "fixed_point": ({"adjoints", "solvers", "tree"}, {"jax"}),
    "correction": (set(), {"jax"}),
    "jacobian": ({"solvers", "tree"}, {"jax"}),
    "diagnosis": ({"fixed_point", "jacobian", "solvers", "tree"}, {"jax", "numpy"}),
    "check": ({"solvers"}, {"jax", "numpy"}),
    "reparam": ({"solvers", "tree"}, {"jax"}),
    "masks": (set(), {"jax", "numpy"}),
    "init": (set(), {"jax", "numpy"}),
    "linen": ({"adjoints", "fixed_point", "solvers", "masks", "tree"}, {"jax", "flax"}),
    "nnx": ({"adjoints", "fixed_point", "solvers", "masks", "tree"}, {"jax", "flax"}),
    "testing": (CORE, {"jax", "numpy"}),
    "models": (LAYERS, {"jax", "flax", "numpy"}),
    "errors": (set(), set()),
    "folders": ({"errors"}, {"etils"}),
    "data": (
        {"errors", "folders"},
        {"numpy", "grain", "absl", "tensorflow_datasets", "sklearn", "PIL", "datasets"},
    ),
    "training": (
        CORE | {"errors", "folders"},
        {
            "jax",
            "flax",
            "numpy",
            "optax",
            "orbax",
            "absl",
            "etils",
            "tqdm",
            "tensorboardX",
            "matplotlib",
        }
        | {"safetensors"},
    ),
    "convert": ({"errors", "training"}, {"numpy", "torch"}),
}
# Heavy packages that only the function using them may import.
LATE = {"grain", "tensorflow_datasets", "sklearn", "PIL", "torch", "matplotlib", "tensorboardX"}
LATE |= {"datasets", "etils", "safetensors"}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path) for path in SOURCES}


def imports(tree: ast.Module) -> typing.Iterator[tuple[str, bool]]:
    """Yields (module, whether it is imported when the file is) of every import of a file."""
    late = {
        node
        for block in ast.walk(tree)
        if isinstance(block, (ast.FunctionDef, ast.AsyncFunctionDef))
        or (isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING")
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what a file depends on"
            module = node.module or ""
            names = [
                f"{module}.{alias.name}" if f"{module}.{alias.name}" in MODULES else module
                for alias in node.names
            ]
        else:
            continue
        yield from ((name, node not in late) for name in names)


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_library_imports_only_what_the_table_allows(path):
    parts = name_of(path).split(".")
    part = parts[1] if len(parts) > 1 else ""
    own, others = TABLE[part]
    for name, early in imports(parse(path)):
        top, _, rest = name.partition(".")
        if top in sys.stdlib_module_names:
            continue
        if top == "deq_jax":
            wanted = rest.split(".")[0]
            # `import deq_jax` brings the core's names, which models and training may use.
            ok = wanted in own or wanted == part or (not wanted and own >= CORE)
            assert ok, f"{part or 'deq_jax'} may not import {name}"
        else:
            assert top in others, f"{part or 'deq_jax'} may not import {name}"
            # A TFDS builder is a subclass; only TFDS and a command import that module.
            builder = name_of(path) == "deq_jax.data.wikitext"
            assert not early or top not in LATE or builder, f"import {name} where it is used"


def test_absl_is_touched_in_one_place():
    users = [
        name_of(path)
        for path in SOURCES
        if any(name.startswith("absl") for name, _ in imports(parse(path)))
    ]
    # Grain's worker processes want absl's flags parsed.
    assert set(users) <= {"deq_jax.training.flags", "deq_jax.data.prefetch"} | {
        f"experiments.{task.name}.main" for task in (ROOT / "experiments").iterdir()
    }


def test_import_of_the_library_is_light():
    heavy = "flax absl optax orbax grain tensorflow_datasets tensorflow torch sklearn tqdm"
    code = (
        "import sys, deq_jax\n"
        f"print([name for name in {heavy.split()} if name in sys.modules])\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, 'importing deq_jax has started a device'"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr


def test_a_folder_of_this_name_is_not_taken_for_the_library(tmp_path):
    """Python is often started in the folder above a clone."""
    (tmp_path / "deq_jax").mkdir()
    command = [sys.executable, "-c", "import deq_jax; print(deq_jax.__file__)"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert Path(done.stdout.strip()).name == "__init__.py", done.stderr


def public(module) -> typing.Iterator[tuple[str, object]]:
    """Yields the public objects that a module lists or defines, and those of modules it lists."""
    for name in getattr(module, "__all__", dir(module)):
        value = getattr(module, name)
        if inspect.ismodule(value):
            if hasattr(module, "__all__"):
                yield from public(value)
        elif not name.startswith("_") and (
            hasattr(module, "__all__") or getattr(value, "__module__", "") == module.__name__
        ):
            yield f"{module.__name__}.{name}", value


def undocumented(name: str, value: object) -> list[str]:
    """What is missing in the docstring of a function, or of a class and its public methods."""
    doc = inspect.getdoc(value) or ""
    missing = [] if doc else [f"{name}: docstring"]
    if inspect.isclass(value):
        is_protocol = getattr(value, "_is_protocol", False)
        fields = getattr(value, "__dataclass_fields__", ())
        if fields and not is_protocol and "Args:" not in doc and "Attributes:" not in doc:
            missing.append(f"{name}: Args or Attributes")
        for key, method in vars(value).items():
            own = inspect.isfunction(method) and method.__module__.startswith("deq_jax")
            own = own and key not in fields  # the default of a field that holds a function
            if own and not key.startswith("_") and not inspect.getdoc(method):
                missing.append(f"{name}.{key}: docstring")
    elif inspect.isfunction(value):
        signature = inspect.signature(value)
        if signature.parameters and "Args:" not in doc:
            missing.append(f"{name}: Args")
        if signature.return_annotation not in (None, "None") and "Returns:" not in doc:
            missing.append(f"{name}: Returns")
    return missing


def test_every_public_name_is_documented():
    import deq_jax
    import deq_jax.linen
    import deq_jax.nnx
    import deq_jax.testing

    modules = [deq_jax, deq_jax.linen, deq_jax.nnx, deq_jax.testing]
    found = {name: value for module in modules for name, value in public(module)}
    assert set(deq_jax.__all__) <= set(dir(deq_jax))
    assert len(found) > 20
    assert [line for name, value in found.items() for line in undocumented(name, value)] == []


@pytest.mark.parametrize("name", [name_of(path) for path in LIBRARY])
def test_examples_of_docstrings_run(name):
    import deq_jax

    names = {key: getattr(deq_jax, key) for key in deq_jax.__all__}
    result = doctest.testmod(
        importlib.import_module(name),
        extraglobs=names | {"deq": deq_jax},
        optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS,
    )
    assert result.failed == 0
