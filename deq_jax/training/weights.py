"""Weights from elsewhere: another run's, or published ones that `deq_jax.convert` has written."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from deq_jax.training import folders
from deq_jax.training.checkpoint import Checkpoints, first_line, read, saved_steps
from deq_jax.training.errors import UsageError

_FOLDER = "checkpoints"
_TRUNK = "equilibrium"
"""Weights without a part of this module are of no use to a model that has it."""
_SHOWN = 3
"""Names listed of each kind of misfit; the others are counted."""


def save(folder: str | os.PathLike[str], params: Any, extra: Any, source: dict[str, Any]) -> None:
    """Writes weights where `load` finds them: one checkpoint, step 0, with its checksums.

    Args:
      folder: becomes `folder/checkpoints/000000000`.
      params: nested dict of arrays.
      extra: the untrained collections, for instance {"batch_stats": ...}.
      source: where they come from, a dict that JSON can hold.

    Raises:
      UsageError: the folder has checkpoints already, or cannot be written.

    Example:
      >>> import tempfile
      >>> folder = tempfile.mkdtemp()
      >>> save(folder, {"a": jnp.ones(2)}, {}, {"file": "a.pkl"})
      >>> load(folder)[0]["a"].tolist()
      [1.0, 1.0]
    """
    folder = folders.parse(folder)
    checkpoints = Checkpoints(folder / _FOLDER, keep=1, fits=lambda _: "", say=print)
    if checkpoints.steps():
        raise UsageError(
            f"{folder} has checkpoints already; choose another folder, nothing is overwritten"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except folders.errors(folder) as error:
        raise UsageError(f"cannot write to {folder}: {folders.reason(error)}") from error
    state = jax.tree.map(jnp.asarray, {"params": params, "extra": extra})
    with checkpoints:
        checkpoints.save(0, state, {"source": source})
        checkpoints.finish()


def load(folder: str | os.PathLike[str], say: Callable[[str], None] = print) -> tuple[Any, Any]:
    """Reads the weights of a run, or those that `save` wrote.

    Args:
      folder: a workdir of one model (for a comparison: `.../jr`), or a folder of `save`.
      say: called with what the user should know of newer checkpoints that are damaged.

    Returns:
      (params, extra), nested dicts of arrays, from the newest checkpoint that is whole.

    Raises:
      UsageError: there is no such folder, no checkpoint in it, or none that can be read.

    Example:
      >>> params, extra = load("runs/cifar10_large_jr/model")  # doctest: +SKIP
    """
    directory = folders.parse(folder) / _FOLDER
    steps = saved_steps(directory)
    if not steps:
        raise UsageError(
            f"no checkpoint in {directory}; wanted the workdir of a model (after --compare: its "
            "folder jr or no_jr) or a folder written by python -m deq_jax.convert.*"
        )
    refused = []
    for step in reversed(steps):
        try:
            state, _ = read(directory / f"{step:09d}")
        except Exception as error:  # whatever a library makes of a damaged or foreign file
            refused.append(f"step {step}: {first_line(error)}")
            continue
        if not isinstance(state, dict) or "params" not in state:
            refused.append(f"step {step}: it holds no params")
            continue
        if refused:
            say(f"in {directory}: {'; '.join(refused)}; taking the checkpoint of step {step}")
        return state["params"], state.get("extra") or {}
    raise UsageError(f"no checkpoint in {directory} can be read: {'; '.join(refused)}")


def adopt(
    own: tuple[Any, Any], loaded: tuple[Any, Any], say: Callable[[str], None]
) -> tuple[Any, Any]:
    """Takes every loaded array that has a place of the same shape in a model.

    A head for another number of classes, or for another task, keeps its own initial weights; what
    was not taken over is told.

    Args:
      own: (params, extra) of the model.
      loaded: (params, extra) from `load`.
      say: called with the sentences that the user should see.

    Returns:
      (params, extra) like `own`, dtypes and shardings too.

    Raises:
      UsageError: nothing fits, or nothing of the module "equilibrium" of a model that has one.

    Example:
      >>> mine = ({"stem": jnp.zeros(2), "head": jnp.zeros(3)}, {})
      >>> theirs = ({"stem": jnp.ones(2), "head": jnp.ones(4)}, {})
      >>> taken, _ = adopt(mine, theirs, print)
      1 of 2 arrays of the model were loaded (incomplete: head 0/1)
        of another shape, not loaded: head ([4] there, [3] here)
      >>> taken["stem"].tolist(), taken["head"].tolist()
      ([1.0, 1.0], [0.0, 0.0, 0.0])
    """
    there = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(loaded)}
    taken, absent, misfits = [], [], {}

    def choose(path: Any, leaf: jax.Array) -> jax.Array:
        name = _name(path)
        found = there.get(name)
        if found is None:
            absent.append(name)
        elif found.shape != leaf.shape:
            misfits[name] = f"{name} ({list(found.shape)} there, {list(leaf.shape)} here)"
        else:
            taken.append(name)
            value = jax.device_get(found).astype(leaf.dtype)
            # To the sharding that the model's own array has, of which this process may hold a part.
            return jax.make_array_from_callback(value.shape, leaf.sharding, lambda i: value[i])
        return leaf

    result = jax.tree_util.tree_map_with_path(choose, own)
    fits, wanted = _by_module(taken), _by_module([*taken, *absent, *misfits])
    total = wanted.total()
    if not taken or (wanted[_TRUNK] and not fits[_TRUNK]):
        part = "" if not taken else f' "{_TRUNK}" of'
        raise UsageError(
            f"none of the {len(there)} arrays loaded has a place in{part} this model of {total}; "
            f"there: {_few(sorted(there))}; here: {_few([*misfits.values(), *absent])}; wanted "
            "weights of a model with the same settings"
        )
    parts = [f"{name} {fits[name]}/{n}" for name, n in wanted.items() if fits[name] < n]
    gaps = f" (incomplete: {_few(parts)})" if parts else ""
    say(f"{len(taken)} of {total} arrays of the model were loaded{gaps}")
    for label, names in (
        ("of another shape, not loaded", list(misfits.values())),
        ("not there, left as initialised", absent),
        ("there, but not in the model", sorted(set(there).difference(taken, misfits))),
    ):
        if names:
            say(f"  {label}: {_few(names)}")
    return result


def require_fit(loaded: Any, wanted: Any, folder: str | os.PathLike[str], advice: str) -> None:
    """Refuses weights that are not those of a model, every one of them.

    Args:
      loaded: a tree of arrays.
      wanted: the model's, of arrays or shapes.
      folder: where they are from.
      advice: what to do, the end of the message.

    Raises:
      UsageError: a name or shape differs; the first one is named.
    """
    there, here = (
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (loaded, wanted))
    )
    differing = sorted(n for n in there.keys() | here.keys() if there.get(n) != here.get(n))
    if differing:
        name = differing[0]
        raise UsageError(
            f"the weights in {folder} are of another model: {name} is {there.get(name)} there "
            f"and {here.get(name)} here; {advice}"
        )


def _by_module(names: Iterable[str]) -> Counter[str]:
    """How many of the names are of each top-level module, its batch statistics included."""
    return Counter(name.removeprefix("batch_stats/").split("/")[0] for name in names)


def _name(path: Any) -> str:
    """`stem/conv1/kernel`; the leading index of (params, extra) is left out."""
    return jax.tree_util.keystr(path[1:], simple=True, separator="/")


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
