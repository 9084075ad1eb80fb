"""Modules of flax NNX as state that goes in and out.

A function that is given NNX objects, or closes over some, and may change them in place becomes a pure one: of their
state, which is arrays, to its result and the changes. `pure` makes it, and what it makes puts the changes into the
caller's objects, as `nnx.jit` and `nnx.remat` do, structure and shared references included. It is what traces the
function that decides where it goes from there, so nothing here knows of plans. flax is never imported: whoever has an
NNX object has imported it.
"""

import copy
import functools
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from jaxckpt.errors import UnsupportedProgramError
from jaxckpt.program.objects import call_unchanged, cells, is_a, is_opaque

# Closed-over objects are one more argument, under a name that nobody can write.
CLOSURE = "<closure>"
_TAG = "jaxckpt"
# Functions, containers and objects that are looked into for modules, at each call.
_MOST = 5_000


@dataclass(frozen=True, kw_only=True)
class Pure:
    """A function without side effects on NNX objects, and the arguments to call it with.

    Attributes:
        fun: returns the result, and with objects what of their state changed.
        args: positional arguments, objects replaced by their structure and their state.
        kwargs: named ones, with the closed-over objects among them.
        objects: the caller's, in the same places; None where there are none, and everything is as it was.
    """

    fun: Callable
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    objects: Any = None

    def finish(self, out: Any) -> Any:
        """Put the changes into the caller's objects, and return the result.

        Raises:
            UnsupportedProgramError: an object that changed belongs outside of a transformation that is under way.
        """
        if self.objects is None:
            return out
        result, changes = out
        if changes is None:
            return result
        _check_level(self.objects, changes.touched)
        nnx = _nnx()
        leaves = jax.tree.leaves((self.args, self.kwargs))
        full = jax.tree.map(
            lambda x: leaves[x.position] if isinstance(x, _Kept) else x,
            (changes.objects, result),
            is_leaf=lambda x: isinstance(x, _Kept),
        )
        with nnx.update_context(_TAG):
            nnx.to_tree(self.objects, ctxtag=_TAG)
            return nnx.from_tree(full, ctxtag=_TAG, is_inner=False)[1]

    @property
    def positional(self) -> tuple[Callable, tuple[Any, ...]]:
        """The same with every argument by its place, where the caller named none."""
        # As callers count them: by name, and what a function closes over at the end.
        names, number = sorted(self.kwargs, key=lambda name: (name == CLOSURE, name)), len(self.args)
        fun = self.fun
        if not names:
            return fun, self.args

        @functools.wraps(fun)
        def by_place(*args: Any) -> Any:
            return fun(*args[:number], **dict(zip(names, args[number:], strict=True)))

        return by_place, (*self.args, *(self.kwargs[name] for name in names))

    def variables(self) -> tuple[Any, ...] | None:
        """For each leaf, the path and the variable of a module that it is in; None where it is in none."""
        if self.objects is None:
            return None
        found: list[Any] = []
        for node in jax.tree.leaves((self.args, self.kwargs), is_leaf=_is_state):
            if not _is_state(node) or _is_variable(node.state):
                found += [None] * len(jax.tree.leaves(node))
                continue
            for path, value in jax.tree_util.tree_flatten_with_path(node.states[0], is_leaf=_is_variable)[0]:
                keys = tuple(getattr(key, "key", getattr(key, "name", None)) for key in path)
                found += [(keys, value)] * len(jax.tree.leaves(value))
        return tuple(found)


def pure(fun: Callable, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, returns_all: bool = False) -> Pure:
    """Take the NNX objects out of a call.

    Args:
        fun: any function.
        args: its arguments, which may be or hold NNX objects.
        kwargs: likewise.
        returns_all: state that did not change is a result too, for donated arguments.

    Returns:
        A pure function and its arguments; those given, where the call has no such object.
    """
    if _nnx() is None:
        return Pure(fun=fun, args=tuple(args), kwargs=dict(kwargs))
    held = _held_objects(fun, args, kwargs)
    named = {**kwargs, CLOSURE: held} if held else dict(kwargs)
    objects = tuple(args), named
    if not _has_objects(objects):
        return Pure(fun=fun, args=tuple(args), kwargs=named)
    # Also what is no object is taken apart once, so that a container is not the caller's.
    pure_args, pure_kwargs = _nnx().to_tree(objects)
    return Pure(fun=Carried(fun, returns_all), args=pure_args, kwargs=pure_kwargs, objects=_only_objects(objects))


