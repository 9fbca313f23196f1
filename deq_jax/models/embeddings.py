"""Word embedding and softmax over large vocabularies: frequent words are wide, rare ones narrow.

The vocabulary is in order of frequency and cut into clusters: a shortlist, and tails of rarer and
rarer words.  The softmax first decides between the words of the shortlist and the tails, then
within one tail,

    log p(word) = log p_head(tail i) + log p_i(word),

so that only the words of a text that are in tail i are ever scored against tail i.

Reference: Grave et al., arXiv 1609.04309; Baevski and Auli, arXiv 1809.10853 (input embedding).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from deq_jax.models.layers import NORMAL
from deq_jax.models.softmax import CHUNK, linear_nll, scores


class OneDevice:
    """What `training.parallel.ShardedMap` is for a batch that is not split.

    Example:
      >>> OneDevice()(abs)(-1)
      1
    """

    def copies(self, params: Any) -> Any:
        """Returns the parameters."""
        return params

    def __call__(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the function."""
        return f


class AdaptiveEmbedding(nn.Module):
    """Embedding and softmax of one vocabulary, with tied weights.

    Called, it embeds words; `nll` and `log_probs` are the softmax.  Cluster i has vectors of
    ``embed / div_val^i`` numbers and a projection to ``features``; without cutoffs there is one
    cluster, and with ``div_val`` 1 and ``embed == features`` there are no projections.

    Attributes:
      vocab: V, number of words, in order of frequency.
      features: size of the model's state.
      embed: size of the vectors of the shortlist; None for ``features``.
      cutoffs: number of words before each tail, rising; () for one softmax over all.
      div_val: every tail's vectors are so many times shorter than those of the cluster before.
      tie_weights: whether the softmax scores with the vectors that embed.
      tie_projections: likewise of the projections, one flag for each cluster; () ties those of the
        tails, as published.
      init_weights: initialiser of all weights; biases start at zero.
      per_device: how `nll` and the embedding are computed; ``training.parallel.ShardedMap(mesh)``
        lets each device of a mesh look up and sort its own words, and sums their gradients once.

    Raises:
      ValueError: for cutoffs that do not rise within the vocabulary, vectors that vanish, a wrong
        number of flags.

    Example:
      >>> vocab = AdaptiveEmbedding(vocab=100, features=8, cutoffs=(20, 60), div_val=2)
      >>> words = jnp.array([[3, 70]])
      >>> params = vocab.init(jax.random.key(0), words, method="everything")
      >>> hidden = vocab.apply(params, words)
      >>> hidden.shape, vocab.apply(params, hidden, words, method="nll").shape
      ((1, 2, 8), (1, 2))
    """

    vocab: int
    features: int
    embed: int | None = None
    cutoffs: tuple[int, ...] = ()
    div_val: int = 1
    tie_weights: bool = True
    tie_projections: tuple[bool, ...] = ()
    init_weights: Callable[..., jax.Array] = NORMAL
    per_device: Any = OneDevice()

    def __post_init__(self) -> None:
        """Refuses settings that do not fit each other."""
        edges = (0, *self.cutoffs, self.vocab)
        if any(a >= b for a, b in zip(edges, edges[1:], strict=False)):
            raise ValueError(
                f"cutoffs must rise between 0 and the {self.vocab} words of the vocabulary, got "
                f"{tuple(self.cutoffs)}"
            )
        if self.features < 1 or self.div_val < 1 or self.width(len(self.cutoffs)) < 1:
            raise ValueError(
                f"got embed={self.embed or self.features}, div_val={self.div_val} and "
                f"{len(self.cutoffs)} tails; wanted vectors of at least one number in every tail"
            )
        if self.tie_projections and len(self.tie_projections) != len(self.cutoffs) + 1:
            raise ValueError(
                f"tie_projections must be one flag for each of {len(self.cutoffs) + 1} clusters, "
                f"or empty, got {self.tie_projections}"
            )
        super().__post_init__()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of words in each cluster, the shortlist first."""
        edges = (0, *self.cutoffs, self.vocab)
        return tuple(b - a for a, b in zip(edges, edges[1:], strict=False))

    def width(self, cluster: int) -> int:
        """Length of the vectors of a cluster.

        Args:
          cluster: its number, 0 for the shortlist.

        Returns:
          The length.
        """
        return (self.embed or self.features) // self.div_val**cluster

    def setup(self) -> None:
        """Creates the parameters; see the class for what there is."""
        clusters, draw, zeros = range(len(self.sizes)), self.init_weights, nn.initializers.zeros
        weights: dict[str, jax.Array] = {}

        def create(name: str, init: Callable[..., jax.Array], *shape: int) -> None:
            weights[name] = self.param(name, init, shape)

        for name in ("table",) if self.tie_weights else ("table", "out_table"):
            for i in clusters:
                create(f"{name}{i}", draw, self.sizes[i], self.width(i))
        for i in clusters:
            create(f"bias{i}", zeros, self.sizes[i])
        if len(clusters) > 1:
            create("tails", draw, len(clusters) - 1, self.width(0))
            create("tails_bias", zeros, len(clusters) - 1)
        for projection in (self._projection, self._out_projection):
            for i in clusters:
                name = projection(i)
                if name is not None and name not in weights:
                    create(name, draw, self.width(i), self.features)
        self.weights, self.copies = weights, self.per_device.copies(weights)

    def _projection(self, cluster: int) -> str | None:
        """Name of what projects a cluster's vectors into the model."""
        if self.div_val == 1 and self.width(0) == self.features:
            return None
        # Vectors of one length share one projection.
        return f"projection{cluster if self.div_val > 1 else 0}"

    def _out_projection(self, cluster: int) -> str | None:
        """Name of what projects the model's state to score a cluster."""
        name = self._projection(cluster)
        tied = self.tie_projections[cluster] if self.tie_projections else cluster > 0
        return name if tied or name is None else f"out_projection{cluster}"

    def __call__(self, words: jax.Array) -> jax.Array:
        """Embeds.

        Args:
          words: int [...], in [0, vocab).

        Returns:
          float [..., features], scaled by sqrt(features).
        """
        return self.per_device(self._embed)(self.copies, words)

    def _embed(self, weights: Mapping[str, jax.Array], words: jax.Array) -> jax.Array:
        total, first = jnp.zeros((*words.shape, self.features)), 0
        for i, size in enumerate(self.sizes):
            place, name = words - first, self._projection(i)
            inside = (place >= 0) & (place < size)
            vectors = weights[f"table{i}"][jnp.where(inside, place, 0)]
            vectors = jnp.where(inside[..., None], vectors, 0)
            total = total + (vectors if name is None else vectors @ weights[name])
            first += size
        return total * math.sqrt(self.features)

    def nll(self, hidden: jax.Array, words: jax.Array) -> jax.Array:
        """Negative log-likelihood of words.

        Args:
          hidden: float [B, ..., features].
          words: int [B, ...].

        Returns:
          float [B, ...].

        Raises:
          ValueError: for shapes that do not fit each other.
        """
        if hidden.shape != (*words.shape, self.features):
            raise ValueError(
                f"got hidden {hidden.shape} for words {words.shape}; wanted "
                f"{(*words.shape, self.features)}"
            )

        def local(weights: Any, hidden: jax.Array, words: jax.Array) -> jax.Array:
            return _adaptive_nll(self._softmax(weights), hidden, words)

        return self.per_device(local)(self.copies, hidden, words)

    def log_probs(self, hidden: jax.Array) -> jax.Array:
        """Log-probabilities of all words; for a few positions, as in generating.

        Args:
          hidden: float [..., features].

        Returns:
          float [..., vocab].
        """
        (table, bias, projection), *tails = self._softmax(self.weights)
        head = jax.nn.log_softmax(scores(_project(hidden, projection), table, bias))
        parts = [head[..., : self.sizes[0]]]
        for i, (table, bias, projection) in enumerate(tails, 1):
            own = jax.nn.log_softmax(scores(_project(hidden, projection), table, bias))
            parts.append(own + head[..., -i][..., None])
        return jnp.concatenate(parts, axis=-1)

    def everything(self, words: jax.Array) -> jax.Array:
        """Embeds words and scores them; to be initialised with, as both make parameters.

        Args:
          words: int [B, ...].

        Returns:
          As `nll`.
        """
        return self.nll(self(words), words)

    def _softmax(
        self, weights: Mapping[str, jax.Array]
    ) -> list[tuple[jax.Array, jax.Array, jax.Array | None]]:
        """Table, bias and projection of every cluster; those of the head end with the tails.

        As in the published weights the last but i-th column of the head stands for tail i.
        """
        kind = "table" if self.tie_weights else "out_table"
        parts = []
        for i in range(len(self.sizes)):
            name = self._out_projection(i)
            projection = None if name is None else weights[name]
            parts.append((weights[f"{kind}{i}"], weights[f"bias{i}"], projection))
        if len(parts) > 1:
            table, bias, projection = parts[0]
            table = jnp.concatenate([table, weights["tails"]])
            parts[0] = table, jnp.concatenate([bias, weights["tails_bias"]]), projection
        return parts


