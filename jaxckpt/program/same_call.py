"""When two calls are the same call, and tables of what was made for the latest of them.

Static values are the same by type and value (1, 1.0 and True differ, and so do 0.0 and -0.0), functions and classes by
identity. Whatever may change between two calls is never the same, not even as itself.
"""

import functools
import threading
import types
from collections.abc import Callable, Hashable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, PartitionSpec, Sharding

from jaxckpt.program.objects import attributes, is_a

Value = TypeVar("Value")


class ChangingError(Exception):
    """A value that may be another one at the next call without looking it."""


class Recent(Generic[Value]):
    """What was made for the latest keys; threads may share it.

    Args:
        most: how many are kept. One that was forgotten is made again.
    """

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, threading.Lock()
        self._kept: dict[Any, Value] = {}

    def get(self, key: Any, make: Callable[[], Value]) -> Value:
        """The value of a key, made if it is not there; of several threads that make one, all get the first."""
        with self._lock:
            if key in self._kept:
                self._kept[key] = value = self._kept.pop(key)  # the latest again
                return value
        made = make()
        with self._lock:
            value = self._kept.setdefault(key, made)
            while len(self._kept) > self._most:
                del self._kept[next(iter(self._kept))]
        return value

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._kept.clear()


class Itself:
    """Stands for one object among keys, and keeps it alive so that no other takes its address."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Itself) and other.value is self.value


def key_of(value: Any) -> Hashable:
    """What is equal for static values that are the same.

    Raises:
        ChangingError: the value has state, or is none of those that are known to have none.
    """
    if value is None:
        return None
    kind = type(value)
    if kind in _BY_VALUE:
        return kind, value
    if kind in (float, complex):
        return kind, np.asarray(value).tobytes()  # -0.0 is not 0.0, and nan is nan
    if kind in (tuple, frozenset, slice, range):
        return kind, _parts(value)
    if isinstance(value, _BY_IDENTITY) or kind is object:
        return Itself(value)
    for kinds, key in _KINDS:
        if isinstance(value, kinds):
            return kind, key(value)
    raise ChangingError


def tree_key(tree: Any) -> Hashable:
    """The same for a tree's structure, with what its nodes hold beside their children.

    Raises:
        ChangingError: a node holds something that may change.
    """
    node = tree.node_data()
    if node is None:
        return tree.num_leaves
    kind, data = node
    held = tuple(map(key_of, data)) if isinstance(data, list) else key_of(data)
    return Itself(kind), held, tuple(map(tree_key, tree.children()))


def _parts(value: Any) -> Hashable:
    if isinstance(value, slice):
        return tuple(map(key_of, (value.start, value.stop, value.step)))
    keys = map(key_of, value)
    return frozenset(keys) if isinstance(value, frozenset) else tuple(keys)


def _array_key(value: Any) -> Hashable:
    if isinstance(value, Tracer):
        raise ChangingError
    return Itself(value)


def _scalar_key(value: np.generic) -> Hashable:
    if value.dtype.hasobject:
        raise ChangingError
    return value.dtype, value.tobytes()


def _builtin_key(value: types.BuiltinFunctionType) -> Hashable:
    if not isinstance(value.__self__, types.ModuleType | type | None):
        raise ChangingError  # a method of an object
    return Itself(value)


def _record_key(value: Any) -> Hashable:
    """A frozen dataclass by its fields, if it has nothing beside them."""
    if not is_dataclass(value):
        raise ChangingError
    names = {f.name for f in fields(value)}
    if is_a(value, "flax.linen", "Module"):
        # Its fields cannot be set, and only one that is bound to variables has anything beside them.
        if getattr(value, "scope", None) is not None or getattr(value, "parent", None) is not None:
            raise ChangingError
        names -= {"parent"}
    elif not getattr(value, "__dataclass_params__").frozen or not attributes(value).keys() <= names:  # noqa: B009
        raise ChangingError
    return tuple((name, key_of(getattr(value, name, None))) for name in sorted(names))


def _last_key(value: Any) -> Hashable:
    if is_a(value, "flax.core", "FrozenDict") or is_a(value, "flax.typing", "HashableMapping"):
        return _mapping_key(value)
    if is_a(value, "flax.nnx", "GraphDef"):  # its lists are not changed
        return tuple(map(key_of, value.nodes)), tuple(map(key_of, value.attributes))
    return _record_key(value)


def _mapping_key(value: Mapping[Any, Any]) -> Hashable:
    return tuple((key_of(k), key_of(v)) for k, v in value.items())


def _named_key(value: tuple) -> Hashable:
    if not hasattr(value, "_fields") or getattr(value, "__dict__", None):
        raise ChangingError
    return tuple(map(key_of, value))


def _partial_key(value: functools.partial) -> Hashable:
    if type(value) not in (functools.partial, jax.tree_util.Partial) or value.__dict__:
        raise ChangingError
    return key_of(value.func), key_of(value.args), _mapping_key(value.keywords)


_BY_VALUE = {bool, int, str, bytes, types.EllipsisType, types.NotImplementedType}
_BY_IDENTITY = (type, Enum, types.FunctionType, types.ModuleType, np.ufunc, jax.custom_jvp, jax.custom_vjp)
_BY_IDENTITY += (type(jax.jit(len)),)
_KINDS: tuple[tuple[Any, Callable[[Any], Hashable]], ...] = (
    (jax.Array, _array_key),
    (np.generic, _scalar_key),
    (np.dtype | Mesh | AbstractMesh | PartitionSpec | Sharding | jax.Device, lambda value: value),
    (jax.tree_util.PyTreeDef, tree_key),
    (types.BuiltinFunctionType, _builtin_key),
    (types.MethodType, lambda value: (key_of(value.__func__), key_of(value.__self__))),
    (functools.partial, _partial_key),
    (types.MappingProxyType, _mapping_key),
    (tuple, _named_key),
    (object, _last_key),
)
