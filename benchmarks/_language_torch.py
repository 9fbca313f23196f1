"""The DEQ-Transformer in PyTorch: the network that deq_jax is measured against.

Parameters are named as in the published state dict, so that one set of weights runs in both
libraries.  As in deq_jax, keys and values that no evaluation of f changes are computed once a step.
"""

# PyTorch and torchdeq are installed by the extra [bench] only.
# pyright: reportMissingImports=false

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks._case import PENALTY
from benchmarks._torch import Equilibrium, WeightNorm, refresh, start, state_of

STD = 0.01  # of weights that are not under weight norm


class _Normed(WeightNorm):
    """Affine map; with `window` its weights have the axis of a convolution's window, of size 1."""

    def __init__(self, inner: int, out: int, bias: bool = True, window: bool = True) -> None:
        bound = 1 / math.sqrt(inner)
        super().__init__(torch.empty(out, inner, *[1] * window).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(out).uniform_(-bound, bound)) if bias else None

    def refresh(self) -> None:
        super().refresh()
        self.matrix = self.weight.flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.matrix, self.bias)


class _Fixed(NamedTuple):
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


class _Attention(nn.Module):
    """Relative attention of H heads of D features, C = H * D."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.shape = (heads, features // heads)
        self.r_w_bias = nn.Parameter(STD * torch.randn(self.shape))
        self.r_r_bias = nn.Parameter(STD * torch.randn(self.shape))
        self.qkv_net = _Normed(features, 3 * features, bias=False)
        self.r_net = _Normed(features, features, bias=False)
        self.o_net = _Normed(features, features)

    def fixed(self, u: torch.Tensor, z_memory: torch.Tensor, u_memory: torch.Tensor) -> _Fixed:
        """From u [B, T, 3C] and the memory [B, M, C], [B, M, 2C] to what no evaluation changes."""
        features, own, memory = z_memory.shape[2], u.shape[1], z_memory.shape[1]
        matrix = self.qkv_net.matrix[features:]  # nobody asks from the memory
        k, v = (F.linear(z_memory, matrix) + u_memory).chunk(2, dim=-1)
        rates = 10000.0 ** (-torch.arange(0, features, 2, device=u.device) / features)
        angles = torch.arange(memory + own - 1, -1, -1, device=u.device)[:, None] * rates
        places = torch.cat([angles.sin(), angles.cos()], dim=-1)
        hidden = torch.ones(own, memory + own, dtype=torch.bool, device=u.device)
        return _Fixed(
            u,
            k.unflatten(-1, self.shape),
            v.unflatten(-1, self.shape),
            self.r_net(places).unflatten(-1, self.shape),
            hidden.triu(memory + 1),
        )

    def forward(self, z: torch.Tensor, x: _Fixed) -> torch.Tensor:
        qkv = (self.qkv_net(z) + x.u).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, self.shape) for part in qkv)
        k, v = torch.cat([x.k, k], dim=1), torch.cat([x.v, v], dim=1)
        content = torch.einsum("bihd,bjhd->bhij", q + self.r_w_bias, k)
        place = torch.einsum("bihd,jhd->bhij", q + self.r_r_bias, x.r)
        scores = (content + _shift(place)) / math.sqrt(self.shape[1])
        weights = scores.masked_fill(x.hidden, -math.inf).softmax(dim=-1)
        return self.o_net(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))


def _shift(scores: torch.Tensor) -> torch.Tensor:
    """Moves scores [B, H, T, M + T] of distances to the keys that are so far from a query."""
    batch, heads, queries, keys = scores.shape
    rows = F.pad(scores, (1, 0)).reshape(batch, heads, keys + 1, queries)[:, :, 1:]
    return rows.reshape(scores.shape)


class _FeedForward(nn.Module):
    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.ff1_net = _Normed(features, hidden, window=False)
        self.ff2_net = _Normed(hidden, features, window=False)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.ff2_net(F.relu(self.ff1_net(h)))


class _Cell(nn.Module):
    """The map that is iterated; its layer normalisation has no parameters."""

    def __init__(self, size: Any) -> None:
        super().__init__()
        self.features = size.features
        self.dec_attn = _Attention(size.features, size.heads)
        self.pos_ff = _FeedForward(size.features, size.hidden)

    def forward(self, z: torch.Tensor, x: _Fixed) -> torch.Tensor:
        h = self.norm(z + self.dec_attn(z, x))
        return self.norm(h + self.pos_ff(h))

    def norm(self, h: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(h, (self.features,), eps=1e-5)


class _Embedding(nn.Module):
    """Of words, all in one cluster."""

    def __init__(self, words: int, features: int) -> None:
        super().__init__()
        self.emb_layers = nn.ModuleList([nn.Embedding(words, features)])
        self.scale = math.sqrt(features)
        nn.init.normal_(self.table, 0, STD)

    @property
    def table(self) -> nn.Parameter:
        """The vectors, [V, C]."""
        return self.get_parameter("emb_layers.0.weight")

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.emb_layers[0](words) * self.scale


class _Criterion(nn.Module):
    """The softmax over all words, its matrix tied to the embedding's table."""

    def __init__(self, table: nn.Parameter) -> None:
        super().__init__()
        self.out_layers = nn.ModuleList([nn.Linear(*table.shape[::-1])])
        self.out_layers[0].weight = table
        nn.init.zeros_(self.get_parameter("out_layers.0.bias"))

    def forward(self, z: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        scores = self.out_layers[0](z).flatten(0, 1)
        return F.cross_entropy(scores, targets.flatten(), reduction="none").view(targets.shape)


class _Transformer(nn.Module):
    """Embedding, injection, cell and softmax; the solve sits between the last two."""

    def __init__(self, size: Any) -> None:
        super().__init__()
        self.word_emb = _Embedding(size.words, size.features)
        self.inject_conv = nn.Conv1d(size.features, 3 * size.features, 1)
        self.func = _Cell(size)
        self.crit = _Criterion(self.word_emb.table)
        nn.init.normal_(self.inject_conv.weight, 0, STD)

    def inject(self, words: torch.Tensor, z: torch.Tensor, u: torch.Tensor) -> _Fixed:
        """From words [B, T] and the memory to what f is given; weights are normalised here."""
        refresh(self.func)
        # A convolution of one position is a matrix, and faster as such for this layout.
        conv = self.inject_conv
        own = F.linear(self.word_emb(words), conv.weight.squeeze(-1), conv.bias)
        return self.func.dec_attn.fixed(own, z, u)


def build(
    case: Any, size: Any, history: int, text: Any
) -> tuple[Callable[[], Any], Callable[[], dict]]:
    """Sets one case up.

    Args:
        case: a `benchmarks.language.Case`; its form is "compiled", or else f runs eagerly.
        size: of its model.
        history: iterates that Anderson keeps.
        text: a `benchmarks.language.Segment`.

    Returns:
        What runs a step or an inference, and what gives the evaluations of f and the products with
        its Jacobian in the last run.
    """
    device = start(case.device, 1 if case.form == "eager, 1 thread" else case.threads)
    train = case.task != "infer"
    net = _Transformer(size).train(train).to(device)
    words, targets = (torch.from_numpy(a).long().to(device) for a in (text.words, text.targets))
    z_memory, u_memory = (torch.from_numpy(a).to(device) for a in (text.z, text.u))
    # torchdeq's Broyden makes one evaluation more than its steps; its Anderson does not.
    solve = Equilibrium(
        net.func,
        case.form,
        case.task,
        memory={"m": history},
        f_solver="anderson",
        b_solver="broyden",
        f_max_iter=case.depth,
        b_max_iter=case.depth - 1,
    )

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        net.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(train):
            x = net.inject(words, z_memory, u_memory)
            zeros = torch.zeros_like(x.u[..., : size.features])
            z = solve(lambda cell, z: cell(z, x), zeros, train)
            nll = net.crit(z, targets)
        if train:
            (nll.mean() + PENALTY * solve.penalty).backward()
        u = x.u.detach()[..., z.shape[2] :]
        after = _remember(z_memory, z.detach()), _remember(u_memory, u)
        if device == "cuda":
            torch.cuda.synchronize()
        return after

    def counts() -> dict:
        return {"evaluations": float(solve.evaluations), "products": float(solve.products)}

    if case.form == "compiled":
        run()  # compiling takes memory of its own
    return run, counts


def _remember(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Appends positions [B, T, C] to [B, M, C], and keeps as many as there were."""
    return torch.cat([old, new], dim=1)[:, new.shape[1] :]


def reference(size: Any, text: Any) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray]:
    """Evaluates the network at a random state, for the comparison with deq_jax.

    Args:
        size: of the model.
        text: a `benchmarks.language.Segment`.

    Returns:
        Its state dict, z, f(z), and the negative log-likelihoods at z.
    """
    torch.manual_seed(0)
    net = _Transformer(size)
    for label, parameter in net.named_parameters():
        if parameter.ndim == 1 or label.endswith(("weight_g", "_bias")):
            # Biases of 0, and lengths that are those of the directions, would hide a mistake.
            parameter.data += 0.3 * torch.randn_like(parameter)
        elif "weight_v" not in label:
            parameter.data *= 10  # scores so small would not tell the words apart
    words, targets = (torch.from_numpy(a).long() for a in (text.words, text.targets))
    z = torch.randn(*words.shape, size.features)
    with torch.no_grad():
        x = net.inject(words, torch.from_numpy(text.z), torch.from_numpy(text.u))
        out, nll = net.func(z, x).numpy(), net.crit(z, targets).numpy()
    return state_of(net), z.numpy(), out, nll
