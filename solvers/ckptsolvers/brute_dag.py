"""The least work of a tiny graph by shortest paths over everything that can be held: the oracle of the tests.

No paper: Dijkstra's algorithm over states (held values, computed nodes). Three classes of schedules can be searched:
"any"; "given", in which nodes are computed for the first time in the graph's order; and "stages", Checkmate's class,
in which, besides, each node is computed at most once, in order, between two first computations.
"""

import heapq
import time
from collections.abc import Iterator
from typing import Literal

from ckptsolvers.dag import Dag, DagSolution, DagStep, simulate_dag
from ckptsolvers.errors import InfeasibleError, InvalidProblemError
from ckptsolvers.solution import check_budget

_MOST_NODES = 12

Order = Literal["any", "given", "stages"]
_State = tuple[int, int, int]  # held and computed nodes as bit sets, and the least node that may come next


def solve_brute_force_dag(dag: Dag, *, budget_bytes: int, order: Order = "any") -> DagSolution:
    """Return the least work within the budget, over all schedules of a class.

    Args:
        dag: at most 12 nodes.
        budget_bytes: the most that may be alive at once.
        order: the class of schedules, as above.

    Raises:
        InfeasibleError: nothing fits.
        InvalidProblemError: too many nodes.
    """
    check_budget(budget_bytes)
    started = time.perf_counter()
    n = len(dag.nodes)
    if n > _MOST_NODES:
        raise InvalidProblemError(f"{n} nodes have too many states to try all; at most {_MOST_NODES}")
    start: _State = (0, 0, 0)
    costs: dict[_State, int] = {start: 0}
    came: dict[_State, tuple[_State, DagStep]] = {}
    queue: list[tuple[int, _State]] = [(0, start)]
    while queue:
        cost, state = heapq.heappop(queue)
        if cost > costs[state]:
            continue
        if state[1] == (1 << n) - 1:
            steps = _read_back(came, state)
            judged = simulate_dag(dag, steps)
            return DagSolution(
                steps=steps,
                judgement=judged,
                budget_bytes=budget_bytes,
                solver="brute force",
                bound_work=judged.work,
                bound_for=f"schedules with order {order!r}",
                solve_s=time.perf_counter() - started,
            )
        for step, following, price in _moves(dag, state, budget_bytes, order):
            if cost + price < costs.get(following, 1 << 62):
                costs[following] = cost + price
                came[following] = (state, step)
                heapq.heappush(queue, (cost + price, following))
    raise InfeasibleError(budget_bytes, None, "brute force")


def _moves(dag: Dag, state: _State, budget_bytes: int, order: Order) -> Iterator[tuple[DagStep, _State, int]]:
    held, done, least = state
    first_undone = (~done & (done + 1)).bit_length() - 1
    now = sum(node.size_bytes for i, node in enumerate(dag.nodes) if held >> i & 1)
    for i, node in enumerate(dag.nodes):
        if held >> i & 1:
            yield DagStep("drop", i), (held & ~(1 << i), done, least), 0
            continue
        is_first = not done >> i & 1
        if (not is_first and node.is_once) or (is_first and order != "any" and i != first_undone):
            continue
        if order == "stages" and i < least:
            continue
        if all(held >> read & 1 for read in node.reads) and (
            now + node.size_bytes + node.transient_bytes <= budget_bytes
        ):
            next_least = 0 if is_first or order != "stages" else i + 1
            yield DagStep("compute", i), (held | 1 << i, done | 1 << i, next_least), node.time


def _read_back(came: dict[_State, tuple[_State, DagStep]], state: _State) -> tuple[DagStep, ...]:
    steps = []
    while state in came:
        state, step = came[state]
        steps.append(step)
    return tuple(reversed(steps))
