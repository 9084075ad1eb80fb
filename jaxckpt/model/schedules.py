"""Schedules over a problem: the chain table's, from the least bytes to the least work, with what the judge says."""

import bisect
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from ckptsolvers import ChainTable, Judgement, Keep, Problem, Schedule, simulate
from ckptsolvers.chain import default_num_levels

_T = TypeVar("_T")


# Candidates stand this far apart in predicted bytes; finer ones differ by less than a compiler's own noise.
_STEP = 1.01
# From the most bytes of a table to the least for which its schedules are taken; below, its levels are too coarse.
_RANGE = 8
# A finer table is worth its time where it is finer by this factor.
_FINER = 1.1
# Programs of up to so many blocks, as those of loops are, get a table this fine: two plans of a body differ in what is
# stacked, which takes many levels, or in what one iteration needs, a part of one of the usual levels.
FEW_BLOCKS, _FINE_LEVELS = 16, 16_000
# There a candidate with fewer bytes stays beside one whose work is less by no more than this share of a forward.
_NEARLY = 0.003


@dataclass(frozen=True, slots=True)
class Candidate:
    """A schedule with what the judge says of it, and the problem it is for.

    Attributes:
        schedule: a tree over the problem's blocks.
        judgement: its bytes and work.
        problem: one of the program's.
        is_identical: whether it is of those that treat identical blocks identically, whose bytes are off by less.
    """

    schedule: Schedule
    judgement: Judgement
    problem: Problem = field(compare=False, repr=False)
    is_identical: bool = False

    @property
    def digest(self) -> str:
        """A name for the schedule, among those of one program, that is the same everywhere."""
        shown = [self.problem.num_blocks, self.schedule.to_json()]
        return hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]


def spread_out(items: Sequence[_T], sizes: Sequence[float], works: Sequence[int], *, is_fine: bool) -> list[_T]:
    """Of the items within a hundredth in bytes the last one, and the first one that takes hardly more work.

    Args:
        items: from the least bytes to the least work; the first of all is kept too.
        sizes: `[num_items]`, bytes.
        works: `[num_items]`.
        is_fine: whether to take the first ones.
    """
    chosen: list[int] = []
    last = len(items) - 1
    while last >= 0:
        first = bisect.bisect_right(sizes, sizes[last] / _STEP, 0, last)
        spare = _NEARLY * works[-1] if is_fine else -1
        near = next(i for i in range(first, last + 1) if i == last or works[i] <= works[last] + spare)
        chosen += dict.fromkeys((last, near))
        last = first - 1
    return [items[i] for i in sorted({0, *chosen})] if items else []


def chain_schedules(problem: Problem, *, is_fine: bool = False) -> Sequence[Schedule]:
    """Schedules from the least bytes to keeping everything: a table for all, and finer ones where bytes are fewer."""
    most = max(1, keep_all(problem).judgement.peak_bytes)
    # What one of very many blocks makes must not be less than a level.
    num_levels = _FINE_LEVELS if is_fine else max(2 * problem.num_blocks, default_num_levels(problem.num_blocks) // 2)
    schedules: list[Schedule] = []
    about = None
    while most:
        table = ChainTable(problem, max_bytes=most, num_levels=num_levels, about=about)
        about = table.about
        if not table.steps():
            break  # rounded up to the table's resolution, not even keeping everything fits
        low = int(1.5 * table.steps()[0] * table.unit_bytes)
        # A loop left to itself may keep a hundred times what it needs.
        above = most // _RANGE if low * _RANGE < most else low if low * _FINER < most else 0
        schedules = [*_spread_schedules(table, above, is_fine), *schedules]
        most = above
    return schedules


def _spread_schedules(table: ChainTable, above_bytes: int, is_fine: bool) -> list[Schedule]:
    """A table's schedules above a level, as many as are worth judging: that takes longer than solving."""
    levels = [level for level in table.steps() if level * table.unit_bytes > above_bytes]
    chosen = spread_out(levels, levels, table.times()[levels].tolist(), is_fine=is_fine)
    return [table.schedule(level) for level in reversed(chosen)]


def keep_all(problem: Problem) -> Candidate:
    """The schedule that leaves every block to JAX, as the program does without a plan."""
    keep_all = Schedule(tuple(Keep(k, len(b.options) - 1) for k, b in enumerate(problem.blocks)))
    return Candidate(keep_all, simulate(problem, keep_all), problem)
