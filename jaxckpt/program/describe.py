"""A program's structure as text: what its fingerprint is made of, the same in every process and on every terminal.

Nothing is printed through `repr` or `str` of an object that may show an address, a colour, a path or a printing option.
Jaxprs, records, meshes, shardings and arrays are described by what they hold, functions by module, name and code.
"""

import functools
import hashlib
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.core import AbstractValue, ShapedArray
from jax.extend.core import primitives as prims
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxckpt import _compat

# Where these parameters are all that decides what the forward computes; the others say how it is differentiated.
_FORWARD = {
    prims.custom_jvp_call_p: "call_jaxpr",
    prims.custom_vjp_call_p: "call_jaxpr",
    prims.remat_p: "jaxpr",
}
_HEX = 32


@dataclass(frozen=True, slots=True)
class Description:
    """A program's structure.

    Attributes:
        lines: one for each input, equation and output.
        opaque: parameters that are described by their type alone, for want of anything better that is stable.
        is_exact: equal lines are equal computations: there is no function among the parameters but for derivatives,
            nothing opaque and no device.
    """

    lines: tuple[str, ...]
    opaque: tuple[Any, ...]
    is_exact: bool

    @property
    def digest(self) -> str:
        """Of all lines, 32 hexadecimal digits."""
        return digest("\n".join(self.lines))


def digest(text: str | bytes) -> str:
    """A digest of 32 hexadecimal digits."""
    return hashlib.sha256(text.encode(errors="backslashreplace") if isinstance(text, str) else text).hexdigest()[:_HEX]


def show_aval(aval: Any) -> str:
    """`float32[8,512]`."""
    dtype = getattr(aval, "dtype", None)
    if dtype is None:
        return str(aval)
    return f"{dtype}[{','.join(map(str, aval.shape))}]"


def describe(
    avals: Sequence[Any], inputs: Iterable[int], equations: Iterable[Any], outputs: Iterable[Any]
) -> Description:
    """Describe a flat program, its values numbered in the order in which they appear."""
    writer, numbers = Writer(), {}
    number = lambda v: numbers.setdefault(v, len(numbers))  # noqa: E731
    made = lambda v: f"{number(v)}:{writer.aval(avals[v])}"  # noqa: E731
    read = lambda x: str(number(x)) if isinstance(x, int) else writer.constant(x.value, x.aval)  # noqa: E731
    lines = [f"input {made(v)}" for v in inputs]
    lines += [writer.equation(eqn, map(read, eqn.inputs), map(made, eqn.outputs)) for eqn in equations]
    lines.append("output " + " ".join(map(read, outputs)))
    return Description(lines=tuple(lines), opaque=tuple(writer.opaque), is_exact=writer.is_exact)


