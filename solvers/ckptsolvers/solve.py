"""One entry for every solver of block problems, and the rule that picks one."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from ckptsolvers.brute import solve_brute_force
from ckptsolvers.chain import solve_chain
from ckptsolvers.chen import chen_schedules, segments, solve_chen
from ckptsolvers.errors import InvalidProblemError
from ckptsolvers.intervals import Intervals
from ckptsolvers.lower_sets import solve_lower_sets
from ckptsolvers.options import option_rules
from ckptsolvers.problem import Problem
from ckptsolvers.regions_milp import solve_regions_milp
from ckptsolvers.revolve import is_uniform_chain, revolve_schedules, solve_revolve
from ckptsolvers.schedule import Schedule
from ckptsolvers.simulate import simulate
from ckptsolvers.solution import Solution, best_of, check_budget

SOLVERS: dict[str, Callable[..., Solution]] = {
    "chain": solve_chain,
    "chen": solve_chen,
    "revolve": solve_revolve,
    "lower_sets": solve_lower_sets,
    "ilp": solve_regions_milp,
    "brute_force": solve_brute_force,
}
# Those that make all their schedules at once, and need not be asked at one budget after the other.
SCHEDULES: dict[str, Callable[[Problem], Iterator[Schedule]]] = {"chen": chen_schedules, "revolve": revolve_schedules}
_MOST_SPLITS = 20_000_000  # about a minute


def solve(
    problem: Problem, *, budget_bytes: int, solver: str | Callable[..., Solution] = "auto", **settings
) -> Solution:
    """Solve a block problem and say why by which method.

    "auto" takes the plain schedule if it fits, revolve for a uniform chain, the chain table for everything up to a
    few hundred blocks (or many more that repeat), and the best of Chen's and revolve's schedules beyond that.

    Args:
        problem: any blocks and values.
        budget_bytes: the most the judged peak may be.
        solver: "auto", a name in `SOLVERS`, or a function with the signature of `solve_chain`.
        **settings: passed on to the solver.

    Raises:
        InfeasibleError: the solver's class has no schedule within the budget.
        InvalidProblemError: a solver that does not exist.

    Example:
        >>> from ckptsolvers import chain
        >>> solution = solve(chain([1] * 10, [1] * 10), budget_bytes=4)
        >>> solution.judgement.work, solution.solver
        (16, 'revolve')
    """
    check_budget(budget_bytes)
    if callable(solver):
        return replace(solver(problem, budget_bytes=budget_bytes, **settings), reason="a solver of the caller's own")
    if solver != "auto":
        if solver not in SOLVERS:
            raise InvalidProblemError(f"{solver=} is not one of auto, {', '.join(SOLVERS)}")
        return replace(SOLVERS[solver](problem, budget_bytes=budget_bytes, **settings), reason="asked for by name")
    plain = _plain(problem, budget_bytes)
    if plain is not None:
        return plain
    if is_uniform_chain(problem):
        solution, reason = solve_revolve(problem, budget_bytes=budget_bytes), "the problem is a uniform chain"
    elif (splits := num_splits(problem)) <= _MOST_SPLITS:
        solution = solve_chain(problem, budget_bytes=budget_bytes, **settings)
        reason = f"the blocks differ, and the table has only {splits:,} splits"
    else:
        solution = best_of(problem, _heuristics(problem), budget_bytes=budget_bytes, solver="chen and revolve")
        reason = f"the table would have {splits:,} splits, more than a minute's"
    return replace(solution, reason=reason)


def num_splits(problem: Problem) -> int:
    """How many splits the chain table adds up: the measure of its time."""
    return sum(
        sum(t - s for s in range(t - length)) for t, (_, length) in enumerate(Intervals(problem).twins()) if t > length
    )


def _plain(problem: Problem, budget_bytes: int) -> Solution | None:
    """Keep every block and recompute nothing, if that fits."""
    options = next(iter(option_rules(problem).values()))
    schedule = segments((), options)
    judged = simulate(problem, schedule)
    if judged.peak_bytes > budget_bytes or judged.extra_work > 0:
        return None
    return Solution(
        schedule=schedule,
        judgement=judged,
        budget_bytes=budget_bytes,
        solver="plain",
        bound_work=judged.work,
        bound_for="all schedules",
        reason="nothing has to be recomputed",
    )


def _heuristics(problem: Problem) -> Iterator[Schedule]:
    yield from chen_schedules(problem)
    yield from revolve_schedules(problem)
