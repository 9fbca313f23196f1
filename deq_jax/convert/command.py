"""The command line that all conversions share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deq_jax.convert.torch_state import Converted, read


def parser(model: str) -> argparse.ArgumentParser:
    """The options of every conversion.

    Args:
      model: what the weights are of.

    Returns:
      A parser, to which a conversion adds its own options.

    Example:
      >>> parser("multiscale DEQ").parse_args(["a.pkl", "out"]).partial
      False
    """
    result = argparse.ArgumentParser(description=f"Published {model} weights -> --init_from=OUT")
    result.set_defaults(model=model)
    result.add_argument(
        "weights", type=Path, help="PyTorch state dict, or .safetensors or .npz of its arrays"
    )
    result.add_argument(
        "out", type=Path, help="folder or FILE.safetensors to be written; must not have weights"
    )
    result.add_argument(
        "--partial", action="store_true", help="convert what fits, list what is missing or unknown"
    )
    return result


def run(
    options: argparse.Namespace,
    convert: Callable[[Mapping[str, np.ndarray]], Converted],
    settings: Callable[[Converted], Mapping[str, object]],
    hidden: str,
) -> None:
    """Converts a file, writes the folder or file, and says which model the weights are of.

    Args:
      options: of `parser`.
      convert: from a state dict to our trees.
      settings: reads off the shapes which model it is.
      hidden: half a sentence, what does not show in the weights.

    Raises:
      SystemExit: with a sentence, when the file cannot be converted.

    Example:
      >>> run(parser("multiscale DEQ").parse_args(), convert, settings, "dropout")  # doctest: +SKIP
    """
    from deq_jax.training import weights

    try:
        converted = convert(read(options.weights))
        if not converted.params:
            raise ValueError(f"got no array of a {options.model} in {options.weights}")
        extra = {"batch_stats": converted.batch_stats} if converted.batch_stats else {}
        source = {"file": options.weights.name, "missing": converted.missing}
        weights.save(options.out, converted.params, extra, source)
    except ValueError as error:
        sys.exit(str(error))
    for label, names in (("missing", converted.missing), ("unknown", converted.unknown)):
        if names:
            print(f"{label}: {', '.join(names)}")
    count = sum(array.size for array in _arrays(converted.params))
    print(f"written to {options.out}: {count:,} parameters, of a model with")
    for name, value in settings(converted).items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()
        print(f"  --model.{name}={text}")
    print(f"({hidden})")


def _arrays(tree: Mapping[str, Any]) -> Iterator[np.ndarray]:
    for value in tree.values():
        if isinstance(value, Mapping):
            yield from _arrays(value)
        else:
            yield value