class Writer:
    """Describes values, and notes which of them cannot be."""

    def __init__(self) -> None:
        self.opaque: list[Any] = []
        self.is_exact = True
        self._is_forward = True  # inside what decides the forward
        self._is_callback = False  # inside a call of Python, whose state is nothing of the program's
        self._is_policy = False  # inside what says which values a checkpoint saves
        self._jaxprs: dict[tuple[int, bool, bool], tuple[Any, str]] = {}  # by identity; they are kept alive
        self._avals: dict[int, tuple[Any, str]] = {}
        self._path: list[int] = []

    def equation(self, eqn: Any, reads: Iterable[str], made: Iterable[str]) -> str:
        """A line for an equation, flat or of a jaxpr."""
        params = " ".join(f"{k}={self._param(eqn.primitive, k, v)}" for k, v in sorted(eqn.params.items()))
        operands = " ".join(reads)  # numbered before what is made
        return f"{' '.join(made)} = {eqn.primitive.name} {operands} [{params}]"

    def aval(self, aval: Any) -> str:
        """Shape and dtype, with `*` for a weak type and what explicit meshes add."""
        found = self._avals.get(id(aval))
        if found is None:
            self._avals[id(aval)] = found = aval, self._aval(aval)
        return found[1]

    def _aval(self, aval: Any) -> str:
        kind = type(aval)
        text = "" if kind is ShapedArray else _name(kind)
        if not hasattr(aval, "dtype"):
            return text
        text += show_aval(aval) + ("*" if getattr(aval, "weak_type", False) else "")
        sharding, space = getattr(aval, "sharding", None), getattr(aval, "memory_space", None)
        if sharding is not None and any(axis != AxisType.Auto for axis in sharding.mesh.axis_types):
            varying = self.text(getattr(aval, "vma", None) or getattr(aval, "manual_axis_type", None))
            text += f"@{self.text(sharding.mesh)}{self.text(sharding.spec)}{varying}"
        return text if getattr(space, "name", "Device") == "Device" else f"{text}<{self.text(space)}>"

    def constant(self, value: Any, aval: Any) -> str:
        """A literal operand: scalars by value, arrays by digest."""
        return f"{self._array(value)}:{self.aval(aval)}"

    def text(self, value: Any) -> str:
        """Any parameter."""
        write = _WRITERS.get(type(value))
        if write is not None:
            return write(self, value)
        if id(value) in self._path:
            return "..."  # it holds itself
        self._path.append(id(value))
        try:
            return self._other(value)
        finally:
            self._path.pop()

    def _param(self, primitive: Any, name: str, value: Any) -> str:
        if name == "np_printoptions":  # how `debug.print` shows numbers here
            self.is_exact = False
            return ""
        write = _WRITERS.get(type(value))
        if write is not None:
            return write(self, value)
        before = self._is_forward, self._is_callback, self._is_policy
        self._is_forward &= _FORWARD.get(primitive, name) == name
        self._is_callback |= name == "callback" and _compat.is_callback(primitive)
        self._is_policy |= name == "policy" and primitive is prims.remat_p
        text = self.text(value)
        self._is_forward, self._is_callback, self._is_policy = before
        return text

    def _many(self, values: Iterable[Any]) -> str:
        return ",".join(map(self.text, values))

    def _pairs(self, pairs: Iterable[tuple[Any, Any]]) -> str:
        return ",".join(f"{k}={self.text(v)}" for k, v in pairs)

    def _sequence(self, value: Sequence[Any]) -> str:
        return f"({self._many(value)})"

    def _set(self, value: Iterable[Any]) -> str:
        return "{" + ",".join(sorted(map(self.text, value))) + "}"

    def _mapping(self, value: Mapping[Any, Any]) -> str:
        return "{" + ",".join(sorted(f"{self.text(k)}:{self.text(v)}" for k, v in value.items())) + "}"

    def _function(self, value: types.FunctionType) -> str:
        if not _is_jax_own(value):
            self._has_code()
        text = f"{_name(value)}:{_code_digest(value.__code__)}"
        if self._is_callback:
            return text + self._closure(value, types.FunctionType)
        # What a rule or a policy was made for is held in its closure, but so is what JAX remembers there meanwhile.
        if self._is_policy or not value.__module__.startswith("jax."):
            text += self._closure(value)
        wrapped = getattr(value, "__wrapped__", None)
        return text if wrapped is None else f"{text}<{self.text(wrapped)}>"

    def _closure(self, value: types.FunctionType, kind: Any = object) -> str:
        held: list[Any] = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        for cell in value.__closure__ or ():
            try:
                held.append(cell.cell_contents)
            except ValueError:  # empty
                held.append(None)
        return f"({','.join(self._held(x) for x in held if isinstance(x, kind))})"

    def _held(self, value: Any) -> str:
        """What a function closes over: constants and functions, since all else may change."""
        if _is_plain(value) or isinstance(value, types.FunctionType):
            return self.text(value)
        return _name(type(value))

    def _has_code(self) -> None:
        self.is_exact &= not self._is_forward

    def _array(self, value: Any) -> str:
        if isinstance(value, bool | int | float | complex):
            return repr(value)
        if jnp.issubdtype(value.dtype, jax.dtypes.extended):
            return f"{value.dtype}{self._array(jax.random.key_data(value))}"
        if isinstance(value, jax.Array) and not value.is_fully_addressable:
            return self._unknown(value)
        found = np.asarray(value)
        if found.dtype.hasobject:
            return self._unknown(value)
        if not found.ndim and found.dtype.kind in "biufc" and (item := found.item()) == item:
            return repr(item)
        shape = "x".join(map(str, found.shape))
        return f"{found.dtype}[{shape}]{digest(np.ascontiguousarray(found).tobytes())}"

    def _typed_array(self, value: Any) -> str:
        return f"{self._array(value)}:{value.dtype}"

    def _jaxpr(self, value: Any) -> str:
        key = id(value), self._is_forward, self._is_callback
        if key not in self._jaxprs:
            opened = getattr(value, "jaxpr", value)
            number: dict[Any, int] = {}
            name = lambda v: f"{number.setdefault(v, len(number))}:{self.aval(v.aval)}"  # noqa: E731
            read = lambda x: self.constant(x.val, x.aval) if isinstance(x, jex.Literal) else str(number[x])  # noqa: E731
            lines = [f"const {self._typed_array(const)}" for const in getattr(value, "consts", ())]
            lines += map(name, (*opened.constvars, *opened.invars))
            lines += [self.equation(e, map(read, e.invars), map(name, e.outvars)) for e in opened.eqns]
            lines.append("output " + " ".join(map(read, opened.outvars)))
            self._jaxprs[key] = value, "jaxpr:" + digest("\n".join(lines))
        return self._jaxprs[key][1]

    def _tree(self, value: Any) -> str:
        node = value.node_data()
        if node is None:
            return "*" if value.num_leaves else "None"
        return f"{_name(node[0])}<{self.text(node[1])}>({self._many(value.children())})"

    def _sharding(self, value: Sharding) -> str:
        if isinstance(value, NamedSharding):
            return f"{self.text(value.mesh)}{self.text(value.spec)}{value.memory_kind}"
        self.is_exact = False
        if isinstance(value, SingleDeviceSharding):
            return f"one device:{value.memory_kind}"
        return repr(value)  # of the compiler's own kinds, which print their tiles and nothing else

    def _mesh(self, value: Any) -> str:
        # The same plan serves other devices, the same run does not.
        self.is_exact &= not isinstance(value, Mesh) or value.empty
        return f"mesh({self.text(value.axis_names)},{self.text(tuple(value.shape.values()))},{_kinds(value)})"

    def _other(self, value: Any) -> str:
        for kind, write in _KINDS:
            if isinstance(value, kind):
                return write(self, value)
        if isinstance(own := getattr(value, "description", None), Description):
            self.opaque += own.opaque
            self.is_exact = False
            return f"program:{own.digest}"
        kind = type(value)
        if hasattr(value, "eqns"):
            return self._jaxpr(value)
        if hasattr(value, "_fields"):  # a named tuple
            return f"{_name(kind)}({self._pairs(zip(value._fields, value, strict=True))})"
        if is_dataclass(value):
            shown = ((f.name, getattr(value, f.name)) for f in fields(value) if f.name not in _HIDDEN)
            return f"{_name(kind)}({self._pairs(shown)})"
        if not _is_python(kind):
            return self._unknown(value)
        state = dict(_state(value))
        if not state and callable(value):
            return self._callable(value)
        if not state:  # one of a kind, such as a marker
            return _name(kind)
        if kind.__module__.partition(".")[0] in ("jax", "jaxlib"):
            return f"{_name(kind)}({self._pairs((k, v) for k, v in sorted(state.items()) if k not in _HIDDEN)})"
        return self._callable(value) if self._is_callback else self._unknown(value)

    def _partial(self, value: functools.partial) -> str:
        return f"partial({self.text(value.func)},{self._many(value.args)},{self._mapping(value.keywords)})"

    def _method(self, value: types.MethodType) -> str:
        self._has_code()
        return f"{self.text(value.__func__)} of {_name(type(value.__self__))}"

    def _builtin(self, value: Any) -> str:
        self._has_code()
        return _name(value)

    def _wrapper(self, value: Any) -> str:
        """A function that JAX transforms, and where it has them its rules."""
        self._has_code()
        rules = [getattr(value, name, None) for name in ("__wrapped__", "fun", "jvp", "fwd", "bwd")]
        return f"{_name(type(value))}({self._many(r for r in rules if r is not None)})"

    def _callable(self, value: Any) -> str:
        self._has_code()
        return f"{_name(type(value))}()"

    def _unknown(self, value: Any) -> str:
        self.is_exact = False
        self.opaque.append(value)
        return _name(type(value))


