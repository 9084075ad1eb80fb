"""What compilers do beyond what a program says: operands copied into another layout, room that an operation needs.

Seen in XLA's scheduled programs. Only what was seen is listed.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

from jax.extend.core import primitives as prims

from jaxckpt.program import primitives
from jaxckpt.program.ir import Equation, size_bytes
from jaxckpt.targets.chip import Target
from jaxckpt.targets.compiler import Habits


def habits_of(target: Target, avals: Sequence[Any], equations: Sequence[Equation] = ()) -> Habits:
    """Return what a target's compiler does with these equations.

    On CPU, XLA multiplies `[batch, m, k]` by `[batch, k, n]` and convolves images with their features last; it brings
    other operands into this order, those of weight gradients above all. It finds the maxima of a pooling with four
    indices per element, which depend on nothing and are therefore made before anything else; without a checkpoint it
    does so in the forward and keeps four per result. Its kernels for reductions do arithmetic on the way, but neither
    comparisons nor layout changes, and nothing whose result is read elsewhere. What is ready first runs first.

    GPUs and TPUs read operands as they lie, and make what is costly again for each of its readers: the exponentials of
    a softmax are no buffer beside its operand. On TPU a product reads operands that are fused into it too: of a softmax
    between two products only its operand is ever a buffer, and of a gelu too.

    A scatter into zeros that is only added to something else scatters into that, wherever it runs.
    """
    scatters = _scatters(equations)
    if target.platform != "cpu":
        return Habits(matmuls_fuse_operands=target.platform == "tpu", repeats_expensive=True, scatters=scatters)
    added = {scatter.outputs[0] for scatter in scatters.values()}
    layouts = {prims.dot_general_p: _dot, prims.conv_general_dilated_p: _conv}

    def shape(x: Any) -> tuple[int, ...]:
        return (avals[x] if isinstance(x, int) else x.aval).shape

    def copies(eqn: Equation) -> Collection[int]:
        if eqn.primitive not in layouts:
            return ()
        flags = layouts[eqn.primitive](eqn.params, [len(shape(x)) for x in eqn.inputs])
        return {x for x, is_copied in zip(eqn.inputs, flags, strict=True) if is_copied and isinstance(x, int)}

    def scratch_bytes(eqn: Equation) -> int:
        if eqn.primitive is prims.scatter_add_p:
            if eqn.outputs[0] in added:
                return 0
            # Zeros to add to, which depend on nothing either; the result is another buffer.
            return size_bytes(avals[eqn.outputs[0]])
        if eqn.primitive is not _POOLING_DERIVATIVE:
            return 0
        return 4 * _INDEX_BYTES * sum(math.prod(shape(x)) for x in eqn.inputs)

    def index_bytes(eqn: Equation) -> int:
        # Of the first operand's elements, the pooling's results.
        return 4 * _INDEX_BYTES * math.prod(shape(eqn.inputs[0])) if eqn.primitive is _POOLING_DERIVATIVE else 0

    return Habits(
        copies=copies,
        scratch_bytes=scratch_bytes,
        index_bytes=index_bytes,
        kernel_holds=lambda eqn: eqn.primitive in _KERNEL_HOLDS,
        scatters=scatters,
        is_breadth_first=True,
    )


def _scatters(equations: Sequence[Equation]) -> dict[int, Equation]:
    """Scatters into zeros whose result is read by an addition alone, by that addition's result."""
    maker = {v: eqn for eqn in equations for v in eqn.outputs}
    num_readers = Counter(x for eqn in equations for x in eqn.inputs if isinstance(x, int))
    found = {}
    for eqn in equations:
        if eqn.primitive not in _ADDITIONS:
            continue
        for x in eqn.reads:
            scatter = maker.get(x)
            if scatter is None or scatter.primitive is not prims.scatter_add_p or num_readers[x] > 1:
                continue
            zeros = maker.get(scatter.reads[0])
            if zeros is not None and zeros.primitive is prims.broadcast_in_dim_p and not zeros.reads:
                found[eqn.outputs[0]] = scatter
                break
    return found


def outside_regions(target: Target, avals: Sequence[Any]) -> Callable[[Equation], bool]:
    """Return which operations a target runs with less memory where no region covers them.

    On CPU that is a pooling of maxima: inside a region its derivative holds four indices for each element of the
    image from the start of the program on, outside of any four for each result. Where there are as many results as
    elements nothing is won.
    """

    def is_outside(eqn: Equation) -> bool:
        if eqn.primitive not in _POOLINGS:
            return False
        (result,), (image, *_) = eqn.outputs, eqn.reads
        return 2 * math.prod(avals[result].shape) <= math.prod(avals[image].shape)

    return is_outside if target.platform == "cpu" else lambda eqn: False


_KERNEL_HOLDS = (primitives.CHEAP | primitives.EXPENSIVE | primitives.BROADCASTS) - primitives.COMPARES
_ADDITIONS = frozenset({prims.add_p, prims.add_jaxvals_p})
_POOLINGS = frozenset({prims.reduce_window_max_p, prims.reduce_window_min_p})
_POOLING_DERIVATIVE = prims.select_and_scatter_add_p
_INDEX_BYTES = 4


def _dot(params: dict[str, Any], ranks: Sequence[int]) -> tuple[bool, bool]:
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = params["dimension_numbers"]
    lhs, rhs = ranks
    batch, num = tuple(range(len(lhs_batch))), len(lhs_contract)
    lhs_last = tuple(lhs_contract) == tuple(range(lhs - num, lhs))
    rhs_first = tuple(rhs_contract) == tuple(range(len(batch), len(batch) + num))
    # A matrix is multiplied transposed as it lies.
    return (
        lhs > 2 and not (tuple(lhs_batch) == batch and lhs_last),
        rhs > 2 and not (tuple(rhs_batch) == batch and rhs_first),
    )


def _conv(params: dict[str, Any], ranks: Sequence[int]) -> tuple[bool, bool]:
    dims, rank = params["dimension_numbers"], ranks[0]
    features_last = (0, rank - 1, *range(1, rank - 1))
    kernel = (rank - 1, rank - 2, *range(rank - 2))
    return tuple(dims.lhs_spec) != features_last, tuple(dims.rhs_spec) != kernel
