"""Weights from elsewhere: another run's, or published ones that ``deq_jax.convert`` has written.

They are in a folder of checkpoints or in one `.safetensors` file, as the path's suffix says.  The
arrays of a file are named ``params/stem/conv1/kernel``, ``batch_stats/stem/norm1/mean``.
"""

from __future__ import annotations

import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from deq_jax import __version__, folders
from deq_jax.errors import UsageError
from deq_jax.training.checkpoint import Checkpoints, first_line, read, saved_steps

_FOLDER = "checkpoints"
_TRUNK = "equilibrium"
"""Weights without a part of this module are of no use to a model that has it."""
_SHOWN = 3
"""Names listed of each kind of misfit; the others are counted."""

SUFFIX = ".safetensors"
"""A path that ends so is one file, any other a folder."""

DTYPES = frozenset(
    "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint64 uint32 uint16 uint8".split()
) | {"bool"}
"""What a file holds bit for bit."""


def save(path: str | os.PathLike[str], params: Any, extra: Any, source: dict[str, Any]) -> None:
    """Writes weights where `load` finds them; overwrites nothing.

    Args:
      path: a folder, which gets one checkpoint, of step 0, with its checksums; or a file that ends
        in ``.safetensors``.
      params: nested dict of arrays.
      extra: the untrained collections, for instance {"batch_stats": ...}.
      source: where they come from, a dict that JSON can hold; the metadata "source" of a file.

    Raises:
      UsageError: the folder has checkpoints already, the file exists, or cannot be written; or a
        file cannot hold these names or dtypes.

    Example:
      >>> import tempfile
      >>> folder = Path(tempfile.mkdtemp())
      >>> save(folder / "a.safetensors", {"a": jnp.ones(2, jnp.bfloat16)}, {}, {"file": "a.pkl"})
      >>> load(folder / "a.safetensors")[0]["a"]
      Array([1, 1], dtype=bfloat16)
    """
    path = folders.parse(path)
    if path.suffix == SUFFIX:
        _write_file(_local(path), params, extra, source)
        return
    checkpoints = Checkpoints(path / _FOLDER, keep=1, fits=lambda _: "", say=print)
    if checkpoints.steps():
        raise UsageError(
            f"{path} has checkpoints already; choose another folder, nothing is overwritten"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except folders.errors(path) as error:
        raise UsageError(f"cannot write to {path}: {folders.reason(error)}") from error
    state = jax.tree.map(jnp.asarray, {"params": params, "extra": extra})
    with checkpoints:
        checkpoints.save(0, state, {"source": source})
        checkpoints.finish()


def load(path: str | os.PathLike[str], say: Callable[[str], None] = print) -> tuple[Any, Any]:
    """Reads the weights of a run, or those that `save` wrote.

    Args:
      path: a workdir of one model (for a comparison: ``.../jr``), a folder of `save`, or a file
        that ends in ``.safetensors``.
      say: called with what the user should know of newer checkpoints that are damaged.

    Returns:
      (params, extra), nested dicts of arrays, from the newest checkpoint that is whole.

    Raises:
      UsageError: there is no such folder, no checkpoint in it, or none that can be read; the file
        is not there, damaged, or of other contents.

    Example:
      >>> params, extra = load("runs/cifar10_large_jr/model")  # doctest: +SKIP
    """
    path = folders.parse(path)
    if path.suffix == SUFFIX and not path.is_dir():
        return _load_file(_local(path))
    newest = _newest(path, say)
    return newest.params, newest.extra


def export(
    run: str | os.PathLike[str], path: str | os.PathLike[str], say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Writes the newest weights of a run to a ``.safetensors`` file; overwrites nothing.

    Args:
      run: what `load` takes as a folder.
      path: the file, which must not exist.
      say: called with what the user should know of newer checkpoints that are damaged.

    Returns:
      What the file's metadata say under "source": the name of the run, the step, and the settings
      of the model where the run has recorded them.

    Raises:
      UsageError: as of `load` and `save`; or the path has another suffix.

    Example:
      >>> import tempfile
      >>> folder = Path(tempfile.mkdtemp())
      >>> save(folder / "run", {"a": jnp.ones(2)}, {}, {"file": "a.pkl"})
      >>> export(folder / "run", folder / "a.safetensors")
      {'run': 'run', 'step': 0, 'file': 'a.pkl'}
    """
    run, path = folders.parse(run), _local(folders.parse(path))
    if path.suffix != SUFFIX:
        raise UsageError(f"got {path} to write to; wanted the name of a file that ends in {SUFFIX}")
    _refuse_existing(path)
    newest = _newest(run, say)
    source = {"run": run.name, "step": newest.step, **newest.host.get("source", {})}
    if model := newest.host.get("config", {}).get("model"):
        source["model"] = model
    save(path, newest.params, newest.extra, source)
    return source


def read_file(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads a ``.safetensors`` file of any contents.

    Args:
      path: the file.

    Returns:
      Name -> array, the file's metadata.

    Raises:
      UsageError: no such file, it is truncated or of another format, or the package safetensors is
        not installed.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "a.safetensors"
      >>> save(path, {"a": jnp.ones(2)}, {}, {"file": "a.pkl"})
      >>> list(read_file(path)[0])
      ['params/a']
    """
    package = _safetensors(path)
    if not path.is_file():
        raise UsageError(f"got {path}, which is no file; wanted a {SUFFIX} file")
    try:
        with package.safe_open(str(path), framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # the package has exceptions of its own for foreign files
        raise UsageError(
            f"{path} cannot be read as safetensors ({first_line(error)}); wanted a whole file of "
            "that format: copy or export it again"
        ) from error


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
      (params, extra) like ``own``, dtypes and shardings too.

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


class _Newest(NamedTuple):
    """The newest checkpoint of a run that is whole."""

    params: Any
    extra: Any
    step: int
    host: dict[str, Any]


def _newest(folder: folders.Folder, say: Callable[[str], None]) -> _Newest:
    """Reads the newest whole checkpoint of a run; tells which newer ones are not."""
    directory = folder / _FOLDER
    steps = saved_steps(directory)
    if not steps:
        raise UsageError(
            f"no checkpoint in {directory}; wanted the workdir of a model (after --compare: its "
            f"folder jr or no_jr), a folder written by python -m deq_jax.convert.*, or a {SUFFIX} "
            "file"
        )
    refused = []
    for step in reversed(steps):
        try:
            state, host = read(directory / f"{step:09d}")
        except Exception as error:  # whatever a library makes of a damaged or foreign file
            refused.append(f"step {step}: {first_line(error)}")
            continue
        if not isinstance(state, dict) or "params" not in state:
            refused.append(f"step {step}: it holds no params")
            continue
        if refused:
            say(f"in {directory}: {'; '.join(refused)}; taking the checkpoint of step {step}")
        return _Newest(state["params"], state.get("extra") or {}, step, host)
    raise UsageError(f"no checkpoint in {directory} can be read: {'; '.join(refused)}")


def _write_file(path: Path, params: Any, extra: Any, source: dict[str, Any]) -> None:
    """Writes a new file of named arrays, and what they are into its metadata."""
    package = _safetensors(path)
    _refuse_existing(path)
    assert "params" not in extra, "an untrained collection cannot be called params"
    arrays = _named({"params": params}) | _named(extra)
    metadata = {
        "format": "flax",
        "deq_jax": __version__,
        "source": json.dumps(source),
        "crc32": str(_checksum(arrays)),
    }
    content = package.numpy.save(arrays, metadata)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            try:
                file.write(content)
                file.flush()
            except OSError:
                path.unlink()  # a part of it
                raise
    except OSError as error:
        _refuse_existing(path)
        raise UsageError(f"cannot write to {path}: {error.strerror}") from error


def _load_file(path: Path) -> tuple[Any, Any]:
    """Reads what `_write_file` wrote, or another program under the same names."""
    arrays, metadata = read_file(path)
    parents = {name.rsplit("/", n)[0] for name in arrays for n in range(1, name.count("/") + 1)}
    if "params" not in parents or parents.intersection(arrays):
        raise UsageError(
            f"got {path} with the arrays {_few(sorted(arrays)) or '(none)'}; wanted the names of a "
            "model of deq_jax, params/...: convert published PyTorch weights first, by python -m "
            "deq_jax.convert.mdeq or .transformer"
        )
    recorded, found = metadata.get("crc32"), str(_checksum(arrays))
    if recorded not in (None, found):
        raise UsageError(
            f"the arrays in {path} were altered: their CRC-32 is {found}, and {recorded} was "
            "recorded; copy or export the file again"
        )

    def place(array: np.ndarray) -> Any:
        # JAX without x64 would narrow what has 64 bits.
        kept = jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype
        return jnp.asarray(array) if kept else array

    tree = unflatten_dict({n: place(array) for n, array in arrays.items()}, sep="/")
    return tree.pop("params"), tree


def _named(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of a collection by their paths, in C order, which a file takes for granted."""
    arrays = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        keys = [getattr(entry, "key", None) for entry in path]
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        array = np.asarray(jax.device_get(leaf), order="C")
        if not all(isinstance(key, str) and "/" not in key for key in keys):
            raise UsageError(
                f"got an array at {jax.tree_util.keystr(path)}; wanted nested dicts whose keys are "
                f"texts without a slash: a {SUFFIX} file joins them by slashes"
            )
        if array.dtype.name not in DTYPES:
            raise UsageError(
                f"got {name} of {array.dtype.name}; wanted one of {', '.join(sorted(DTYPES))} in a "
                f"{SUFFIX} file: cast it, or write a folder"
            )
        arrays[name] = array
    return arrays


def _checksum(arrays: Mapping[str, np.ndarray]) -> int:
    """CRC-32 of names and bytes, in the order of the names."""
    checksum = 0
    for name in sorted(arrays):
        checksum = zlib.crc32(arrays[name].tobytes(), zlib.crc32(name.encode(), checksum))
    return checksum


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise UsageError(f"{path} exists already; choose another name, nothing is overwritten")


def _local(path: folders.Folder) -> Path:
    if not isinstance(path, Path):
        raise UsageError(f"got {path}; wanted a local path for a {SUFFIX} file")
    return path


def _safetensors(path: Path) -> Any:
    """The package, imported where a file needs it."""
    try:
        import safetensors
        import safetensors.numpy
    except ImportError:
        raise UsageError(
            f"{path} needs the package safetensors, which is not installed: pip install "
            "safetensors, or deq_jax with its extra hub"
        ) from None
    return safetensors


def _by_module(names: Iterable[str]) -> Counter[str]:
    """How many of the names are of each top-level module, its batch statistics included."""
    return Counter(name.removeprefix("batch_stats/").split("/")[0] for name in names)


def _name(path: Any) -> str:
    """`stem/conv1/kernel`; the leading index of (params, extra) is left out."""
    return jax.tree_util.keystr(path[1:], simple=True, separator="/")


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
