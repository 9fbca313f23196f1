"""A nested dataclass as a flat mapping of dotted names, and back: for flags and config.json."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

ConfigT = TypeVar("ConfigT")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One value of a configuration.

    Attributes:
      name: dotted, for instance "solver.max_steps".
      type: its annotation, resolved.
      value: its value.
      description: one line.
      may_change: whether a run may be resumed with another value.
    """

    name: str
    type: Any
    value: Any
    description: str
    may_change: bool


def leaves(config: Any, prefix: str = "") -> Iterator[Leaf]:
    """Lists the values of a nested dataclass in the order in which they are written.

    Args:
      config: a dataclass whose fields are values or such dataclasses.
      prefix: put before every name.

    Yields:
      A `Leaf` for each value.

    Example:
      >>> from deq_jax.training.config import SolverConfig
      >>> next(leaves(SolverConfig(), "solver.")).name
      'solver.name'
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield Leaf(
                name=prefix + field.name,
                type=hints[field.name],
                value=value,
                description=field.metadata.get("help", ""),
                may_change=field.metadata.get("may_change", False),
            )


def replace(config: ConfigT, values: Mapping[str, Any]) -> ConfigT:
    """Copies a configuration with some values replaced, and checks the copy.

    Args:
      config: a nested dataclass.
      values: dotted name -> value.

    Returns:
      A configuration of the same type.

    Raises:
      ValueError: the configuration has no value of a name, or rejects a value; the message begins
        with the dotted name.

    Example:
      >>> from deq_jax.training.config import Config
      >>> replace(Config(), {"solver.max_steps": 7}).solver.max_steps
      7
    """
    known = [leaf.name for leaf in leaves(config)]
    for name in values:
        if name not in known:
            raise ValueError(
                f"{name} is not a value of {type(config).__name__}{did_you_mean(name, known)}"
            )
    return _replace(config, values, "")


def _replace(config: ConfigT, values: Mapping[str, Any], prefix: str) -> ConfigT:
    changes = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        name, value = prefix + field.name, getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = _replace(value, values, f"{name}.")
        elif name in values:
            changes[field.name] = values[name]
    try:
        return dataclasses.replace(config, **changes)  # type: ignore[type-var]
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as nested dicts of what JSON can hold.

    Args:
      config: a nested dataclass.

    Returns:
      A dict equal to what `json.loads` makes of its JSON text.

    Example:
      >>> from deq_jax.training.config import EvalConfig
      >>> to_dict(EvalConfig(budgets=(1, 2)))["budgets"]
      [1, 2]
    """
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(template: ConfigT, tree: Mapping[str, Any]) -> ConfigT:
    """The configuration that `to_dict` described.

    Args:
      template: a configuration of the type wanted; its values are used where `tree` has none.
      tree: nested dicts.

    Returns:
      A configuration of the template's type.

    Raises:
      ValueError: a value is refused, or a name is not one of the template's.

    Example:
      >>> from deq_jax.training.config import Config
      >>> from_dict(Config(), to_dict(Config())) == Config()
      True
    """
    flat = flatten(tree)
    known = {leaf.name: leaf for leaf in leaves(template)}
    unknown = sorted(flat.keys() - known.keys())
    if unknown:
        raise ValueError(
            f"got unknown names {', '.join(unknown)}; wanted names of {type(template).__name__}"
        )
    return replace(template, {name: _coerce(value, known[name]) for name, value in flat.items()})


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict of dotted names.

    Args:
      tree: nested mappings.
      prefix: put before every name.

    Returns:
      dotted name -> value.

    Example:
      >>> flatten({"a": {"b": 1}})
      {'a.b': 1}
    """
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def differences(
    saved: Mapping[str, Any],
    config: Any,
    free: Callable[[Leaf], bool] = lambda leaf: leaf.may_change,
) -> list[str]:
    """What keeps a run of `config` from continuing a run that was saved.

    Args:
      saved: `to_dict` of the saved run's configuration, perhaps written by another version.
      config: the configuration now.
      free: which fields are passed over; by default those that may change.

    Returns:
      Lines such as "solver.tol: 0.001 there, 0.01 now".

    Example:
      >>> from deq_jax.training.config import Config, OptimConfig
      >>> differences(to_dict(Config()), Config(optim=OptimConfig(lr=0.1)))
      ['optim.lr: 0.001 there, 0.1 now']
    """
    passed = {leaf.name for leaf in leaves(config) if free(leaf)}
    then, now = flatten(saved), flatten(to_dict(config))
    names = [name for name in [*now, *sorted(then.keys() - now.keys())] if name not in passed]
    absent = "absent"
    return [
        f"{name}: {then.get(name, absent)} there, {now.get(name, absent)} now"
        for name in names
        if then.get(name, absent) != now.get(name, absent)
    ]


def optional_of(annotation: Any) -> tuple[Any, bool]:
    """Splits `X | None`.

    Args:
      annotation: a type annotation.

    Returns:
      (X, True) for `X | None`, (annotation, False) for any other.

    Example:
      >>> optional_of(int | None)
      (<class 'int'>, True)
    """
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        inner = [a for a in typing.get_args(annotation) if a is not type(None)]
        if len(inner) == 1 and len(inner) < len(typing.get_args(annotation)):
            return inner[0], True
    return annotation, False


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Suggests names: first those that are spelt alike, then those with the same last part.

    Args:
      word: what was written.
      known: the names that exist.

    Returns:
      The end of a message, empty if nothing is near.

    Example:
      >>> did_you_mean("solver.max_step", ["solver.max_steps", "solver.tol"])
      '; did you mean solver.max_steps?'
    """
    known = list(known)
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.75)
    last = word.rpartition(".")[2]
    close += [n for n in known if n.rpartition(".")[2] == last and n not in close]
    return f"; did you mean {' or '.join(close[:3])}?" if close else ""


def _coerce(value: Any, leaf: Leaf) -> Any:
    """Undoes what JSON does to tuples, and to floats that are whole."""
    inner, _ = optional_of(leaf.type)
    if value is None:
        return None
    if typing.get_origin(inner) is tuple:
        item = typing.get_args(inner)[0]
        return tuple(float(v) if item is float else v for v in value)
    return float(value) if inner is float else value
