"""Nested dataclasses as command-line flags, and the words in which they are refused."""

import dataclasses
import json
import os
import subprocess
import sys
from typing import Literal

import pytest
from absl import flags as absl_flags

from deq_jax.training import Config, OptimConfig, SolverConfig, UsageError, fields, flags, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    width: int = option(8, "units of the hidden layer")
    scales: tuple[float, ...] = option((0.5, 1.0), "scales of the resolutions")
    groups: int | None = option(None, "groups of the normalisation; none for one a channel")
    norm: Literal["group", "none"] = option("group", "normalisation")
    bias: bool = option(True, "whether layers have a bias")
    note: str = option("", "free text")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExampleConfig(Config):
    model: ModelConfig = ModelConfig()


PRESETS = {
    "small": ExampleConfig(solver=SolverConfig(max_steps=7)),
    "large": ExampleConfig(model=ModelConfig(width=64, groups=4), optim=OptimConfig(clip=0.5)),
}


def parse(*args: str) -> ExampleConfig:
    values = absl_flags.FlagValues()
    argv = ["prog", *args]
    preset, config = flags.find_defaults(PRESETS, "small", argv, values)
    flags.define(preset, config, PRESETS, values)
    return flags.parse_config(config, argv, values)


def test_no_flag_gives_the_default_preset():
    assert parse() == PRESETS["small"]


@pytest.mark.parametrize("args", [("--preset=large",), ("--preset", "large"), ("-preset=large",)])
def test_preset_sets_all_defaults(args):
    assert parse(*args) == PRESETS["large"]


def test_explicit_flag_beats_preset_wherever_it_stands():
    for args in [("--preset=large", "--model.width=3"), ("--model.width=3", "--preset=large")]:
        config = parse(*args)
        assert config.model.width == 3
        assert config.model.groups == 4


def test_a_preset_in_a_flagfile_counts(tmp_path):
    file = tmp_path / "flags.txt"
    file.write_text("--preset=large\n--model.width=5\n")
    config = parse(f"--flagfile={file}")
    assert (config.model.groups, config.model.width) == (4, 5)


def test_a_file_of_a_run_gives_the_defaults(tmp_path):
    config = fields.replace(PRESETS["large"], {"solver.tol": 0.5, "eval.budgets": (1, 2)})
    file = tmp_path / "config.json"
    file.write_text(json.dumps(fields.to_dict(config)))
    assert parse(f"--config={file}") == config
    assert parse("--model.width=3", f"--config={file}").model.width == 3
    file.write_text(json.dumps({"solver": {"tolerance": 1}}))
    with pytest.raises(UsageError, match=r"config.json: got unknown names solver.tolerance"):
        parse(f"--config={file}")
    for content in ("[1]", "{"):
        file.write_text(content)
        with pytest.raises(UsageError, match="wanted the config.json of a run of this program"):
            parse(f"--config={file}")
    with pytest.raises(UsageError, match="No such file"):
        parse(f"--config={tmp_path / 'absent.json'}")


@pytest.mark.parametrize(
    ("arg", "name", "value"),
    [
        ("--solver.max_steps=12", "solver.max_steps", 12),
        ("--optim.lr=1e-3", "optim.lr", 1e-3),
        ("--optim.lr=1", "optim.lr", 1.0),
        ("--optim.nesterov", "optim.nesterov", True),
        ("--model.bias=false", "model.bias", False),
        ("--nomodel.bias", "model.bias", False),
        ("--model.norm=none", "model.norm", "none"),
        ("--model.groups=3", "model.groups", 3),
        ("--model.groups=none", "model.groups", None),
        ("--model.scales=1,2.5", "model.scales", (1.0, 2.5)),
        ("--model.scales=", "model.scales", ()),
        ("--eval.budgets=1,2,4", "eval.budgets", (1, 2, 4)),
        ("--model.note=a=b, c", "model.note", "a=b, c"),
        ("--workdir=runs/x", "workdir", "runs/x"),
    ],
)
def test_every_kind_of_field_is_read(arg, name, value):
    values = {leaf.name: leaf.value for leaf in fields.leaves(parse(arg))}
    assert values[name] == value
    assert type(values[name]) is type(value)
    default = {leaf.name: leaf.value for leaf in fields.leaves(PRESETS["small"])}
    assert {k: v for k, v in values.items() if k != name} == {
        k: v for k, v in default.items() if k != name
    }


@pytest.mark.parametrize(
    ("arg", "words"),
    [
        ("--solver.max_step=3", ["--solver.max_step", "did you mean solver.max_steps"]),
        ("--lr=3", ["--lr", "did you mean optim.lr"]),
        ("--nonsense=3", ["unknown flag --nonsense"]),
        ("--preset=smal", ["'smal'", "small, large", "did you mean small?"]),
        ("--solver.max_steps=many", ["--solver.max_steps=many", "integer"]),
        ("--solver.name=brodyen", ["picard|anderson|broyden", "did you mean broyden"]),
        ("--eval.budgets=1,x", ["--eval.budgets=1,x", "list such as 1,2,4"]),
        ("--model.bias=perhaps", ["--model.bias"]),
        ("--solver.tol=0", ["--solver.tol must be above 0", "got 0.0"]),
        ("--solver.tol=nan", ["--solver.tol must be above 0", "got nan"]),
        ("--solver.max_steps=0", ["--solver.max_steps must be at least 1, got 0"]),
        ("--jac.prob=1.5", ["--jac.prob must be in [0, 1], got 1.5"]),
        ("--jac.budget_low=-7", ["--jac.budget_low must be above -solver.max_steps = -7"]),
        ("--optim.schedule=inverse_sqrt", ["--optim.warmup_steps must be at least 1"]),
        ("--train.steps=-1", ["--train.steps must be at least 0, got -1"]),
        ("stray", ["'stray'", "--name=value"]),
        ("--train.steps", ["--train.steps"]),
    ],
)
def test_bad_flags_are_refused_in_words(arg, words):
    with pytest.raises(UsageError) as error:
        parse(arg)
    for word in words:
        assert word in str(error.value)


