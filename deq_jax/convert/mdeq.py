"""Published weights of the multiscale DEQ, for classification and segmentation.

    python -m deq_jax.convert.mdeq weights.pkl out_dir
    python -m experiments.image_classification.main --preset=imagenet_small --init_from=out_dir

The file is a PyTorch state dict, a .safetensors or an .npz of its arrays; what is written is a
folder, or one file if the name ends in .safetensors.

Names are those of the published state dicts; what these hold twice, and batch counters, are left
out.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping

import numpy as np

from deq_jax.convert import command
from deq_jax.convert.torch_state import Converted, Module, convert

IGNORED = ("fullstage_copy.", "deq.func.", "deq.func_copy.", "loss.")
"""Older versions of the published layer kept a copy of f for the backward pass, and registered both
once more; segmentation saved the class weights of its loss."""

_BATCH_NORM = ("norm", "statistics")


def modules(
    branches: int, blocks: int = 1, *, segmentation: bool = False, projected: Container[int] = ()
) -> Iterator[Module]:
    """The modules of the published model.

    Args:
      branches: number of resolutions.
      blocks: residual blocks in each.
      segmentation: which head.
      projected: branches whose bottleneck in the classification head certainly has a projection.

    Yields:
      Stem, cell, and head; what only some models have is in a group.

    Example:
      >>> next(modules(2)).ours
      'stem/conv1'
    """
    for theirs, ours in (("0", "conv1"), ("3", "conv2")):
        yield Module(f"downsample.{theirs}", f"stem/{ours}", ("conv",))
    for theirs, ours in (("1", "norm1"), ("4", "norm2")):
        yield Module(f"downsample.{theirs}", f"stem/{ours}", _BATCH_NORM)
    # A small model has the convolution only if it halves its input.
    group = "inject" if branches <= 2 else ""
    yield Module("stage0.0", "stem/inject", ("conv",), group)
    yield Module("stage0.1", "stem/inject_norm", _BATCH_NORM, group)
    yield from _cell(branches, blocks)
    if not segmentation:
        yield from _classification(branches, projected)
        return
    yield Module("last_layer.0", "head/merge", ("conv_bias",))
    yield Module("last_layer.1", "head/merge_norm", _BATCH_NORM)
    yield Module("last_layer.3", "head/scores", ("conv_bias",))


def _cell(branches: int, blocks: int) -> Iterator[Module]:
    there, here = "fullstage", "equilibrium/f"
    for i in range(branches):
        for j in range(blocks):
            block, path = f"{there}.branches.{i}.blocks.{j}", f"{here}/branch{i}_block{j}"
            for k in (1, 2):
                yield Module(f"{block}.conv{k}", f"{path}/conv{k}", ("weight_norm",))
            for k in (1, 2, 3):
                yield Module(f"{block}.gn{k}", f"{path}/norm{k}", ("norm",))
        for j in range(branches):
            way, path = f"{there}.fuse_layers.{i}.{j}.net", f"{here}/fuse_{i}_{j}"
            if j > i:
                yield Module(f"{way}.conv", f"{path}/conv", ("conv",))
                yield Module(f"{way}.gnorm", f"{path}/norm", ("norm",))
            for k in range(i - j):
                yield Module(f"{way}.{k}.conv", f"{path}/conv{k}", ("conv",))
                yield Module(f"{way}.{k}.gnorm", f"{path}/norm{k}", ("norm",))
        post = f"{there}.post_fuse_layers.{i}"
        yield Module(f"{post}.conv", f"{here}/post{i}/conv", ("weight_norm",))
        yield Module(f"{post}.gnorm", f"{here}/post{i}/norm", ("norm",), group="post")


def _classification(branches: int, projected: Container[int]) -> Iterator[Module]:
    for i in range(branches):
        there, here = f"incre_modules.{i}.0", f"head/increase{i}"
        for k in (1, 2, 3):
            yield Module(f"{there}.conv{k}", f"{here}/conv{k}", ("conv",))
            yield Module(f"{there}.bn{k}", f"{here}/norm{k}", ("statistics",))
        group = "" if i in projected else f"project{i}"
        yield Module(f"{there}.downsample.0", f"{here}/project", ("conv",), group)
        yield Module(f"{there}.downsample.1", f"{here}/project_norm", _BATCH_NORM, group)
        if i:
            yield Module(f"downsamp_modules.{i - 1}.0", f"head/down{i - 1}", ("conv_bias",))
            yield Module(f"downsamp_modules.{i - 1}.1", f"head/down{i - 1}_norm", _BATCH_NORM)
    yield Module("final_layer.0", "head/final", ("conv_bias",))
    yield Module("final_layer.1", "head/final_norm", _BATCH_NORM)
    yield Module("classifier", "head/classifier", ("linear",))


def convert_state(
    state: Mapping[str, np.ndarray], *, segmentation: bool = False, partial: bool = False
) -> Converted:
    """Lays out a published state dict as the parameters of `MDEQ`.

    Args:
      state: name -> array, as `deq_jax.convert.torch_state.read` returns it.
      segmentation: which head is wanted; the modules of the other one count as unknown.
      partial: accept missing and unknown names; they are listed in the result.

    Returns:
      params, batch_stats, missing, unknown.

    Raises:
      ValueError: without ``partial``, names are missing or unknown; the message lists them.  Or the
        head is that of segmentation, and this was not said.

    Example:
      >>> convert_state({"classifier.bias": np.ones(3)}, partial=True).params
      {'head': {'classifier': {'bias': array([1., 1., 1.])}}}
    """
    if any(name.startswith("last_layer.") for name in state) and not (segmentation or partial):
        raise ValueError(
            "got the head of a segmentation model, last_layer; wanted segmentation=True "
            "(--segmentation), or a classifier's weights"
        )
    places = (
        r"fullstage\.(?:branches|fuse_layers|post_fuse_layers)\.(\d+)\.",
        r"fullstage\.fuse_layers\.\d+\.(\d+)\.",
        r"incre_modules\.(\d+)\.",
    )
    branches = max(_count(state, pattern) for pattern in places)
    blocks = _count(state, r"fullstage\.branches\.\d+\.blocks\.(\d+)\.")
    wanted = modules(branches, blocks, segmentation=segmentation, projected=_projected(state))
    return convert(state, wanted, ignored=IGNORED, partial=partial)


def _projected(state: Mapping[str, np.ndarray]) -> set[int]:
    """The branches whose bottleneck changes the number of channels."""
    found = set()
    for i in range(_count(state, r"incre_modules\.(\d+)\.")):
        first, last = (state.get(f"incre_modules.{i}.0.conv{k}.weight") for k in (1, 3))
        if first is not None and last is not None and first.shape[1] != last.shape[0]:
            found.add(i)
    return found


def _count(state: Mapping[str, np.ndarray], pattern: str) -> int:
    """One more than the largest number that a name has at the pattern's place."""
    found = (re.match(pattern, name) for name in state)
    return 1 + max((int(match[1]) for match in found if match), default=0)