def has_objects(fun: Callable, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function is given objects of flax NNX, or closes over some."""
    return _nnx() is not None and (_has_objects((args, kwargs)) or bool(_held_objects(fun, args, kwargs)))


def is_differentiated(variable: Any, wanted: Any) -> bool:
    """Whether `nnx.grad` differentiates a variable of a module, for a `nnx.DiffState` or a position."""
    nnx = _nnx()
    path, value = variable
    state = wanted if isinstance(wanted, nnx.DiffState) else nnx.DiffState(-1, nnx.Param)
    return bool(_is_variable(value) and state.map_prefix(path, value))


def position_of(wanted: Any) -> int:
    """The argument's position, of one or of a `nnx.DiffState`."""
    return wanted.argnum if is_a(wanted, "flax.nnx", "DiffState") else wanted


class Carried:
    """What is traced: objects are made of the state that comes in, and what became of them goes out."""

    def __init__(self, fun: Callable, returns_all: bool) -> None:
        self._fun, self._returns_all = fun, returns_all
        self.__name__ = getattr(fun, "__name__", type(fun).__name__)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Make the objects, call the function, and return its result and what changed."""
        nnx = _nnx()
        places = {} if self._returns_all else {id(x): i for i, x in enumerate(jax.tree.leaves((args, kwargs)))}
        # Made twice, since the second time is the outside of what is changed: it gives the objects their numbers.
        outside = nnx.from_tree((args, kwargs))
        with nnx.update_context(_TAG):
            inside = nnx.from_tree(nnx.to_tree(outside, ctxtag=_TAG), ctxtag=_TAG, is_inner=True)
            objects = _only_objects(inside)
            before = _snapshot(objects)
            result = self._call(*inside)
            touched = _touched(before, _snapshot(objects))
            if touched is None and not _has_objects(result):
                if not self._returns_all:
                    return result, None
                touched = ()
            pure_objects, pure_result = nnx.to_tree((objects, result), ctxtag=_TAG)
        kept = jax.tree.map(lambda x: _Kept(places[id(x)]) if id(x) in places else x, pure_objects)
        return pure_result, _Changes(kept, touched or ())

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the user's function with the new objects in the places of those it holds."""
        made = kwargs.get(CLOSURE, ())
        given = {name: value for name, value in kwargs.items() if name != CLOSURE}
        held = _held_objects(self._fun, args, given)
        new = {id(old): inside for old, inside in zip(held, made, strict=True)}
        replace = _Replacing(lambda x: new.get(id(x), x))
        fun = replace(self._fun)
        args, given = jax.tree.map(lambda x: x if _is_object(x) else replace(x), (args, given), is_leaf=_is_object)
        try:
            return call_unchanged(fun, args, given)
        except Exception as error:
            if not is_a(error, "flax.errors", "TraceContextError"):
                raise
            raise UnsupportedProgramError(
                f"{self.__name__} changes a module of flax NNX that is neither among its arguments nor closed over, or "
                f"that belongs outside of a transformation inside: {error}. Pass the module as an argument"
            ) from error


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Kept:
    """Stands for the leaf of the arguments that did not change."""

    position: int


class _Changes:
    """What became of the objects: their structure and state, and which variables are others."""

    def __init__(self, objects: Any, touched: tuple[int, ...]) -> None:
        self.objects, self.touched = objects, touched


jax.tree_util.register_pytree_node(_Changes, lambda x: ((x.objects,), x.touched), lambda t, c: _Changes(c[0], t))


class _Replacing:
    """Puts other NNX objects in the places of those that a function or an object holds.

    What holds none is left as it is; what does is copied.
    """

    def __init__(self, new: Callable[[Any], Any]) -> None:
        self._new, self._left = new, _MOST
        self._done: dict[int, tuple[Any, Any]] = {}

    def __call__(self, value: Any) -> Any:
        if _is_object(value):
            return self._new(value)
        if is_opaque(value) or self._left <= 0:
            return value
        if id(value) not in self._done:
            self._left -= 1
            self._done[id(value)] = value, value  # where a circle closes, and kept alive
            self._done[id(value)] = value, self._replaced(value)
        return self._done[id(value)][1]

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            fun, owner = self(value.__func__), self(value.__self__)
            return value if fun is value.__func__ and owner is value.__self__ else types.MethodType(fun, owner)
        if isinstance(value, functools.partial):
            fun, args, named = self(value.func), self(value.args), self(value.keywords)
            is_same = fun is value.func and args is value.args and named is value.keywords
            return value if is_same else type(value)(fun, *args, **named)
        if isinstance(value, list | tuple):
            return self._sequence(value)
        if isinstance(value, dict):
            new = {k: self(x) for k, x in value.items()}
            return self._copied(value, new) if _differ(value.values(), new.values()) else value
        held = getattr(value, "__dict__", None)
        if not held:
            return value
        new = {k: self(x) for k, x in held.items()}
        if not _differ(held.values(), new.values()):
            return value
        made = copy.copy(value)
        for name, x in new.items():
            object.__setattr__(made, name, x)
        return made

    def _sequence(self, value: Any) -> Any:
        new = [self(x) for x in value]
        if not _differ(value, new):
            return value
        return type(value)(*new) if hasattr(value, "_fields") else type(value)(new)

    @staticmethod
    def _copied(value: dict, new: dict) -> dict:
        made = copy.copy(value)
        made.update(new)
        return made

    def _function(self, fun: types.FunctionType) -> types.FunctionType:
        held = cells(fun)
        new = {name: self(x) for name, x in held.items()}
        defaults, named = self(fun.__defaults__), self(fun.__kwdefaults__)
        is_same = not _differ(held.values(), new.values()) and defaults is fun.__defaults__
        if is_same and named is fun.__kwdefaults__:
            return fun
        pairs = zip(fun.__code__.co_freevars, fun.__closure__ or (), strict=True)
        closure = tuple(
            types.CellType(new[name]) if name in held and new[name] is not held[name] else cell for name, cell in pairs
        )
        made = types.FunctionType(fun.__code__, fun.__globals__, fun.__name__, defaults, closure)
        made.__kwdefaults__ = named
        made.__dict__.update(fun.__dict__)
        made.__qualname__, made.__module__ = fun.__qualname__, fun.__module__
        return made


def _differ(old: Any, new: Any) -> bool:
    return any(a is not b for a, b in zip(old, new, strict=True))


def _held_objects(fun: Callable, args: Any, kwargs: Any) -> tuple[Any, ...]:
    """The NNX objects that a function closes over, and those in arguments that are no pytrees, each once."""
    found: dict[int, Any] = {}

    def note(value: Any) -> Any:
        return found.setdefault(id(value), value)

    look = _Replacing(note)
    look(fun)
    for leaf in jax.tree.leaves((args, kwargs), is_leaf=_is_object):
        if not _is_object(leaf):
            look(leaf)
    return tuple(found.values())


def _snapshot(objects: Any) -> tuple[Any, list[list[Any]]]:
    """The structure of objects, and the leaves of each of their variables."""
    state = _nnx().to_tree(objects)
    variables = jax.tree.leaves(state, is_leaf=_is_variable)
    return jax.tree.structure(state), [jax.tree.leaves(variable) for variable in variables]


def _touched(before: Any, after: Any) -> tuple[int, ...] | None:
    """Which variables have other leaves than before; None where nothing is another."""
    (structure, old), (now, new) = before, after
    if structure != now:
        return tuple(i for i, (a, b) in enumerate(zip(old, new, strict=False)) if len(old) == len(new) and _other(a, b))
    return tuple(i for i, (a, b) in enumerate(zip(old, new, strict=True)) if _other(a, b)) or None


def _other(old: list[Any], new: list[Any]) -> bool:
    return len(old) != len(new) or _differ(old, new)


def _check_level(objects: Any, touched: tuple[int, ...]) -> None:
    """Refuse to put values of a transformation that is under way into a variable that was made outside of it."""
    paths, _ = jax.tree_util.tree_flatten_with_path(_nnx().to_tree(objects), is_leaf=_is_variable)
    for path, variable in (paths[i] for i in touched):
        try:
            if _is_variable(variable):
                variable.set_raw_value(variable.get_raw_value())
        except Exception as error:
            if not is_a(error, "flax.errors", "TraceContextError"):
                raise
            raise UnsupportedProgramError(
                f"the function changes the {type(variable).__name__} at {show_state_path(path[1:])}, which was made "
                "outside of a transformation that is under way; pass the module through that transformation"
            ) from error


def show_state_path(path: Any) -> str:
    """A path of a module's state, without the two steps from the module to it."""
    return jax.tree_util.keystr(tuple(path)).replace(".states[0]", "")


def _only_objects(tree: Any) -> Any:
    """The NNX objects of a tree in their places, None for the rest."""
    return jax.tree.map(lambda x: x if _is_object(x) else None, tree, is_leaf=_is_object)


def _has_objects(tree: Any) -> bool:
    return any(map(_is_object, jax.tree.leaves(tree, is_leaf=_is_object)))


def _is_object(value: Any) -> bool:
    return is_a(value, "flax.nnx", "Variable", "Pytree", "Object")


def _is_variable(value: Any) -> bool:
    return is_a(value, "flax.nnx", "Variable")


def _is_state(value: Any) -> bool:
    return is_a(value, "flax.nnx", "NodeStates")


def _nnx() -> Any:
    return sys.modules.get("flax.nnx")
