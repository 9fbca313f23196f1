"""deq_jax's side of the vision benchmark: the path of a training run, without its optimiser."""

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks._case import NEVER, PENALTY, Program, jax_peak_mb
from benchmarks._vision_case import MODELS, STOPPED, Case, batch


def build(case: Case) -> Program:
    """Compile one case without running it.

    Args:
        case: what to build; its form says over how many devices the batch is split.

    Returns:
        The program.
    """
    import jax

    devices = int(case.form.split()[0])
    if case.device == "cpu":
        jax.config.update("jax_num_cpu_devices", devices)
    from deq_jax.training.parallel import batch_sharding, make_mesh, replicated

    mesh = make_mesh(jax.devices()[:devices])
    model = resnet() if case.model == "resnet101" else mdeq(case.model, mesh)
    images, labels = (jax.device_put(a, batch_sharding(mesh)) for a in batch(case.batch))
    start = jax.jit(lambda key: model.init(key, images, train=False))
    variables = jax.device_put(start(jax.random.key(0)), replicated(mesh))
    step = inference(model) if case.task == "infer" else training(model, case.task)
    operands = (variables, images, labels, jax.random.key(1))
    program = jax.jit(step).lower(*operands).compile()

    return Program(
        run=lambda: jax.block_until_ready(program(*operands)),
        evaluations=lambda: float(np.mean(program(*operands)[0])),
        peak=jax_peak_mb,
    )


def mdeq(name: str, mesh: Any) -> Any:
    """The multiscale DEQ as the experiments wire it, without dropout.

    Args:
        name: of `MODELS`.
        mesh: the devices that share the batch.

    Returns:
        A Linen module.
    """
    import deq_jax as deq
    from deq_jax.models.heads import ClassificationHead
    from deq_jax.models.mdeq import MDEQ
    from deq_jax.models.mdeq_cell import MDEQCell
    from deq_jax.training.parallel import sharded_fixed_point

    sizes = MODELS[name]
    return MDEQ(
        cell=MDEQCell(channels=sizes.channels, expansion=sizes.expansion),
        head=ClassificationHead(sizes.classes, sizes.head, sizes.final),
        solver=deq.Broyden(tol=NEVER, max_steps=sizes.forward),
        adjoint=deq.Implicit(deq.Broyden(tol=NEVER, max_steps=sizes.backward)),
        fixed_point=sharded_fixed_point(mesh),
    )


def resnet() -> Any:
    """The explicit rival.

    Returns:
        A Linen module.
    """
    from deq_jax.models.resnet import ResNet

    return ResNet(classes=10, depth=101, stem="cifar")


def inference(model: Any) -> Callable:
    """Logits, by at most `STOPPED` evaluations of f where there is a solve.

    Args:
        model: from `mdeq` or `resnet`.

    Returns:
        (variables, images, labels, key) -> (evaluations of f, logits).
    """
    from deq_jax.models.mdeq import MDEQ

    def run(variables, images, labels, key):
        del labels, key
        if not isinstance(model, MDEQ):
            return 0.0, model.apply(variables, images, train=False)
        result: Any = model.apply(variables, images, train=False, max_steps=STOPPED)
        logits, solution = result
        return solution.stats.num_steps, logits

    return run


def training(model: Any, task: str) -> Callable:
    """Loss and gradients of one step.

    Args:
        model: from `mdeq`.
        task: "train", or "train with JR".

    Returns:
        (variables, images, labels, key) -> (evaluations of f, loss, gradients, batch statistics).
    """
    import jax
    import optax

    import deq_jax as deq

    def run(variables, images, labels, key):
        def objective(params):
            (logits, solution), updated = model.apply(
                {**variables, "params": params},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            if task == "train with JR":
                loss = loss + PENALTY * deq.frobenius_penalty(*solution.at, key=key)
            return loss, (solution.stats.num_steps, updated)

        gradient = jax.value_and_grad(objective, has_aux=True)
        (loss, (count, updated)), grads = gradient(variables["params"])
        return count, loss, grads, updated

    return run


def compare(
    name: str, state: dict, z: list, x: np.ndarray, image: list, logits: np.ndarray
) -> dict:
    """Evaluate f and the whole network with the twin's weights.

    Args:
        name: of `MODELS`.
        state: the twin's state dict, as numpy.
        z: a state, one NHWC array a branch.
        x: an injection, NHWC.
        image: the twin's f(z, x).
        logits: the twin's head at z.

    Returns:
        f and logits, the largest difference over the largest value; parameters, their number.
    """
    import jax

    from deq_jax.convert.mdeq import convert_state
    from deq_jax.models.mdeq_cell import WEIGHT_NORM
    from deq_jax.training.parallel import make_mesh

    model = mdeq(name, make_mesh(jax.devices()[:1]))
    converted = convert_state(state)
    params, stats = converted.params, converted.batch_stats
    f = {"params": WEIGHT_NORM.merge(params["equilibrium"]["f"])}
    ours = jax.jit(model.cell.apply)(f, tuple(z), x)
    head = {"params": params["head"], "batch_stats": stats["head"]}
    scores = jax.jit(lambda v, z: model.head.apply(v, z, train=False))(head, tuple(z))

    def off(a: Any, b: Any) -> float:
        return float(np.abs(np.asarray(a) - b).max() / np.abs(b).max())

    return {
        "f": max(off(a, b) for a, b in zip(ours, image, strict=True)),
        "logits": off(scores, logits),
        "parameters": sum(np.size(a) for a in jax.tree.leaves(params)),
    }
