"""What a differentiated program saves that it need not: copies of a constant, gathered arrays, results of kernels."""

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


def copies_of_constants(jaxpr: Any) -> Iterator[Kept]:
    """What loops stack for the backward pass although it is the same in every iteration."""
    for body in _bodies(jaxpr):
        readers = _readers(body)
        for eqn in body.eqns:
            if eqn.primitive is not prims.scan_p or not is_loop(eqn) or _is_backward(eqn):
                continue
            same = _invariant_results(eqn)
            kept = [v for v in same if any(map(_is_backward, readers.get(v, ())))]
            for v in kept:
                size = size_bytes(v.aval)
                yield Kept(
                    source=line_of(eqn.source_info),
                    shown=show_aval(v.aval),
                    size_bytes=size - size // eqn.params["length"],
                    avals=(v.aval,),
                )


def _invariant_results(eqn: Any) -> list[Any]:
    """The stacked results of a scan that depend on neither what is carried nor a slice."""
    num_consts, num_carry = _compat.scan_layout(eqn.params)
    body = eqn.params["jaxpr"].jaxpr
    changing = set(body.invars[num_consts:])
    for one in body.eqns:
        if one.effects or any(not isinstance(v, jex.Literal) and v in changing for v in one.invars):
            changing |= set(one.outvars)
    pairs = zip(body.outvars[num_carry:], eqn.outvars[num_carry:], strict=True)
    return [made for inner, made in pairs if not isinstance(inner, jex.Literal) and inner not in changing]


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
                own = {v for v, keep in zip(inner.outvars, kept, strict=True) if keep and not isinstance(v, jex.Literal)}
            _find_gathered(inner, trips * trips_of(eqn), own, found)


def kernels_again(jaxpr: Any, is_again: bool = False) -> dict[str, set[str]]:
    """Pallas kernels that checkpoints run again in the backward pass: their lines and names.

    Args:
        jaxpr: a differentiated jaxpr.
        is_again: whether all of it is recomputation.
    """
    found: dict[str, set[str]] = defaultdict(set)
    for eqn in jaxpr.eqns:
        again = is_again or _AGAIN in str(eqn.source_info.name_stack)
        if _compat.is_kernel(eqn):
            if again:
                found[line_of(eqn.source_info)].add(_compat.kernel_cost(eqn)[0])
            continue
        for inner in jex.jaxprs_in_params(eqn.params):
            for source, names in kernels_again(inner, again).items():
                found[source] |= names
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