def _project(hidden: jax.Array, projection: jax.Array | None) -> jax.Array:
    return hidden if projection is None else hidden @ projection.T


def _adaptive_nll(
    clusters: list[tuple[jax.Array, jax.Array, jax.Array | None]],
    hidden: jax.Array,
    words: jax.Array,
) -> jax.Array:
    """The negative log-likelihood of every word, cluster by cluster of the sorted words."""
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), words.reshape(-1)
    (table, bias, projection), *tails = clusters
    if not tails:
        nll = linear_nll(_project(rows, projection), table, bias, flat)
        return nll.reshape(words.shape)
    first = table.shape[0] - len(tails)
    edges = [first]
    for tail, _, _ in tails[:-1]:
        edges.append(edges[-1] + tail.shape[0])
    cluster = (flat[:, None] >= jnp.asarray(edges)[None]).sum(axis=1)  # 0 for the shortlist
    columns = jnp.where(cluster == 0, flat, table.shape[0] - cluster)
    nll = linear_nll(_project(rows, projection), table, bias, columns)
    order = jnp.argsort(cluster)  # stable
    # A gather by a permutation, whose transpose JAX does not know to be one too.
    inside, place = rows.at[order].get(unique_indices=True), flat[order]
    ends = jnp.searchsorted(cluster[order], jnp.arange(1, len(tails) + 2))
    total = jnp.zeros_like(nll)
    for i, (table, bias, projection) in enumerate(tails):
        # The words of a tail are few: an eighth at a time wastes little.
        chunk = max(min(CHUNK // table.shape[0], -(-flat.size // 8)), 1)
        part = _project(inside, projection)
        labels = place - edges[i]
        total = total + linear_nll(part, table, bias, labels, ends[i], ends[i + 1], chunk=chunk)
    back = jnp.zeros_like(order).at[order].set(jnp.arange(flat.size), unique_indices=True)
    return (nll + total[back]).reshape(words.shape)
