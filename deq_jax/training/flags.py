"""Nested frozen dataclasses on the command line, as dotted absl flags.

``--solver.max_steps=12`` sets the field ``max_steps`` of the part ``solver``.  Supported fields:
int, float, bool, str, ``Literal[...]`` of strings, tuples of int, float or str (written ``1,2,4``;
empty for the empty tuple), and each of these ``| None`` (written ``none``).
"""

from __future__ import annotations

import json
import sys
import time
import traceback
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import jax
from absl import app
from absl import flags as absl_flags
from absl import logging as absl_logging

from deq_jax import folders
from deq_jax.errors import Interrupted, UsageError
from deq_jax.training import distributed, fields
from deq_jax.training.distributed import PeerMonitor

ConfigT = TypeVar("ConfigT")

_PROCESSES = {
    "coordinator": (str | None, "host:port of process 0, or auto: see docs/devices.md"),
    "num_processes": (int | None, "processes of this run"),
    "process_id": (int | None, "which of them this one is, from 0"),
}
"""Flags that are no part of the configuration, which all processes share."""


def run(main: Callable[[ConfigT], object], presets: Mapping[str, ConfigT], *, default: str) -> None:
    """Parses the command line into a configuration and runs an experiment with it.

    A whole main.py:

        from deq_jax.training import flags
        from experiments.toy_regression.config import PRESETS
        from experiments.toy_regression.experiment import run_experiment

        if __name__ == "__main__":
            flags.run(run_experiment, PRESETS, default="paper")

    ``--preset=NAME`` chooses the defaults of all other flags; ``--solver.tol=1e-4`` and the like
    override them.  What a user can mend (a flag, a value, a `UsageError` from the experiment) is
    shown in one sentence on stderr and ends with exit code 1; an interrupted run ends with
    128 + signal number, as shells do, so that a scheduler knows that it is not finished.

    JAX keeps what it has compiled for later runs, in ``~/.cache/deq_jax/programs``; its own flags
    name another folder, ``--jax_compilation_cache_dir``, or keep nothing,
    ``--jax_enable_compilation_cache=false``.

    Args:
      main: called with the configuration.
      presets: name -> configuration, all of one type.
      default: the preset used when ``--preset`` is not given.

    Raises:
      SystemExit: always, as absl's `app.run`.

    Example:
      >>> run(print, {"small": Config()}, default="small")  # doctest: +SKIP
    """
    values = absl_flags.FLAGS
    try:
        preset, config = find_defaults(presets, default, sys.argv, values)
        define(preset, config, presets, values)
    except UsageError as error:
        _fail(str(error))

    def parse(argv: Sequence[str]) -> Any:
        try:
            return parse_config(config, argv, values)
        except UsageError as error:
            _fail(f"{error}\n(--helpshort lists all flags)")

    def guarded(config: Any) -> None:
        if not values["verbosity"].present:
            absl_logging.set_verbosity(absl_logging.WARNING)  # JAX tells of every absent backend
        # A dry run says how long compiling takes.
        if not (jax.config.jax_compilation_cache_dir or getattr(config, "dry_run", False)):
            jax.config.update("jax_compilation_cache_dir", str(folders.cache() / "programs"))
        monitor = None
        try:
            monitor = distributed.initialize(*(values[name].value for name in _PROCESSES))
            main(config)
        except Interrupted as request:
            sys.stderr.write(f"{request}\n" * distributed.is_first())
            _end(monitor)
            sys.exit(128 + request.signal_number)
        except Exception as error:
            if _is_said_in_words(error):
                if monitor is not None:  # others wait for this one, which must not wait for them
                    monitor.fail(f"process {jax.process_index()}: {error}")
                _fail(str(error))
            if monitor is None:
                raise
            if isinstance(error, jax.errors.JaxRuntimeError) and monitor.is_alone():
                time.sleep(10)  # it is being said, and this process ended
            traceback.print_exc()
            monitor.fail(f"process {jax.process_index()}: {type(error).__name__}")
        _end(monitor)

    jax.config.config_with_absl()  # JAX's own flags, such as --jax_debug_nans
    app.run(guarded, flags_parser=parse)


def find_defaults(
    presets: Mapping[str, ConfigT], default: str, argv: Sequence[str], values: absl_flags.FlagValues
) -> tuple[str, ConfigT]:
    """Reads ``--preset`` and ``--config`` before the other flags, whose defaults depend on them.

    Args:
      presets: name -> configuration.
      default: the name to use when both flags are absent.
      argv: the command line with the program's name.
      values: expands ``--flagfile``.

    Returns:
      A key of ``presets``, and the configuration: of that name, or read from ``--config``'s file.

    Raises:
      UsageError: there is no such preset, or the file holds no configuration of this program.

    Example:
      >>> find_defaults({"a": 1, "b": 2}, "a", ["prog", "--preset=b"], absl_flags.FlagValues())
      ('b', 2)
    """
    given = {"preset": default, "config": ""}
    args = values.read_flags_from_files(list(argv[1:]), force_gnu=False)
    for arg, following in zip(args, [*args, ""][1:], strict=True):
        key, equals, value = arg.partition("=")
        if arg == "--":
            break
        if (name := key.lstrip("-")) in given and key.startswith("-"):
            given[name] = value if equals else following
    name = given["preset"]
    if name not in presets:
        hint = fields.did_you_mean(name, presets)
        raise UsageError(f"unknown preset {name!r}; presets: {', '.join(presets)}{hint}")
    if not given["config"]:
        return name, presets[name]
    try:
        tree = json.loads(Path(given["config"]).expanduser().read_text(encoding="utf-8"))
        return name, fields.from_dict(presets[name], tree)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UsageError(
            f"got --config={given['config']}: {folders.reason(error)}; wanted the config.json of a "
            "run of this program"
        ) from error


