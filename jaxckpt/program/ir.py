"""The flat program: equations over numbered values, with a fingerprint."""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from jaxckpt import _compat
from jaxckpt.program.describe import Description, describe
from jaxckpt.program.source import relative_source


@dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """A literal operand or result. Its value may be an array, so it is the same as itself alone."""

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
        effects: its effects, names of mapped axes among them.
        has_effects: whether one of them must happen once: a name of an axis need not.
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
    has_effects: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """List what is read once: it is asked for again and again."""
        reads = tuple(dict.fromkeys(x for x in self.inputs if isinstance(x, int)))
        object.__setattr__(self, "reads", reads)
        object.__setattr__(self, "has_effects", not all(map(_compat.is_axis_effect, self.effects)))

    @property
    def source(self) -> str:
        """`file:line (function)` of the user's code, the file relative to its project or package."""
        lines = map(_compat.source_line, (self.source_info, *self.call_infos))
        return relative_source(next(filter(None, lines), ""))

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
        closed_over: the arrays that stand for the first inputs, where they are known: what the function closes over. In
            the user's own jit they are constants. No part of the fingerprint.
        keeps_checkpoints: whether the user's own checkpoints are left as they are; otherwise they are inlined.
    """

    avals: list[Any]
    inputs: tuple[int, ...]
    equations: tuple[Equation, ...]
    outputs: tuple[Atom, ...]
    shardings: tuple[Any, ...] = ()
    closed_over: tuple[Any, ...] = ()
    keeps_checkpoints: bool = True

    @functools.cached_property
    def description(self) -> Description:
        """Its structure as text; stable across traces, processes, terminals and printing options."""
        return describe(self.avals, self.inputs, self.equations, self.outputs)

    def lines(self) -> tuple[str, ...]:
        """A line per input, equation and output."""
        return self.description.lines

    @functools.cached_property
    def _digest(self) -> str:
        return self.description.digest

    def fingerprint(self) -> str:
        """A digest of the program: equal programs have equal ones.

        Functions among its parameters, such as callbacks, count by their names and code. Two programs with one
        fingerprint may share a plan, which is applied to each of them, and never a run.
        """
        return self._digest


def live_equations(equations: Sequence[Equation], outputs: Iterable[Atom]) -> list[Equation]:
    """Those that an output or an effect needs, and those of libraries' own primitives, in order.

    A library may look for its primitives, as K-FAC's tags are found, whether anything reads what they make or not. What
    makes nothing is there for something else, such as a reference that it writes to.
    """
    needed = {x for x in outputs if isinstance(x, int)}
    live = []
    for eqn in reversed(equations):
        if (
            eqn.has_effects
            or not eqn.outputs
            or not needed.isdisjoint(eqn.outputs)
            or not _compat.is_jax_own(eqn.primitive)
        ):
            needed.update(eqn.reads)
            live.append(eqn)
    return live[::-1]


def has_symbolic_shapes(program: Program) -> bool:
    """Whether the size of an input is an expression, as under `jax.export` with `symbolic_shape`."""
    return any(not isinstance(n, int) for v in program.inputs for n in getattr(program.avals[v], "shape", ()))


def spec_of(aval: Any) -> jax.ShapeDtypeStruct:
    """What JAX traces to a value like this one: more than a shape inside `shard_map` and on explicit meshes."""
    if not has_placed_type(aval):
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype)
    return jax.ShapeDtypeStruct(
        aval.shape, aval.dtype, sharding=aval.sharding, manual_axis_type=getattr(aval, "manual_axis_type", None)
    )


def has_placed_type(aval: Any) -> bool:
    """Whether a value's type says where it lies, as on explicit meshes, or over which axes it varies."""
    sharding = getattr(aval, "sharding", None)
    return sharding is not None and any(kind != AxisType.Auto for kind in sharding.mesh.axis_types)


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


def is_on_host(aval: Any) -> bool:
    """Whether values of this shape lie in the host's memory; JAX prints them as `float32<host>[8]`."""
    return getattr(aval, "memory_space", None) is jax.memory.Space.Host


def can_be_saved(aval: Any) -> bool:
    """Whether JAX saves such a value by name: it rounds what it saves, and refuses to round complex numbers."""
    dtype = getattr(aval, "dtype", None)
    return dtype is None or not jnp.issubdtype(dtype, np.complexfloating)


def is_differentiable(aval: Any) -> bool:
    """Whether a tangent can be other than zero: floating point or complex."""
    dtype = getattr(aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, np.inexact)
