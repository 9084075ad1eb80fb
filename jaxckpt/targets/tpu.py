"""How many bytes a target holds for a value: what its compiler rounds and what its tiles pad.

TPUs multiply float32 matrices in bfloat16 unless told otherwise, so what products alone read is written rounded. Their
memory comes in tiles of 8 x 128 elements. Compilers lay matrices out so that little is padded, but an image has its
features last: 64 of them take the room of 128.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as prims

from jaxckpt.program import primitives
from jaxckpt.program.control_flow import is_planned_inside
from jaxckpt.program.ir import Equation, size_bytes
from jaxckpt.targets.chip import Target
from jaxckpt.targets.compiler import Layouts

_LANES = 128
_DEFAULT_PRECISIONS = (None, lax.Precision.DEFAULT, (lax.Precision.DEFAULT, lax.Precision.DEFAULT))
# Their operands and results of one rank are laid out alike.
_KEEPS_LAYOUT = primitives.FUSIBLE | primitives.IMAGES


def layouts_of(
    target: Target,
    avals: Sequence[Any],
    equations: Sequence[Equation],
    *,
    features: Mapping[int, int] | None = None,
    read_by_derivatives: bool = False,
) -> Layouts:
    """Find what values take.

    Args:
        target: the chip.
        avals: `[num_values]`, shapes and dtypes.
        equations: all that make and read the values.
        features: what is known of images already.
        read_by_derivatives: the derivatives are not among the equations, and read what exponentials and the like make.
    """
    sizes = [size_bytes(aval) for aval in avals]
    if target.platform != "tpu":
        return Layouts(sizes)
    found = _features(avals, equations, dict(features or {}))
    for v, dim in found.items():
        if num := avals[v].shape[dim]:
            sizes[v] = sizes[v] // num * (math.ceil(num / _LANES) * _LANES)
    return Layouts(sizes, _narrow(avals, equations, read_by_derivatives), found)


def _features(avals: Sequence[Any], equations: Sequence[Equation], found: dict[int, int]) -> dict[int, int]:
    """The dimension of features of images: those of convolutions, and what has their shape before and after them."""
    for eqn in equations:
        if eqn.primitive is prims.conv_general_dilated_p:
            dims, image = eqn.params["dimension_numbers"], eqn.inputs[0]
            if isinstance(image, int):
                found.setdefault(image, dims.lhs_spec[1])
            found.setdefault(eqn.outputs[0], dims.out_spec[1])
    if not found:
        return found

    def spread(sources: Sequence[int], to: Sequence[int]) -> None:
        for v in to:
            shape = avals[v].shape
            for u in sources:
                dim, like = found.get(u), avals[u].shape
                if dim is None or v in found or len(shape) < 4:
                    continue
                is_last = dim == len(like) - 1 and shape[-1] == like[-1]
                if is_last or (len(shape) == len(like) and shape[dim] == like[dim]):
                    found[v] = len(shape) - 1 if is_last else dim

    for _ in range(2):
        for eqn in equations:
            if eqn.primitive in _KEEPS_LAYOUT:
                spread(eqn.reads, eqn.outputs)
        for eqn in reversed(equations):
            if eqn.primitive in _KEEPS_LAYOUT:
                spread(eqn.outputs, eqn.reads)
    return found


def _narrow(avals: Sequence[Any], equations: Sequence[Equation], read_by_derivatives: bool) -> frozenset[int]:
    """Float32 values that products of the default precision alone read; changes of shape on the way do not matter."""
    wide: set[int] = set()
    for eqn in reversed(equations):
        if read_by_derivatives and eqn.primitive in primitives.EXPENSIVE:
            wide.update(eqn.outputs)
        if primitives.is_matmul(eqn) and eqn.params.get("precision") in _DEFAULT_PRECISIONS:
            continue
        if eqn.primitive in primitives.RESHAPES and wide.isdisjoint(eqn.outputs):
            continue
        wide.update(eqn.reads)
    read = {v for eqn in equations for v in eqn.reads}
    return frozenset(v for v in read - wide if getattr(avals[v], "dtype", None) == jnp.float32)


def is_head(target: Target, avals: Sequence[Any], equations: Sequence[Equation]) -> Callable[[Equation], bool]:
    """Return which products make logits, where a target needs less memory if no region covers those.

    On TPU the cotangent of logits is fused into the products that read it, but at the end of a region it is a buffer,
    as large as they are. What makes them is the last product and those like it, and what it reads is tiny beside its
    result.
    """

    def shapes(eqn: Equation) -> list[Any]:
        return [avals[x].shape for x in (*eqn.reads, *eqn.outputs)]

    last = next((eqn for eqn in reversed(equations) if primitives.is_matmul(eqn) or is_planned_inside(eqn)), None)
    if target.platform != "tpu" or last is None or is_planned_inside(last):
        return lambda eqn: False
    # Parameters under another shape are there anyway.
    made = {v for eqn in equations if eqn.reads and eqn.primitive not in primitives.RESHAPES for v in eqn.outputs}
    read = sum(math.prod(avals[v].shape) for v in made.intersection(last.reads))
    if math.prod(avals[last.outputs[0]].shape) < _MANY_TIMES * read:
        return lambda eqn: False
    return lambda eqn: eqn.primitive is last.primitive and shapes(eqn) == shapes(last)


_MANY_TIMES = 8
