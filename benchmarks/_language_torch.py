"""The DEQ-Transformer in PyTorch: the network that deq_jax is measured against.

Parameters are named as in the published state dict, so that one set of weights runs in both
libraries.  As in deq_jax, keys and values that no evaluation of f changes are computed once a step.
"""

# PyTorch and torchdeq are installed by the extra [bench] only.
# pyright: reportMissingImports=false

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks._case import PENALTY
from benchmarks._torch import Equilibrium, WeightNorm, refresh, start

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


class _Cell(nn.Module):
    """The map that is iterated; its layer normalisation has no parameters."""

    def __init__(self, size: Any) -> None:
        super().__init__()
        self.features = size.features
        self.dec_attn = _Attention(size.features, size.heads)
        up = _Normed(size.features, size.hidden, window=False)
        down = _Normed(size.hidden, size.features, window=False)
        self.pos_ff = nn.Sequential(OrderedDict(ff1_net=up, relu=nn.ReLU(), ff2_net=down))

    def forward(self, z: torch.Tensor, x: _Fixed) -> torch.Tensor:
        h = self.norm(z + self.dec_attn(z, x))
        return self.norm(h + self.pos_ff(h))

    def norm(self, h: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(h, (self.features,), eps=1e-5)


class _Transformer(nn.Module):
    """Embedding, injection, cell and softmax; the solve sits between the last two."""

    def __init__(self, size: Any) -> None:
        super().__init__()
        table = nn.Embedding(size.words, size.features)
        softmax = nn.Linear(size.features, size.words)
        softmax.weight = table.weight
        nn.init.zeros_(softmax.bias)
        self.word_emb = nn.ModuleDict({"emb_layers": nn.ModuleList([table])})
        self.inject_conv = nn.Conv1d(size.features, 3 * size.features, 1)
        self.func = _Cell(size)
        self.crit = nn.ModuleDict({"out_layers": nn.ModuleList([softmax])})
        for weight in (table.weight, self.inject_conv.weight):
            nn.init.normal_(weight, 0, STD)

    def inject(self, words: torch.Tensor, z: torch.Tensor, u: torch.Tensor) -> _Fixed:
        """From words [B, T] and the memory to what f is given; weights are normalised here."""
        refresh(self.func)
        # A convolution of one position is a matrix, and faster as such for this layout.
        conv = self.inject_conv
        embedded = self.word_emb["emb_layers"][0](words) * math.sqrt(self.func.features)
        own = F.linear(embedded, conv.weight.squeeze(-1), conv.bias)
        return self.func.dec_attn.fixed(own, z, u)

    def nll(self, z: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """From states [B, T, C] to the negative log-likelihoods of the targets [B, T]."""
        scores = self.crit["out_layers"][0](z).flatten(0, 1)
        return F.cross_entropy(scores, targets.flatten(), reduction="none").view(targets.shape)


def build(
    case: Any, size: Any, history: int, batch: dict, remembered: Sequence[np.ndarray]
) -> tuple[Callable[[], Any], Callable[[], dict[str, float]]]:
    """Sets one case up.

    Args:
        case: a `benchmarks.language.Case`; its form is "compiled", or else f runs eagerly.
        size: of its model.
        history: iterates that Anderson keeps.
        batch: "words" and "targets", [B, T].
        remembered: states [B, M, C], and injections into keys and values [B, M, 2C].

    Returns:
        What runs a step or an inference, and what gives the evaluations of f and the products with
        its Jacobian in the last run.
    """
    device = start(case.device, 1 if case.form == "eager, 1 thread" else case.threads)
    train = case.task != "infer"
    net = _Transformer(size).train(train).to(device)
    words, targets = (torch.from_numpy(batch[k]).long().to(device) for k in ("words", "targets"))
    z_memory, u_memory = (torch.from_numpy(a).to(device) for a in remembered)
    # torchdeq's Broyden makes one evaluation more than its steps; its Anderson does not.
    solve = Equilibrium(
        net.func,
        case,
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
            z = solve(lambda cell, z: cell(z, x), torch.zeros_like(x.u[..., : size.features]))
            nll = net.nll(z, targets)
        if train:
            (nll.mean() + PENALTY * solve.penalty).backward()
        u = x.u.detach()[..., size.features :]
        after = _remember(z_memory, z.detach()), _remember(u_memory, u)
        if device == "cuda":
            torch.cuda.synchronize()
        return after

    if case.form == "compiled":
        run()  # compiling takes memory of its own
    return run, solve.counts


def _remember(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Appends positions [B, T, C] to [B, M, C], and keeps as many as there were."""
    return torch.cat([old, new], dim=1)[:, new.shape[1] :]


def reference(
    size: Any, batch: dict, remembered: Sequence[np.ndarray]
) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray]:
    """Evaluates the network at a random state, for the comparison with deq_jax.

    Args:
        size: of the model.
        batch: see `build`.
        remembered: see `build`.

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
    words, targets = (torch.from_numpy(batch[key]).long() for key in ("words", "targets"))
    z = torch.randn(*words.shape, size.features)
    with torch.no_grad():
        x = net.inject(words, *map(torch.from_numpy, remembered))
        out, nll = net.func(z, x).numpy(), net.nll(z, targets).numpy()
    state = {name: value.numpy() for name, value in net.state_dict().items()}
    return state, z.numpy(), out, nll
