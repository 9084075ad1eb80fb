"""Binomial checkpointing: the optimal schedule of a uniform chain, in closed form.

"Algorithm 799: revolve, an implementation of checkpointing for the reverse or adjoint mode of computational
differentiation" (Griewank, Walther, 2000), also known as revolve, binomial, treeverse or logarithmic checkpointing
(Griewank 1992, "Achieving logarithmic growth of temporal and spatial complexity in reverse automatic
differentiation"). This is the offline variant: the number of steps is known and states are held in one kind of memory.

With c states held, the one before the first step among them, beta(c, r) = binomial(c + r, c) steps can be reversed
when no step runs forward more than r times. The least number of forward steps is

    t(n, c) = r n - beta(c + 1, r - 1),    r the least with beta(c, r) >= n.

Conventions. t(n, c) is Griewank and Walther's count: forward steps that only advance the state. What a step does again
for its own backward (the "turn") is not in it. Papers that count the turns' n forward steps give t(n, c) + n, which is
`num_forwards(..., turns=True)`. Some papers do not count the initial state among the c; this module does.

Optimal for chains whose steps cost the same and whose states have the same size; a heuristic elsewhere. The schedule
takes O(n) time and space.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import comb
from typing import Literal

from ckptsolvers.errors import InfeasibleError, InvalidProblemError
from ckptsolvers.options import option_rules
from ckptsolvers.problem import Problem
from ckptsolvers.schedule import Keep, Node, Schedule, region
from ckptsolvers.simulate import simulate
from ckptsolvers.solution import Solution, best_of, check_budget

_MAX_COUNTS = 96


@dataclass(frozen=True, slots=True)
class Action:
    """One action of a time-stepping reversal, in the vocabulary of adjoint codes.

    Attributes:
        kind: "store" holds the current state, "restore" makes a held state the current one, "drop" frees it,
            "advance" runs steps `step` to `stop - 1` forward, "turn" runs `step` forward and backward.
        step: the step, or the step before which the state stands.
        stop: where an advance ends; `step + 1` otherwise.
    """

    kind: Literal["store", "restore", "drop", "advance", "turn"]
    step: int
    stop: int


def solve_revolve(problem: Problem, *, budget_bytes: int) -> Solution:
    """Return the binomial schedule with the least work within the budget.

    Args:
        problem: any blocks and values; the schedule is optimal where every block is like every other.
        budget_bytes: the most the judged peak may be.

    Returns:
        A judged solution, proven optimal among all schedules when the problem is a uniform chain.

    Raises:
        InfeasibleError: not even one held state fits.

    Source: Griewank and Walther 2000, section 2.
    """
    if is_uniform_chain(problem):
        return _solve_uniform(problem, budget_bytes)
    return best_of(problem, revolve_schedules(problem), budget_bytes=budget_bytes, solver="revolve")


def revolve_schedules(problem: Problem) -> Iterator[Schedule]:
    """Yield the binomial schedules with 1, 2, ... held states, whatever the budget, under each option rule.

    Long problems get a grid of counts instead of all, from the least count at which no step runs more than 16 times.
    """
    n = problem.num_blocks
    for _, options in zip(range(2), option_rules(problem).values(), strict=False):
        for count in _counts(n):
            yield revolve_schedule(n, count, options=options)


def revolve_schedule(num_blocks: int, num_states: int, *, options: tuple[int, ...] | None = None) -> Schedule:
    """Build the binomial tree: split at m, recompute the left part with as many states, the right with one less.

    Args:
        num_blocks: n.
        num_states: states held at once, the initial one included.
        options: the option of each block, `[n]`; the first one by default.
    """
    _check_counts(num_blocks, num_states)
    picked = options or (0,) * num_blocks
    out: list[list[Node]] = [[]]
    # Each task is a sequence to build (start, length, states, repeats), or the closing of a region.
    tasks = [(0, num_blocks, min(num_states, num_blocks), num_repeats(num_blocks, num_states))]
    while tasks:
        start, length, c, r = tasks.pop()
        if length == 0:
            children = out.pop()
            out[-1].append(region(tuple(children)))
        elif length == 1:
            out[-1].append(Keep(start, picked[start]))
        else:
            m = split_length(length, c, r)
            tasks.append((start + m, length - m, c - 1, r))
            tasks.append((-1, 0, 0, 0))
            tasks.append((start, m, c, r - 1))
            out.append([])
    return Schedule(tuple(out[0]))


def revolve_actions(num_steps: int, num_states: int) -> Iterator[Action]:
    """Yield the explicit list of actions that reverses a chain of steps.

    The initial state is stored first and dropped last; no more than `num_states` states are held at once.

    Args:
        num_steps: n.
        num_states: states held at once, the initial one included.
    """
    _check_counts(num_steps, num_states)
    yield Action("store", 0, 1)
    # Each task is a run of steps to reverse (start, length, states, repeats), with length 0 for "restore start" and
    # -1 for "drop start".
    tasks = [(0, num_steps, min(num_states, num_steps), num_repeats(num_steps, num_states))]
    while tasks:
        start, length, c, r = tasks.pop()
        if length == 0:
            yield Action("restore", start, start + 1)
        elif length == -1:
            yield Action("drop", start, start + 1)
        elif length == 1:
            yield Action("turn", start, start + 1)
        else:
            m = split_length(length, c, r)
            yield Action("advance", start, start + m)
            tasks.append((start, m, c, r - 1))
            tasks.append((start, 0, 0, 0))
            if length - m > 1:
                yield Action("store", start + m, start + m + 1)
                tasks.append((start + m, -1, 0, 0))
            tasks.append((start + m, length - m, c - 1, r))
    yield Action("drop", 0, 1)


def num_forwards(num_steps: int, num_states: int, *, turns: bool = False) -> int:
    """The least number of forward steps that reverse a uniform chain.

    Args:
        num_steps: n.
        num_states: states held at once, the initial one included.
        turns: count the n forward steps of the turns too (the last step's among them).

    Example:
        >>> [num_forwards(10, c) for c in (1, 2, 3, 9)]
        [45, 20, 15, 9]
        >>> [num_forwards(10, c, turns=True) for c in (1, 2, 3)]
        [55, 30, 25]
    """
    _check_counts(num_steps, num_states)
    r = num_repeats(num_steps, num_states)
    advances = r * num_steps - comb(num_states + r, r - 1) if r else 0
    return advances + (num_steps if turns else 0)


def num_repeats(num_steps: int, num_states: int) -> int:
    """The least r with binomial(num_states + r, num_states) >= num_steps: how often a step runs forward at most."""
    low, high = 0, 1
    while comb(num_states + high, num_states) < num_steps:
        low, high = high, 2 * high
    while low < high:
        middle = (low + high) // 2
        if comb(num_states + middle, num_states) < num_steps:
            low = middle + 1
        else:
            high = middle
    return low


def is_uniform_chain(problem: Problem) -> bool:
    """Whether every block is like every other, reads only the one before, saves nothing and hides no transients."""
    first, size = problem.blocks[0], problem.values[0].size_bytes if problem.values else 0
    values_fit = len(problem.values) == problem.num_blocks and all(
        (value.made_by, value.read_by, value.size_bytes, value.cotangent_bytes) == (k, (k + 1,), size, 0)
        for k, value in enumerate(problem.values)
    )
    option = first.options[0]
    return (
        values_fit
        and len(first.options) == 1
        and all(block == first for block in problem.blocks)
        and (option.saved_bytes, option.saved_outputs, option.backward_peak_bytes) == (0, (), 0)
        and first.forward_times[0] == option.forward_times[0] == 0
        and first.forward_times == option.forward_times
        and first.forward_peak_bytes == option.forward_peak_bytes == size
    )


def _solve_uniform(problem: Problem, budget_bytes: int) -> Solution:
    """Take the most states that fit: c states, the first of them outside the problem, peak at c + 1 sizes."""
    check_budget(budget_bytes)
    started = time.perf_counter()
    n, size = problem.num_blocks, max(1, problem.values[0].size_bytes)
    schedule = revolve_schedule(n, max(1, min(n - 1, budget_bytes // size - 1)))
    judged = simulate(problem, schedule)
    if judged.peak_bytes > budget_bytes:
        raise InfeasibleError(budget_bytes, judged.peak_bytes, "revolve")
    return Solution(
        schedule=schedule,
        judgement=judged,
        budget_bytes=budget_bytes,
        solver="revolve",
        bound_work=judged.work,
        bound_for="all schedules of a uniform chain",
        solve_s=time.perf_counter() - started,
    )


def split_length(length: int, c: int, r: int) -> int:
    """Where to split `length` steps with c states, none to run more than r times: the length of the left part."""
    # Optimal when the left part's repeats are r - 1 and the right part's r: m <= beta(c, r - 1) and
    # length - m >= beta(c - 1, r - 1). Of the optimal splits this is the last one.
    return max(1, min(comb(c + r - 1, c), length - comb(c + r - 2, c - 1)))


def _counts(n: int) -> list[int]:
    if n <= _MAX_COUNTS:
        return list(range(1, max(2, n)))
    least = next(c for c in range(1, n) if num_repeats(n, c) <= 16)
    ratio = (n - 1) / least
    return sorted({round(least * ratio ** (i / _MAX_COUNTS)) for i in range(_MAX_COUNTS + 1)})


def _check_counts(num_steps: int, num_states: int) -> None:
    if num_steps < 1 or num_states < 1:
        raise InvalidProblemError(f"{num_steps=} and {num_states=} must both be at least 1")
