"""The adaptive softmax beside the whole one, over WikiText-103's vocabulary.

    pip install -e .[train]
    python -m benchmarks.softmax

Loss and gradients of one batch of words drawn by Zipf's law (the r-th word as often as 1 / r);
float32, equal sizes.  Every case runs in a process of its own.  Writes softmax.json and prints the
table.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks._case import compiled, machine, measured, serve, timed
from benchmarks._report import RESULTS, records, write

WORDS, CUTOFFS = 267_735, (20_000, 40_000, 200_000)
CASES = {
    "all scores at once": {"whole": True},
    "all scores, in chunks": {},
    "adaptive, vectors of one length": {"cutoffs": CUTOFFS},
    "adaptive, vectors 4 times shorter in each tail": {"cutoffs": CUTOFFS, "div_val": 4},
}


def _build(name: str, tokens: int, features: int) -> Callable[[], Any]:
    """What computes loss and gradients of a case, compiled."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from deq_jax.models.embeddings import AdaptiveEmbedding

    kind = dict(CASES[name])
    whole = kind.pop("whole", False)
    net = AdaptiveEmbedding(vocab=WORDS, features=features, **kind)
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, WORDS + 1)
    words = jnp.asarray(rng.choice(WORDS, (1, tokens), p=share / share.sum()), jnp.int32)
    hidden = jnp.asarray(rng.standard_normal((1, tokens, features)), jnp.float32)
    params = net.init(jax.random.key(0), words[:, :8], method="everything")

    def loss(params: Any, hidden: jax.Array) -> jax.Array:
        if not whole:
            nll: Any = net.apply(params, hidden, words, method="nll")
            return nll.mean()
        log_probs: Any = net.apply(params, hidden, method="log_probs")
        return -jnp.take_along_axis(log_probs, words[..., None], axis=-1).mean()

    return compiled(jax.value_and_grad(loss, argnums=(0, 1)), params, hidden)


def measure(request: dict) -> dict:
    """Measures one case.

    Args:
        request: "case" with name, tokens and features; "repeats".

    Returns:
        What `benchmarks._case.timed` says, with the results in the peak memory; "loss".
    """
    case, repeats = request["case"], request["repeats"]
    run = _build(case["name"], case["tokens"], case["features"])
    found = timed(run, repeats, seconds=20)
    return {"repeats": repeats, "loss": float(run()[0])} | found


def main() -> None:
    """Runs everything and writes the results."""
    parser = argparse.ArgumentParser(description="Time the adaptive softmax.")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="timed runs; the median is shown")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    common = {"tokens": options.tokens, "features": options.features, "threads": options.threads}
    rows = [
        measured("benchmarks.softmax", {"name": name} | common, options.steps) for name in CASES
    ]
    write(options.out / "softmax.json", ("jax", "jaxlib"), machine=machine(), rows=rows)
    first = rows[0].get("ms", float("nan"))
    columns = {
        "softmax": "{name}",
        "ms": "{ms:,.0f}",
        "share of the first": lambda row: f"{row['ms'] / first:.2f}",
        "peak MB": "{peak_mb:,.0f}",
    }
    print(f"\n{options.tokens:,} words out of {WORDS:,}, {options.features} features\n")
    print(records(columns, rows))


if __name__ == "__main__":
    serve(measure, main)
