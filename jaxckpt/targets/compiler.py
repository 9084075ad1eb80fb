"""What a compiler does, by rule; `cpu`, `gpu` and `tpu` say where one differs."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

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
class Habits:
    """What a compiler does beyond what the program says.

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


# A compiler that does nothing of its own accord.
PLAIN = Habits()

# What a loop keeps for its backward is copied into stacks and out of them: the time of moving it, this many times.
# On CPU three scanned models (an LSTM, GPT-2, Llama) agree on 7; on an H100 plans of one are between 4 and 7. A TPU's
# compiler puts values into their stacks where it makes them, and reads them there; that was not timed.
STACKING = {"cpu": 7, "cuda": 4, "tpu": 1}
