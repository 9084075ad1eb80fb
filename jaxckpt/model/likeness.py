"""When parts of a program are the same computation, whatever their values are called.

Two equations are alike if they apply one primitive with equal parameters, on one line of the user's code and in the
same scopes. Functions and jaxprs among the parameters are equal only to themselves, since no text says what they do.
"""

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxckpt import _compat
from jaxckpt.model.cut import Span
from jaxckpt.model.option import Save
from jaxckpt.program.ir import Constant, Equation

# Constants of more elements are equal only to themselves.
_MAX_ELEMENTS = 256


@dataclass(frozen=True, slots=True)
class Scopes:
    """Scopes of a part of a program.

    Attributes:
        around: those that stand around the part, and not around what it is a part of.
        depth: how many of its equations' scopes these and those around them stand for, outermost first.
    """

    around: tuple[Any, ...]
    depth: int


class Likeness:
    """Keys that are equal for parts that are alike. What it has seen stays alive, since some goes by identity."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._equations: dict[int, tuple[int, tuple[Any, ...], Equation]] = {}
        self._constants: dict[int, tuple[int, Constant]] = {}
        self._lines: dict[Any, str] = {}

    def common_scopes(self, equations: Sequence[Equation], depth: int) -> Scopes:
        """The scopes that all of these equations stand in; the outermost ones up to a depth stand around them."""
        stacks = {self._seen(eqn)[1] for eqn in equations}
        first = min(stacks, key=len, default=())
        size = next((i for i in range(depth, len(first)) if any(s[i] != first[i] for s in stacks)), len(first))
        return Scopes(first[depth:size], max(depth, size))

    def merged_scopes(self, equations: Sequence[Equation], depth: int) -> Scopes | None:
        """The same with one for all the layers that the equations stand in, such as `h3..h5`.

        Returns:
            None where they stand in one layer: layers are scopes with numbers that have none around them.
        """
        common = self.common_scopes(equations, depth)
        at = common.depth
        stacks = [stack for stack, _ in itertools.groupby(self._seen(eqn)[1] for eqn in equations)]
        layers = list(dict.fromkeys(stack[at] for stack in stacks if len(stack) > at))
        has_number = lambda scopes: any(c.isdigit() for c in _compat.show_stack(tuple(scopes)))  # noqa: E731
        if len(layers) < 2 or not has_number(layers) or has_number(stacks[0][:at]):
            return None
        name = "..".join(_compat.show_stack((scope,)) for scope in (layers[0], layers[-1]))
        return Scopes((*common.around, _compat.scope_named(name)), at + 1)

    def key(
        self, spans: Sequence[Span], saved: Sequence[Save], reads: Sequence[int], wanted: Sequence[int], depth: int
    ) -> Hashable:
        """Of blocks, the same for others that are alike.

        Args:
            spans: the blocks.
            saved: what each of them saves.
            reads: what they read, in the order in which they are given it.
            wanted: what is read of them.
            depth: how many scopes, outermost first, do not count.
        """
        numbers: dict[int, int] = {}
        number = lambda v: numbers.setdefault(v, len(numbers))  # noqa: E731
        parts: list[Any] = []
        for span in spans:
            parts.append(len(span.equations))
            for eqn in span.equations:
                likeness, scopes, _ = self._seen(eqn)
                parts.append((likeness, scopes[depth:]))
                # Negative numbers are constants.
                parts += [number(x) if isinstance(x, int) else self._constant(x) for x in eqn.inputs]
                parts += map(number, eqn.outputs)
        placed = tuple(save.placed(numbers) for save in saved)  # type: ignore[arg-type]
        return tuple(parts), placed, tuple(map(number, reads)), tuple(map(number, wanted))

    def _seen(self, eqn: Equation) -> tuple[int, tuple[Any, ...], Equation]:
        found = self._equations.get(id(eqn))
        if found is None:
            params = tuple((name, _key(x)) for name, x in eqn.params.items())
            alike = eqn.primitive, params, self._line(eqn), id(eqn.ctx), len(eqn.inputs), len(eqn.outputs)
            found = self._numbered(alike), _compat.stack_elements(eqn.name_stacks), eqn
            self._equations[id(eqn)] = found
        return found

    def _line(self, eqn: Equation) -> str:
        traceback = eqn.source_info.traceback
        if traceback not in self._lines:
            self._lines[traceback] = _compat.source_line(eqn.source_info)
        return self._lines[traceback]

    def _constant(self, constant: Constant) -> int:
        found = self._constants.get(id(constant))
        if found is None:
            alike = _key(constant.value), str(constant.aval), getattr(constant.aval, "weak_type", False)
            self._constants[id(constant)] = found = -1 - self._numbered(alike), constant
        return found[0]

    def _numbered(self, alike: Hashable) -> int:
        return self._numbers.setdefault(alike, len(self._numbers))


class WithoutScopes(Sequence[Equation]):
    """Equations without the outermost scopes that they stand in, made when they are asked for: most are never run."""

    def __init__(self, equations: Sequence[Equation], depth: int):
        self._equations, self._depth = equations, depth

    def __len__(self) -> int:
        return len(self._equations)

    @overload
    def __getitem__(self, at: int) -> Equation: ...

    @overload
    def __getitem__(self, at: slice) -> "WithoutScopes": ...

    def __getitem__(self, at: int | slice) -> "Equation | WithoutScopes":
        """An equation, or some of them."""
        if isinstance(at, slice):
            return WithoutScopes(self._equations[at], self._depth)
        eqn = self._equations[at]
        scopes = _compat.stack_elements(eqn.name_stacks)[self._depth :]
        return replace(eqn, name_stacks=(_compat.stack_of(scopes),)) if self._depth else eqn


def _key(value: Any) -> Hashable:
    """What is equal for parameters that mean the same."""
    kind = type(value)
    if isinstance(value, tuple | list):
        return kind, tuple(map(_key, value))
    if isinstance(value, dict):
        return kind, tuple((_key(k), _key(x)) for k, x in value.items())
    if kind in (float, complex):
        return kind, repr(value)  # zeros of two signs, and what is no number
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _array_key(value)
    try:
        hash(value)
    except TypeError:
        return id(value)
    return kind, value


def _array_key(value: Any) -> Hashable:
    if value.size > _MAX_ELEMENTS or isinstance(value, Tracer) or jnp.issubdtype(value.dtype, jax.dtypes.extended):
        return id(value)
    return type(value).__name__, str(value.dtype), value.shape, np.asarray(value).tobytes()
