"""The state that one training step hands to the next."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from deq_jax.training.parallel import replicated
from deq_jax.training.task import Task


@flax.struct.dataclass
class TrainState:
    """Everything that training changes.

    Attributes:
      step: int32 scalar, the number of finished training steps.
      params: trained parameters.
      opt_state: state of the optimiser.
      extra: untrained collections (batch statistics ...), {} when there are none.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    extra: Any


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
    task: Task, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh
) -> TrainState:
    """Draws the initial state, under jit, one copy on every device of the mesh.

    Args:
      task: draws the parameters.
      optimizer: draws up its own state.
      seed: of the whole run.
      mesh: where the state lives.

    Returns:
      The state at step 0.

    Example:
      >>> from deq_jax.training.parallel import make_mesh
      >>> state = create_state(task, optimizer, 0, make_mesh())  # doctest: +SKIP
    """
    return jax.jit(_initializer(task, optimizer), out_shardings=replicated(mesh))(
        split_seed(seed)[0]
    )


def abstract_state(task: Task, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The shapes, dtypes and shardings of `create_state`, without computing anything.

    Args:
      task: as for `create_state`.
      optimizer: as for `create_state`.
      mesh: as for `create_state`.

    Returns:
      A TrainState of `jax.ShapeDtypeStruct`.

    Example:
      >>> from deq_jax.training.parallel import make_mesh
      >>> shapes = abstract_state(task, optimizer, make_mesh())  # doctest: +SKIP
    """
    shapes = jax.eval_shape(_initializer(task, optimizer), jax.random.key(0))
    sharding = replicated(mesh)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes
    )


def _initializer(task: Task, optimizer: optax.GradientTransformation) -> Any:
    def init(key: jax.Array) -> TrainState:
        params, extra = task.init(key)
        return TrainState(
            step=jnp.int32(0), params=params, opt_state=optimizer.init(params), extra=extra
        )

    return init
