"""Growing lower sets of a forward graph: what to hold when the order is not given.

"A graph theoretic framework of recomputation algorithms for memory-efficient backpropagation" (Kusumoto, Inoue,
Watanabe, Akiba, Koyama, 2019). A lower set holds, with a node, everything it is computed from. A schedule is a growing
sequence of them; of the part V_i = L_i minus L_(i-1) only the boundary d(L_i), which nodes outside L_i read, is held,
and the rest is computed once more when the part's gradients are due. With U_i the union of the boundaries up to i:

    time again  T(V_i minus d(L_i))
    memory      M(U_(i-1)) + 2 M(V_i) + M(D minus L_i) + M(reads of D, minus L_i),    D the readers of L_i's nodes

The exact variant goes through all lower sets, of which a graph with branches has exponentially many; the approximate
one through the closures of single nodes only. Two refinements: the last part is kept, as its gradients come at once,
and as the memory formula is a bound from above, larger bounds are tried and the judge says what fits.

Optimal by the formula among its own class: parts do not nest, so with little memory nested schedules are faster.
O(k^2 pairs) time for k lower sets.
"""

import bisect
import time
from dataclasses import dataclass
from typing import Literal

from ckptsolvers.dag import Dag, DagJudgement, DagSolution, DagStep, simulate_dag, steps_of_computes
from ckptsolvers.errors import InfeasibleError, InvalidProblemError
from ckptsolvers.solution import check_budget
from ckptsolvers.training import gradient_of, training_graph

_MOST_SETS = 4000
_MOST_PAIRS = 500
_MOST_SEQUENCES = 30
_STRETCHES = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0)


def solve_lower_sets_dag(
    forward: Dag, *, budget_bytes: int, family: Literal["exact", "approximate"] = "approximate"
) -> DagSolution:
    """Return the sequence of lower sets with the least recomputation within the budget, as steps.

    Args:
        forward: a forward graph whose last node is the loss. The steps are on `training_graph(forward)`.
        budget_bytes: the most that may be alive at once, as the judge counts.
        family: all lower sets, or the closures of single nodes.

    Raises:
        InfeasibleError: no sequence fits, or the judge found none that does.
        InvalidProblemError: more than 4000 lower sets; take the approximate family.

    Source: Kusumoto et al. 2019, sections 4.2 and 4.3.
    """
    check_budget(budget_bytes)
    started = time.perf_counter()
    dag = training_graph(forward)
    search = _Search(forward, all_lower_sets(forward) if family == "exact" else closures(forward))
    best: tuple[tuple[DagStep, ...], DagJudgement] | None = None
    least: int | None = None
    for stretch in _STRETCHES:
        for sequence in search.run(int(budget_bytes * stretch)):
            steps = canonical_steps(forward, dag, sequence)
            judged = simulate_dag(dag, steps)
            least = judged.peak_bytes if least is None else min(least, judged.peak_bytes)
            if judged.peak_bytes <= budget_bytes and (best is None or judged.work < best[1].work):
                best = steps, judged
    if best is None:
        raise InfeasibleError(budget_bytes, least, f"lower_sets ({family})")
    return DagSolution(
        steps=best[0],
        judgement=best[1],
        budget_bytes=budget_bytes,
        solver=f"lower_sets ({family})",
        bound_work=dag.total_time,  # of every node once
        bound_for="all schedules",
        solve_s=time.perf_counter() - started,
    )


def all_lower_sets(forward: Dag) -> list[int]:
    """Every lower set as a bit set, the empty one first.

    Raises:
        InvalidProblemError: there are more than 4000.
    """
    reads = [sum(1 << read for read in node.reads) for node in forward.nodes]
    found, queue = {0}, [0]
    for lower in queue:
        for v, needed in enumerate(reads):
            larger = lower | 1 << v
            if needed & ~lower == 0 and larger not in found:
                found.add(larger)
                queue.append(larger)
        if len(found) > _MOST_SETS:
            raise InvalidProblemError(f"the graph has more than {_MOST_SETS} lower sets; use family='approximate'")
    return sorted(found, key=lambda lower: (lower.bit_count(), lower))


def closures(forward: Dag) -> list[int]:
    """For each node the lower set of all that it is computed from, with the empty and the whole set."""
    sets: list[int] = []
    for v, node in enumerate(forward.nodes):
        closure = 1 << v
        for read in node.reads:
            closure |= sets[read]
        sets.append(closure)
    everything = (1 << len(forward.nodes)) - 1
    return sorted({0, everything, *sets}, key=lambda lower: (lower.bit_count(), lower))


