"""What a differentiated program saves that it need not: copies of a constant, gathered arrays, results of kernels."""

import enum
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax.extend.core as jex
import numpy as np
from jax.extend.core import primitives as prims

from jaxckpt import _compat
from jaxckpt.compilation.buffers import CompiledMemory
from jaxckpt.diagnosis.sites import equations, is_loop, line_of, trips_of
from jaxckpt.program.describe import show_aval
from jaxckpt.program.ir import size_bytes
from jaxckpt.program.primitives import ALIAS, find_primitives

# The same elements, or the same in another precision.
_SAME = ALIAS | find_primitives("convert_element_type transpose")
_TAKES = find_primitives("dynamic_slice gather")
_CALLS = frozenset({prims.jit_p, prims.closed_call_p, prims.remat_p})
_BACKWARD, _AGAIN = "transpose(", "rematted_computation"


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Values that are saved from the forward to the backward pass.

    Attributes:
        source: the line that makes them.
        shown: type of each, with its count.
        size_bytes: of all on each device, counted; what is spared if they are not saved.
        avals: of each.
    """

    source: str
    shown: str
    size_bytes: int
    avals: tuple[Any, ...]


def copies_of_constants(jaxpr: Any) -> Iterator[tuple[str, Kept]]:
    """What loops stack for the backward pass although it is the same in every iteration, or lies in a constant.

    Returns:
        Pairs of what kind of finding it is, and the values.
    """
    for body in _bodies(jaxpr):
        readers = _readers(body)
        for eqn in body.eqns:
            if eqn.primitive is not prims.scan_p or not is_loop(eqn) or _is_backward(eqn):
                continue
            for v, what in _needless(eqn):
                if any(map(_is_backward, readers.get(v, ()))):
                    size, length = size_bytes(v.aval), eqn.params["length"]
                    is_same = what is _Of.CONSTANTS
                    yield (
                        "constant-saved-by-iterations" if is_same else "slices-saved",
                        Kept(
                            source=line_of(eqn.source_info),
                            shown=show_aval(v.aval),
                            size_bytes=size - size // length if is_same else size,
                            avals=(v.aval,),
                        ),
                    )


class _Of(enum.IntEnum):
    """What a value in a loop's body is made of."""

    CONSTANTS = 0  # the same in every iteration
    SLICES = 1  # a part of what is the same
    ITERATIONS = 2


def _needless(eqn: Any) -> Iterator[tuple[Any, _Of]]:
    """The stacked results of a scan that need not be stacked."""
    num_consts, num_carry = _compat.scan_layout(eqn.params)
    body = eqn.params["jaxpr"].jaxpr
    given = [_Of.CONSTANTS if i < num_consts else _Of.ITERATIONS for i in range(len(body.invars))]
    made = _made_of(body, given)[num_carry:]
    for v, what in zip(eqn.outvars[num_carry:], made, strict=True):
        if what is not _Of.ITERATIONS:
            yield v, what


def _made_of(jaxpr: Any, given: list[_Of]) -> list[_Of]:
    """What the results of a jaxpr are made of.

    Args:
        jaxpr: open.
        given: what its operands are made of.
    """
    env = dict(zip(jaxpr.invars, given, strict=True))
    of = lambda v: _Of.CONSTANTS if isinstance(v, jex.Literal) else env.get(v, _Of.CONSTANTS)  # noqa: E731
    for eqn in jaxpr.eqns:
        operands = [of(v) for v in eqn.invars]
        env |= zip(eqn.outvars, _results(eqn, operands), strict=True)
    return [of(v) for v in jaxpr.outvars]


def _results(eqn: Any, operands: list[_Of]) -> list[_Of]:
    worst = max(operands, default=_Of.CONSTANTS)
    if eqn.effects:
        worst = _Of.ITERATIONS
    elif eqn.primitive is prims.cond_p:
        # Which branch runs is another matter: what it saves is the same wherever it does.
        branches = [_made_of(branch.jaxpr, operands[1:]) for branch in eqn.params["branches"]]
        return [max(column) for column in zip(*branches, strict=True)]
    elif eqn.primitive in _CALLS:
        (inner,) = jex.jaxprs_in_params(eqn.params)
        return _made_of(inner, operands)
    elif eqn.primitive in _TAKES and operands[0] is not _Of.ITERATIONS:
        worst = max(operands[0], _Of.SLICES if worst is _Of.ITERATIONS else worst)
    elif worst is _Of.SLICES and eqn.primitive not in _SAME:
        worst = _Of.ITERATIONS
    return [worst] * len(eqn.outvars)