def settings(converted: Converted) -> dict[str, object]:
    """Reads off the shapes which model the weights are of.

    Args:
      converted: from `convert_state`, complete.

    Returns:
      Name of a field of the experiments' model configuration -> value.  The number of halvings in
      the stem, of groups and the dropout do not show in the weights.

    Example:
      >>> settings(convert_state({}, partial=True))
      {}
    """
    cell = converted.params.get("equilibrium", {}).get("f", {})
    head = converted.params.get("head", {})
    found: dict[str, object] = {}
    branches = [cell[name] for name in sorted(cell) if re.fullmatch(r"branch\d+_block0", name)]
    if branches:
        kernels = [[b[f"conv{k}"]["kernel"]["v"].shape for k in (1, 2)] for b in branches]
        found["channels"] = tuple(second[3] for _, second in kernels)
        found["expansion"] = kernels[0][0][3] // kernels[0][0][2]
        found["blocks"] = sum(name.startswith("branch0_") for name in cell)
        big = tuple(sum(shape[0] == 5 for shape in pair) for pair in kernels)
        found["big_kernels"] = big if any(big) else ()
        found["post_affine"] = "norm" in cell["post0"]
    if "classifier" in head:
        found["classes"] = head["classifier"]["bias"].size
        found["final"] = head["final"]["bias"].size
        widths = [head[f"increase{i}"]["conv1"]["kernel"].shape[3] for i in range(len(branches))]
        found["head"] = tuple(widths)
    elif "scores" in head:
        found["classes"] = head["scores"]["bias"].size
    return found


def main(arguments: list[str] | None = None) -> None:
    """Converts a file; the command line of this module.

    Args:
      arguments: instead of those of the process.

    Raises:
      SystemExit: with a sentence, when the file cannot be converted.

    Example:
      >>> main(["weights.pkl", "out.safetensors"])  # doctest: +SKIP
    """
    parser = command.parser("multiscale DEQ")
    parser.add_argument(
        "--segmentation", action="store_true", help="the head is that of segmentation"
    )
    options = parser.parse_args(arguments)
    command.run(
        options,
        lambda state: convert_state(
            state, segmentation=options.segmentation, partial=options.partial
        ),
        settings,
        "halvings in the stem, groups and dropout do not show in the weights",
    )


if __name__ == "__main__":
    main()