def define(preset: str, config: Any, names: Iterable[str], values: absl_flags.FlagValues) -> None:
    """Defines ``--preset``, ``--config`` and one flag for every field, defaults from ``config``.

    Args:
      preset: default of ``--preset``.
      config: from `find_defaults`.
      names: of all presets.
      values: where the flags are defined.

    Example:
      >>> from deq_jax.training.config import Config
      >>> values = absl_flags.FlagValues()
      >>> define("a", Config(), ["a"], values)
      >>> values["solver.max_steps"].default
      30
    """

    def add(flag: absl_flags.Flag) -> None:
        # The program's own name as module: --helpshort shows the flags of the main module only.
        absl_flags.DEFINE_flag(flag, values, module_name=sys.argv[0])

    help_text = f"set of defaults for all other flags: {', '.join(names)}"
    add(absl_flags.Flag(_Parser(str), _Serializer(), "preset", preset, help_text))
    help_text = "file of defaults for all other flags: the config.json of a run"
    add(absl_flags.Flag(_Parser(str), _Serializer(), "config", "", help_text))
    for leaf in fields.leaves(config):
        if leaf.type is bool:
            add(absl_flags.BooleanFlag(leaf.name, leaf.value, leaf.description))
        else:
            # absl leaves a default of None out of its help.
            text = leaf.description + ("\n(default: none)" if leaf.value is None else "")
            add(absl_flags.Flag(_Parser(leaf.type), _Serializer(), leaf.name, leaf.value, text))
    for name, (annotation, text) in _PROCESSES.items():
        text += "\n(default: none)"
        add(absl_flags.Flag(_Parser(annotation), _Serializer(), name, None, text))


def parse_config(config: ConfigT, argv: Sequence[str], values: absl_flags.FlagValues) -> ConfigT:
    """Parses a command line over the defaults of a preset.

    Args:
      config: the preset that `define` was given.
      argv: the command line with the program's name.
      values: where `define` put the flags.

    Returns:
      A configuration of the same type.

    Raises:
      UsageError: an unknown flag, a value that cannot be read or is refused, a stray argument.

    Example:
      >>> from deq_jax.training.config import Config
      >>> values = absl_flags.FlagValues()
      >>> define("a", Config(), ["a"], values)
      >>> parse_config(Config(), ["prog", "--optim.lr=0.5"], values).optim.lr
      0.5
    """
    names = [leaf.name for leaf in fields.leaves(config)]
    try:
        rest = values(list(argv))
    except absl_flags.UnrecognizedFlagError as error:
        hint = fields.did_you_mean(error.flagname, [*names, *_PROCESSES, "preset", "config"])
        raise UsageError(f"unknown flag --{error.flagname}{hint}") from error
    except absl_flags.Error as error:
        raise UsageError(str(error)) from error
    if rest[1:]:
        raise UsageError(f"unexpected argument {rest[1]!r}; flags are written --name=value")
    try:
        return fields.replace(config, {name: values[name].value for name in names})
    except ValueError as error:
        raise UsageError(f"--{error}") from error


class _Parser(absl_flags.ArgumentParser):
    """Reads the text of one flag by the annotation of its field."""

    def __init__(self, annotation: Any) -> None:
        super().__init__()
        self.inner, self.optional = fields.optional_of(annotation)
        self.item = None
        if typing.get_origin(self.inner) is tuple:
            self.item = typing.get_args(self.inner)[0]
        supported = (int, float, bool, str)
        literal = typing.get_origin(self.inner) is Literal
        if not literal and self.inner not in supported and self.item not in supported:
            raise TypeError(f"a flag cannot hold a {annotation}; see the docstring of flags.py")
        self.syntactic_help = self.flag_type()

    def parse(self, argument: Any) -> Any:
        """Text -> value; a default comes as the value itself."""
        if not isinstance(argument, str):
            return argument
        if self.optional and argument.lower() == "none":
            return None
        try:
            if self.item is not None:
                return tuple(self.item(part) for part in argument.split(",") if part.strip())
            if self.inner is bool:
                return {"true": True, "1": True, "false": False, "0": False}[argument.lower()]
            if typing.get_origin(self.inner) is not Literal:
                return self.inner(argument)
        except (ValueError, KeyError):
            raise ValueError(f"expected {self.flag_type()}") from None
        choices = typing.get_args(self.inner)
        if argument not in choices:
            raise ValueError(f"expected {self.flag_type()}{fields.did_you_mean(argument, choices)}")
        return argument

    def flag_type(self) -> str:
        """What the flag takes, in words, for --help."""
        names = {int: "integer", float: "number", str: "text", bool: "true or false"}
        if self.item is not None:
            words = f"list such as 1,2,4 of {names[self.item]}"
        elif typing.get_origin(self.inner) is Literal:
            words = "one of " + "|".join(typing.get_args(self.inner))
        else:
            words = names[self.inner]
        return f"{words}, or none" if self.optional else words


class _Serializer(absl_flags.ArgumentSerializer):
    """Writes a value as the command line takes it."""

    def serialize(self, value: Any) -> str:
        if value is None:
            return "none"
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _is_said_in_words(error: Exception) -> bool:
    """Whether it is the user's to mend: a data set that is not there has no error number."""
    absent = isinstance(error, FileNotFoundError) and error.errno is None
    return absent or isinstance(error, UsageError)


def _end(monitor: PeerMonitor | None) -> None:
    """The end of this process is no surprise to the others."""
    if monitor is not None:
        distributed.barrier("end")
        monitor.close()


def _fail(message: str) -> NoReturn:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(1)
