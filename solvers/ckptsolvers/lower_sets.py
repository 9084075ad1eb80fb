"""One level of regions, placed by dynamic programming over cuts of a block problem.

"A graph theoretic framework of recomputation algorithms for memory-efficient backpropagation" (Kusumoto, Inoue,
Watanabe, Akiba, Koyama, 2019): a schedule is a growing sequence of lower sets L1, L2, ...; what is read across them
is held, the rest of each part is computed once more in the backward pass. `lower_sets_dag` is the paper's method on
graphs. This variant is for blocks, whose order is fixed: the lower sets are its prefixes, a part that holds all it
needs is a kept block, and memory is counted as the judge counts it and not by the paper's bound.

Optimal among schedules whose regions do not nest, when every block has one option; the paper's class, and so far from
the nested optimum when memory is short. With several options regions use uniform rules. The lists of non-dominated
(bytes, work) pairs are exact up to 2000 pairs per cut, beyond which some are left out.

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
from ckptsolvers.solution import Solution, check_budget

_MOST_PAIRS = 2000


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
        optimal_for="schedules of this order without nested regions" if proven else None,
        bound_work=judged.work if proven else None,
        solve_s=time.perf_counter() - started,
    )


@dataclass(frozen=True, slots=True)
class _Move:
    """A kept block or a region from one cut to another."""

    stop: int
    held_bytes: int
    peak_bytes: int
    work: int
    node: Node


@dataclass(slots=True)
class _Pairs:
    """Non-dominated ways to reach a cut: bytes held, work so far, and the move and pair each came by."""

    held: np.ndarray
    work: np.ndarray
    moves: list[tuple[int, int, _Move] | None]  # (cut, pair, move)


class _Search:
    def __init__(self, problem: Problem, budget_bytes: int):
        self.problem, self.budget_bytes = problem, budget_bytes
        self.about = Intervals(problem)
        self._known: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.is_exact = True

    def run(self) -> Schedule | None:
        n = self.problem.num_blocks
        moves = self._moves()
        pairs: list[_Pairs | None] = [None] * (n + 1)
        arrivals: list[list[tuple[int, np.ndarray, _Move]]] = [[] for _ in range(n + 1)]
        pairs[0] = _Pairs(np.zeros(1, np.int64), np.zeros(1, np.int64), [None])
        for s in range(n + 1):
            if s:
                pairs[s] = self._merge(arrivals[s], pairs)
            at = pairs[s]
            if at is None or s == n:
                continue
            for move in moves[s]:
                fits = np.flatnonzero(at.held + move.peak_bytes <= self.budget_bytes)
                if len(fits):
                    arrivals[move.stop].append((s, fits, move))
        return _read_back(pairs)

    def _merge(self, arrivals: list[tuple[int, np.ndarray, _Move]], pairs: list[_Pairs | None]) -> _Pairs | None:
        parts = [(cut, fits, move, pairs[cut]) for cut, fits, move in arrivals]
        found = [(cut, fits, move, at) for cut, fits, move, at in parts if at is not None]
        if not found:
            return None
        held = np.concatenate([at.held[fits] + move.held_bytes for _, fits, move, at in found])
        work = np.concatenate([at.work[fits] + move.work for _, fits, move, at in found])
        origins = [(cut, pair, move) for cut, fits, move, _ in found for pair in fits.tolist()]
        order = np.lexsort((work, held))
        least = np.minimum.accumulate(work[order])
        keep = order[np.flatnonzero(np.diff(least, prepend=least[0] + 1) < 0)]
        if len(keep) > _MOST_PAIRS:
            self.is_exact = False
            keep = keep[np.linspace(0, len(keep) - 1, _MOST_PAIRS).round().astype(int)]
        return _Pairs(held[keep], work[keep], [origins[i] for i in keep.tolist()])

    def _moves(self) -> list[list[_Move]]:
        """Every kept block and every region, by its start."""
        n = self.problem.num_blocks
        moves: list[list[_Move]] = [[] for _ in range(n)]
        for k, block in enumerate(self.problem.blocks):
            for o in range(len(block.options)):
                peak, work, held = self._keep(k, n, o)
                moves[k].append(_Move(k + 1, held, peak, work, Keep(k, o)))
        for options in option_rules(self.problem).values():
            for stop in range(1, n):
                self._add_regions(moves, stop, options)
        return moves

    def _add_regions(self, moves: list[list[_Move]], stop: int, options: tuple[int, ...]) -> None:
        """Add the regions that end at a cut, growing them to the left block by block."""
        n, about = self.problem.num_blocks, self.about
        inside_peak = inside_work = 0
        children: tuple[Node, ...] = ()
        for s in range(stop - 1, -1, -1):
            peak, work, held = self._keep(s, stop, options[s])
            inside_peak = max(peak, held + inside_peak) if children else peak
            inside_work += work
            children = (Keep(s, options[s]), *children)
            store, sweep_peaks = self._stores(s)
            sweep_peak = int(sweep_peaks[stop - s - 1]) + about.waiting[n]
            sweep_time = int(about.sweep_times(n)[stop] - about.sweep_times(n)[s])
            moves[s].append(
                _Move(
                    stop,
                    int(store[stop - s - 1]),
                    max(inside_peak, sweep_peak),
                    sweep_time + inside_work,
                    region(children),
                )
            )

    def _keep(self, k: int, stop: int, o: int) -> tuple[int, int, int]:
        """Peak, work and held bytes of keeping a block in a sequence that ends at `stop`."""
        option, about = self.problem.blocks[k].options[o], self.about
        peak = max(option.forward_peak_bytes + about.waiting[stop], option.backward_peak_bytes + about.passing[k])
        work = option.forward_times[about.num_wanted(k, stop)] + option.recompute_time
        held = about.hold_bytes(k, stop, o)
        return peak, work, held

    def _stores(self, s: int) -> tuple[np.ndarray, np.ndarray]:
        if s not in self._known:
            store = self.about.store_bytes(s, self.problem.num_blocks)
            self._known[s] = (store, self.about.sweep_peaks(s, self.problem.num_blocks, store))
        return self._known[s]


def _read_back(pairs: list[_Pairs | None]) -> Schedule | None:
    at = pairs[-1]
    if at is None:
        return None
    nodes: list[Node] = []
    pair = int(at.work.argmin())
    while (origin := at.moves[pair]) is not None:
        cut, pair, move = origin
        nodes.append(move.node)
        before = pairs[cut]
        assert before is not None
        at = before
    return Schedule(tuple(reversed(nodes)))
