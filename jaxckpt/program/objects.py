"""Python objects that a function reaches besides its traced arguments, and whether tracing changed them.

A function is traced once and runs many times. What it does to an object while it is traced would be done once, and a
tracer that it leaves there is of no use afterwards. Both are refused, with the path of the object. Looked at are the
arguments, closure cells, defaults, attributes of functions, `functools.partial` and the `self` of bound methods, and
what these hold. Globals are not, nor are the insides of libraries' objects, the elements of arrays and what an iterator
has given out.
"""

import functools
import inspect
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jaxckpt.errors import UnsupportedProgramError

# Their objects keep caches and counts of their own.
_LIBRARIES = {"jax", "jaxlib", "numpy", "scipy", "flax", "haiku", "equinox", "optax", "jaxckpt", "ckptsolvers"}
_LIBRARIES |= sys.stdlib_module_names - {"__main__"}
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_NAMESPACES = {"builtins", "collections", "types", "argparse"}
# More than a configuration or a trainer holds; walking so many takes some milliseconds.
_MOST = 20_000


def call_unchanged(fun: Callable, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a function that is being traced, and refuse it if it changed an object.

    Raises:
        UnsupportedProgramError: with the path of the first object that changed.
    """
    before = list(_walk(fun, args, kwargs))
    result = fun(*args, **kwargs)
    for path, value, held in before:
        found = _difference(path, value, held)
        if found is not None:
            _refuse(fun, *found)
    return result


def attributes(value: Any) -> dict[str, Any]:
    """What an object holds, in its `__dict__` and its slots."""
    slots = (name for base in type(value).__mro__ for name in _as_tuple(vars(base).get("__slots__", ())))
    held = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return {k: v for k, v in held.items() if k not in ("__weakref__", "__dict__")} | getattr(value, "__dict__", {})


def is_opaque(value: Any) -> bool:
    """Whether an object's insides are nobody's business: an array, a class, a module, an object of a library."""
    if isinstance(value, (_PLAIN, type | types.ModuleType | jax.Array | np.ndarray | np.generic)):
        return True
    if isinstance(value, types.FunctionType | types.MethodType | functools.partial | random.Random):
        return False
    if isinstance(value, np.random.Generator | np.random.RandomState):
        return False
    return _is_library(type(value).__module__) or is_a(value, "flax.linen", "Module")


def _is_library(module: str) -> bool:
    root = module.partition(".")[0]
    return root in _LIBRARIES and root not in _NAMESPACES


def is_a(value: Any, module: str, *names: str) -> bool:
    """Whether an object is of a library's class; nobody has one before the library is imported."""
    found = sys.modules.get(module)
    return found is not None and any(isinstance(value, getattr(found, name, ())) for name in names)


def cells(fun: types.FunctionType) -> dict[str, Any]:
    """The values a function closes over, by name; those not yet set are left out."""
    found = {}
    for name, cell in zip(fun.__code__.co_freevars, fun.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:
            continue
    return found


def _as_tuple(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _walk(fun: Callable, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Every object within reach, the nearest first, with its path and what it holds: by name, by place, or as one."""
    ahead = deque([("self" if not isinstance(fun, types.FunctionType) else "", fun)])
    ahead += zip(_parameter_names(fun, len(args)), args, strict=True)
    ahead += kwargs.items()
    seen: dict[int, Any] = {}  # kept alive, so that no other object takes an address
    left = _MOST
    while ahead and left > 0:
        path, value = ahead.popleft()
        if id(value) in seen:
            continue
        if is_opaque(value):
            wrapped = getattr(value, "__wrapped__", None) if callable(value) and not isinstance(value, type) else None
            ahead += [] if wrapped is None else [("", wrapped)]  # a function under jit
            continue
        seen[id(value)] = value
        held, children = _held(path, value)
        left -= 1 + len(children)
        ahead += children
        if held is not None:
            yield path, value, held


def _parameter_names(fun: Callable, number: int) -> list[str]:
    try:
        kinds = inspect.signature(fun).parameters.values()
        names = [p.name for p in kinds if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    except (TypeError, ValueError):
        names = []
    return [*names[:number], *(f"args[{i}]" for i in range(len(names), number))]


def _held(path: str, value: Any) -> tuple[Any, list[tuple[str, Any]]]:
    """What an object holds, None where that may change or cannot, and where each part of it is found."""
    if isinstance(value, types.FunctionType):
        inside = {f"closure cell {name!r} of {value.__name__}": x for name, x in cells(value).items()}
        inside |= {f"{value.__name__}.{name}": x for name, x in value.__dict__.items()}
        defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        children = [*inside.items(), *((f"a default of {value.__name__}", x) for x in defaults)]
        if _is_library(value.__globals__.get("__name__", "")):  # a wrapper of JAX's, say, around the user's function
            return None, [(name, x) for name, x in children if callable(x)]
        return inside, children
    if isinstance(value, types.MethodType):
        return None, [("self", value.__self__), ("", value.__func__)]
    if isinstance(value, functools.partial):
        named = [(f"partial({name}=)", x) for name, x in value.keywords.items()]
        return None, [("self", value.func), *((f"partial.args[{i}]", x) for i, x in enumerate(value.args)), *named]
    if isinstance(value, random.Random | np.random.Generator | np.random.RandomState):
        return repr(_state(value)), []
    if is_a(value, "flax.nnx", "Pytree", "Object"):  # what it holds itself goes in and out with its state
        return None, [(f"{path}.{name}", x) for name, x in vars(value).items()]
    if isinstance(value, tuple | frozenset | types.MappingProxyType):
        return None, [(f"{path}[{i}]", x) for i, x in enumerate(value)] if isinstance(value, tuple) else []
    return _contents(value), [(_part(path, value, name), x) for name, x in _items(_contents(value))]


def _contents(value: Any) -> Any:
    """A copy of what an object holds."""
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, list | deque):
        return list(value)
    if isinstance(value, set | bytearray):
        return type(value)(value)
    return attributes(value)


def _items(held: Any) -> list[tuple[Any, Any]]:
    if isinstance(held, dict):
        return list(held.items())
    return list(enumerate(held)) if isinstance(held, list) else []


def _part(path: str, value: Any, name: Any) -> str:
    return f"{path}[{name!r}]" if isinstance(value, dict | list | deque) else f"{path}.{name}"


def _state(value: Any) -> Any:
    if isinstance(value, random.Random):
        return value.getstate()
    return value.bit_generator.state if isinstance(value, np.random.Generator) else value.get_state()


def _difference(path: str, value: Any, held: Any) -> tuple[str, Any] | None:
    """The path of the first part of an object that is another than before, with what it is now."""
    now = _held(path, value)[0] if isinstance(held, str) or isinstance(value, types.FunctionType) else _contents(value)
    if not isinstance(held, dict | list):
        return None if now == held else (path, None)
    before, after = dict(_items(held)), dict(_items(now))
    for name in [*after, *(name for name in before if name not in after)]:
        old, new = before.get(name, _MISSING), after.get(name, _MISSING)
        if not _same(old, new) and not _is_cached(value, name, new):
            return name if isinstance(value, types.FunctionType) else _part(path, value, name), new
    return None


_MISSING = object()


def _same(old: Any, new: Any) -> bool:
    """Whether nobody can tell one value from the other: the same object, or plain values that are equal."""
    if old is new:
        return True
    if type(old) is not type(new):
        return False
    if isinstance(old, list | tuple):
        return len(old) == len(new) and all(map(_same, old, new))
    if isinstance(old, dict):
        return old.keys() == new.keys() and all(_same(old[k], new[k]) for k in old)
    if isinstance(old, types.MethodType):
        return old.__self__ is new.__self__ and old.__func__ is new.__func__
    return isinstance(old, _PLAIN) and old == new


def _is_cached(value: Any, name: Any, new: Any) -> bool:
    """Whether this is a `functools.cached_property` that was asked for its value."""
    declared = inspect.getattr_static(type(value), name, None) if isinstance(name, str) else None
    return isinstance(declared, functools.cached_property) and not _has_tracer(new)


def _has_tracer(value: Any) -> bool:
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(value))


def _refuse(fun: Callable, path: str, new: Any) -> None:
    label = getattr(fun, "__name__", type(fun).__name__)
    left = " and leaves a tracer in it" if _has_tracer(new) else ""
    raise UnsupportedProgramError(
        f"{label} changes {path.lstrip('.')} while it is traced{left}. A traced function runs again without its Python "
        "code, so the change would be lost at later calls; return the new value, and change the object outside"
    )
