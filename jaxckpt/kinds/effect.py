"""Blocks that run once and that no region covers: side effects, and what a compiler treats worse inside regions."""

from dataclasses import replace

from ckptsolvers import Block, Option

from jaxckpt.model.joint import LocalBlock
from jaxckpt.model.option import EVERYTHING, BlockAnalysis
from jaxckpt.model.schedules import NO_ROOM
from jaxckpt.program.ir import size_bytes


def effectful(local: LocalBlock) -> BlockAnalysis:
    """A block with side effects and no tangents: it is run where it stands, and that is its only option."""
    size = sum(size_bytes(local.program.avals[v]) for v in local.outputs if v not in local.results)
    times = (0,) * (len(local.outputs) + 1)
    option = Option(
        name=EVERYTHING,
        saved_bytes=0,
        recompute_time=0,
        forward_times=times,
        forward_peak_bytes=size,
        backward_peak_bytes=0,
    )
    block = Block(forward_times=times, forward_peak_bytes=size, options=(option,))
    unread = tuple(range(len(local.span.inputs)))
    return BlockAnalysis(block, block, (None,), (unread,), 0, 0)


def outside_regions_only(analysis: BlockAnalysis) -> BlockAnalysis:
    """The block as one that no region covers: left to JAX where it stands, and never run without being kept."""
    alone = lambda block: replace(block, forward_peak_bytes=NO_ROOM, options=block.options[-1:])  # noqa: E731
    return replace(
        analysis,
        block=alone(analysis.block),
        flops_block=alone(analysis.flops_block),
        saved=analysis.saved[-1:],
        unread=analysis.unread[-1:],
    )