def gathered(jaxpr: Any) -> list[Kept]:
    """What all-gathers make in the forward pass and the backward pass reads, by line."""
    found: dict[str, list[tuple[Any, int]]] = defaultdict(list)
    _find_gathered(jaxpr, 1, set(), found)
    return [
        Kept(
            source=source,
            shown=_count(aval for aval, _ in values),
            size_bytes=sum(size_bytes(aval) * trips for aval, trips in values),
            avals=tuple(aval if trips == 1 else _stack(aval, trips) for aval, trips in values),
        )
        for source, values in found.items()
    ]


def _find_gathered(jaxpr: Any, trips: int, wanted: set[Any], found: dict[str, list[tuple[Any, int]]]) -> None:
    """Note gathers whose results are read by the backward pass.

    Args:
        jaxpr: where.
        trips: how often it runs.
        wanted: those of its results that the backward pass reads, as far as is known outside of it.
        found: by line, the values with how often they are kept.
    """
    readers = _readers(jaxpr)
    backward = {v for v, eqns in readers.items() if any(map(_is_backward, eqns))} | wanted
    # Backwards, so that what a value is made of is known to be wanted when its maker is met.
    for eqn in reversed(jaxpr.eqns):
        if _is_backward(eqn):
            continue
        kept = [v in backward for v in eqn.outvars]
        if eqn.primitive in _compat.GATHERS:
            if any(kept):
                found[line_of(eqn.source_info)].append((eqn.outvars[0].aval, trips))
        elif eqn.primitive in _SAME and any(kept):
            backward |= {v for v in eqn.invars if not isinstance(v, jex.Literal)}
        for inner in jex.jaxprs_in_params(eqn.params):
            own = set()
            if len(inner.outvars) == len(eqn.outvars):
                own = {
                    v for v, keep in zip(inner.outvars, kept, strict=True) if keep and not isinstance(v, jex.Literal)
                }
            _find_gathered(inner, trips * trips_of(eqn), own, found)


def kernels_again(jaxpr: Any, is_again: bool = False) -> set[str]:
    """The names of Pallas kernels that checkpoints run again in the backward pass.

    Args:
        jaxpr: a differentiated jaxpr.
        is_again: whether all of it is recomputation.
    """
    found: set[str] = set()
    for eqn in jaxpr.eqns:
        again = is_again or _AGAIN in str(eqn.source_info.name_stack)
        if _compat.is_kernel(eqn):
            found |= {_compat.kernel_cost(eqn)[0]} if again else set()
            continue
        for inner in jex.jaxprs_in_params(eqn.params):
            found |= kernels_again(inner, again)
    return found


def is_in(memory: CompiledMemory | None, avals: Sequence[Any]) -> bool:
    """Whether a compiled program has buffers of these shapes, each as often as it is there."""
    if memory is None:
        return False
    wanted = Counter(_xla_shape(aval) for aval in avals)
    there = Counter(buffer.shape.split("{")[0] for buffer in memory.buffers)
    return all(there[shape] >= count for shape, count in wanted.items())


def _bodies(jaxpr: Any) -> Iterator[Any]:
    yield jaxpr
    for eqn in equations(jaxpr):
        yield from jex.jaxprs_in_params(eqn.params)


def _readers(jaxpr: Any) -> dict[Any, list[Any]]:
    readers: dict[Any, list[Any]] = defaultdict(list)
    for eqn in jaxpr.eqns:
        for v in eqn.invars:
            if not isinstance(v, jex.Literal):
                readers[v].append(eqn)
    return readers


def _is_backward(eqn: Any) -> bool:
    stack = str(eqn.source_info.name_stack)
    return _BACKWARD in stack or _AGAIN in stack or (eqn.primitive is prims.remat_p and eqn.params["differentiated"])


def _count(avals: Iterator[Any]) -> str:
    counts = Counter(map(show_aval, avals))
    return ", ".join(f"{n} x {shown}" if n > 1 else shown for shown, n in counts.items())


def _stack(aval: Any, trips: int) -> Any:
    return aval.update(shape=(trips, *aval.shape))


def _xla_shape(aval: Any) -> str:
    dtype = np.dtype(aval.dtype)
    names = {"bool": "pred", "bfloat16": "bf16"}
    letter = {"f": "f", "i": "s", "u": "u", "c": "c"}.get(dtype.kind, dtype.name)
    name = names.get(dtype.name, f"{letter}{8 * dtype.itemsize}")
    return f"{name}[{','.join(map(str, aval.shape))}]"
