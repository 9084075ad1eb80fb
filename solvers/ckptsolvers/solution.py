"""What every solver returns: a schedule, the judge's verdict on it, and how much of it is proven."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

from ckptsolvers.errors import InfeasibleError, InvalidProblemError
from ckptsolvers.problem import Problem
from ckptsolvers.proof import NESTED, Proof
from ckptsolvers.schedule import Schedule
from ckptsolvers.simulate import Judgement, simulate


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution(Proof):
    """A schedule within a budget, judged by replay.

    Attributes:
        schedule: the tree.
        judgement: what the simulator found; no solver reports numbers of its own.
        budget_bytes: what was allowed.
        solver: which solver made it.
        bound_work: no schedule of a class does less work within the budget than this; None where no bound is known.
        bound_for: which class that is.
        solve_s: wall time of the solver, judging included.
        reason: why this solver was picked, where `solve` picked it.
    """

    schedule: Schedule
    judgement: Judgement
    budget_bytes: int
    solver: str
    bound_work: int | None = None
    bound_for: str = ""
    solve_s: float = 0.0
    reason: str = ""


def check_budget(budget_bytes: int) -> None:
    """Refuse a budget that is no whole number of bytes.

    Raises:
        InvalidProblemError: a float, a bool, or a negative number.
    """
    if isinstance(budget_bytes, bool) or not isinstance(budget_bytes, int) or budget_bytes < 0:
        raise InvalidProblemError(f"budget_bytes={budget_bytes!r} must be a whole number of bytes, 0 or more")


def least_work(problem: Problem) -> int:
    """No nested schedule does less work: all is made in the first sweep, and each block is kept once."""
    return sum(
        min(min(o.forward_times[-1], block.forward_time + o.forward_times[0]) + o.recompute_time for o in block.options)
        for block in problem.blocks
    )


def best_of(problem: Problem, schedules: Iterable[Schedule], *, budget_bytes: int, solver: str) -> Solution:
    """Judge schedules and return the one with the least work within the budget; the lower peak breaks ties.

    Its bound is what any schedule takes, which says little where memory is short.

    Raises:
        InfeasibleError: none fits; it says the least peak among them.
    """
    check_budget(budget_bytes)
    started = time.perf_counter()
    least: int | None = None
    best: tuple[tuple[int, int], Schedule, Judgement] | None = None
    for schedule in schedules:
        judged = simulate(problem, schedule)
        peak = judged.peak_bytes
        least = peak if least is None else min(least, peak)
        if peak <= budget_bytes and (best is None or (judged.work, peak) < best[0]):
            best = ((judged.work, peak), schedule, judged)
    if best is None:
        raise InfeasibleError(budget_bytes, least, solver)
    solve_s = time.perf_counter() - started
    return Solution(
        schedule=best[1],
        judgement=best[2],
        budget_bytes=budget_bytes,
        solver=solver,
        bound_work=least_work(problem),
        bound_for=NESTED,
        solve_s=solve_s,
    )
