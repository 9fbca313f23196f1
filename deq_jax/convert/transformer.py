"""Published weights of the DEQ-Transformer.

    python -m deq_jax.convert.transformer model_state_dict.pth out.safetensors
    python -m experiments.language_modeling.main --preset=wikitext103_jr --init_from=out.safetensors

The file is a PyTorch state dict, a .safetensors or an .npz of its arrays; what is written is one
.safetensors file, or a folder if the name ends otherwise.

Names are those of the published state dicts.  What is tied there stands twice in them, as equal
arrays, and once in ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from deq_jax.convert import command
from deq_jax.convert.torch_state import Array, Converted, Module, convert

IGNORED = ("pos_emb.", "func_copy.", "deq.", "deqback.")
"""The rates of the positional embedding, and older versions' copies of f."""

_MAPS = (
    ("dec_attn.qkv_net", "qkv", False),
    ("dec_attn.r_net", "r", False),
    ("dec_attn.o_net", "o", True),
    ("pos_ff.ff1_net", "ff1", True),
    ("pos_ff.ff2_net", "ff2", True),
)
"""Name there, name here, whether it has a bias."""


def modules(clusters: int = 1, *, normalised: bool = True) -> Iterator[Module | Array]:
    """The arrays of the published model.

    Args:
      clusters: of the vocabulary, the shortlist included.
      normalised: whether the cell's maps are under weight norm.

    Yields:
      Vocabulary, injection and cell; what only some models have is in a group.

    Example:
      >>> next(modules()).ours
      'vocab/table0'
    """
    for i in range(clusters):
        yield Array(f"word_emb.emb_layers.{i}.weight", f"vocab/table{i}")
        yield Array(f"crit.out_layers.{i}.weight", f"vocab/out_table{i}", "untied")
        yield Array(f"crit.out_layers.{i}.bias", f"vocab/bias{i}")
        for theirs, ours in (("word_emb.emb_projs", ""), ("crit.out_projs", "out_")):
            path = f"vocab/{ours}projection{i}"
            yield Array(f"{theirs}.{i}.weight", path, f"{theirs}{i}", transposed=True)
    if clusters > 1:
        yield Array("crit.cluster_weight", "vocab/tails")
        yield Array("crit.cluster_bias", "vocab/tails_bias")
    yield Module("inject_conv", "inject", ("linear",))
    there, here = "func", "equilibrium/f"
    for name, ours, bias in _MAPS:
        kinds = ("weight_norm",) if normalised else ("conv",)
        yield Module(f"{there}.{name}", f"{here}/{ours}", kinds)
        if bias:
            yield Array(f"{there}.{name}.bias", f"{here}/{ours}/bias")
    yield Array(f"{there}.dec_attn.r_w_bias", f"{here}/content_bias")
    yield Array(f"{there}.dec_attn.r_r_bias", f"{here}/position_bias")


def convert_state(
    state: Mapping[str, np.ndarray], *, cutoffs: Sequence[int] = (), partial: bool = False
) -> Converted:
    """Lays out a published state dict as the parameters of `DEQTransformer`.

    Args:
      state: name -> array, as `deq_jax.convert.torch_state.read` returns it.
      cutoffs: only for clusters whose vectors have one length (div_val 1), which stand in one
        table there: where it is cut.
      partial: accept missing and unknown names; they are listed in the result.

    Returns:
      params, batch_stats (empty), missing, unknown.

    Raises:
      ValueError: without ``partial``, names are missing or unknown; the message lists them.  Or
        one table for several clusters has to be cut, and it was not said where.

    Example:
      >>> convert_state({"crit.cluster_bias": np.ones(2)}, partial=True).params
      {'vocab': {'tails_bias': array([1., 1.])}}
    """
    state = _cut(state, cutoffs)
    tails = np.shape(state.get("crit.cluster_bias", ()))
    clusters = 1 + (tails[0] if tails else 0)
    for i in range(clusters):  # what is tied stands twice
        for name, copy in (("emb_layers", "out_layers"), ("emb_projs", "out_projs")):
            second = f"crit.{copy}.{i}.weight"
            # Clusters whose vectors have one length share one projection into the model.
            first = [f"word_emb.{name}.{j}.weight" for j in (i, 0)]
            twins = [state[n] for n in first if n in state]
            if second in state and any(np.array_equal(state[second], a) for a in twins):
                del state[second]
    normalised = not any(re.fullmatch(r"func\..*_net\.weight", name) for name in state)
    wanted = modules(clusters, normalised=normalised)
    return convert(state, wanted, ignored=IGNORED, partial=partial)


def _cut(state: Mapping[str, np.ndarray], cutoffs: Sequence[int]) -> dict[str, np.ndarray]:
    """A copy in which every cluster has a table of its own."""
    state = dict(state)
    tails = np.shape(state.get("crit.cluster_bias", ()))
    first, second = (f"word_emb.emb_layers.{i}.weight" for i in (0, 1))
    if not tails or first not in state or second in state:
        return state
    if len(cutoffs) != tails[0]:
        raise ValueError(
            f"got one table for {tails[0] + 1} clusters and cutoffs {tuple(cutoffs)}; wanted "
            f"{tails[0]} cutoffs (--cutoffs=20000,40000,...), which the weights do not tell"
        )
    output = "crit.out_layers.0"
    for name in ("word_emb.emb_layers.0.weight", f"{output}.weight", f"{output}.bias"):
        whole = state.pop(name, None)
        if whole is not None:
            for i, part in enumerate(np.split(whole, list(cutoffs))):
                state[name.replace(".0.", f".{i}.")] = part
    return state


def settings(converted: Converted) -> dict[str, object]:
    """Reads off the shapes which model the weights are of.

    Args:
      converted: from `convert_state`, complete.

    Returns:
      Name of a field of the experiment's model configuration -> value.  Norm before or after,
      memory and dropout do not show in the weights.

    Example:
      >>> settings(convert_state({}, partial=True))
      {}
    """
    vocab = converted.params.get("vocab", {})
    cell = converted.params.get("equilibrium", {}).get("f", {})
    found: dict[str, object] = {}
    if "content_bias" in cell:
        found["heads"], width = cell["content_bias"].shape
        found["features"] = found["heads"] * width
    if "ff1" in cell:
        found["hidden"] = cell["ff1"]["bias"].size
    tables = [vocab[name] for name in sorted(vocab) if name.startswith("table")]
    if tables:
        sizes = [table.shape[0] for table in tables]
        found["embed"] = tables[0].shape[1]
        found["cutoffs"] = tuple(np.cumsum(sizes[:-1]).tolist())
        found["div_val"] = found["embed"] // tables[1].shape[1] if len(tables) > 1 else 1
    return found


def main(arguments: list[str] | None = None) -> None:
    """Converts a file; the command line of this module.

    Args:
      arguments: instead of those of the process.

    Raises:
      SystemExit: with a sentence, when the file cannot be converted.

    Example:
      >>> main(["model_state_dict.pth", "out_dir"])  # doctest: +SKIP
    """
    parser = command.parser("DEQ-Transformer")
    parser.add_argument("--cutoffs", default="", help="of a model with div_val 1: 20000,40000")
    options = parser.parse_args(arguments)
    cutoffs = [int(cut) for cut in options.cutoffs.split(",") if cut]
    command.run(
        options,
        lambda state: convert_state(state, cutoffs=cutoffs, partial=options.partial),
        settings,
        "the place of the norm, memory and dropout do not show in the weights",
    )


if __name__ == "__main__":
    main()
