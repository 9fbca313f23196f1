"""The DEQ-Transformer in PyTorch: the network that deq_jax is measured against.

Parameters are named as in the published state dict, so that one set of weights runs in both
libraries.  As in deq_jax, weights under weight norm, and keys and values that no evaluation of f
changes, are computed once a step.
"""

# PyTorch is installed by the extra [bench] only.
# pyright: reportMissingImports=false

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks._language_case import Size

STD = 0.01  # of weights that are not under weight norm


class Normed(nn.Module):
    """Affine map under weight norm; `refresh` computes its weight, once a step."""

    def __init__(self, inner: int, out: int, bias: bool = True, window: bool = True) -> None:
        """Draws PyTorch's default weights.

        Args:
            inner: features that enter.
            out: features that leave.
            bias: whether it has one.
            window: whether its weights have the axis of a convolution's window, of size 1.
        """
        super().__init__()
        bound = 1 / math.sqrt(inner)
        weight = torch.empty(out, inner, *[1] * window).uniform_(-bound, bound)
        self.weight_v = nn.Parameter(weight)
        self.weight_g = nn.Parameter(self.lengths().detach())
        self.bias = nn.Parameter(torch.empty(out).uniform_(-bound, bound)) if bias else None

    def lengths(self) -> torch.Tensor:
        """The length of every output's weights, shaped to be multiplied with them."""
        v = self.weight_v
        return v.flatten(1).norm(dim=1).reshape(-1, *[1] * (v.ndim - 1))

    def refresh(self) -> None:
        """Computes the matrix from its length and direction."""
        self.matrix = (self.weight_v * (self.weight_g / self.lengths())).flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [..., inner]."""
        return F.linear(x, self.matrix, self.bias)


class Fixed(NamedTuple):
    """What f is given besides its state.

    Attributes:
        u: [B, T, 3C], injections into queries, keys and values.
        k: [B, M, H, D], keys of the memory.
        v: [B, M, H, D], its values.
        r: [M + T, H, D], keys of the relative positions.
        hidden: bool [T, M + T], the keys that a query must not see.
    """

    u: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    r: torch.Tensor
    hidden: torch.Tensor


class Attention(nn.Module):
    """Relative attention."""

    def __init__(self, features: int, heads: int) -> None:
        """Builds it.

        Args:
            features: C.
            heads: H.
        """
        super().__init__()
        self.shape = (heads, features // heads)
        self.r_w_bias = nn.Parameter(STD * torch.randn(self.shape))
        self.r_r_bias = nn.Parameter(STD * torch.randn(self.shape))
        self.qkv_net = Normed(features, 3 * features, bias=False)
        self.r_net = Normed(features, features, bias=False)
        self.o_net = Normed(features, features)

    def fixed(self, u: torch.Tensor, z_memory: torch.Tensor, u_memory: torch.Tensor) -> Fixed:
        """Computes what no evaluation of f changes.

        Args:
            u: [B, T, 3C].
            z_memory: [B, M, C].
            u_memory: [B, M, 2C].

        Returns:
            The second argument of f.
        """
        features, own, memory = z_memory.shape[2], u.shape[1], z_memory.shape[1]
        matrix = self.qkv_net.matrix[features:]  # nobody asks from the memory
        k, v = (F.linear(z_memory, matrix) + u_memory).chunk(2, dim=-1)
        rates = 10000.0 ** (-torch.arange(0, features, 2, device=u.device) / features)
        angles = torch.arange(memory + own - 1, -1, -1, device=u.device)[:, None] * rates
        places = torch.cat([angles.sin(), angles.cos()], dim=-1)
        hidden = torch.ones(own, memory + own, dtype=torch.bool, device=u.device)
        return Fixed(
            u,
            k.unflatten(-1, self.shape),
            v.unflatten(-1, self.shape),
            self.r_net(places).unflatten(-1, self.shape),
            hidden.triu(memory + 1),
        )

    def forward(self, z: torch.Tensor, x: Fixed) -> torch.Tensor:
        """Mixes [B, T, C] over memory and segment."""
        qkv = (self.qkv_net(z) + x.u).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, self.shape) for part in qkv)
        k, v = torch.cat([x.k, k], dim=1), torch.cat([x.v, v], dim=1)
        content = torch.einsum("bihd,bjhd->bhij", q + self.r_w_bias, k)
        place = torch.einsum("bihd,jhd->bhij", q + self.r_r_bias, x.r)
        scores = (content + shift(place)) / math.sqrt(self.shape[1])
        weights = scores.masked_fill(x.hidden, -math.inf).softmax(dim=-1)
        return self.o_net(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))


def shift(scores: torch.Tensor) -> torch.Tensor:
    """Moves the scores of distances M + T - 1, ..., 0 to the keys that are so far from a query.

    Args:
        scores: [B, H, T, M + T].

    Returns:
        [B, H, T, M + T]; keys after the query get something else.
    """
    batch, heads, queries, keys = scores.shape
    rows = F.pad(scores, (1, 0)).reshape(batch, heads, keys + 1, queries)[:, :, 1:]
    return rows.reshape(scores.shape)


class FeedForward(nn.Module):
    """Two layers."""

    def __init__(self, features: int, hidden: int) -> None:
        """Builds it.

        Args:
            features: C.
            hidden: between the layers.
        """
        super().__init__()
        self.ff1_net = Normed(features, hidden, window=False)
        self.ff2_net = Normed(hidden, features, window=False)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Maps [B, T, C]."""
        return self.ff2_net(F.relu(self.ff1_net(h)))


