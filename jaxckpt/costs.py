"""FLOPs and bytes of every equation, and which results a compiler does not materialise.

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
from jax import lax
from jax.extend.core import primitives as prims

from jaxckpt import _compat
from jaxckpt.trace import Equation, elements, size_bytes


def _find(names: str) -> frozenset[Any]:
    """The primitives of these names that this JAX has, as objects."""
    found = (getattr(prims, f"{n}_p", None) or getattr(lax, f"{n}_p", None) for n in names.split())
    return frozenset(p for p in found if p is not None)


# One operation per element; cheap enough that compilers repeat them rather than store their results.
CHEAP = _find(
    "abs add add_jaxvals and ceil clamp clz complex conj convert_element_type copy device_put eq eq_to floor ge gt "
    "imag integer_pow is_finite le le_to lt lt_to max min mul mulhi name ne neg nextafter not one_minus_square or "
    "population_count real reduce_precision rem round select_n sharding_constraint shift_left "
    "shift_right_arithmetic shift_right_logical sign square stop_gradient sub xor bitcast_convert_type random_wrap "
    "random_unwrap"
)
# One operation per element too, but a compiler computes them once.
EXPENSIVE = _find(
    "acos acosh asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt cos cosh digamma div erf erf_inv erfc exp exp2 "
    "expm1 igamma igamma_grad_a igammac lgamma log log1p log2 logistic polygamma polynomial pow "
    "regularized_incomplete_beta rsqrt sin sinh sqrt tan tanh zeta"
)
# No operations: a compiler folds them into whatever reads them.
LAYOUT = _find("broadcast_in_dim expand_dims iota reshape rev slice squeeze transpose split unstack tile empty2")
COMPARES = _find("and eq eq_to ge gt is_finite le le_to lt lt_to ne not or select_n xor clamp")
BROADCASTS = _find("broadcast_in_dim iota")
# The same buffer under another shape.
ALIAS = _find("reshape squeeze expand_dims name stop_gradient sharding_constraint copy reduce_precision")
# The same digits in another shape.
RESHAPES = ALIAS | LAYOUT
# Moving data by index: no operations, but a result of its own.
_MOVES = _find(
    "concatenate dynamic_slice dynamic_update_slice gather pad stack scatter all_gather all_to_all "
    "ppermute ragged_all_to_all optimization_barrier after_all create_token axis_index"
)
_REDUCES = _find(
    "argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor cumsum cummax cummin "
    "cumprod cumlogsumexp psum pmax pmin scatter_add scatter_mul scatter_min scatter_max scatter_sub reduce_scatter"
)
# These write into their first operand.
IN_PLACE = _find(
    "dynamic_update_slice scatter scatter_add scatter_apply scatter_max scatter_min scatter_mul scatter_sub"
)
# Results are images like the operands.
IMAGES = _find(
    "concatenate pad reduce_window reduce_window_max reduce_window_min reduce_window_sum select_and_gather_add "
    "select_and_scatter_add"
)
_SOLVES = frozenset({lax.linear_solve_p})
_RANDOM = _find(
    "random_bits random_fold_in random_seed random_split random_gamma rng_bit_generator rng_uniform threefry2x32"
)
# Tangents end here.
STOPS = _find("stop_gradient")
FUSIBLE = CHEAP | EXPENSIVE | LAYOUT
# Reductions read fused operands and make a buffer.
READS_FUSED = FUSIBLE | _find("reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor")

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


def cost(eqn: Equation, avals: list[Any]) -> Cost:
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
        return Cost(flops, moved, matmul_flops={_dtype(operands[0]): flops} if primitive in _MATMULS else {})
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
    if primitive in _SOLVES:
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
        LAYOUT | _MOVES | _compat.UNNAMED_PRIMITIVES | _find("name copy stop_gradient reshape squeeze"),
        lambda p, i, o: 0,
    ),
    **dict.fromkeys(_REDUCES, lambda p, i, o: sum(map(elements, i))),
    **dict.fromkeys(_RANDOM, lambda p, i, o: sum(map(elements, o))),
    **dict.fromkeys(_find("dot_general ragged_dot_general ragged_dot"), _dot),
    **dict.fromkeys(_find("conv_general_dilated"), _conv),
    **dict.fromkeys(
        _find(
            "reduce_window reduce_window_max reduce_window_min reduce_window_sum select_and_scatter_add "
            "select_and_gather_add select_and_scatter reduce"
        ),
        _window,
    ),
    **dict.fromkeys(_find("sort top_k approx_top_k"), _sort),
    **dict.fromkeys(_find("fft"), _fft),
    **dict.fromkeys(_find("cholesky"), _cubic(1 / 3)),
    **dict.fromkeys(_find("lu"), _cubic(2 / 3)),
    **dict.fromkeys(_find("qr householder_product hessenberg tridiagonal geqrf"), _cubic(4 / 3)),
    **dict.fromkeys(_find("eigh svd eig schur"), _cubic(9)),
    **dict.fromkeys(_find("triangular_solve tridiagonal_solve"), _triangular_solve),
}
_FLOPS.pop(None, None)
_MATMULS = _find("dot_general conv_general_dilated ragged_dot_general")


def inner_bytes(eqn: Equation) -> int:
    """Bytes moved inside an equation that holds jaxprs; 0 for others."""
    nested = _nested(eqn.primitive, eqn.params)
    return nested.moved_bytes if nested else 0


def is_matmul(eqn: Equation) -> bool:
    """Whether it runs on the matrix units."""
    return eqn.primitive in _MATMULS


def _dtype(operand: Any) -> str:
    """The dtype that decides the matrix units' rate."""
    return str(np.dtype(operand.dtype))


def renamed(equations: Iterable[Equation]) -> dict[int, int]:
    """Values that are others' buffers under a new shape or name, and which ones."""
    same: dict[int, int] = {}
    for eqn in equations:
        reads = {same.get(v, v) for v in eqn.reads}
        if eqn.primitive in ALIAS and len(reads) == 1:
            same[eqn.outputs[0]] = reads.pop()
    return same


def gradient_cost(fun: Callable, *args: Any) -> Cost:
    """Cost of a function's jaxpr after dead code is removed, inside nested jaxprs too."""
    return jaxpr_cost(_compat.dce(jax.make_jaxpr(fun)(*args)))