def test_a_field_of_an_unsupported_type_is_the_programmers_error():
    @dataclasses.dataclass(frozen=True)
    class Odd:
        names: dict = option(None, "cannot be written as a flag")

    with pytest.raises(TypeError, match="dict"):
        flags.define("a", Odd(), ["a"], absl_flags.FlagValues())


def test_a_configuration_survives_json():
    config = parse("--preset=large", "--eval.budgets=1,2", "--optim.lr=1")
    text = json.dumps(fields.to_dict(config))
    assert fields.from_dict(ExampleConfig(), json.loads(text)) == config
    with pytest.raises(ValueError, match=r"model\.depth"):
        fields.from_dict(ExampleConfig(), {"model": {"depth": 3}})


def test_differences_name_the_fields_and_pass_over_those_that_may_change():
    saved = fields.to_dict(parse("--model.width=3", "--train.log_every=7", "--workdir=elsewhere"))
    saved["old"] = {"field": 1}
    assert fields.differences(saved, PRESETS["small"]) == [
        "model.width: 3 there, 8 now",
        "old.field: 1 there, absent now",
    ]


def test_every_field_has_a_one_line_description():
    for leaf in fields.leaves(Config()):
        assert leaf.description, leaf.name
        assert "\n" not in leaf.description


MAIN = """'''Trains an example.'''
import sys
sys.path[:0] = PATHS
from deq_jax.training import UsageError, flags
from test_flags import PRESETS

def main(config):
    print(config.model.width)
    if config.model.note == "compile":
        import jax
        jax.jit(lambda x: 2 * x)(1.0)
        return
    if config.model.note == "open":
        open("nowhere.txt")
    if config.model.note == "no data":
        raise FileNotFoundError("no data set here; prepare it")
    if config.model.note:
        raise UsageError(config.model.note)

if __name__ == "__main__":
    flags.run(main, PRESETS, default="small")
"""


def run_main(tmp_path, *args: str, env=None) -> subprocess.CompletedProcess:
    script = tmp_path / "main.py"
    script.write_text(MAIN.replace("PATHS", repr(sys.path)))
    command = [sys.executable, str(script), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)


def test_what_is_compiled_is_kept_for_later_runs(tmp_path):
    kept, named = tmp_path / "deq_jax" / "programs", tmp_path / "named"
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}  # all programs, of any time to compile
    del env["JAX_COMPILATION_CACHE_DIR"]
    for args, filled in (
        (["--dry_run"], [False, False]),
        ([f"--jax_compilation_cache_dir={named}"], [False, True]),
        ([], [True, True]),
    ):
        assert run_main(tmp_path, "--model.note=compile", *args, env=env).returncode == 0
        assert [any(folder.glob("*")) for folder in (kept, named)] == filled


def test_helpshort_lists_every_field_with_its_default(tmp_path):
    text = run_main(tmp_path, "--helpshort", "--preset=large").stdout
    assert "Trains an example." in text
    for leaf in fields.leaves(PRESETS["large"]):
        assert f"--{'[no]' if leaf.type is bool else ''}{leaf.name}:" in text
    lines = text.split("\n")
    at = next(i for i, line in enumerate(lines) if "--model.width" in line)
    assert "units of the hidden layer" in lines[at]
    assert "(default: '64')" in lines[at + 1]


@pytest.mark.parametrize(
    ("args", "code", "out", "err"),
    [
        (["--preset=large", "--model.width=5"], 0, "5\n", ""),
        (
            ["--model.widht=5"],
            1,
            "",
            "error: unknown flag --model.widht; did you mean model.width?",
        ),
        (["--preset=huge"], 1, "", "error: unknown preset 'huge'; presets: small, large"),
        (["--model.note=the workdir is taken"], 1, "8\n", "error: the workdir is taken"),
        (["--model.note=no data"], 1, "8\n", "error: no data set here; prepare it"),
    ],
)
def test_a_main_program_speaks_plainly(tmp_path, args, code, out, err):
    done = run_main(tmp_path, *args)
    assert (done.returncode, done.stdout) == (code, out)
    assert done.stderr.startswith(err)
    assert "Traceback" not in done.stderr


def test_a_file_that_a_program_misses_by_mistake_shows_where(tmp_path):
    done = run_main(tmp_path, "--model.note=open")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and 'open("nowhere.txt")' in done.stderr


def test_unknown_names_are_not_ignored():
    for name, hint in (
        ("solver.max_stepz", "; did you mean solver.max_steps"),
        ("max_steps", "; did you mean .*solver.max_steps"),
        ("solver", "; did you mean"),
        ("model.zzzzzz", "$"),
    ):
        with pytest.raises(ValueError, match=f"^{name} is not a value of ExampleConfig{hint}"):
            fields.replace(PRESETS["small"], {name: 7, "train.steps": 3})
    changed = fields.replace(PRESETS["small"], {"solver.max_steps": 9, "model.width": 2})
    assert (changed.solver.max_steps, changed.model.width) == (9, 2)