def canonical_steps(forward: Dag, dag: Dag, sequence: list[int]) -> tuple[DagStep, ...]:
    """Write a sequence of lower sets out as computes and drops on the training graph (the canonical strategy)."""
    last = len(forward.nodes) - 1
    parts = [_members(after & ~before) for before, after in zip([0, *sequence], sequence, strict=False)]
    held = {v for lower in sequence for v in _members(_boundary(forward, lower))}
    computes = [v for part in parts for v in part]
    for place in range(len(parts) - 1, -1, -1):
        if place < len(parts) - 1:
            computes.extend(v for v in parts[place] if v not in held)
        computes.extend(gradient_of(v, last) for v in reversed(parts[place]) if v != last)
    return steps_of_computes(dag, computes)


@dataclass(frozen=True, slots=True)
class _Pair:
    """A way to reach a lower set: bytes held, time computed again, and where it came from."""

    held_bytes: int
    again: int
    before: "_Pair | None"
    lower: int


class _Search:
    def __init__(self, forward: Dag, sets: list[int]):
        self.forward, self.sets = forward, sets
        self.sizes = [node.size_bytes for node in forward.nodes]
        self.times = [node.time for node in forward.nodes]
        self.moves = [
            [self._move(before, after) for after in sets[i + 1 :] if before & ~after == 0]
            for i, before in enumerate(sets)
        ]

    def run(self, budget_bytes: int) -> list[list[int]]:
        """The sequences that trade time against held bytes, at most `_MOST_SEQUENCES`, within a bound on memory."""
        pairs: dict[int, list[_Pair]] = {lower: [] for lower in self.sets}
        pairs[0] = [_Pair(0, 0, None, 0)]
        for lower, moves in zip(self.sets, self.moves, strict=True):
            pairs[lower] = _pruned(pairs[lower])
            held = [pair.held_bytes for pair in pairs[lower]]
            for after, needed, more, again in moves:
                for pair in pairs[lower][: bisect.bisect_right(held, budget_bytes - needed)]:
                    pairs[after].append(_Pair(pair.held_bytes + more, pair.again + again, pair, after))
        return [_sequence(pair) for pair in _pruned(pairs[self.sets[-1]], most=_MOST_SEQUENCES)]

    def _move(self, before: int, after: int) -> tuple[int, int, int, int]:
        """Where it leads, the memory it needs above M(U), what it adds to M(U), and the time it computes again."""
        part, boundary = after & ~before, _boundary(self.forward, after)
        readers = 0
        for v, node in enumerate(self.forward.nodes):
            if not after >> v & 1 and any(after >> read & 1 for read in node.reads):
                readers |= 1 << v
        read = 0
        for v in _members(readers):
            for u in self.forward.nodes[v].reads:
                read |= 1 << u
        needed = 2 * self._bytes(part) + self._bytes(readers) + self._bytes(read & ~after)
        is_last = after == self.sets[-1]
        again = 0 if is_last else sum(self.times[v] for v in _members(part & ~boundary))
        return after, needed, self._bytes(boundary & ~before), again

    def _bytes(self, members: int) -> int:
        return sum(self.sizes[v] for v in _members(members))


def _sequence(pair: _Pair) -> list[int]:
    sequence: list[int] = []
    while pair.before is not None:
        sequence.append(pair.lower)
        pair = pair.before
    return sequence[::-1]


def _pruned(pairs: list[_Pair], most: int = _MOST_PAIRS) -> list[_Pair]:
    pairs.sort(key=lambda pair: (pair.held_bytes, pair.again))
    kept: list[_Pair] = []
    for pair in pairs:
        if not kept or pair.again < kept[-1].again:
            kept.append(pair)
    if len(kept) > most:
        kept = [kept[i * (len(kept) - 1) // (most - 1)] for i in range(most)]
    return kept


def _boundary(forward: Dag, lower: int) -> int:
    """Nodes of a lower set that nodes outside it read."""
    boundary = 0
    for v, node in enumerate(forward.nodes):
        if not lower >> v & 1:
            for read in node.reads:
                boundary |= lower & 1 << read
    return boundary


def _members(bits: int) -> list[int]:
    members = []
    while bits:
        low = bits & -bits
        members.append(low.bit_length() - 1)
        bits ^= low
    return members
