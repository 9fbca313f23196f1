"""A function as JAX sees it: traced once, with the arrays that it closes over as an operand."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer
from jax.extend.core import (
    ClosedJaxpr,  # pyright: ignore[reportPrivateImportUsage]
    Jaxpr,
    jaxpr_as_fun,
)

from deq_jax.tree import PyTree

# Programs that calls outside jit keep; a program holds some hundred memory mappings.
_PROGRAMS = 128


@dataclasses.dataclass(frozen=True, eq=False)
class Traced:
    """f(*operands) as ``traced(consts, *operands)``.

    Attributes:
      source: the Python function under `jax.disable_jit`, else None: what keeps a program must not
        keep what f closes over.
      identity: what makes functions of the same program the same.
      jaxpr: its program, of the consts and the leaves of the operands; None under
        `jax.disable_jit`, where ``source`` is called.
      in_tree: structure of the operands.
      out: the result, with types (shape, dtype, sharding) in place of arrays.
    """

    source: Callable[..., PyTree] | None
    identity: tuple
    jaxpr: Jaxpr | None
    in_tree: Any
    out: PyTree

    def __call__(self, consts: tuple[jax.Array, ...], *operands: PyTree) -> PyTree:
        """Evaluates the program."""
        if self.jaxpr is None:
            assert self.source is not None
            return self.source(*operands)
        leaves, in_tree = jax.tree.flatten(operands)
        assert in_tree == self.in_tree, f"{in_tree} is not {self.in_tree}"
        out = jaxpr_as_fun(ClosedJaxpr(self.jaxpr, []))(*consts, *leaves)
        return jax.tree.unflatten(jax.tree.structure(self.out), out)


def trace(f: Callable[..., PyTree], *operands: PyTree) -> tuple[Traced, tuple[jax.Array, ...]]:
    """Traces a function once.

    Args:
      f: any function of trees of arrays.
      *operands: its arguments.

    Returns:
      The program, and the arrays and tracers that f closes over.
    """
    in_tree = jax.tree.structure(operands)
    if jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
        return Traced(f, (), None, in_tree, jax.tree.map(jax.typeof, f(*operands))), ()
    closed, out = jax.make_jaxpr(f, return_shape=True)(*operands)
    out = jax.tree.unflatten(jax.tree.structure(out), closed.out_avals)
    jaxpr, consts = closed.jaxpr, tuple(closed.consts)
    if consts:
        # Consts become operands: since JAX 0.12 a Jaxpr holds its own.

        def g(consts: Any, *leaves: jax.Array) -> list[jax.Array]:
            return jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, list(consts)))(*leaves)

        jaxpr = jax.make_jaxpr(g)(consts, *jax.tree.leaves(operands)).jaxpr
    return Traced(None, _identity(f), jaxpr, in_tree, out), consts


def call(
    f: Callable[..., PyTree], traced: Traced, static: tuple, *operands: PyTree, inline: bool = True
) -> PyTree:
    """Returns ``f(traced, *static, *operands)``; outside jit by a compiled program that is kept.

    Args:
      f: a function of this library.
      traced: the program that it runs.
      static: its other hashable arguments.
      *operands: trees of arrays.
      inline: whether f becomes a part of the program that is being traced.  Pass False if autodiff
        goes through f: then JAX keeps the derivative of the compiled program too.

    Returns:
      The result of f.
    """
    tracing = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(operands))
    if traced.jaxpr is None or (inline and tracing):
        return f(traced, *static, *operands)
    try:
        program = _program(f, _Key.of(traced), static)
    except TypeError:  # a solver of the user's that cannot be hashed
        return f(traced, *static, *operands)
    return program(*operands)


def _identity(f: Any) -> tuple:
    """Code of a function, and what it closes over that is no array.

    Functions made anew for every call, such as a lambda in a loop, share their code.  The arrays
    that they close over are operands, and whatever else they close over has to be equal.
    """
    held: list[Any] = []
    while dataclasses.is_dataclass(f) and hasattr(f, "f"):  # one of our wrappers
        names = [field.name for field in dataclasses.fields(f) if field.name != "f"]
        held += [type(f), *(getattr(f, name) for name in names)]
        f = getattr(f, "f")  # noqa: B009
    held.append(getattr(f, "__self__", None))
    held += [cell.cell_contents for cell in getattr(f, "__closure__", None) or ()]
    kept = tuple(a for a in held if not isinstance(a, Tracer) and _is_hashable(a))
    return getattr(f, "__code__", f), kept


@dataclasses.dataclass(frozen=True)
class _Key:
    """What makes two traced functions the same program."""

    identity: tuple
    text: str
    in_tree: Any
    traced: Traced = dataclasses.field(compare=False)

    @classmethod
    def of(cls, traced: Traced) -> _Key:
        text = re.sub(r"0x[0-9a-f]+", "", str(traced.jaxpr))
        return cls(traced.identity, text, traced.in_tree, traced)


@functools.lru_cache(maxsize=_PROGRAMS)
def _program(f: Callable[..., PyTree], key: _Key, static: tuple) -> Callable[..., PyTree]:
    def program(*operands: PyTree) -> PyTree:
        return f(key.traced, *static, *operands)

    return jax.jit(program)


def _is_hashable(thing: Any) -> bool:
    try:
        hash(thing)
    except TypeError:
        return False
    return True