# Where a value came from and what was remembered of it meanwhile; neither changes what is computed.
_HIDDEN = {"debug_info", "_debug_info", "name_and_src_info", "f_transformed", "stores", "in_type"}
_CONSTANTS = (types.NoneType, bool, int, float, complex, str, bytes, types.EllipsisType, range, slice)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | frozenset | set):
        return all(map(_is_plain, value))
    return type(value) in _CONSTANTS or isinstance(value, Enum | type | np.dtype | np.generic)


def _name(value: Any) -> str:
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None) or type(value).__qualname__
    return f"{getattr(value, '__module__', None) or type(value).__module__}.{name}"


def _kinds(mesh: Any) -> str:
    return ",".join(getattr(kind, "name", str(kind)) for kind in mesh.axis_types)


def _state(value: Any) -> Iterator[tuple[str, Any]]:
    """The attributes of an object, but for what it only remembers."""
    kind = type(value)
    slots = (name for base in kind.__mro__ for name in _as_tuple(base.__dict__.get("__slots__", ())))
    for name in (*slots, *getattr(value, "__dict__", {})):
        is_cached = isinstance(getattr(kind, name, None), functools.cached_property)
        if name not in ("__weakref__", "__dict__") and not is_cached and hasattr(value, name):
            yield name, getattr(value, name)


