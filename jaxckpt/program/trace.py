"""A function of pytrees, traced to a flat program, with the trees that lead there and back."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, NoneType
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jaxckpt.program.flatten import flatten
from jaxckpt.program.ir import Program


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A program with the trees that lead from arguments to it and back.

    Attributes:
        program: the flat program.
        consts: closed-over arrays or tracers, the first of the program's inputs.
        in_tree: structure of `(args, kwargs)`.
        is_array: for each leaf, whether it is traced; the others are static.
        static_leaves: the leaves that are not traced, None in the places of those that are.
        out_tree: structure of the result.
        arg_names: for each traced leaf, how a user would write it, such as `args[0]['w']`.
    """

    program: Program
    consts: tuple[Any, ...]
    in_tree: Any
    is_array: tuple[bool, ...]
    static_leaves: tuple[Any, ...]
    out_tree: Any
    arg_names: tuple[str, ...]


def is_array_like(leaf: Any) -> bool:
    """Whether a leaf is traced: arrays, their specs, tracers and Python numbers. All else, booleans too, is static."""
    if isinstance(leaf, bool):
        return False  # a flag that decides what the function does, not data
    if isinstance(leaf, int | float | complex | np.ndarray | np.generic | jax.Array):
        return True
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


class Memory:
    """What a function was traced to, so that equal calls are traced once, as under `jax.jit`.

    JAX's own cache decides what equal calls are, given the same function object for them: that object is kept here.
    A call with static leaves whose state may change, such as instances of a class, is traced each time.
    """

    _MOST = 64

    def __init__(self) -> None:
        self._functions: dict[Any, _Flat] = {}
        self._traced: dict[int, tuple[Any, Traced]] = {}  # by identity of the jaxpr, which is kept alive

    def function(self, key: Any, static: Sequence[Any], flat: "_Flat") -> "_Flat":
        """The first flat function of equal calls."""
        try:
            return self._keep(self._functions, key, flat) if all(map(is_settled, static)) else flat
        except TypeError:  # equal by values that cannot be hashed
            return flat

    def traced(self, closed: Any, make: Callable[[], Traced]) -> Traced:
        """What a jaxpr was made into before."""
        if any(isinstance(const, Tracer) for const in closed.consts):
            return make()  # it ends with the trace that is under way
        if id(closed) not in self._traced:
            self._keep(self._traced, id(closed), (closed, make()))
        return self._traced[id(closed)][1]

    def _keep(self, kept: dict, key: Any, value: Any) -> Any:
        value = kept.setdefault(key, value)
        while len(kept) > self._MOST:
            kept.pop(next(iter(kept)))
        return value


_SETTLED = (NoneType, str, bytes, bool, type, Enum, FunctionType, BuiltinFunctionType, np.ufunc, np.dtype)
_SETTLED += (jax.custom_jvp, jax.custom_vjp, type(jax.jit(len)))


def is_settled(leaf: Any) -> bool:
    """Whether a static value is the same as long as it is equal: a constant or a function, not an object with state."""
    if isinstance(leaf, _SETTLED):
        return True
    return not isinstance(leaf, MethodType) and type(leaf).__hash__ not in (None, object.__hash__)


def trace(
    fun: Callable,
    args: Sequence[Any],
    kwargs: dict[str, Any] | None = None,
    memory: Memory | None = None,
    key: Any = None,
    *,
    keep_checkpoints: bool = True,
) -> Traced:
    """Trace a function to a flat program.

    Args:
        fun: a function of pytrees.
        args: arrays, `ShapeDtypeStruct`s or pytrees of them; leaves that are not arrays are static.
        kwargs: likewise.
        memory: of earlier calls; equal ones give the same object.
        key: stands for `fun` among the functions that share the memory.
        keep_checkpoints: leave the user's own checkpoints as they are; otherwise their insides are inlined.

    Returns:
        The program and its trees. What `fun` raises while it is traced is raised unchanged.
    """
    whole = (tuple(args), dict(kwargs or {}))
    leaves, in_tree = jax.tree.flatten(whole)
    is_array = tuple(map(is_array_like, leaves))
    static = tuple(None if dyn else leaf for leaf, dyn in zip(leaves, is_array, strict=True))
    memory = memory or Memory()
    flat = memory.function((key, in_tree, static, is_array), static, _Flat(fun, in_tree, static, is_array))
    closed = jax.make_jaxpr(flat)(*(leaf for leaf, dyn in zip(leaves, is_array, strict=True) if dyn))

    def make() -> Traced:
        program = flatten(closed.jaxpr, keep_checkpoints=keep_checkpoints)
        # Inside another trace they are values like any other.
        is_inside = any(isinstance(const, Tracer) for const in closed.consts)
        paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(whole)[0]]
        return Traced(
            program=replace(program, closed_over=() if is_inside else tuple(closed.consts)),
            consts=tuple(closed.consts),
            in_tree=in_tree,
            is_array=is_array,
            static_leaves=static,
            out_tree=flat.out_tree,
            arg_names=tuple(_show_path(path) for path, dyn in zip(paths, is_array, strict=True) if dyn),
        )

    return memory.traced(closed, make)


class _Flat:
    """A function of its traced leaves, which remembers the tree of its latest result."""

    def __init__(self, fun: Callable, in_tree: Any, static: Sequence[Any], is_array: Sequence[bool]):
        self._call = functools.partial(call_with_leaves, fun, in_tree, static, is_array)
        self.out_tree: Any = None
        self.__name__ = getattr(fun, "__name__", "fun")

    def __call__(self, *dynamic: Any) -> list[Any]:
        leaves, self.out_tree = jax.tree.flatten(self._call(dynamic))
        return leaves


def call_with_leaves(fun: Callable, in_tree: Any, static: Sequence[Any], is_array: Sequence[bool], dynamic: Any) -> Any:
    """Call a function with its traced leaves put back among the static ones."""
    rest = iter(dynamic)
    leaves = [next(rest) if dyn else leaf for leaf, dyn in zip(static, is_array, strict=True)]
    args, kwargs = jax.tree.unflatten(in_tree, leaves)
    return fun(*args, **kwargs)


def _show_path(path: Any) -> str:
    branch, *rest = path
    if getattr(branch, "idx", None) == 1:
        return f"{rest[0].key}{jax.tree_util.keystr(tuple(rest[1:]))}"
    return f"args{jax.tree_util.keystr(tuple(rest))}"
