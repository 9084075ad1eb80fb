"""One level of regions, placed by dynamic programming over cuts of a block problem.

"A graph theoretic framework of recomputation algorithms for memory-efficient backpropagation" (Kusumoto, Inoue,
Watanabe, Akiba, Koyama, 2019): a schedule is a growing sequence of lower sets L1, L2, ...; what is read across them
is held, the rest of each part is computed once more in the backward pass. `lower_sets_dag` is the paper's method on
graphs. This variant is for blocks, whose order is fixed: the lower sets are its prefixes, a part that holds all it
needs is a kept block, and memory is counted as the judge counts it and not by the paper's bound.

Optimal among schedules whose regions do not nest, when every block has one option; the paper's class, and so far from
the nested optimum when memory is short. With several options regions use uniform rules. The lists of non-dominated
(bytes, work) pairs are exact up to 1000 pairs per cut, beyond which some are left out.

O(n^2 pairs) time, O(n pairs) space.
"""

import time
from dataclasses import dataclass

import numpy as np

from ckptsolvers.errors import InfeasibleError
from ckptsolvers.intervals import Intervals
from ckptsolvers.options import option_rules
from ckptsolvers.problem import Problem
from ckptsolvers.schedule import Keep, Node, Schedule, region
from ckptsolvers.simulate import simulate
from ckptsolvers.solution import Solution, check_budget, least_work

_MOST_PAIRS = 1000


def solve_lower_sets(problem: Problem, *, budget_bytes: int) -> Solution:
    """Return the schedule without nested regions that does the least work within the budget.

    Args:
        problem: any blocks and values.
        budget_bytes: the most the judged peak may be.

    Returns:
        A judged solution, proven optimal among schedules of depth 1 if every block has one option and no pairs had
        to be left out.

    Raises:
        InfeasibleError: nothing of depth 1 fits; nested schedules may.

    Source: Kusumoto et al. 2019, section 4.
    """
    check_budget(budget_bytes)
    started = time.perf_counter()
    search = _Search(problem, budget_bytes)
    schedule = search.run()
    if schedule is None:
        raise InfeasibleError(budget_bytes, None, "lower_sets")
    judged = simulate(problem, schedule)
    proven = search.is_exact and all(len(block.options) == 1 for block in problem.blocks)
    return Solution(
        schedule=schedule,
        judgement=judged,
        budget_bytes=budget_bytes,
        solver="lower_sets",
        bound_work=judged.work if proven else least_work(problem),
        bound_for="schedules of this order without nested regions",
        solve_s=time.perf_counter() - started,
    )


@dataclass(frozen=True, slots=True)
class _Move:
    """A kept block or a region from one place to another.

    A place is twice a cut, plus one if the block before the cut is kept and what it made may be dropped after its use.
    """

    stop: int
    held_bytes: int
    peak_bytes: int
    work: int
    node: Node


@dataclass(slots=True)
class _Pairs:
    """Non-dominated ways to reach a place: bytes held, work so far, and the place, pair and move each came by."""

    held: np.ndarray
    work: np.ndarray
    origins: list[tuple[int, int, _Move] | None]


@dataclass(frozen=True, slots=True)
class _Kept:
    """What keeping a block takes: its own peaks, what it holds, what it drops once it has run, its work."""

    forward_bytes: int
    backward_bytes: int
    held_bytes: int
    drop_bytes: int
    work: int
    frees_outputs: bool

    def peak_bytes(self, inner_bytes: int, *, drops: bool) -> int:
        """The peak with what runs between its forward and its backward."""
        drop = self.drop_bytes if drops else 0
        return max(self.forward_bytes, self.backward_bytes - drop, self.held_bytes - drop + inner_bytes)


