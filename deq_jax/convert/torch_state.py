"""State dicts of PyTorch: reading them, and laying out their arrays as ours are."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PREFIXES = ("module.", "model.")
"""What DataParallel and the published wrappers put before every name."""

IGNORED = ("num_batches_tracked",)
"""Last parts of names that carry no weights."""

# kind of module -> (name of the PyTorch tensor, our collection, our name)
LEAVES = {
    "conv": (("weight", "params", "kernel"),),
    "conv_bias": (("weight", "params", "kernel"), ("bias", "params", "bias")),
    "weight_norm": (
        ("weight_g", "params", "kernel/g"),
        ("weight_v", "params", "kernel/v"),
    ),
    "linear": (("weight", "params", "kernel"), ("bias", "params", "bias")),
    "norm": (("weight", "params", "scale"), ("bias", "params", "bias")),
    "statistics": (
        ("running_mean", "batch_stats", "mean"),
        ("running_var", "batch_stats", "var"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Module:
    """One module of the published model and its place in ours.

    Attributes:
      theirs: its dotted name there.
      ours: its path here, joined by ``/``.
      kinds: which of its tensors there are: keys of `LEAVES`.
      group: name of what only some models have, "" for what all have.  Of a group, a state dict
        has everything or nothing.
    """

    theirs: str
    ours: str
    kinds: tuple[str, ...]
    group: str = ""

    def leaves(self) -> Iterator[tuple[str, str, str]]:
        """Lists the module's arrays.

        Yields:
          Name of the PyTorch tensor, our collection, our path joined by ``/``.
        """
        for kind in self.kinds:
            for theirs, collection, ours in LEAVES[kind]:
                yield f"{self.theirs}.{theirs}", collection, f"{self.ours}/{ours}"


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of the published model and its place in ours, in the same layout.

    Attributes:
      theirs: its dotted name there.
      ours: its path in our parameters, joined by ``/``.
      group: as of a `Module`.
      transposed: whether the axes of a matrix change places after all.
    """

    theirs: str
    ours: str
    group: str = ""
    transposed: bool = False

    def leaves(self) -> Iterator[tuple[str, str, str]]:
        """Lists the array, as `Module.leaves` does.

        Yields:
          Name of the PyTorch tensor, our collection, our path joined by ``/``.
        """
        yield self.theirs, "params", self.ours


class Converted(NamedTuple):
    """What became of a state dict.

    Attributes:
      params: nested dict of arrays.
      batch_stats: likewise; {} without batch normalisation.
      missing: names that the model has and the state dict has not.
      unknown: names that the state dict has and the model has not.
    """

    params: dict[str, Any]
    batch_stats: dict[str, Any]
    missing: list[str]
    unknown: list[str]


