"""Segments that are recomputed once: the square root, and the greedy that takes a budget.

"Training deep nets with sublinear memory cost" (Chen, Xu, Zhang, Guestrin, 2016), also known as sqrt(n)
checkpointing, uniform or periodic checkpointing. Section 4 of the paper: a chain is cut into segments, only what
crosses the cuts is stored, and each segment runs forward once more when its backward is due. With sqrt(n) segments of
a uniform chain the memory is O(sqrt(n)) for one extra forward. Algorithm 3 cuts greedily where the bytes of a segment
pass a threshold and searches for the threshold; here every threshold of a geometric grid is tried.

This variant keeps the last segment, whose backward comes at once, instead of recomputing it. It is a heuristic: regions
do not nest, so below 2 sqrt(n) states nothing fits, and on an uneven chain neither cuts nor options are the best ones.

Each schedule takes O(n) to make and O(n + steps) to judge.
"""

from collections.abc import Iterator

from ckptsolvers.options import option_rules, saved_bytes
from ckptsolvers.problem import Problem
from ckptsolvers.schedule import Keep, Schedule, region
from ckptsolvers.solution import Solution, best_of

_NUM_THRESHOLDS = 32
_MAX_COUNTS = 96


def solve_chen(problem: Problem, *, budget_bytes: int) -> Solution:
    """Return the segment schedule with the least work within the budget.

    Args:
        problem: any blocks and values.
        budget_bytes: the most the judged peak may be.

    Returns:
        A judged solution; nothing is proven of it. It takes one replay per candidate of `chen_schedules`.

    Raises:
        InfeasibleError: no segment schedule fits; nested ones may.

    Source: Chen et al. 2016, section 4.
    """
    return best_of(problem, chen_schedules(problem), budget_bytes=budget_bytes, solver="chen")


def chen_schedules(problem: Problem) -> Iterator[Schedule]:
    """Yield every segment schedule that is worth judging, whatever the budget; no two are the same.

    Uniform segments in every number from 1 (nothing recomputed) to n (each block by itself), and the outcomes of the
    budgeted greedy, each with "least recompute" and "least saved". Other option rules get the uniform segments of
    each length only. Long problems get a grid of numbers instead of all.
    """
    seen: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    for rule, (_, options) in enumerate(option_rules(problem).items()):
        for cuts in _cuts(problem, options, every_count=rule < 2):
            if (cuts, options) not in seen:
                seen.add((cuts, options))
                yield segments(cuts, options)


def segments(cuts: tuple[int, ...], options: tuple[int, ...]) -> Schedule:
    """Recompute every segment between two cuts and keep what follows the last.

    Args:
        cuts: first blocks of all segments but the first, ascending; none for a schedule without recomputation.
        options: the option of each block, `[n]`.
    """
    keeps = tuple(Keep(k, o) for k, o in enumerate(options))
    bounds = (0, *cuts)
    regions = [region(keeps[start:stop]) for start, stop in zip(bounds, cuts, strict=False)]
    return Schedule((*regions, *keeps[bounds[-1] :]))


def uniform_cuts(num_blocks: int, num_segments: int) -> tuple[int, ...]:
    """Cut n blocks into segments whose lengths differ by at most one."""
    return tuple(i * num_blocks // num_segments for i in range(1, num_segments))


def _cuts(problem: Problem, options: tuple[int, ...], *, every_count: bool) -> Iterator[tuple[int, ...]]:
    n = problem.num_blocks
    counts = range(1, n + 1) if every_count and n <= _MAX_COUNTS else sorted({-(-n // k) for k in range(1, n + 1)})
    for count in counts:
        yield uniform_cuts(n, count)
    if every_count:
        sizes = [_segment_bytes(problem, k, o) for k, o in enumerate(options)]
        for threshold in _thresholds(max(sizes), sum(sizes)):
            yield greedy_cuts(sizes, threshold)


def greedy_cuts(sizes_bytes: list[int], threshold_bytes: int) -> tuple[int, ...]:
    """Cut before each block that would take its segment above the threshold (Algorithm 3 of the paper)."""
    cuts, held = [], 0
    for k, size in enumerate(sizes_bytes):
        if held and held + size > threshold_bytes:
            cuts.append(k)
            held = 0
        held += size
    return tuple(cuts)


def _segment_bytes(problem: Problem, block: int, option: int) -> int:
    chosen = problem.blocks[block].options[option]
    made = set(problem.outputs[block]) - {problem.outputs[block][p] for p in chosen.saved_outputs}
    return saved_bytes(problem, block, chosen) + sum(problem.values[v].size_bytes for v in made)


def _thresholds(least: int, most: int) -> Iterator[int]:
    low, high = max(1, least), max(1, most)
    for i in range(_NUM_THRESHOLDS):
        yield round(low * (high / low) ** (i / _NUM_THRESHOLDS))