def _is_jax_own(fun: types.FunctionType) -> bool:
    """Whether a function is JAX's, and the same one wherever its name stands."""
    module = sys.modules.get(fun.__module__) if fun.__module__.startswith("jax.") else None
    return getattr(module, fun.__qualname__, None) is fun


def _is_python(kind: type) -> bool:
    """Whether a class is written in Python, so that its instances' attributes are all there is to them."""
    return kind is object or any("__dict__" in vars(base) or "__slots__" in vars(base) for base in kind.__mro__)


def _as_tuple(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


@functools.lru_cache(maxsize=1024)
def _code_digest(code: types.CodeType) -> str:
    """What a function does, wherever it is written."""
    consts = ",".join(map(_constant, code.co_consts))
    names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
    return digest(f"{code.co_code.hex()} {names} {counts} {consts}")[:16]


def _constant(value: Any) -> str:
    if isinstance(value, types.CodeType):
        return _code_digest(value)
    if isinstance(value, tuple):
        return f"({','.join(map(_constant, value))})"
    if isinstance(value, frozenset):
        return "{" + ",".join(sorted(map(_constant, value))) + "}"
    return repr(value)


_WRITERS: dict[type, Callable[[Writer, Any], str]] = {
    **dict.fromkeys((*_CONSTANTS,), lambda _, value: repr(value)),
    tuple: Writer._sequence,
    list: Writer._sequence,
    set: Writer._set,
    frozenset: Writer._set,
    dict: Writer._mapping,
    functools.partial: Writer._partial,
    slice: lambda writer, value: f"slice({writer._many((value.start, value.stop, value.step))})",
}
_KINDS: tuple[tuple[Any, Callable[[Writer, Any], str]], ...] = (
    (Enum, lambda _, value: f"{_name(type(value))}.{value.name}"),
    (np.dtype, lambda _, value: str(value)),
    (np.ndarray | np.generic | jax.Array, Writer._typed_array),
    (AbstractValue, Writer.aval),
    (jex.Primitive, lambda _, value: value.name),
    (Mesh | AbstractMesh, Writer._mesh),
    (PartitionSpec, lambda writer, value: f"P({writer._many((tuple(value), value.unreduced, value.reduced))})"),
    (Sharding, Writer._sharding),
    (jax.tree_util.PyTreeDef, Writer._tree),
    (types.FunctionType, Writer._function),
    (types.MethodType, Writer._method),
    (types.BuiltinFunctionType | np.ufunc, Writer._builtin),
    (functools.partial, Writer._partial),
    (type(jax.jit(len)), Writer._wrapper),
    (jax.custom_jvp | jax.custom_vjp, Writer._wrapper),
    (type, lambda _, value: _name(value)),
    (types.ModuleType, lambda _, value: value.__name__),
    (Mapping, Writer._mapping),
)
