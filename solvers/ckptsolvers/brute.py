"""Every nested schedule of a tiny problem, judged one by one: the oracle of the tests.

No paper. A region whose backward comes at once (the last of its sequence) costs a forward and saves nothing, so it is
left out unless asked for; what is left are the large Schroeder numbers of trees, 2, 6, 22, 90, 394, 1806, 8558, 41586
for 2 to 9 blocks, times the options of each block.
"""

import itertools
import time
from collections.abc import Iterator

from ckptsolvers.errors import InvalidProblemError
from ckptsolvers.problem import Problem
from ckptsolvers.proof import NESTED
from ckptsolvers.schedule import Keep, Node, Schedule, region
from ckptsolvers.simulate import simulate
from ckptsolvers.solution import Solution, best_of

_MOST_SCHEDULES = 500_000


def solve_brute_force(problem: Problem, *, budget_bytes: int) -> Solution:
    """Judge every nested schedule and return the one with the least work within the budget.

    Raises:
        InfeasibleError: no nested schedule fits.
        InvalidProblemError: there are more than half a million of them.
    """
    started = time.perf_counter()
    best = best_of(problem, all_schedules(problem), budget_bytes=budget_bytes, solver="brute force")
    return Solution(
        schedule=best.schedule,
        judgement=best.judgement,
        budget_bytes=budget_bytes,
        solver="brute force",
        bound_work=best.judgement.work,
        bound_for=NESTED,
        solve_s=time.perf_counter() - started,
    )


def brute_force_frontier(problem: Problem, *, last_regions: bool = False) -> list[tuple[int, int]]:
    """The (peak bytes, work) of every nested schedule that no other beats in both, by rising peak.

    Raises:
        InvalidProblemError: there are more than half a million schedules.
    """
    judged = sorted(
        (verdict.peak_bytes, verdict.work)
        for verdict in (simulate(problem, s) for s in all_schedules(problem, last_regions=last_regions))
    )
    frontier: list[tuple[int, int]] = []
    for peak, work in judged:
        if not frontier or work < frontier[-1][1]:
            frontier.append((peak, work))
    return frontier


def all_schedules(problem: Problem, *, last_regions: bool = False) -> Iterator[Schedule]:
    """Yield every nested schedule of a problem.

    Args:
        problem: any blocks and values.
        last_regions: yield those too in which the last node of a sequence is recomputed. A region around nothing but
            another region is never yielded.

    Raises:
        InvalidProblemError: there are more than half a million.
    """
    num_options = [len(block.options) for block in problem.blocks]
    count = num_schedules(num_options)
    if count > _MOST_SCHEDULES:
        raise InvalidProblemError(f"{problem.num_blocks} blocks have {count:,} nested schedules, too many to try all")
    return map(Schedule, _sequences(num_options, 0, problem.num_blocks, last_regions))


def num_schedules(num_options: list[int]) -> int:
    """How many nested schedules there are, without those whose last node is recomputed.

    Example:
        >>> [num_schedules([1] * n) for n in (1, 2, 3, 4, 9)]
        [1, 2, 6, 22, 41586]
    """
    shapes = [0, 1]
    for n in range(2, len(num_options) + 1):
        shapes.append(shapes[n - 1] + sum(shapes[m] * shapes[n - m] for m in range(1, n)))
    total = shapes[len(num_options)]
    for num in num_options:
        total *= num
    return total


def _sequences(
    num_options: list[int], start: int, stop: int, last_regions: bool, wrapped: bool = False
) -> Iterator[tuple[Node, ...]]:
    if start == stop:
        yield ()
        return
    for middle in range(start + 1, stop + 1):
        regions = middle < stop or (last_regions and not wrapped)
        for first in _nodes(num_options, start, middle, regions, last_regions):
            for rest in _sequences(num_options, middle, stop, last_regions):
                yield (first, *rest)


def _nodes(num_options: list[int], start: int, stop: int, regions: bool, last_regions: bool) -> Iterator[Node]:
    keeps = (Keep(start, o) for o in range(num_options[start])) if stop == start + 1 else ()
    insides = _sequences(num_options, start, stop, last_regions, wrapped=True) if regions else ()
    return itertools.chain(keeps, map(region, insides))
