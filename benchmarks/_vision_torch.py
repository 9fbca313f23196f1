"""The twin's side of the vision benchmark: torchdeq's solvers at the settings that suit them best.

The backward solve hangs on a hook, which spares the evaluation of f that torchdeq's other form of
the implicit gradient makes; the penalty is taken on the evaluation that carries the gradient.
"""

# PyTorch and torchdeq are installed by the extra [bench] only.
# pyright: reportMissingImports=false

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks._case import NEVER, PENALTY, Program, cuda_peak_mb
from benchmarks._vision_case import MODELS, STOPPED, Case, batch
from benchmarks._vision_twin import Mdeq


class Solve:
    """The equilibrium by torchdeq; its state is one matrix [B, D].

    Every branch lies in that matrix in the order in which its images lie in memory.
    """

    def __init__(self, net: Mdeq, case: Case) -> None:
        """Sets the solvers up.

        Args:
            net: whose cell is iterated.
            case: its form: "NCHW", "channels_last" or "compiled".
        """
        import torchdeq

        model = MODELS[case.model]
        self.shapes = [(c, 32 >> i, 32 >> i) for i, c in enumerate(model.channels)]
        self.last = case.form != "NCHW"
        self.penalised = case.task == "train with JR"
        self.eager = net.fullstage
        self.f = torch.compile(self.eager) if case.form == "compiled" else self.eager
        # torchdeq's Broyden makes one evaluation more than its steps.
        self.deq = torchdeq.get_deq(
            core="indexing",
            ift=True,
            hook_ift=True,
            f_solver="broyden",
            b_solver="broyden",
            f_max_iter=model.forward - 1,
            b_max_iter=model.backward - 1,
            eval_f_max_iter=STOPPED - 1,
            f_tol=NEVER,
            b_tol=NEVER,
        )
        self.count = 0
        self.penalty: Any = 0.0

    def __call__(self, x: torch.Tensor, train: bool) -> list[torch.Tensor]:
        """Solves from zero, with the injection x."""
        import torchdeq

        self.count = 0

        def f(flat: torch.Tensor) -> torch.Tensor:
            traced = torch.is_grad_enabled()
            # What torch.compile makes cannot be differentiated twice.
            cell = self.eager if traced and self.penalised else self.f
            out = self.join(cell(self.split(flat), x))
            if not traced:
                self.count += 1
            elif self.penalised:  # on the one evaluation that also carries the gradient
                self.penalty = torchdeq.loss.jac_reg(out, flat, vecs=1)
            return out

        start = x.new_zeros(x.shape[0], sum(map(math.prod, self.shapes)))
        return self.split(self.deq.train(train)(f, start)[0][-1])

    def join(self, z: list[torch.Tensor]) -> torch.Tensor:
        """From branches [B, C, H, W] to [B, D]."""
        return torch.cat([(y.permute(0, 2, 3, 1) if self.last else y).flatten(1) for y in z], 1)

    def split(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """From [B, D] to branches [B, C, H, W]."""
        parts = flat.split([math.prod(shape) for shape in self.shapes], 1)
        pairs = zip(parts, self.shapes, strict=True)
        if self.last:
            return [y.unflatten(1, (h, w, c)).permute(0, 3, 1, 2) for y, (c, h, w) in pairs]
        return [y.unflatten(1, shape) for y, shape in pairs]


def build(case: Case) -> Program:
    """Set one case up.

    Args:
        case: what to build.

    Returns:
        The program.
    """
    torch.manual_seed(0)
    on_gpu = case.device == "gpu"
    if on_gpu:  # JAX's defaults: TF32, and the fastest algorithm by trial
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    else:
        torch.set_num_threads(case.threads)
    order = torch.contiguous_format if case.form == "NCHW" else torch.channels_last
    place: Any = {"device": "cuda" if on_gpu else "cpu", "memory_format": order}
    train = case.task != "infer"
    net = Mdeq(MODELS[case.model]).train(train).to(**place)
    pixels, classes = batch(case.batch)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(**place)
    labels = torch.from_numpy(classes).long().to(images.device)
    solve = Solve(net, case)

    def run() -> None:
        net.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(train):
            x = net.stem(images)
            logits = net.head(solve(x, train))
        if train:
            (F.cross_entropy(logits, labels) + PENALTY * solve.penalty).backward()
        if on_gpu:
            torch.cuda.synchronize()

    if case.form == "compiled":
        run()  # compiling takes memory of its own
    return Program(run, lambda: float(solve.count), cuda_peak_mb)


def reference(name: str) -> tuple[dict, list, np.ndarray, list, np.ndarray]:
    """Evaluate the twin at a random state, for the comparison with deq_jax.

    Args:
        name: of `MODELS`.

    Returns:
        Its state dict, z, x, f(z, x), and the head's logits at z; NHWC.
    """
    torch.manual_seed(0)
    sizes = MODELS[name]
    net = Mdeq(sizes).eval()
    for parameter in net.parameters():  # scales of 1 and biases of 0 would hide a mistake
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    z = [torch.randn(2, c, 32 >> i, 32 >> i) for i, c in enumerate(sizes.channels)]
    x = torch.randn_like(z[0])

    def images(y: torch.Tensor) -> np.ndarray:
        return y.permute(0, 2, 3, 1).numpy()

    with torch.no_grad():
        net.stem(torch.zeros(1, 3, 32, 32))  # normalises the weights
        out, logits = net.fullstage(z, x), net.head(z).numpy()
    state = {key: value.numpy() for key, value in net.state_dict().items()}
    return state, list(map(images, z)), images(x), list(map(images, out)), logits
