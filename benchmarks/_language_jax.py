"""deq_jax's side of the language benchmark: the path of a training run, without its optimiser."""

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks._case import NEVER, PENALTY, jax_peak_mb
from benchmarks._language_case import HISTORY, SIZES, Case, Segment, Step, segment


def build(case: Case) -> Step:
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
    model = network(case, mesh)
    text = segment(SIZES[case.size], case.batch)
    read = jax.device_put((text.words, text.targets, full(model, text)), batch_sharding(mesh))
    start = jax.jit(lambda key: model.init(key, *read, train=False))
    variables = jax.device_put(start(jax.random.key(0)), replicated(mesh))
    step = inference(model) if case.task == "infer" else training(model, case.task)
    operands = (variables, *read, jax.random.key(1))
    program = jax.jit(step).lower(*operands).compile()

    return Step(
        run=lambda: jax.block_until_ready(program(*operands)),
        evaluations=lambda: float(np.mean(program(*operands)[0])),
        peak=jax_peak_mb,
        products=lambda: float(np.mean(program(*operands)[1])),
    )


def network(case: Case, mesh: Any) -> Any:
    """The model as the experiment wires it, without dropout.

    Args:
        case: its network, size, depth and history.
        mesh: the devices that share the batch.

    Returns:
        A Linen module.
    """
    import deq_jax as deq
    from deq_jax.models.embeddings import AdaptiveEmbedding
    from deq_jax.models.transformer import DEQTransformer, ExplicitTransformer, TransformerCell
    from deq_jax.training.parallel import sharded_fixed_point, sharded_map

    size = SIZES[case.size]
    common: Any = {
        "vocab": AdaptiveEmbedding(size.words, size.features, per_device=sharded_map(mesh)),
        "cell": TransformerCell(size.features, size.heads, size.hidden, pre_norm=False),
        "memory": size.memory,
    }
    if case.network == "explicit":
        return ExplicitTransformer(layers=case.depth, tied=False, **common)
    backward = deq.Broyden(tol=NEVER, max_steps=case.depth, memory=case.history or case.depth)
    return DEQTransformer(
        solver=deq.Anderson(tol=NEVER, max_steps=case.depth, memory=HISTORY),
        adjoint=deq.Implicit(backward),
        fixed_point=sharded_fixed_point(mesh, TransformerCell.x_axes),
        **common,
    )


def full(model: Any, text: Segment) -> Any:
    """A memory in which nothing is empty.

    Args:
        model: from `network`.
        text: what it remembers; every layer of an explicit network the same states.

    Returns:
        What the model takes.
    """
    batch, length = text.z.shape[:2]
    empty = model.empty_memory(batch)
    z = text.z if empty.z.ndim == 3 else text.z[:, None]
    return empty.replace(
        z=np.broadcast_to(z, empty.z.shape),
        u=text.u,
        filled=np.full(batch, length, np.int32),
    )


def inference(model: Any) -> Callable:
    """Negative log-likelihoods and the next memory.

    Args:
        model: from `network`.

    Returns:
        (variables, words, targets, memory, key) -> (evaluations of f, 0, likelihoods, memory).
    """

    def run(variables, words, targets, memory, key):
        del key
        nll, reading = model.apply(variables, words, targets, memory, train=False)
        return evaluations(reading), 0.0, nll, reading.memory

    return run


def training(model: Any, task: str) -> Callable:
    """Loss and gradients of one step.

    Args:
        model: from `network`.
        task: "train", or "train with JR".

    Returns:
        (variables, words, targets, memory, key) -> (evaluations of f, products with its Jacobian,
        loss, gradients, memory).
    """
    import jax

    import deq_jax as deq

    def run(variables, words, targets, memory, key):
        def objective(params, probe):
            nll, reading = model.apply(
                {"params": params},
                words,
                targets,
                memory,
                train=True,
                probe=probe,
                rngs={"dropout": key},
            )
            loss = nll.mean()
            if task == "train with JR":
                loss = loss + PENALTY * deq.frobenius_penalty(*reading.solution.at, key=key)
            return loss, reading

        gradient = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
        # What comes out for the probe are the statistics of the backward solve.
        probe = deq.backward_probe(memory.u)
        (loss, reading), (grads, stats) = gradient(variables["params"], probe)
        return evaluations(reading), stats.num_steps, loss, grads, reading.memory

    return run


def evaluations(reading: Any) -> Any:
    """How often a pass has evaluated f.

    Args:
        reading: what the model returned.

    Returns:
        A number for every stream; 0 without a solve.
    """
    return 0.0 if reading.solution is None else reading.solution.stats.num_steps


def compare(name: str, state: dict, z: np.ndarray, image: np.ndarray, nll: np.ndarray) -> dict:
    """Evaluate f and the softmax with the twin's weights.

    Args:
        name: of `SIZES`.
        state: the twin's state dict, as numpy.
        z: a state, [B, T, C].
        image: the twin's f(z), where its injection is that of `segment`.
        nll: the twin's negative log-likelihoods at z.

    Returns:
        f and nll, the largest difference over the largest value; parameters, their number.
    """
    import jax
    from flax import linen as nn

    import deq_jax as deq
    from deq_jax.convert.transformer import convert_state
    from deq_jax.linen import once
    from deq_jax.models.transformer_cell import Injection, positions
    from deq_jax.training.parallel import make_mesh

    size, text = SIZES[name], segment(SIZES[name], z.shape[0])
    case = Case(name, "deq", "deq_jax", "1 device", "infer", 1, None, z.shape[0])
    model = network(case, make_mesh(jax.devices()[:1]))
    params: Any = convert_state(state).params

    def evaluate(params, z):
        vocab = {"params": params["vocab"]}
        embedded = model.vocab.apply(vocab, text.words)
        inject = {"params": params["inject"]}
        u: Any = nn.Dense(3 * size.features).apply(inject, embedded)
        places = positions(size.memory + size.length, size.features)
        x = Injection(u=u, memory=full(model, text), positions=places)
        f = {"params": deq.weight_norm.merge(params["equilibrium"]["f"])}
        image = model.cell.apply(f, z, x, method=once)
        return image, model.vocab.apply(vocab, z, text.targets, method="nll")

    def off(a: Any, b: Any) -> float:
        return float(np.abs(np.asarray(a) - b).max() / np.abs(b).max())

    ours = jax.jit(evaluate)(params, z)
    return {
        "f": off(ours[0], image),
        "nll": off(ours[1], nll),
        "parameters": sum(np.size(a) for a in jax.tree.leaves(params)),
    }
