"""The twin's side of the language benchmark: torchdeq's solvers at the settings that suit them.

As in the vision benchmark the backward solve hangs on a hook, and the penalty is taken on the
evaluation that carries the gradient.
"""

# PyTorch and torchdeq are installed by the extra [bench] only.
# pyright: reportMissingImports=false

from typing import Any

import numpy as np
import torch

from benchmarks._case import NEVER, PENALTY, cuda_peak_mb
from benchmarks._language_case import HISTORY, SIZES, Case, Step, segment
from benchmarks._language_twin import Fixed, Transformer


class Solve:
    """The equilibrium by torchdeq, from zero; counts what the solvers evaluate."""

    def __init__(self, net: Transformer, case: Case) -> None:
        """Sets the solvers up.

        Args:
            net: whose cell is iterated.
            case: its form ("compiled", or else eager), its task and its depth.
        """
        import torchdeq

        self.penalised = case.task == "train with JR"
        self.eager = net.func
        self.f = torch.compile(self.eager) if case.form == "compiled" else self.eager
        # torchdeq's Broyden makes one evaluation more than its steps; its Anderson does not.
        self.deq = torchdeq.get_deq(
            core="indexing",
            ift=True,
            hook_ift=True,
            f_solver="anderson",
            b_solver="broyden",
            f_max_iter=case.depth,
            b_max_iter=case.depth - 1,
            f_tol=NEVER,
            b_tol=NEVER,
        )
        self.forward = self.pulled = 0
        self.penalty: Any = 0.0

    def products(self) -> float:
        """Products with the Jacobian in the last backward solve."""
        # One more pull, after the solve, takes its result to the parameters.
        return float(max(self.pulled - 1, 0))

    def __call__(self, x: Fixed, train: bool) -> torch.Tensor:
        """Solves with the injection x."""
        import torchdeq

        self.forward = self.pulled = 0

        def f(z: torch.Tensor) -> torch.Tensor:
            traced = torch.is_grad_enabled()
            # What torch.compile makes cannot be differentiated twice.
            cell = self.eager if traced and self.penalised else self.f
            out = cell(z, x)
            if not traced:
                self.forward += 1
                return out
            if self.penalised:  # on the one evaluation that also carries the gradient
                self.penalty = torchdeq.loss.jac_reg(out, z, vecs=1)
            out.register_hook(self.pull)
            return out

        start = torch.zeros_like(x.u[..., : self.eager.features])
        return self.deq.train(train)(f, start, solver_kwargs={"m": HISTORY})[0][-1]

    def pull(self, gradient: torch.Tensor) -> None:
        """Counts a cotangent that arrives at f."""
        del gradient
        self.pulled += 1


def build(case: Case) -> Step:
    """Set one case up.

    Args:
        case: what to build.

    Returns:
        The program.
    """
    torch.manual_seed(0)
    on_gpu = case.device == "gpu"
    if on_gpu:  # TF32 is JAX's default
        torch.backends.cuda.matmul.allow_tf32 = True
    else:
        torch.set_num_threads(1 if case.form == "eager, 1 thread" else case.threads)
    device, train = "cuda" if on_gpu else "cpu", case.task != "infer"
    net = Transformer(SIZES[case.size]).train(train).to(device)
    text = segment(SIZES[case.size], case.batch)
    words, targets = (torch.from_numpy(a).long().to(device) for a in (text.words, text.targets))
    z_memory, u_memory = (torch.from_numpy(a).to(device) for a in (text.z, text.u))
    solve = Solve(net, case)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        net.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(train):
            x = net.inject(words, z_memory, u_memory)
            z = solve(x, train)
            nll = net.crit(z, targets)
        if train:
            (nll.mean() + PENALTY * solve.penalty).backward()
        u = x.u.detach()[..., z.shape[2] :]
        after = remember(z_memory, z.detach()), remember(u_memory, u)
        if on_gpu:
            torch.cuda.synchronize()
        return after

    if case.form == "compiled":
        run()  # compiling takes memory of its own
    return Step(run, lambda: float(solve.forward), cuda_peak_mb, solve.products)


def remember(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Appends positions, and keeps as many as there were.

    Args:
        old: [B, M, C].
        new: [B, T, C].

    Returns:
        [B, M, C].
    """
    return torch.cat([old, new], dim=1)[:, new.shape[1] :]


def reference(name: str) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray]:
    """Evaluate the twin at a random state, for the comparison with deq_jax.

    Args:
        name: of `SIZES`.

    Returns:
        Its state dict, z, f(z) of `segment` of two streams, and the negative log-likelihoods at z.
    """
    torch.manual_seed(0)
    size = SIZES[name]
    net = Transformer(size)
    for label, parameter in net.named_parameters():
        if parameter.ndim == 1 or label.endswith(("weight_g", "_bias")):
            # Biases of 0, and lengths that are those of the directions, would hide a mistake.
            parameter.data += 0.3 * torch.randn_like(parameter)
        elif "weight_v" not in label:
            parameter.data *= 10  # scores so small would not tell the words apart
    text = segment(size, 2)
    z = torch.randn(2, size.length, size.features)
    words, targets = (torch.from_numpy(a).long() for a in (text.words, text.targets))
    with torch.no_grad():
        x = net.inject(words, torch.from_numpy(text.z), torch.from_numpy(text.u))
        out, nll = net.func(z, x).numpy(), net.crit(z, targets).numpy()
    state = {key: value.numpy() for key, value in net.state_dict().items()}
    return state, z.numpy(), out, nll