def read(path: Path) -> dict[str, np.ndarray]:
    """Reads a state dict.

    Args:
      path: a file of ``torch.save(model.state_dict(), path)``, or an ``.npz`` or ``.safetensors``
        of the same names.

    Returns:
      name -> array, prefixes of wrappers taken off.  Tensors of 16-bit floats become float32, but
      for those of an ``.npz``.

    Raises:
      ValueError: no such file, no state dict in it, or PyTorch or safetensors is needed and not
        installed.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "weights.npz"
      >>> np.savez(path, **{"module.classifier.bias": np.zeros(3)})
      >>> list(read(path))
      ['classifier.bias']
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"got {path}, which is no file; wanted a PyTorch state dict, an .npz or a .safetensors"
        )
    readers = {".npz": _read_numpy, ".safetensors": _read_safetensors}
    state = readers.get(path.suffix, _read_torch)(path)
    if isinstance(state, Mapping) and "state_dict" in state:  # a training checkpoint
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not state or not all(map(_is_array, state.values())):
        raise ValueError(f"got no state dict in {path}; wanted a mapping from names to tensors")
    arrays: dict[str, np.ndarray] = {}
    for name, value in state.items():
        short = strip(str(name))
        if short in arrays:
            raise ValueError(
                f"got {short} twice in {path}, under different prefixes; wanted one model in a file"
            )
        arrays[short] = _to_numpy(value)
    return arrays


def _read_numpy(path: Path) -> Any:
    try:
        return dict(np.load(path))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as an .npz of arrays: {error}") from error


def _read_safetensors(path: Path) -> Any:
    from deq_jax.training import weights

    arrays, _ = weights.read_file(path)
    half = ("float16", "bfloat16")
    return {n: a.astype(np.float32) if a.dtype.name in half else a for n, a in arrays.items()}


def _read_torch(path: Path) -> Any:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            f"reading {path} needs PyTorch, which is not installed: pip install torch, or store "
            "the tensors as a .safetensors or an .npz under the same names"
        ) from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds on foreign files
        # Its own words go on for pages, and recommend to run whatever code the file brings.
        raise ValueError(
            f"{path} cannot be read as PyTorch weights ({type(error).__name__}); wanted what "
            "torch.save(model.state_dict(), path) writes: tensors, and no objects of other classes"
        ) from error


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _to_numpy(value: Any) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    value = value.detach()
    if value.is_floating_point() and value.element_size() == 2:
        value = value.float()  # NumPy has no bfloat16
    return value.numpy()


def strip(name: str) -> str:
    """Takes the prefixes of wrappers off a name.

    Args:
      name: of a tensor.

    Returns:
      The name inside the bare model.

    Example:
      >>> strip("module.model.classifier.bias")
      'classifier.bias'
    """
    while name.startswith(PREFIXES):
        name = name.split(".", 1)[1]
    return name


def convert(
    state: Mapping[str, np.ndarray],
    modules: Iterable[Module | Array],
    *,
    ignored: tuple[str, ...] = (),
    partial: bool = False,
) -> Converted:
    """Lays out a state dict as our parameters.

    Convolutions OIHW -> HWIO, matrices (O, I) and (O, I, 1) -> (I, O), weight norm's lengths
    (O, 1, ...) -> (O); an `Array` stays as it is.

    Args:
      state: name -> array.
      modules: what the model has.
      ignored: beginnings of names that are left out silently.
      partial: accept missing and unknown names; they are listed in the result.

    Returns:
      The trees and the lists of names.

    Raises:
      ValueError: without ``partial``, names are missing or unknown; the message lists them.

    Example:
      >>> modules = [Module("fc", "classifier", ("linear",))]
      >>> state = {"fc.weight": np.zeros((3, 2)), "fc.bias": np.zeros(3)}
      >>> convert(state, modules).params["classifier"]["kernel"].shape
      (2, 3)
    """
    trees: dict[str, dict[str, Any]] = {"params": {}, "batch_stats": {}}
    rest = {
        name: array
        for name, array in state.items()
        if not name.startswith(ignored) and name.rsplit(".", 1)[-1] not in IGNORED
    }
    modules = list(modules)
    groups = {m.group for m in modules if any(name in rest for name, _, _ in m.leaves())}
    missing = []
    for module in modules:
        for name, collection, ours in module.leaves():
            if name in rest:
                _put(trees[collection], ours, _lay_out(rest.pop(name), name, module))
            elif not module.group or module.group in groups:
                missing.append(name)
    unknown = sorted(rest)
    if (missing or unknown) and not partial:
        raise ValueError(
            f"got a state dict that does not fit: missing {missing or 'none'}; unknown "
            f"{unknown or 'none'}; wanted all names of the published model and no other, or "
            "partial conversion (--partial)"
        )
    return Converted(trees["params"], trees["batch_stats"], missing, unknown)


def _lay_out(array: np.ndarray, name: str, module: Module | Array) -> np.ndarray:
    if isinstance(module, Array):
        return array.T if module.transposed else array
    if name.endswith(".weight_g"):
        return array.reshape(-1)
    if array.ndim == 3 and array.shape[2] == 1:  # a convolution over positions, one wide
        return array[..., 0].T
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.T  # matrices; vectors stay


def _put(tree: dict[str, Any], path: str, value: np.ndarray) -> None:
    *parents, last = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = np.ascontiguousarray(value)