class Cell(nn.Module):
    """The map that is iterated."""

    def __init__(self, size: Size) -> None:
        """Builds it.

        Args:
            size: of the model.
        """
        super().__init__()
        self.features = size.features
        self.dec_attn = Attention(size.features, size.heads)
        self.pos_ff = FeedForward(size.features, size.hidden)

    def forward(self, z: torch.Tensor, x: Fixed) -> torch.Tensor:
        """One application of f to [B, T, C]."""
        h = self.norm(z + self.dec_attn(z, x))
        return self.norm(h + self.pos_ff(h))

    def norm(self, h: torch.Tensor) -> torch.Tensor:
        """Layer normalisation without parameters."""
        return F.layer_norm(h, (self.features,), eps=1e-5)


class Embedding(nn.Module):
    """Of words, all in one cluster."""

    def __init__(self, words: int, features: int) -> None:
        """Draws the table.

        Args:
            words: V.
            features: C.
        """
        super().__init__()
        self.emb_layers = nn.ModuleList([nn.Embedding(words, features)])
        self.scale = math.sqrt(features)
        nn.init.normal_(self.table, 0, STD)

    @property
    def table(self) -> nn.Parameter:
        """The vectors, [V, C]."""
        return self.get_parameter("emb_layers.0.weight")

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """Embeds [B, T]."""
        return self.emb_layers[0](words) * self.scale


class Criterion(nn.Module):
    """The softmax over all words."""

    def __init__(self, table: nn.Parameter) -> None:
        """Ties its matrix.

        Args:
            table: of the embedding.
        """
        super().__init__()
        self.out_layers = nn.ModuleList([nn.Linear(*table.shape[::-1])])
        self.out_layers[0].weight = table
        nn.init.zeros_(self.get_parameter("out_layers.0.bias"))

    def forward(self, z: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood of every target [B, T]."""
        scores = self.out_layers[0](z).flatten(0, 1)
        return F.cross_entropy(scores, targets.flatten(), reduction="none").view(targets.shape)


class Transformer(nn.Module):
    """Embedding, injection, cell, softmax; `solve` sits between the last two."""

    def __init__(self, size: Size) -> None:
        """Builds it.

        Args:
            size: of the model.
        """
        super().__init__()
        self.word_emb = Embedding(size.words, size.features)
        self.inject_conv = nn.Conv1d(size.features, 3 * size.features, 1)
        self.func = Cell(size)
        self.crit = Criterion(self.word_emb.table)
        nn.init.normal_(self.inject_conv.weight, 0, STD)

    def inject(self, words: torch.Tensor, z: torch.Tensor, u: torch.Tensor) -> Fixed:
        """From words [B, T] to what f is given; weights are normalised here.

        Args:
            words: [B, T].
            z: remembered states, [B, M, C].
            u: remembered injections, [B, M, 2C].

        Returns:
            The second argument of f.
        """
        for module in self.func.modules():
            if isinstance(module, Normed):
                module.refresh()
        # A convolution of one position is a matrix, and faster as such for this layout.
        conv = self.inject_conv
        own = F.linear(self.word_emb(words), conv.weight.squeeze(-1), conv.bias)
        return self.func.dec_attn.fixed(own, z, u)
