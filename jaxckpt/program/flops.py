"""FLOPs and bytes of every equation.

FLOPs follow the convention of the field: a multiply-add is two, an elementwise operation one per element of its
result whatever its function, a reduction one per element of its operand, moving data none. Loops count their trips.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from jax.extend.core import primitives as prims

from jaxckpt import _compat
from jaxckpt.program.ir import Equation, elements, size_bytes
from jaxckpt.program.primitives import (
    CHEAP,
    EXPENSIVE,
    LAYOUT,
    MATMULS,
    MOVES,
    RANDOM,
    REDUCES,
    SOLVES,
    find_primitives,
)

FlopRule = Callable[[Equation, list[Any]], int]


@dataclass(frozen=True, slots=True)
class Cost:
    """What one run of an equation costs.

    Attributes:
        flops: floating-point operations.
        moved_bytes: bytes of its operands and results.
        unknown: primitives inside it without a FLOP rule, or loops whose trips cannot be known.
        matmul_flops: of the operations those on the matrix units, by dtype.
    """

    flops: int
    moved_bytes: int
    unknown: frozenset[str] = frozenset()
    matmul_flops: Mapping[str, int] = field(default_factory=dict)


def equation_cost(eqn: Equation, avals: list[Any]) -> Cost:
    """Cost of an equation; an unknown primitive counts by its bytes and is listed."""
    operands = [avals[x] if isinstance(x, int) else x.aval for x in eqn.inputs]
    return _cost(eqn.primitive, eqn.params, operands, [avals[v] for v in eqn.outputs])


def jaxpr_cost(jaxpr: Any) -> Cost:
    """Cost of a jaxpr, the sum over its equations."""
    return _total(
        _cost(e.primitive, e.params, [v.aval for v in e.invars], [v.aval for v in e.outvars]) for e in jaxpr.eqns
    )


def _cost(primitive: Any, params: dict[str, Any], operands: list[Any], results: list[Any]) -> Cost:
    moved = sum(map(size_bytes, operands)) + sum(map(size_bytes, results))
    nested = _nested(primitive, params)
    if nested is not None:
        return nested
    if primitive in _FLOPS:
        flops = _FLOPS[primitive](params, operands, results)
        return Cost(flops, moved, matmul_flops={_dtype(operands[0]): flops} if primitive in MATMULS else {})
    # A primitive without a rule still takes time: one operation per element it makes.
    return Cost(sum(map(elements, results)), moved, frozenset({primitive.name}))


def _total(costs: Iterable[Cost], trips: int = 1) -> Cost:
    costs = list(costs)
    unknown = frozenset().union(*(c.unknown for c in costs)) if costs else frozenset()
    matmuls: Counter[str] = Counter()
    for c in costs:
        matmuls.update(c.matmul_flops)
    return Cost(
        trips * sum(c.flops for c in costs),
        trips * sum(c.moved_bytes for c in costs),
        unknown,
        {dtype: trips * flops for dtype, flops in matmuls.items()},
    )


def _nested(primitive: Any, params: dict[str, Any]) -> Cost | None:
    """Cost of an equation that holds jaxprs: control flow, custom rules, checkpoints."""
    if primitive is prims.scan_p:
        return _total([jaxpr_cost(params["jaxpr"].jaxpr)], params["length"])
    if primitive is prims.while_p:
        body = _total([jaxpr_cost(params[k].jaxpr) for k in ("body_jaxpr", "cond_jaxpr")])
        return replace(body, unknown=body.unknown | {"while (trips unknown, counted once)"})
    if primitive is prims.cond_p:
        return max((jaxpr_cost(b.jaxpr) for b in params["branches"]), key=lambda c: c.flops)
    if primitive in SOLVES:
        return jaxpr_cost(params["jaxprs"].solve.jaxpr)
    if "_prim" in params:
        return _total([jaxpr_cost(_compat.held_jaxpr(params["_prim"]))])
    bodies = [getattr(params[k], "jaxpr", params[k]) for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in params]
    bodies = [b for b in bodies if hasattr(b, "eqns")]
    return _total([jaxpr_cost(b) for b in bodies]) if bodies else None


def _dot(params: dict[str, Any], operands: list[Any], results: list[Any]) -> int:
    (contract, _), _ = params["dimension_numbers"]
    return 2 * elements(results[0]) * math.prod(operands[0].shape[d] for d in contract)


def _conv(params: dict[str, Any], operands: list[Any], results: list[Any]) -> int:
    # Each result element reads the kernel's window times the input features of its group.
    # Zeros put between the input's elements (a transposed convolution) are multiplied by nobody.
    kernel, spec = operands[1], params["dimension_numbers"].rhs_spec
    zeros = math.prod(params["lhs_dilation"] or ())
    return 2 * elements(results[0]) * elements(kernel) // max(1, kernel.shape[spec[0]] * zeros)


def _window(params: dict[str, Any], operands: list[Any], results: list[Any]) -> int:
    # A scatter over windows (the derivative of a pooling) reads as many as it had results to start from.
    windows = min(elements(results[0]), elements(operands[0]))
    return windows * math.prod(params.get("window_dimensions", ()))


def _sort(params: dict[str, Any], operands: list[Any], results: list[Any]) -> int:
    shape = operands[0].shape
    length = shape[params.get("dimension", -1)] if shape else 1
    return sum(map(elements, operands)) * max(1, math.ceil(math.log2(max(2, length))))


def _fft(params: dict[str, Any], operands: list[Any], results: list[Any]) -> int:
    points = math.prod(params["fft_lengths"])
    return 5 * max(elements(operands[0]), elements(results[0])) * max(1, math.ceil(math.log2(max(2, points))))


def _cubic(factor: float) -> Callable[..., int]:
    """Dense factorisations: a factor times n^3 per matrix."""

    def rule(params: dict[str, Any], operands: list[Any], results: list[Any]) -> int:
        *batch, rows, cols = operands[0].shape
        return math.ceil(factor * math.prod(batch) * rows * cols * min(rows, cols))

    return rule


def _triangular_solve(params: dict[str, Any], operands: list[Any], results: list[Any]) -> int:
    return elements(operands[1]) * operands[0].shape[-1]


_FLOPS: dict[Any, Callable[[dict[str, Any], list[Any], list[Any]], int]] = {
    **dict.fromkeys(CHEAP | EXPENSIVE, lambda p, i, o: sum(map(elements, o))),
    **dict.fromkeys(
        LAYOUT | MOVES | _compat.UNNAMED_PRIMITIVES | find_primitives("name copy stop_gradient reshape squeeze"),
        lambda p, i, o: 0,
    ),
    **dict.fromkeys(REDUCES, lambda p, i, o: sum(map(elements, i))),
    **dict.fromkeys(RANDOM, lambda p, i, o: sum(map(elements, o))),
    **dict.fromkeys(find_primitives("dot_general ragged_dot_general ragged_dot"), _dot),
    **dict.fromkeys(find_primitives("conv_general_dilated"), _conv),
    **dict.fromkeys(
        find_primitives(
            "reduce_window reduce_window_max reduce_window_min reduce_window_sum select_and_scatter_add "
            "select_and_gather_add select_and_scatter reduce"
        ),
        _window,
    ),
    **dict.fromkeys(find_primitives("sort top_k approx_top_k"), _sort),
    **dict.fromkeys(find_primitives("fft"), _fft),
    **dict.fromkeys(find_primitives("cholesky"), _cubic(1 / 3)),
    **dict.fromkeys(find_primitives("lu"), _cubic(2 / 3)),
    **dict.fromkeys(find_primitives("qr householder_product hessenberg tridiagonal geqrf"), _cubic(4 / 3)),
    **dict.fromkeys(find_primitives("eigh svd eig schur"), _cubic(9)),
    **dict.fromkeys(find_primitives("triangular_solve tridiagonal_solve"), _triangular_solve),
}
_FLOPS.pop(None, None)


def inner_bytes(eqn: Equation) -> int:
    """Bytes moved inside an equation that holds jaxprs; 0 for others."""
    nested = _nested(eqn.primitive, eqn.params)
    return nested.moved_bytes if nested else 0


def _dtype(operand: Any) -> str:
    """The dtype that decides the matrix units' rate."""
    return str(np.dtype(operand.dtype))


def gradient_cost(fun: Callable, *args: Any) -> Cost:
    """Cost of a function's jaxpr after dead code is removed, inside nested jaxprs too."""
    return jaxpr_cost(_compat.dce(jax.make_jaxpr(fun)(*args)))
