"""The schedules that nest as regions, as a mixed integer program with exact bytes.

Checkmate (Jain et al., 2020) decides per stage what to hold and what to compute; most of its schedules are no tree of
regions. This program has one binary variable per choice of the chain recurrence (Beaumont et al., 2019) instead, so
that every solution nests:

    K[s, t, o]    block s is kept under option o, and [s + 1, t) follows
    R[s, t, m]    [s, m) is recomputed later, and [m, t) follows
    H[s, t]       bytes above L(0) that are held while [s, t) is worked on

each twice where block s, kept, may drop what block s - 1 made for it. An interval that is reached has exactly one
choice. It needs no memory axis, so nothing is rounded: the way to check the table of `chain`, and to solve small
problems whose sizes have no common unit. Optimal among nested schedules of the given order.

O(n^3) variables; exponential time at worst, and slower than the table from about 12 blocks on.
"""

import math
import time
from dataclasses import dataclass

import numpy as np

from ckptsolvers.chen import chen_schedules
from ckptsolvers.errors import InfeasibleError
from ckptsolvers.intervals import Intervals
from ckptsolvers.linear import LinearProgram
from ckptsolvers.problem import Problem
from ckptsolvers.proof import NESTED
from ckptsolvers.revolve import revolve_schedules
from ckptsolvers.schedule import Keep, Node, Schedule, region
from ckptsolvers.solution import Solution, best_of, check_budget, least_work

_TOLERANCE = 1e-7


def solve_regions_milp(problem: Problem, *, budget_bytes: int, time_limit_s: float = 60.0) -> Solution:
    """Return the nested schedule with the least work within the budget, by branch and bound.

    Args:
        problem: any blocks and values, about a dozen blocks.
        budget_bytes: the most the judged peak may be.
        time_limit_s: when to stop and return the best schedule found, with its gap.

    Returns:
        A judged solution with the solver's bound, proven optimal where the two meet.

    Raises:
        InfeasibleError: nothing nested fits, or nothing was found in time.
    """
    check_budget(budget_bytes)
    started = time.perf_counter()
    program = _Program(problem, budget_bytes)
    found = program.lp.solve(time_limit_s=time_limit_s)
    if found.is_infeasible:
        raise InfeasibleError(budget_bytes, None, "regions_milp")
    schedules = _candidates(problem) if found.values is None else [program.schedule(found.values)]
    best = best_of(problem, schedules, budget_bytes=budget_bytes, solver="regions_milp")
    work, bound = best.judgement.work, 0
    if math.isfinite(found.bound):
        bound = math.ceil(found.bound * program.unit_time * (1 - _TOLERANCE) - _TOLERANCE)
    is_proven = work - bound <= 2 * _TOLERANCE * work
    return Solution(
        schedule=best.schedule,
        judgement=best.judgement,
        budget_bytes=budget_bytes,
        solver="regions_milp",
        bound_work=work if is_proven else max(bound, least_work(problem)),
        bound_for=NESTED,
        solve_s=time.perf_counter() - started,
    )


def _candidates(problem: Problem):
    yield from chen_schedules(problem)
    yield from revolve_schedules(problem)


@dataclass(frozen=True, slots=True)
class _Work:
    """Blocks s..t-1; `drops` if block s is kept and drops what the kept block before it made."""

    s: int
    t: int
    drops: bool = False


@dataclass(frozen=True, slots=True)
class _Choice:
    """One way to go on: keep a block (option >= 0) or recompute what stands before `rest`."""

    variable: int
    rest: _Work
    option: int


class _Program:
    def __init__(self, problem: Problem, budget_bytes: int):
        self.problem, self.about = problem, Intervals(problem)
        self.unit_bytes = max(1, budget_bytes)
        self.unit_time = max(1, problem.forward_time)
        self.lp = LinearProgram()
        n = problem.num_blocks
        works = [_Work(s, t, drops) for t in range(1, n + 1) for s in range(t) for drops in (False, True)]
        self._held = {work: self.lp.add_continuous(upper=1.0) for work in works}
        self._choices: dict[_Work, list[_Choice]] = {work: [] for work in works}
        self._reached: dict[_Work, list[int]] = {work: [] for work in works}
        for work in works:
            self._add_keeps(work)
            if not work.drops:
                self._add_splits(work)
        for work, choices in self._choices.items():
            chosen = {choice.variable: 1.0 for choice in choices}
            reached = dict.fromkeys(self._reached[work], -1.0)
            self.lp.add_equal({**chosen, **reached}, 1.0 if work == _Work(0, n) else 0.0)

    def schedule(self, values: np.ndarray) -> Schedule:
        out: list[list[Node]] = [[]]
        tasks: list[_Work | None] = [_Work(0, self.problem.num_blocks)]
        while tasks:
            work = tasks.pop()
            if work is None:
                children = out.pop()
                out[-1].append(region(tuple(children)))
                continue
            if work.s == work.t:
                continue
            choice = max(self._choices[work], key=lambda choice: values[choice.variable])
            tasks.append(choice.rest)
            if choice.option >= 0:
                out[-1].append(Keep(work.s, choice.option))
            else:
                tasks.append(None)
                tasks.append(_Work(work.s, choice.rest.s))
                out.append([])
        return Schedule(tuple(out[0]))

    def _add_keeps(self, work: _Work) -> None:
        s, t, about, values = work.s, work.t, self.about, self.problem.values
        for o, option in enumerate(self.problem.blocks[s].options):
            drop = sum(values[v].size_bytes for v in self.problem.droppable(s, o, t)) if work.drops else 0
            if work.drops and not drop:
                continue
            time = option.forward_times[about.num_wanted(s, t)] + option.recompute_time
            forward, backward = option.peak_until(s, t) + about.waiting[t], option.backward_peak_bytes
            peak = max(forward, backward + about.passing[s] - drop)
            for drops_next in (False, True)[: 1 if s + 1 == t or option.saved_outputs else 2]:
                chosen = self._add_choice(work, _Work(s + 1, t, drops_next), o, time, peak)
                if s + 1 < t:
                    self._carry(chosen, work, _Work(s + 1, t, drops_next), about.hold_bytes(s, t, o) - drop)

    def _add_splits(self, work: _Work) -> None:
        s, t = work.s, work.t
        if t == s + 1:
            return
        about, sweep = self.about, self.about.sweep_times(t)
        store = about.store_bytes(s, t)
        peaks = about.sweep_peaks(s, t, store)
        for m in range(s + 1, t):
            peak = int(peaks[m - s - 1]) + about.waiting[t]
            chosen = self._add_choice(work, _Work(m, t), -1, int(sweep[m] - sweep[s]), peak)
            self._carry(chosen, work, _Work(m, t), int(store[m - s - 1]))
            self._carry(chosen, work, _Work(s, m), 0)

    def _add_choice(self, work: _Work, rest: _Work, option: int, time: int, peak_bytes: int) -> int:
        chosen = self.lp.add_binary(cost=time / self.unit_time)
        self._choices[work].append(_Choice(chosen, rest, option))
        self.lp.add_at_most({self._held[work]: 1.0, chosen: max(0, peak_bytes) / self.unit_bytes}, 1.0)
        return chosen

    def _carry(self, chosen: int, outer: _Work, inner: _Work, more_bytes: int) -> None:
        """If chosen, the inner interval holds what the outer one does and some more."""
        self._reached[inner].append(chosen)
        more = more_bytes / self.unit_bytes
        self.lp.add_at_most({self._held[outer]: 1.0, self._held[inner]: -1.0, chosen: 1.0 + more}, 1.0)
