"""The flat program: equations over numbered values, printable, with a fingerprint."""

import functools
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from jaxckpt import _compat
from jaxckpt.errors import UnsupportedProgramError
from jaxckpt.program.source import relative_source

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
