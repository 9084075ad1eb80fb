"""What to save inside a block: a knapsack in which leaving something out may force more to be computed again.

The 0-1 knapsack with recomputation dependencies, as in partitioners with an activation memory budget: each node that
the backward reads is saved, or computed again from nodes that are themselves saved, computed again, or always there.
A plain knapsack charges each node its own time and misses the chain behind it; here the dependencies are constraints
of the program, which HiGHS solves exactly through `scipy.optimize.milp`. Exponential time at worst, linear size.

The relaxation for one price per byte is a minimum cut, which finds the trade-off's convex hull but no point inside it.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

from ckptsolvers.dag import Dag
from ckptsolvers.errors import InfeasibleError, InvalidProblemError
from ckptsolvers.linear import LinearProgram
from ckptsolvers.proof import claim
from ckptsolvers.solution import check_budget


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveSet:
    """What to save, and what that makes necessary.

    Attributes:
        saved: nodes to hold, ascending.
        recomputed: nodes to compute again in the backward pass, ascending.
        saved_bytes: of the saved nodes.
        recompute_time: of the recomputed nodes.
        bound_time: no set within the budget takes less time than this.
        solve_s: wall time.
    """

    saved: tuple[int, ...]
    recomputed: tuple[int, ...]
    saved_bytes: int
    recompute_time: int
    bound_time: int
    solve_s: float

    @property
    def is_optimal(self) -> bool:
        """Whether it is proven that no other set within the budget takes less time."""
        return self.recompute_time == self.bound_time

    @property
    def gap(self) -> float:
        """Time above the bound, as a fraction of the time."""
        return (self.recompute_time - self.bound_time) / max(1, self.recompute_time)

    def __str__(self) -> str:
        """One line: the set, its time, and what is proven of it."""
        found = f"knapsack: {len(self.saved)} nodes of {self.saved_bytes:,} bytes, {self.recompute_time:,} to recompute"
        return f"{found}; {claim(self.recompute_time, self.bound_time, 'all sets')}"


def solve_knapsack(
    dag: Dag, *, required: Iterable[int], budget_bytes: int, free: Iterable[int] = (), time_limit_s: float = 10.0
) -> SaveSet:
    """Return the save set that makes the required nodes available again in the least time.

    Args:
        dag: the forward graph of a block.
        required: nodes that the backward reads.
        budget_bytes: the most that saved nodes may sum to.
        free: nodes that are there anyway, such as the block's inputs.
        time_limit_s: when to stop with the best set so far.

    Raises:
        InfeasibleError: what must not be computed twice does not fit; `least_bytes` says what it needs.
        InvalidProblemError: a required or free node that is not in the graph.
    """
    check_budget(budget_bytes)
    started = time.perf_counter()
    needed, given = sorted(set(required)), set(free)
    if any(not 0 <= v < len(dag.nodes) for v in (*needed, *given)):
        raise InvalidProblemError(f"required={needed} or free={sorted(given)} names a node that is not in the graph")
    program, save = _program(dag, needed, given, budget_bytes)
    found = program.solve(time_limit_s=time_limit_s)
    if found.values is None:
        raise InfeasibleError(budget_bytes, None, "knapsack")
    saved = {v for v, place in save.items() if found.values[place] > 0.5}
    recomputed = _needed_again(dag, needed, saved | given)
    # A node that is saved for nothing only costs bytes.
    used = {read for v in recomputed for read in dag.nodes[v].reads} | set(needed)
    saved &= used
    saved_bytes = sum(dag.nodes[v].size_bytes for v in saved)
    if saved_bytes > budget_bytes:
        raise InfeasibleError(budget_bytes, saved_bytes, "knapsack")
    recompute_time = sum(dag.nodes[v].time for v in recomputed)
    # The solver's numbers are floats.
    bound = found.bound * max(1, dag.total_time) if math.isfinite(found.bound) else 0.0
    is_proven = recompute_time - bound < max(0.5, 1e-7 * recompute_time)
    return SaveSet(
        saved=tuple(sorted(saved)),
        recomputed=tuple(sorted(recomputed)),
        saved_bytes=saved_bytes,
        recompute_time=recompute_time,
        bound_time=recompute_time if is_proven else max(0, math.floor(bound)),
        solve_s=time.perf_counter() - started,
    )


def _program(dag: Dag, needed: list[int], given: set[int], budget_bytes: int) -> tuple[LinearProgram, dict[int, int]]:
    program, total_time = LinearProgram(), max(1, dag.total_time)
    inner = [v for v in range(len(dag.nodes)) if v not in given]
    save = {v: program.add_binary() for v in inner}
    again = {
        v: program.add_binary(cost=dag.nodes[v].time / total_time, fixed=0.0 if dag.nodes[v].is_once else None)
        for v in inner
    }
    for v in needed:
        if v not in given:
            program.add_at_most({save[v]: -1.0, again[v]: -1.0}, -1.0)
    for v in inner:
        for read in dag.nodes[v].reads:
            if read not in given:
                program.add_at_most({again[v]: 1.0, save[read]: -1.0, again[read]: -1.0}, 0.0)
    unit = max(1, budget_bytes)
    program.add_at_most({save[v]: dag.nodes[v].size_bytes / unit for v in inner}, budget_bytes / unit)
    return program, save


def _needed_again(dag: Dag, needed: list[int], there: set[int]) -> set[int]:
    again: set[int] = set()
    stack = [v for v in needed if v not in there]
    while stack:
        v = stack.pop()
        if v not in again:
            again.add(v)
            stack.extend(read for read in dag.nodes[v].reads if read not in there)
    return again
