"""What a compiler says of a program: what it fuses, copies and adds, and the bytes that each value takes."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from jax.extend.core import primitives as prims

from jaxckpt.program.ir import Equation


@dataclass(frozen=True, slots=True)
class Layouts:
    """What each value of a program takes on a target.

    Attributes:
        full_bytes: `[num_values]`, as its dtype and the padding say.
        narrow: float32 values that are held as bfloat16.
        features: of images, which dimension lies in the lanes.
    """

    full_bytes: Sequence[int]
    narrow: frozenset[int] = frozenset()
    features: Mapping[int, int] = field(default_factory=dict)

    def held_bytes(self, v: int) -> int:
        """What holding a value takes."""
        return self.full_bytes[v] // (2 if v in self.narrow else 1)


def _nothing(eqn: Equation) -> tuple[()]:
    del eqn
    return ()


def _no_bytes(eqn: Equation) -> int:
    del eqn
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionRules:
    """What a compiler does with some equations beyond what they say; the defaults add nothing.

    Attributes:
        copies: operands of an equation that it copies into another layout first.
        scratch_bytes: what it needs while an equation runs that a checkpoint separates from the forward; it may make
            that as soon as the program starts.
        index_bytes: what it holds instead from the forward to the backward where no checkpoint separates them.
        kernel_holds: where reductions are kernels of their own, the operations that these do for themselves, unless
            something else reads the result too; None where a reduction fuses like anything else.
        is_breadth_first: it runs what became ready first, and so makes copies long before they are read.
        matmuls_fuse_operands: whether it fuses what makes an operand of a product or a convolution into that.
        repeats_expensive: whether it makes a costly fused result again for each of its readers.
        scatters: by the result of an addition, the scatter into zeros whose result it adds; it scatters in place.
    """

    copies: Callable[[Equation], Collection[int]] = _nothing
    scratch_bytes: Callable[[Equation], int] = _no_bytes
    index_bytes: Callable[[Equation], int] = _no_bytes
    kernel_holds: Callable[[Equation], bool] | None = None
    is_breadth_first: bool = False
    matmuls_fuse_operands: bool = False
    repeats_expensive: bool = False
    scatters: Mapping[int, Equation] = field(default_factory=dict)


PLAIN = FusionRules()


def added_scatters(equations: Sequence[Equation]) -> dict[int, Equation]:
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


_ADDITIONS = frozenset({prims.add_p, prims.add_jaxvals_p})
