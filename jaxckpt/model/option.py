"""What is known of the ways to keep a block."""

from dataclasses import dataclass

from ckptsolvers import Block, Option

from jaxckpt.model.tree import Saved

EVERYTHING = "everything"


@dataclass(frozen=True, slots=True)
class BlockAnalysis:
    """What is known of a distinct block, in numbers of its own."""

    block: Block
    flops_block: Block
    saved: tuple[Saved, ...]  # for each option what it saves, values as positions in the block's own numbering
    unread: tuple[tuple[int, ...], ...]  # for each option, the inputs that only its forward reads
    unplanned_cost: int
    residual_bytes: int  # of what JAX keeps of the block without a checkpoint, whether a compiler needs it or not
    # Of loops and conditionals, for each option: most alive in the backward beyond what is saved, if that stays.
    transients: tuple[int, ...] = ()
    # Of a loop's whole body, for each option: most alive in the backward where what was saved is read from stacks.
    stacked_peaks: tuple[int, ...] = ()


def dominates(a: Option, b: Option, spare_bytes: int = 0, spare_time: int = 0) -> bool:
    """Whether an option is as good as another one in everything, or worse by no more than this."""
    sizes = ("saved_bytes", "forward_peak_bytes", "backward_peak_bytes")
    return (
        set(a.saved_outputs) <= set(b.saved_outputs)
        and all(getattr(a, k) <= getattr(b, k) + spare_bytes for k in sizes)
        and a.recompute_time <= b.recompute_time + spare_time
        and all(x <= y + spare_time for x, y in zip(a.forward_times, b.forward_times, strict=True))
    )
