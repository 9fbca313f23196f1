"""The state that one training step hands to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from deq_jax.training.parallel import batch_sharding, leaf_sharding, replicated
from deq_jax.training.task import Task, init


@flax.struct.dataclass
class TrainState:
    """Everything that training changes.

    Attributes:
      step: int32 scalar, the number of finished training steps.
      params: trained parameters.
      opt_state: state of the optimiser.
      extra: the model's other collections (batch statistics ...), {} if there are none.
      carry: what the last batch has left to the next one, see ``carry`` of `Task`; else None.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    extra: Any
    carry: Any = None


def split_seed(seed: int) -> tuple[jax.Array, jax.Array]:
    """The two keys of a run.

    Args:
      seed: `config.train.seed`.

    Returns:
      (key of the initial weights, root key of the steps: step t uses fold_in(root, t)).

    Example:
      >>> init_key, root = split_seed(0)
    """
    init_key, root = jax.random.split(jax.random.key(seed))
    return init_key, root


def create_state(
    task: Task,
    optimizer: optax.GradientTransformation,
    seed: int,
    mesh: Mesh,
    *,
    shard_above: int | None = None,
) -> TrainState:
    """Draws the initial state, under jit: placed as `abstract_state` says.

    Args:
      task: draws the parameters.
      optimizer: draws up its own state.
      seed: of the whole run.
      mesh: where the state lives.
      shard_above: see `parallel.leaf_sharding`.

    Returns:
      The state at step 0.

    Example:
      >>> from deq_jax.training.parallel import make_mesh
      >>> state = create_state(task, optimizer, 0, make_mesh())  # doctest: +SKIP
    """
    shapes = abstract_state(task, optimizer, mesh, shard_above=shard_above)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    return once(_initializer(task, optimizer), mesh, shardings)(split_seed(seed)[0])


def abstract_state(
    task: Task,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    shard_above: int | None = None,
) -> TrainState:
    """The shapes, dtypes and shardings of `create_state`, without computing anything.

    Parameters and the optimiser's state are placed by `parallel.leaf_sharding`, what is carried is
    split by examples, and every device holds all of the rest.

    Args:
      task: as for `create_state`.
      optimizer: as for `create_state`.
      mesh: as for `create_state`.
      shard_above: as for `create_state`.

    Returns:
      A TrainState of `jax.ShapeDtypeStruct`.

    Example:
      >>> from deq_jax.training.parallel import make_mesh
      >>> shapes = abstract_state(task, optimizer, make_mesh())  # doctest: +SKIP
    """
    shapes = jax.eval_shape(_initializer(task, optimizer), jax.random.key(0))

    def place(part: Any, choose: Callable[[Any], NamedSharding]) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=choose(leaf)), part
        )

    def table(leaf: Any) -> NamedSharding:
        return leaf_sharding(leaf, mesh, shard_above)

    return TrainState(
        step=place(shapes.step, lambda _: replicated(mesh)),
        params=place(shapes.params, table),
        opt_state=place(shapes.opt_state, table),
        extra=place(shapes.extra, lambda _: replicated(mesh)),
        carry=place(shapes.carry, lambda _: batch_sharding(mesh)),
    )


def once(function: Callable[..., Any], mesh: Mesh, out_shardings: Any) -> Callable[..., Any]:
    """`jax.jit` of a function that runs once, such as the draw of initial weights.

    On a CPU its code is not optimised: for the weights of a small MDEQ the compiler would take a
    minute, for code that runs for milliseconds.

    Args:
      function: pure.
      mesh: the devices.
      out_shardings: where the results live.

    Returns:
      The compiled function.

    Example:
      >>> from deq_jax.training.parallel import make_mesh
      >>> mesh = make_mesh()
      >>> float(once(jnp.square, mesh, replicated(mesh))(3.0))
      9.0
    """
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    options: Any = {"xla_backend_optimization_level": 0} if is_cpu else None
    return jax.jit(function, out_shardings=out_shardings, compiler_options=options)


def _initializer(task: Task, optimizer: optax.GradientTransformation) -> Any:
    def start(key: jax.Array) -> TrainState:
        params, extra = init(task, key)
        return TrainState(
            step=jnp.int32(0),
            params=params,
            opt_state=optimizer.init(params),
            extra=extra,
            carry=task.first_carry(train=True),
        )

    return start
