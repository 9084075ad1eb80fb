"""A function of pytrees, traced to a flat program, with the trees that lead there and back."""

import functools
import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jaxckpt.program.flatten import flatten
from jaxckpt.program.ir import Program
from jaxckpt.program.nnx import show_state_path
from jaxckpt.program.objects import call_unchanged
from jaxckpt.program.same_call import ChangingError, Itself, Recent, key_of, tree_key


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
        variables: for each traced leaf, the path and the variable of a module of flax NNX that it is in, or None; None
            where there are no modules.
    """

    program: Program
    consts: tuple[Any, ...]
    in_tree: Any
    is_array: tuple[bool, ...]
    static_leaves: tuple[Any, ...]
    out_tree: Any
    arg_names: tuple[str, ...]
    variables: tuple[Any, ...] | None = None

    def dynamic(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """The traced ones of a call's leaves, in order."""
        return tuple(leaf for leaf, dyn in zip(leaves, self.is_array, strict=True) if dyn)


def traced_leaves(tree: Any) -> tuple[bool, ...]:
    """Which leaves of a call's arguments are traced, in order; the others are static, part of what the function is.

    Arrays, their specs, NumPy's scalars and tracers are traced, and so are Python's numbers wherever `jax.jit` would
    find them: as arguments and in dicts, tuples and training states. Static are True and False, whatever is no number
    (strings, functions, objects), and in an Equinox module every field that is no array, as `equinox.filter_jit` has
    it. The step of `fit` is under `jax.jit` itself, where True and False are traced too.
    """
    equinox = sys.modules.get("equinox")
    if equinox is None:
        return tuple(map(_is_data, jax.tree.leaves(tree)))
    module = equinox.Module
    found: list[bool] = []
    for node in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, module)):
        found += map(_is_array, jax.tree.leaves(node)) if isinstance(node, module) else [_is_data(node)]
    return tuple(found)


def _is_data(leaf: Any) -> bool:
    return (isinstance(leaf, int | float | complex) and not isinstance(leaf, bool)) or _is_array(leaf)


def _is_array(leaf: Any) -> bool:
    if isinstance(leaf, np.ndarray | np.generic | jax.Array):
        return True
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


class Memory:
    """What a function was traced to, so that the same call is traced once, as under `jax.jit`.

    JAX's own cache decides which shapes are the same, given one function object for them: that object is kept here. A
    call with anything that may have changed since, such as an object with state, is traced each time.
    """

    def __init__(self) -> None:
        self._functions: Recent[_Flat] = Recent(64)
        # By the jaxpr, which is kept alive, and the result's tree, which the jaxpr does not tell.
        self._traced: Recent[Traced] = Recent(64)

    def function(self, key: Hashable, make: "Callable[[], _Flat]") -> "_Flat":
        """The one flat function of the same calls."""
        return self._functions.get(key, make)

    def traced(self, closed: Any, out_tree: Any, make: Callable[[], Traced]) -> Traced:
        """What a jaxpr was made into before."""
        if any(isinstance(const, Tracer) for const in closed.consts):
            return make()  # it ends with the trace that is under way
        found = self._traced.get(Itself(closed), make)
        return found if found.out_tree == out_tree else make()


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
        args: arrays, `ShapeDtypeStruct`s or pytrees of them; `traced_leaves` says which leaves are static.
        kwargs: likewise.
        memory: of earlier calls; the same ones give the same object.
        key: stands for `fun` among the functions that share the memory; None is the function itself.
        keep_checkpoints: leave the user's own checkpoints as they are; otherwise their insides are inlined.

    Returns:
        The program and its trees. What `fun` raises while it is traced is raised unchanged.

    Raises:
        UnsupportedProgramError: `fun` changes an object while it is traced.
    """
    whole = (tuple(args), dict(kwargs or {}))
    leaves, in_tree = jax.tree.flatten(whole)
    is_array = traced_leaves(whole)
    static = tuple(None if dyn else leaf for leaf, dyn in zip(leaves, is_array, strict=True))
    flat = _Flat(fun, in_tree, static, is_array)
    if memory is not None:
        try:
            same = key_of((fun if key is None else key, static, is_array)), tree_key(in_tree)
        except ChangingError:
            memory = None
        else:
            flat = memory.function(same, lambda: flat)
    dynamic = [leaf for leaf, dyn in zip(leaves, is_array, strict=True) if dyn]
    # The result's tree comes with the trace, whichever call and thread made it.
    closed, results = jax.make_jaxpr(flat, return_shape=True)(*dynamic)
    out_tree = jax.tree.structure(results)

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
            out_tree=out_tree,
            arg_names=tuple(_show_path(path) for path, dyn in zip(paths, is_array, strict=True) if dyn),
        )

    return make() if memory is None else memory.traced(closed, out_tree, make)


class _Flat:
    """A function of its traced leaves."""

    def __init__(self, fun: Callable, in_tree: Any, static: Sequence[Any], is_array: Sequence[bool]):
        self._call = functools.partial(call_with_leaves, fun, in_tree, static, is_array)
        self.__name__ = getattr(fun, "__name__", "fun")

    def __call__(self, *dynamic: Any) -> Any:
        return self._call(dynamic)


def call_with_leaves(fun: Callable, in_tree: Any, static: Sequence[Any], is_array: Sequence[bool], dynamic: Any) -> Any:
    """Call a function with its traced leaves put back among the static ones."""
    rest = iter(dynamic)
    leaves = [next(rest) if dyn else leaf for leaf, dyn in zip(static, is_array, strict=True)]
    args, kwargs = jax.tree.unflatten(in_tree, leaves)
    return call_unchanged(fun, args, kwargs)


def _show_path(path: Any) -> str:
    branch, *rest = path
    if getattr(branch, "idx", None) == 1:
        return f"{rest[0].key}{show_state_path(rest[1:])}"
    return f"args{show_state_path(rest)}"
