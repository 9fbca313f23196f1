"""The adaptive softmax beside the whole one, over WikiText-103's vocabulary.

    pip install -e .[train]
    python -m benchmarks.softmax

Loss and gradients of one batch of words drawn by Zipf's law (the r-th word as often as 1 / r);
float32, equal sizes.  Every case runs in a process of its own.  Writes softmax.json and prints the
table.
"""

import argparse
import datetime
import importlib.metadata
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks._case import in_process, limit_threads, peak_mb, times_ms

WORDS, CUTOFFS = 267_735, (20_000, 40_000, 200_000)
CASES = {
    "all scores at once": {"whole": True},
    "all scores, in chunks": {},
    "adaptive, vectors of one length": {"cutoffs": CUTOFFS},
    "adaptive, vectors 4 times shorter in each tail": {"cutoffs": CUTOFFS, "div_val": 4},
}


def build(name: str, tokens: int, features: int) -> Callable[[], Any]:
    """Compile one case.

    Args:
        name: of `CASES`.
        tokens: words in the batch.
        features: size of the hidden vectors.

    Returns:
        What computes loss and gradients, and blocks until it is done.
    """
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

    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(params, hidden).compile()
    return lambda: jax.block_until_ready(program(params, hidden))


def measure(request: dict) -> dict:
    """Measure one case.

    Args:
        request: name, tokens, features, threads, repeats.

    Returns:
        The request with loss, ms (median) and peak_mb (of the first run, results included).
    """
    run = build(request["name"], request["tokens"], request["features"])
    found = {}
    peak = peak_mb(lambda: found.update(loss=float(run()[0])))
    (times,) = times_ms([run], request["repeats"], seconds=20)
    return request | found | {"ms": statistics.median(wall for wall, _ in times), "peak_mb": peak}


def main() -> None:
    """Run everything and write the results."""
    parser = argparse.ArgumentParser(description="Time the adaptive softmax.")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="timed runs; the median is shown")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    common = {"tokens": options.tokens, "features": options.features, "threads": options.threads}
    rows = []
    for name in CASES:
        request = common | {"name": name, "repeats": options.steps}
        rows.append(request | in_process("benchmarks.softmax", request))
        print(f"{name}: {rows[-1].get('error') or 'done'}", file=sys.stderr, flush=True)
    first = rows[0].get("ms")
    print(f"\n{options.tokens:,} words out of {WORDS:,}, {options.features} features\n")
    print("| softmax | ms | share of the first | peak MB |\n| --- | --- | --- | --- |")
    for row in rows:
        if "error" in row:
            print(f"| {row['name']} | failed: {row['error']} |")
            continue
        share = f"{row['ms'] / first:.2f}" if first else "-"
        print(f"| {row['name']} | {row['ms']:,.0f} | {share} | {row['peak_mb']:,.0f} |")
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
        "rows": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "softmax.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten: {options.out}/softmax.json")


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):  # from in_process
        asked = json.loads(sys.argv[1])
        limit_threads(asked["threads"])
        print(json.dumps(measure(asked)))
    else:
        main()
