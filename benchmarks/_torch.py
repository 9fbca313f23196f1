"""What the PyTorch sides of the vision and language benchmarks share.

torchdeq's solvers run at the settings that suit them best: the backward solve hangs on a hook,
which spares the evaluation of f that torchdeq's other form of the implicit gradient makes; the
penalty is taken on the evaluation that carries the gradient.
"""

# PyTorch and torchdeq are installed by the extra [bench] only.
# pyright: reportMissingImports=false

from collections.abc import Callable
from typing import Any

import torch
import torchdeq
from torch import nn

from benchmarks._case import NEVER


class WeightNorm(nn.Module):
    """Layer under weight norm; `refresh` computes its weight, once a step as in deq_jax."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(weight)
        self.weight_g = nn.Parameter(self._lengths().detach())

    def _lengths(self) -> torch.Tensor:
        """The length of every output's weights, shaped to be multiplied with them."""
        v = self.weight_v
        return v.flatten(1).norm(dim=1).reshape(-1, *[1] * (v.ndim - 1))

    def refresh(self) -> None:
        """Computes the weight from its length and direction."""
        self.weight = self.weight_v * (self.weight_g / self._lengths())


def refresh(net: nn.Module) -> None:
    """Computes all weights that are under weight norm.

    Args:
        net: a network or a part of it.
    """
    for module in net.modules():
        if isinstance(module, WeightNorm):
            module.refresh()


class Equilibrium:
    """Solves by torchdeq, and counts what the solvers evaluate."""

    def __init__(
        self, cell: nn.Module, case: Any, memory: dict | None = None, **solvers: Any
    ) -> None:
        """Sets the solvers up.

        Args:
            cell: f.
            case: a gradient is wanted unless its task is "infer", with a penalty if that is "train
                with JR"; f is compiled if its form is "compiled".
            memory: of the forward solver, in torchdeq's words.
            **solvers: for `torchdeq.get_deq`.
        """
        self._eager = cell
        self._cell = torch.compile(cell) if case.form == "compiled" else cell
        self._train, self._penalised = case.task != "infer", case.task == "train with JR"
        self._memory = memory
        self._pulls = 0
        common = {"core": "indexing", "ift": True, "hook_ift": True}
        self._deq = torchdeq.get_deq(f_tol=NEVER, b_tol=NEVER, **common, **solvers)
        self._evaluations = 0
        self.penalty: Any = 0.0

    def counts(self) -> dict[str, float]:
        """Evaluations of f and products with its Jacobian in the last solves."""
        # One more pull, after the backward solve, takes its result to the parameters.
        products = max(self._pulls - 1, 0)
        return {"evaluations": float(self._evaluations), "products": float(products)}

    def __call__(
        self, apply: Callable[[Any, torch.Tensor], torch.Tensor], z: torch.Tensor
    ) -> torch.Tensor:
        """Solves.

        Args:
            apply: takes the cell and a state [B, ...]; gives the next state.
            z: start.

        Returns:
            The equilibrium.
        """
        self._evaluations = self._pulls = 0

        def f(z: torch.Tensor) -> torch.Tensor:
            traced = torch.is_grad_enabled()
            # What torch.compile makes cannot be differentiated twice.
            out = apply(self._eager if traced and self._penalised else self._cell, z)
            if not traced:
                self._evaluations += 1
                return out
            if self._penalised:  # on the one evaluation that also carries the gradient
                self.penalty = torchdeq.loss.jac_reg(out, z, vecs=1)
            out.register_hook(self._pull)
            return out

        return self._deq.train(self._train)(f, z, solver_kwargs=self._memory)[0][-1]

    def _pull(self, gradient: torch.Tensor) -> None:
        """Counts a cotangent that arrives at f."""
        del gradient
        self._pulls += 1


def start(device: str, threads: int) -> str:
    """Prepares PyTorch as JAX is by default: TF32, and the fastest algorithm by trial.

    Args:
        device: "cpu" or "gpu".
        threads: on a CPU.

    Returns:
        PyTorch's name of the device.
    """
    torch.manual_seed(0)
    if device == "cpu":
        torch.set_num_threads(threads)
        return "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    return "cuda"
