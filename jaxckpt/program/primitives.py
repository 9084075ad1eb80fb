"""Primitives by what a compiler does with them: fused, moved, reduced, multiplied."""

from collections.abc import Iterable
from typing import Any

from jax import lax
from jax.extend.core import primitives as prims

from jaxckpt.program.ir import Equation


def find_primitives(names: str) -> frozenset[Any]:
    """The primitives of these names that this JAX has, as objects."""
    found = (getattr(prims, f"{n}_p", None) or getattr(lax, f"{n}_p", None) for n in names.split())
    return frozenset(p for p in found if p is not None)


# One operation per element; cheap enough that compilers repeat them rather than store their results.
CHEAP = find_primitives(
    "abs add add_jaxvals and ceil clamp clz complex conj convert_element_type copy device_put eq eq_to floor ge gt "
    "imag integer_pow is_finite le le_to lt lt_to max min mul mulhi name ne neg nextafter not one_minus_square or "
    "population_count real reduce_precision rem round select_n sharding_constraint shift_left "
    "shift_right_arithmetic shift_right_logical sign square stop_gradient sub xor bitcast_convert_type random_wrap "
    "random_unwrap"
)
# One operation per element too, but a compiler computes them once.
EXPENSIVE = find_primitives(
    "acos acosh asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt cos cosh digamma div erf erf_inv erfc exp exp2 "
    "expm1 igamma igamma_grad_a igammac lgamma log log1p log2 logistic polygamma polynomial pow "
    "regularized_incomplete_beta rsqrt sin sinh sqrt tan tanh zeta"
)
# No operations: a compiler folds them into whatever reads them.
LAYOUT = find_primitives(
    "broadcast_in_dim expand_dims iota reshape rev slice squeeze transpose split unstack tile empty2"
)
COMPARES = find_primitives("and eq eq_to ge gt is_finite le le_to lt lt_to ne not or select_n xor clamp")
BROADCASTS = find_primitives("broadcast_in_dim iota")
# The same buffer under another shape.
ALIAS = find_primitives("reshape squeeze expand_dims name stop_gradient sharding_constraint copy reduce_precision")
# The same digits in another shape.
RESHAPES = ALIAS | LAYOUT
# Moving data by index: no operations, but a result of its own.
MOVES = find_primitives(
    "concatenate dynamic_slice dynamic_update_slice gather pad stack scatter all_gather all_to_all "
    "ppermute ragged_all_to_all optimization_barrier after_all create_token axis_index"
)
REDUCES = find_primitives(
    "argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor cumsum cummax cummin "
    "cumprod cumlogsumexp psum pmax pmin scatter_add scatter_mul scatter_min scatter_max scatter_sub reduce_scatter"
)
# These write into their first operand.
IN_PLACE = find_primitives(
    "dynamic_update_slice scatter scatter_add scatter_apply scatter_max scatter_min scatter_mul scatter_sub"
)
# Results are images like the operands.
IMAGES = find_primitives(
    "concatenate pad reduce_window reduce_window_max reduce_window_min reduce_window_sum select_and_gather_add "
    "select_and_scatter_add"
)
SOLVES = frozenset({lax.linear_solve_p})
RANDOM = find_primitives(
    "random_bits random_fold_in random_seed random_split random_gamma rng_bit_generator rng_uniform threefry2x32"
)
# Of these what makes arrays of random numbers, and not one key of another.
DRAWS = find_primitives("random_bits random_gamma rng_bit_generator threefry2x32")
# Tangents end here.
STOPS = find_primitives("stop_gradient")
FUSIBLE = CHEAP | EXPENSIVE | LAYOUT
# Reductions read fused operands and make a buffer.
READS_FUSED = FUSIBLE | find_primitives("reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor")
MATMULS = find_primitives("dot_general conv_general_dilated ragged_dot_general")


def is_matmul(eqn: Equation) -> bool:
    """Whether it runs on the matrix units."""
    return eqn.primitive in MATMULS


def renamed(equations: Iterable[Equation]) -> dict[int, int]:
    """Values that are others' buffers under a new shape or name, and which ones."""
    same: dict[int, int] = {}
    for eqn in equations:
        reads = {same.get(v, v) for v in eqn.reads}
        if eqn.primitive in ALIAS and len(reads) == 1:
            same[eqn.outputs[0]] = reads.pop()
    return same
