"""The weights of a run as one `.safetensors` file, which needs neither Orbax nor pickle to read.

    python -m deq_jax.convert.export runs/digits/jr digits.safetensors
    python -m experiments.image_classification.main --preset=digits --init_from=digits.safetensors

Arrays are named params/stem/conv1/kernel, batch_stats/stem/norm1/mean; values and dtypes are
those of the newest checkpoint.  The metadata "source" is JSON: the run, its step and the settings
of its model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    """Writes a file; the command line of this module.

    Args:
      arguments: instead of those of the process.

    Raises:
      SystemExit: with a sentence, when there are no weights or the file cannot be written.

    Example:
      >>> main(["runs/digits/jr", "digits.safetensors"])  # doctest: +SKIP
    """
    from deq_jax.training import weights

    parser = argparse.ArgumentParser(description="The newest weights of a run -> one file")
    parser.add_argument("run", type=Path, help="workdir of a model; after --compare its jr, no_jr")
    parser.add_argument("file", type=Path, help="FILE.safetensors; must not exist")
    options = parser.parse_args(arguments)
    try:
        source = weights.export(options.run, options.file)
    except ValueError as error:
        sys.exit(str(error))
    print(f"written to {options.file}: the weights of {options.run} after step {source['step']}")


if __name__ == "__main__":
    main()
