"""A function of pytrees as a flat program: one list of equations, nested calls inlined, every value numbered."""

import functools
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, NoneType
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer
from jax.extend.core import primitives as prims
from jax.sharding import AxisType

from jaxckpt import _compat
from jaxckpt.errors import UnsupportedProgramError

# Calls that stand for their body and nothing else.
_INLINED = {prims.jit_p: "jaxpr", prims.closed_call_p: "call_jaxpr"}
# Calls with a derivative of their own.
_RULED = {prims.custom_jvp_call_p: "call_jaxpr", prims.custom_vjp_call_p: "call_jaxpr"}
# Primitives whose parameter `call` holds a flat program: decorated functions inside the one that is traced.
PROGRAM_CALLS: set[Any] = set()
_ADDRESS = re.compile(r" at 0x[0-9a-f]+|0x[0-9a-f]{6,}")


@dataclass(frozen=True, slots=True)
class Constant:
    """A literal operand."""

    value: Any
    aval: Any


Atom = int | Constant


@dataclass(frozen=True, slots=True, kw_only=True)
class Equation:
    """One primitive application over numbered values.

    Attributes:
        primitive: the primitive object; dispatch on it, never on its name.
        params: its parameters.
        inputs: values read, or constants.
        outputs: values made.
        source_info: JAX's record of where it came from.
        call_infos: the same of the calls it was inlined from, innermost first.
        name_stacks: name stacks of the calls it was inlined from, outermost first, its own last.
        ctx: JAX's context of the equation.
        effects: its effects.
        reads: the values read, constants left out, each once.
    """

    primitive: Any
    params: dict[str, Any]
    inputs: tuple[Atom, ...]
    outputs: tuple[int, ...]
    source_info: Any
    call_infos: tuple[Any, ...]
    name_stacks: tuple[Any, ...]
    ctx: Any
    effects: Any
    reads: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """List what is read once: it is asked for again and again."""
        reads = tuple(dict.fromkeys(x for x in self.inputs if isinstance(x, int)))
        object.__setattr__(self, "reads", reads)

    @property
    def source(self) -> str:
        """`file:line (function)` of the user's code."""
        return next(filter(None, map(_compat.source_line, (self.source_info, *self.call_infos))), "")

    @property
    def scope(self) -> str:
        """The name stack as text, such as `GPT/h0/attn`."""
        return "/".join(filter(None, (str(s) for s in self.name_stacks)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """A flat program.

    Attributes:
        avals: `[num_values]`, shape and dtype of each value.
        inputs: the values it starts from: closed-over constants first, then the arguments' array leaves.
        equations: in order.
        outputs: values or constants returned.
        shardings: on which devices each input lies; empty where all are on one. No part of the fingerprint, since
            arguments inside `jit` do not show theirs.
        keeps_checkpoints: whether the user's own checkpoints are left as they are; otherwise they are inlined.
    """

    avals: list[Any]
    inputs: tuple[int, ...]
    equations: tuple[Equation, ...]
    outputs: tuple[Atom, ...]
    shardings: tuple[Any, ...] = ()
    keeps_checkpoints: bool = True
    _lines: tuple[str, ...] | None = field(default=None, init=False, repr=False)

    def lines(self) -> tuple[str, ...]:
        """The program as text, a line per input, equation and output; stable across traces and processes."""
        if self._lines is None:
            rename: dict[int, int] = {}
            number = lambda v: rename.setdefault(v, len(rename))  # noqa: E731
            lines = [f"input {number(v)}:{_show_aval(self.avals[v])}" for v in self.inputs]
            lines += [_show_equation(eqn, self.avals, number) for eqn in self.equations]
            lines.append("output " + " ".join(_show_atom(x, number) for x in self.outputs))
            object.__setattr__(self, "_lines", tuple(lines))
        assert self._lines is not None
        return self._lines

    def fingerprint(self) -> str:
        """A digest of the program: equal programs have equal ones."""
        return hashlib.sha256("\n".join(self.lines()).encode()).hexdigest()[:32]


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
        paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(whole)[0]]
        return Traced(
            program=flatten(closed.jaxpr, keep_checkpoints=keep_checkpoints),
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


def flatten(jaxpr: Any, *, keep_checkpoints: bool = True, is_differentiated: bool = False) -> Program:
    """Flatten a jaxpr: number its values, inline calls, and leave out what no output and no effect needs.

    Args:
        jaxpr: what to flatten.
        keep_checkpoints: leave checkpoints as they are; otherwise inline them, in loops and branches too.
        is_differentiated: it will not be differentiated again, so calls with rules for that are inlined too.

    Returns:
        The program.
    """
    inlined = _INLINED | (_RULED if is_differentiated else {}) | ({} if keep_checkpoints else {prims.remat_p: "jaxpr"})
    avals: list[Any] = []
    equations: list[Equation] = []

    def new(var: Any) -> int:
        avals.append(var.aval)
        return len(avals) - 1

    def enter(eqn: Any, operands: Iterable[Atom], stacks: tuple[Any, ...], calls: tuple[Any, ...]) -> list[Atom]:
        """Copy the equations inside a call."""
        inner = eqn.params[inlined[eqn.primitive]]
        # Closed-over arrays of a nested jaxpr are operands like any other.
        held = zip(getattr(inner, "consts", ()), _opened(inner).constvars, strict=True)
        return walk(_opened(inner), (*(Constant(c, v.aval) for c, v in held), *operands), stacks, calls)

    def insert(program: Program, operands: Sequence[Atom], call: Any, stacks: Any, calls: Any) -> list[Atom]:
        """Copy a flat program's equations, its values renumbered."""
        env = dict(zip(program.inputs, operands, strict=True))
        read = lambda x: env[x] if isinstance(x, int) else x  # noqa: E731
        for eqn in program.equations:
            if eqn.primitive in inlined:  # a call that the inner program keeps
                infos = (eqn.source_info, *eqn.call_infos, call.source_info, *calls)
                env.update(
                    zip(eqn.outputs, enter(eqn, map(read, eqn.inputs), (*stacks, *eqn.name_stacks), infos), strict=True)
                )
                continue
            for v in eqn.outputs:
                avals.append(program.avals[v])
                env[v] = len(avals) - 1
            equations.append(
                replace(
                    eqn,
                    params=eqn.params if keep_checkpoints else _without_checkpoints(eqn),
                    inputs=tuple(map(read, eqn.inputs)),
                    outputs=tuple(env[v] for v in eqn.outputs),
                    call_infos=(*eqn.call_infos, call.source_info, *calls),
                    name_stacks=(*stacks, *eqn.name_stacks),
                )
            )
        return list(map(read, program.outputs))

    def walk(jaxpr: Any, operands: Iterable[Atom], stacks: tuple[Any, ...], calls: tuple[Any, ...]) -> list[Atom]:
        env: dict[Any, Atom] = dict(zip([*jaxpr.constvars, *jaxpr.invars], operands, strict=True))

        def read(atom: Any) -> Atom:
            return Constant(atom.val, atom.aval) if isinstance(atom, jex.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            inputs = tuple(map(read, eqn.invars))
            eqn_stacks = (*stacks, eqn.source_info.name_stack)
            if eqn.primitive in inlined:
                env.update(zip(eqn.outvars, enter(eqn, inputs, eqn_stacks, (eqn.source_info, *calls)), strict=True))
                continue
            if eqn.primitive in PROGRAM_CALLS:
                env.update(
                    zip(eqn.outvars, insert(eqn.params["call"].program, inputs, eqn, eqn_stacks, calls), strict=True)
                )
                continue
            outputs = tuple(map(new, eqn.outvars))
            env.update(zip(eqn.outvars, outputs, strict=True))
            equations.append(
                Equation(
                    primitive=eqn.primitive,
                    params=eqn.params if keep_checkpoints else _without_checkpoints(eqn),
                    inputs=inputs,
                    outputs=outputs,
                    source_info=eqn.source_info,
                    call_infos=calls,
                    name_stacks=eqn_stacks,
                    ctx=eqn.ctx,
                    effects=eqn.effects,
                )
            )
        return [read(v) for v in jaxpr.outvars]

    inputs = tuple(new(v) for v in [*jaxpr.constvars, *jaxpr.invars])
    outputs = tuple(walk(jaxpr, inputs, (), ()))
    live = live_equations(equations, outputs)
    return Program(
        avals=avals,
        inputs=inputs,
        equations=tuple(live),
        outputs=outputs,
        keeps_checkpoints=keep_checkpoints,
    )


def _opened(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


# Where a checkpoint inside is inlined too; others, such as `custom_vjp`, say themselves how they are differentiated.
_ENTERED = (prims.scan_p, prims.while_p, prims.cond_p)


def _without_checkpoints(eqn: Any) -> dict[str, Any]:
    """An equation's parameters, with the checkpoints in a loop's body and in branches inlined."""
    if eqn.primitive not in _ENTERED:
        return eqn.params
    return {k: tuple(map(_inlined, v)) if k == "branches" else _inlined(v) for k, v in eqn.params.items()}


def _inlined(value: Any) -> Any:
    if not hasattr(value, "eqns") or not _has_checkpoints(_opened(value)):
        return value
    program = flatten(_opened(value), keep_checkpoints=False)
    # Closed-over arrays come first among the inputs, and are none of the new jaxpr's.
    fun = functools.partial(run, program, *value.consts)
    return jax.make_jaxpr(fun)(*(spec_of(program.avals[v]) for v in program.inputs[len(value.consts) :]))


def _has_checkpoints(jaxpr: Any) -> bool:
    return any(
        eqn.primitive is prims.remat_p or any(map(_has_checkpoints, jex.jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )


def live_equations(equations: Sequence[Equation], outputs: Iterable[Atom]) -> list[Equation]:
    """Those that an output or an effect needs, in order."""
    needed = {x for x in outputs if isinstance(x, int)}
    live = []
    for eqn in reversed(equations):
        if eqn.effects or not needed.isdisjoint(eqn.outputs):
            needed.update(eqn.reads)
            live.append(eqn)
    return live[::-1]


def refuse_effects(program: Program, what: str) -> None:
    """Refuse a program with effects that a plan cannot keep out of its regions. Calls of Python it can.

    Raises:
        UnsupportedProgramError: with the first such operation's line.
    """
    for eqn in program.equations:
        if not all(map(_compat.is_callback_effect, eqn.effects)):
            raise UnsupportedProgramError(
                f"{eqn.primitive.name} at {eqn.source or 'an unknown line'} has side effects, which would happen again "
                f"in every recomputation; move it out of {what}"
            )


def evaluate(equations: Iterable[Equation], env: dict[int, Any], names: dict[int, str] | None = None) -> None:
    """Run equations on traced or concrete values.

    Args:
        equations: in order.
        env: value number to value; what is made is added to it.
        names: values to pass through `checkpoint_name`, under these names.
    """
    for eqn in equations:
        operands = [x.value if isinstance(x, Constant) else env[x] for x in eqn.inputs]
        with _compat.source_context(eqn.source_info, eqn.name_stacks, eqn.ctx):
            results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
            if not eqn.primitive.multiple_results:
                results = [results]
            for v, result in zip(eqn.outputs, results, strict=True):
                if names and v in names:
                    result = checkpoint_name(result, names[v])
                env[v] = result


def outputs_of(program: Program, env: dict[int, Any]) -> list[Any]:
    """Read a program's outputs from the values that running it made."""
    return [x.value if isinstance(x, Constant) else env[x] for x in program.outputs]


def run(program: Program, *inputs: Any) -> list[Any]:
    """Run a program on flat inputs, without a plan."""
    env = dict(zip(program.inputs, inputs, strict=True))
    evaluate(program.equations, env)
    return outputs_of(program, env)


def spec_of(aval: Any) -> jax.ShapeDtypeStruct:
    """What JAX traces to a value like this one: more than a shape inside `shard_map` and on explicit meshes."""
    sharding = getattr(aval, "sharding", None)
    if sharding is None or all(kind == AxisType.Auto for kind in sharding.mesh.axis_types):
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype)
    return jax.ShapeDtypeStruct(
        aval.shape, aval.dtype, sharding=sharding, manual_axis_type=getattr(aval, "manual_axis_type", None)
    )


def elements(aval: Any) -> int:
    """How many elements a value has."""
    return math.prod(getattr(aval, "shape", ()))


def size_bytes(aval: Any) -> int:
    """Bytes of an array of this shape and dtype; 0 for tokens and float0."""
    dtype, shape = getattr(aval, "dtype", None), getattr(aval, "shape", ())
    if dtype is None or dtype == jax.dtypes.float0:
        return 0
    return math.prod(shape) * _item_bytes(dtype)


@functools.cache
def _item_bytes(dtype: Any) -> int:
    return 8 if jnp.issubdtype(dtype, jax.dtypes.extended) else np.dtype(dtype).itemsize


def is_differentiable(aval: Any) -> bool:
    """Whether a tangent can be other than zero: floating point or complex."""
    dtype = getattr(aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, np.inexact)


def show_aval(aval: Any) -> str:
    """`float32[8,512]`."""
    dtype = getattr(aval, "dtype", None)
    if dtype is None:
        return str(aval)
    return f"{dtype}[{','.join(map(str, aval.shape))}]"


def _show_aval(aval: Any) -> str:
    return show_aval(aval) + ("*" if getattr(aval, "weak_type", False) else "")


def _show_atom(atom: Atom, number: Callable[[int], int]) -> str:
    if isinstance(atom, int):
        return str(number(atom))
    value = np.asarray(atom.value) if np.ndim(atom.value) else atom.value
    if np.ndim(value):
        return f"const:{hashlib.sha256(value.tobytes()).hexdigest()[:12]}:{_show_aval(atom.aval)}"
    return f"{value}:{_show_aval(atom.aval)}"


def _show_equation(eqn: Equation, avals: Sequence[Any], number: Callable[[int], int]) -> str:
    params = " ".join(f"{k}={_ADDRESS.sub('', str(v))}" for k, v in sorted(eqn.params.items()))
    reads = " ".join(_show_atom(x, number) for x in eqn.inputs)
    made = " ".join(f"{number(v)}:{_show_aval(avals[v])}" for v in eqn.outputs)
    return f"{made} = {eqn.primitive.name} {reads} [{params}]"


def _show_path(path: Any) -> str:
    branch, *rest = path
    if getattr(branch, "idx", None) == 1:
        return f"{rest[0].key}{jax.tree_util.keystr(tuple(rest[1:]))}"
    return f"args{jax.tree_util.keystr(tuple(rest))}"