class _Search:
    def __init__(self, problem: Problem, budget_bytes: int):
        self.problem, self.budget_bytes = problem, budget_bytes
        self.about = Intervals(problem)
        self.is_exact = True

    def run(self) -> Schedule | None:
        n = self.problem.num_blocks
        moves = self._moves()
        pairs: list[_Pairs | None] = [None] * (2 * n + 2)
        arrivals: list[list[tuple[int, np.ndarray, _Move]]] = [[] for _ in pairs]
        pairs[0] = _Pairs(np.zeros(1, np.int64), np.zeros(1, np.int64), [None])
        for place in range(2 * n + 2):
            if place:
                pairs[place] = self._merge(arrivals[place], pairs)
            at = pairs[place]
            if at is None or place >= 2 * n:
                continue
            for move in moves[place]:
                fits = np.flatnonzero(at.held + move.peak_bytes <= self.budget_bytes)
                if len(fits):
                    arrivals[move.stop].append((place, fits, move))
        return _read_back(pairs)

    def _merge(self, arrivals: list[tuple[int, np.ndarray, _Move]], pairs: list[_Pairs | None]) -> _Pairs | None:
        parts = [(place, fits, move, pairs[place]) for place, fits, move in arrivals]
        found = [(place, fits, move, at) for place, fits, move, at in parts if at is not None]
        if not found:
            return None
        held = np.concatenate([at.held[fits] + move.held_bytes for _, fits, move, at in found])
        work = np.concatenate([at.work[fits] + move.work for _, fits, move, at in found])
        arrival = np.repeat(np.arange(len(found)), [len(fits) for _, fits, _, _ in found])
        pair = np.concatenate([fits for _, fits, _, _ in found])
        order = np.lexsort((work, held))
        least = np.minimum.accumulate(work[order])
        keep = order[np.flatnonzero(np.diff(least, prepend=least[0] + 1) < 0)]
        if len(keep) > _MOST_PAIRS:
            self.is_exact = False
            keep = keep[np.linspace(0, len(keep) - 1, _MOST_PAIRS).round().astype(int)]
        ways = zip(arrival[keep].tolist(), pair[keep].tolist(), strict=True)
        return _Pairs(held[keep], work[keep], [(found[i][0], p, found[i][2]) for i, p in ways])

    def _moves(self) -> list[list[_Move]]:
        """Every kept block and every region, by the place it starts from."""
        n = self.problem.num_blocks
        moves: list[list[_Move]] = [[] for _ in range(2 * n)]
        for k, block in enumerate(self.problem.blocks):
            for o in range(len(block.options)):
                kept = self._keep(k, n, o)
                for drops in (False, True):
                    held = kept.held_bytes - (kept.drop_bytes if drops else 0)
                    peak = kept.peak_bytes(0, drops=drops)
                    stop = 2 * (k + 1) + kept.frees_outputs
                    moves[2 * k + drops].append(_Move(stop, held, peak, kept.work, Keep(k, o)))
        for options in option_rules(self.problem).values():
            insides = [self._insides(stop, options) for stop in range(n)]
            for start in range(n - 1):
                self._add_regions(moves, start, options, insides)
        return moves

    def _insides(self, stop: int, options: tuple[int, ...]) -> list[tuple[int, int]]:
        """Peak and work of keeping all blocks from each start up to `stop`, when their region is run again."""
        found: list[tuple[int, int]] = []
        plain = dropped = work = 0
        for k in range(stop - 1, -1, -1):
            kept = self._keep(k, stop, options[k])
            inner = 0 if k == stop - 1 else dropped if kept.frees_outputs else plain
            plain, dropped = kept.peak_bytes(inner, drops=False), kept.peak_bytes(inner, drops=True)
            work += kept.work
            found.append((plain, work))
        return found[::-1]

    def _add_regions(
        self, moves: list[list[_Move]], start: int, options: tuple[int, ...], insides: list[list[tuple[int, int]]]
    ) -> None:
        """Add the regions that start at a cut."""
        n, about = self.problem.num_blocks, self.about
        sweep, store = about.sweep_times(n), about.store_bytes(start, n)
        sweep_peaks = about.sweep_peaks(start, n, store) + about.waiting[n]
        for stop in range(start + 1, n):
            inside_peak, inside_work = insides[stop][start]
            length = stop - start
            move = _Move(
                2 * stop,
                int(store[length - 1]),
                max(inside_peak, int(sweep_peaks[length - 1])),
                int(sweep[stop] - sweep[start]) + inside_work,
                region(tuple(Keep(k, options[k]) for k in range(start, stop))),
            )
            moves[2 * start].append(move)
            moves[2 * start + 1].append(move)

    def _keep(self, k: int, stop: int, o: int) -> _Kept:
        """What keeping a block in a sequence that ends at `stop` takes."""
        option, about, values = self.problem.blocks[k].options[o], self.about, self.problem.values
        return _Kept(
            forward_bytes=option.peak_until(k, stop) + about.waiting[stop],
            backward_bytes=option.backward_peak_bytes + about.passing[k],
            held_bytes=about.hold_bytes(k, stop, o) if k + 1 < stop else 0,
            drop_bytes=sum(values[v].size_bytes for v in self.problem.droppable(k, o, stop)),
            work=option.forward_times[about.num_wanted(k, stop)] + option.recompute_time,
            frees_outputs=not option.saved_outputs,
        )


def _read_back(pairs: list[_Pairs | None]) -> Schedule | None:
    ends = [at for at in pairs[-2:] if at is not None]
    if not ends:
        return None
    at = min(ends, key=lambda at: int(at.work.min()))
    nodes: list[Node] = []
    pair = int(at.work.argmin())
    while (origin := at.origins[pair]) is not None:
        place, pair, move = origin
        nodes.append(move.node)
        before = pairs[place]
        assert before is not None
        at = before
    return Schedule(tuple(reversed(nodes)))
