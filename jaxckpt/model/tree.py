"""A program's plan: its blocks, the tree of regions over them, and what each block saves."""

from collections.abc import Sequence
from dataclasses import dataclass

from ckptsolvers import Schedule

from jaxckpt.model.option import Save


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """A program's plan.

    Attributes:
        blocks: `[n]`, positions of each block's equations.
        schedule: the regions.
        saved: `[n]`, what each block saves when it is kept.
        host: inputs of the program that wait on the host, where the schedule is one region around all of it.
    """

    blocks: tuple[tuple[int, ...], ...]
    schedule: Schedule
    saved: tuple[Save, ...]
    host: tuple[int, ...] = ()

    @property
    def is_on_host(self) -> bool:
        """Whether something waits on the host."""
        return bool(self.host) or any(save.is_on_host for save in self.saved)


def blocks_from_json(data: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Positions of each block's equations."""
    return tuple(tuple(map(int, block)) for block in data)


def check_cover(schedule: Schedule, num_blocks: int) -> None:
    """Refuse a schedule that does not cover this many blocks, each once and in order.

    Raises:
        ValueError: with the first block that is amiss.
    """
    at = 0
    for node, _ in schedule.walk():
        if node.start != at:
            raise ValueError(f"its schedule covers block {node.start} where {at} is due")
        at = node.stop if hasattr(node, "option") else at
    if at != num_blocks:
        raise ValueError(f"its schedule covers {at} blocks of {num_blocks}")
