"""The schedules that nest as regions, as a mixed integer program with exact bytes.

Checkmate (Jain et al., 2020) decides per stage what to hold and what to compute; most of its schedules are no tree of
regions. This program has one binary variable per choice of the chain recurrence (Beaumont et al., 2019) instead, so
that every solution nests:

    K[s, t, o]    block s is kept under option o, and [s + 1, t) follows
    R[s, t, m]    [s, m) is recomputed later, and [m, t) follows
    H[s, t]       bytes above L(0) that are held while [s, t) is worked on

An interval that is reached has exactly one choice. It needs no memory axis, so nothing is rounded: the way to check
the table of `chain`, and to solve small problems whose sizes have no common unit. Optimal among nested schedules of
the given order. O(n^3) variables; exponential time at worst, and slower than the table from about 12 blocks on.
"""

import math
import time
from dataclasses import dataclass

import numpy as np

from ckptsolvers.errors import InfeasibleError
from ckptsolvers.intervals import Intervals
from ckptsolvers.linear import LinearProgram
from ckptsolvers.problem import Problem
from ckptsolvers.schedule import Keep, Node, Schedule, region
from ckptsolvers.solution import Solution, best_of, check_budget

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
        optimal_for="nested schedules of this order" if is_proven else None,
        bound_work=work if is_proven else bound,
        solve_s=time.perf_counter() - started,
    )


def _candidates(problem: Problem):
    from ckptsolvers.chen import chen_schedules
    from ckptsolvers.revolve import revolve_schedules

    yield from chen_schedules(problem)
    yield from revolve_schedules(problem)


@dataclass(frozen=True, slots=True)
class _Choice:
    """One way to go on in an interval: a kept block (option >= 0) or a split at `middle`."""

    variable: int
    middle: int
    option: int


class _Program:
    def __init__(self, problem: Problem, budget_bytes: int):
        self.problem, self.about = problem, Intervals(problem)
        self.unit_bytes = max(1, budget_bytes)
        self.unit_time = max(1, problem.forward_time)
        self.lp = LinearProgram()
        n = problem.num_blocks
        self._held = {(s, t): self.lp.add_continuous(upper=1.0) for t in range(1, n + 1) for s in range(t)}
        self._choices: dict[tuple[int, int], list[_Choice]] = {where: [] for where in self._held}
        self._reached: dict[tuple[int, int], list[int]] = {where: [] for where in self._held}
        for s, t in self._held:
            self._add_keeps(s, t)
            self._add_splits(s, t)
        for where, choices in self._choices.items():
            chosen = {choice.variable: 1.0 for choice in choices}
            reached = dict.fromkeys(self._reached[where], -1.0)
            self.lp.add_equal({**chosen, **reached}, 1.0 if where == (0, n) else 0.0)

    def schedule(self, values: np.ndarray) -> Schedule:
        out: list[list[Node]] = [[]]
        tasks: list[tuple[int, int]] = [(0, self.problem.num_blocks)]
        while tasks:
            s, t = tasks.pop()
            if s < 0:
                children = out.pop()
                out[-1].append(region(tuple(children)))
                continue
            if s == t:
                continue
            choice = max(self._choices[s, t], key=lambda choice: values[choice.variable])
            tasks.append((choice.middle, t))
            if choice.option >= 0:
                out[-1].append(Keep(s, choice.option))
            else:
                tasks.append((-1, -1))
                tasks.append((s, choice.middle))
                out.append([])
        return Schedule(tuple(out[0]))

    def _add_keeps(self, s: int, t: int) -> None:
        about = self.about
        for o, option in enumerate(self.problem.blocks[s].options):
            work = option.forward_times[about.num_wanted(s, t)] + option.recompute_time
            peak = max(option.forward_peak_bytes + about.waiting[t], option.backward_peak_bytes + about.passing[s])
            chosen = self._add_choice(s, t, s + 1, o, work, peak)
            if s + 1 < t:
                self._carry(chosen, (s, t), (s + 1, t), about.hold_bytes(s, t, o))

    def _add_splits(self, s: int, t: int) -> None:
        if t == s + 1:
            return
        about, sweep = self.about, self.about.sweep_times(t)
        store = about.store_bytes(s, t)
        peaks = about.sweep_peaks(s, t, store)
        for m in range(s + 1, t):
            peak = int(peaks[m - s - 1]) + about.waiting[t]
            chosen = self._add_choice(s, t, m, -1, int(sweep[m] - sweep[s]), peak)
            self._carry(chosen, (s, t), (m, t), int(store[m - s - 1]))
            self._carry(chosen, (s, t), (s, m), 0)

    def _add_choice(self, s: int, t: int, middle: int, option: int, work: int, peak_bytes: int) -> int:
        chosen = self.lp.add_binary(cost=work / self.unit_time)
        self._choices[s, t].append(_Choice(chosen, middle, option))
        self.lp.add_at_most({self._held[s, t]: 1.0, chosen: peak_bytes / self.unit_bytes}, 1.0)
        return chosen

    def _carry(self, chosen: int, outer: tuple[int, int], inner: tuple[int, int], more_bytes: int) -> None:
        """If chosen, the inner interval holds what the outer one does and some more."""
        self._reached[inner].append(chosen)
        more = more_bytes / self.unit_bytes
        self.lp.add_at_most({self._held[outer]: 1.0, self._held[inner]: -1.0, chosen: 1.0 + more}, 1.0)
