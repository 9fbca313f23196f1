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
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from deq_jax.models.layers import NORMAL
from deq_jax.models.softmax import CHUNK, linear_nll, scores


def as_it_is(f: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function in nothing.

    Args:
      f: the function.

    Returns:
      The same function.

    Example:
      >>> as_it_is(abs)(-1)
      1
    """
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
      per_device: what `nll` is wrapped in; ``training.parallel.sharded_map(mesh)`` lets each device
        of a mesh sort its own words.

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
    per_device: Callable[[Callable[..., Any]], Callable[..., Any]] = as_it_is

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
        projected = self.div_val > 1 or self.width(0) != self.features
        tied = self.tie_projections or tuple(i > 0 for i in clusters)

        def table(name: str) -> list[jax.Array]:
            shapes = [(size, self.width(i)) for i, size in enumerate(self.sizes)]
            return [self.param(f"{name}{i}", draw, shape) for i, shape in enumerate(shapes)]

        def projection(name: str, i: int) -> jax.Array:
            return self.param(f"{name}{i}", draw, (self.width(i), self.features))

        self.table = table("table")
        self.out_table = self.table if self.tie_weights else table("out_table")
        self.bias = [self.param(f"bias{i}", zeros, (size,)) for i, size in enumerate(self.sizes)]
        if len(clusters) > 1:
            self.tails = self.param("tails", draw, (len(clusters) - 1, self.width(0)))
            self.tails_bias = self.param("tails_bias", zeros, (len(clusters) - 1,))
        self.projection = self.out_projection = [None for _ in clusters]
        if projected:
            # Vectors of one length share one projection into the model.
            last = clusters if self.div_val > 1 else (0,)
            own = [projection("projection", i) for i in last]
            self.projection = [own[i if self.div_val > 1 else 0] for i in clusters]
            self.out_projection = [
                self.projection[i] if tied[i] else projection("out_projection", i) for i in clusters
            ]

    def __call__(self, words: jax.Array) -> jax.Array:
        """Embeds.

        Args:
          words: int [...], in [0, vocab).

        Returns:
          float [..., features], scaled by sqrt(features).
        """
        total, first = 0, 0
        for table, projection in zip(self.table, self.projection, strict=True):
            place = words - first
            inside = (place >= 0) & (place < table.shape[0])
            vectors = table[jnp.where(inside, place, 0)]
            vectors = jnp.where(inside[..., None], vectors, 0)
            total = total + (vectors if projection is None else vectors @ projection)
            first += table.shape[0]
        return jnp.asarray(total) * math.sqrt(self.features)

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
        return self.per_device(_adaptive_nll)(self._softmax(), hidden, words)

    def log_probs(self, hidden: jax.Array) -> jax.Array:
        """Log-probabilities of all words; for a few positions, as in generating.

        Args:
          hidden: float [..., features].

        Returns:
          float [..., vocab].
        """
        (table, bias, projection), *tails = self._softmax()
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

    def _softmax(self) -> list[tuple[jax.Array, jax.Array, jax.Array | None]]:
        """Table, bias and projection of every cluster; those of the head end with the tails.

        As in the published weights the last but i-th column of the head stands for tail i.
        """
        parts = list(zip(self.out_table, self.bias, self.out_projection, strict=True))
        if len(parts) > 1:
            table, bias, projection = parts[0]
            head = jnp.concatenate([table, self.tails]), jnp.concatenate([bias, self.tails_bias])
            parts[0] = *head, projection
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
