"""XLA's compiler for CPU: operands copied into another layout, room that an operation needs, and what runs first."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import primitives as prims

from jaxckpt import _compat
from jaxckpt.program import primitives
from jaxckpt.program.ir import Equation, size_bytes
from jaxckpt.targets.compiler import Chip, Compiler
from jaxckpt.targets.rules import FusionRules, Layouts, added_scatters


class CpuCompiler(Compiler):
    """XLA's compiler for CPU."""

    # Three scanned models (an LSTM, GPT-2, Llama) agree on it: the times of the plain program, of its checkpointed body
    # and of plans.
    stacking_passes = 7
    # What is ready first runs first; elsewhere schedulers mind the memory.
    mixes_passes = True
    stacks_tiny_badly = True
    # Loops over counters, which wait for nothing: of 12 layers with dropout 29 of 32 MB, and 10 of 13 where they wait.
    draws_early = True
    # A GPU reads slices of what is there in place.
    copies_slices = True
    # The host's memory is the device's own, so nothing is won there; that programs are right can be seen all the same.
    host_memory = "pinned_host"
    counts_host = False
    least_offload_bytes = 1024
    # Buffers are assigned before LLVM runs, so its optimisations change nothing but the time this takes.
    compile_options = {"xla_backend_optimization_level": 0, **_compat.CPU_REMAT_OPTIONS}  # noqa: RUF012  # read only

    def rules(self, avals: Sequence[Any], equations: Sequence[Equation] = ()) -> FusionRules:
        """Return what it fuses, copies and adds.

        It multiplies `[batch, m, k]` by `[batch, k, n]` and convolves images with their features last; it brings other
        operands into this order, those of weight gradients above all. It finds the maxima of a pooling with four
        indices per element, which depend on nothing and are therefore made before anything else; without a checkpoint
        it does so in the forward and keeps four per result. Its kernels for reductions do arithmetic on the way, but
        neither comparisons nor layout changes, and nothing whose result is read elsewhere. What is ready first runs
        first. A drawing of random numbers is a loop over two words for each of them, which it copies.
        """
        scatters = added_scatters(equations)
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
            if _is_threefry(eqn, avals):
                return _words_bytes(avals[eqn.outputs[0]])
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

        return FusionRules(
            copies=copies,
            scratch_bytes=scratch_bytes,
            index_bytes=index_bytes,
            kernel_holds=_kernel_holds,
            scatters=scatters,
            is_breadth_first=True,
        )

    def layouts(
        self,
        avals: Sequence[Any],
        equations: Sequence[Equation],
        *,
        features: Mapping[int, int] | None = None,
        read_by_derivatives: bool = False,
    ) -> Layouts:
        """Find what values take: of random numbers the words that they are made of are held until they are read."""
        found = super().layouts(avals, equations, features=features, read_by_derivatives=read_by_derivatives)
        sizes = list(found.full_bytes)
        for eqn in equations:
            if _is_threefry(eqn, avals):
                sizes[eqn.outputs[0]] = _words_bytes(avals[eqn.outputs[0]])
        return Layouts(sizes)

    def outside_regions(self, avals: Sequence[Any]) -> Callable[[Equation], bool]:
        """Return which operations it runs with less memory where no region covers them: poolings of maxima.

        Inside a region the derivative of one holds four indices for each element of the image from the start of the
        program on, outside of any four for each result. Where there are as many results as elements nothing is won.
        """

        def is_outside(eqn: Equation) -> bool:
            if eqn.primitive not in _POOLINGS:
                return False
            (result,), (image, *_) = eqn.outputs, eqn.reads
            return 2 * math.prod(avals[result].shape) <= math.prod(avals[image].shape)

        return is_outside

    def devices(self, target: Chip, topology: str | None) -> tuple[Any, ...]:
        """The CPU devices that are here, or described ones if they are too few."""
        del target
        number = int(topology or 1)
        try:
            here = jax.local_devices(backend="cpu")
        except RuntimeError:  # JAX_PLATFORMS leaves the CPU out, and its compiler is needed all the same
            here = []
        return tuple(here[:number]) if len(here) >= number else _compat.described_cpu_devices(number)


def _is_threefry(eqn: Equation, avals: Sequence[Any]) -> bool:
    return eqn.primitive is _RANDOM_BITS and str(avals[eqn.reads[0]].dtype) == "key<fry>"


def _words_bytes(bits: Any) -> int:
    """What a loop of threefry carries: two words for each number, or, where they depend on one another, one."""
    words = math.prod(bits.shape) * max(1, bits.dtype.itemsize // _WORD_BYTES)
    return _WORD_BYTES * (2 * math.prod(bits.shape) if _compat.draws_numbers_apart() else words)


def _kernel_holds(eqn: Equation) -> bool:
    return eqn.primitive in _KERNEL_HOLDS


_KERNEL_HOLDS = (primitives.CHEAP | primitives.EXPENSIVE | primitives.BROADCASTS) - primitives.COMPARES
_POOLINGS = frozenset({prims.reduce_window_max_p, prims.reduce_window_min_p})
_POOLING_DERIVATIVE = prims.select_and_scatter_add_p
_INDEX_BYTES = _WORD_BYTES = 4
(_RANDOM_BITS,) = primitives.find_primitives("random_bits")


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
