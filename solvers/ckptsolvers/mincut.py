"""What to save inside a block: a minimum cut between what is there and what the backward reads.

Every needed value is either saved, at the price of its bytes, or recomputed, at the price of its operation's time,
which needs the operation's operands in turn. For one exchange rate of bytes against time the cheapest choice is a
minimum cut (the selection problem of Picard, "Maximal closure of a graph and applications to combinatorial problems",
1976; torch.compile's partitioner uses the special case in which an operation is either free or never repeated).
Over all rates that gives the lower convex hull of bytes against time; choices off the hull are not found.
"""

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

# Of all prices of a network together, and of an edge that no minimum cut cuts: both fit in 32 bits.
_LARGEST_SUM, _UNCUT = 2**30, 2**31 - 1
# Between two sets so many operations are tried, of those that take more than this share of the whole time.
_MOST_TRIED, _COSTLY = 4, 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One operation that can be repeated.

    Attributes:
        reads: the values it needs.
        makes: the values it makes.
        time: what repeating it costs.
    """

    reads: tuple[int, ...]
    makes: tuple[int, ...]
    time: int


def save_set(
    operations: Sequence[Operation],
    *,
    targets: Collection[int],
    save_bytes: dict[int, int],
    bytes_per_time: Fraction,
) -> frozenset[int]:
    """Return the values to save.

    Args:
        operations: in any order; values that none makes are there for free.
        targets: the values that must be there in the backward.
        save_bytes: what saving costs, for each value that can be saved.
        bytes_per_time: how many bytes one unit of time is worth.

    Returns:
        The saved values of a minimum cut, the one nearest to the targets. Ties are settled the same way every time.
    """
    return _Network(operations, targets, save_bytes).cut(bytes_per_time)


class _Network:
    """The flow network of a block: its edges are the same for every exchange rate."""

    def __init__(
        self,
        operations: Sequence[Operation],
        targets: Collection[int],
        save_bytes: dict[int, int],
        *,
        is_early: bool = False,
    ):
        self.operations, self.targets, self.save_bytes, self.is_early = operations, targets, save_bytes, is_early
        maker = {v: i for i, op in enumerate(operations) for v in op.makes}
        wanted, stack = set(), [v for v in targets if v in maker]
        while stack:
            v = stack.pop()
            if v not in wanted:
                wanted.add(v)
                stack.extend(u for u in operations[maker[v]].reads if u in maker)
        self.maker, self.values = maker, sorted(wanted)
        if not wanted:
            return
        self.ops = sorted({maker[v] for v in wanted})
        node = {v: 2 + i for i, v in enumerate(self.values)}
        op_node = {op: 2 + len(node) + i for i, op in enumerate(self.ops)}
        self.value_nodes = np.array([node[v] for v in self.values])
        self.maker_nodes = np.array([op_node[maker[v]] for v in self.values])
        # A value on the source's side must be there; an operation on it is repeated. What has no price is never cut.
        prices: dict[tuple[int, int], tuple[float, float]] = {}
        prices |= {(0, node[v]): (np.inf, 0.0) for v in targets if v in wanted}
        prices |= {(node[v], op_node[maker[v]]): (save_bytes.get(v, np.inf), 0.0) for v in self.values}
        prices |= {(op_node[op], 1): (0.0, operations[op].time) for op in self.ops}
        reads = ((op, u) for op in self.ops for u in operations[op].reads if u in maker)
        prices |= {(op_node[op], node[u]): (np.inf, 0.0) for op, u in reads}
        # Flows back are edges too: a flow then has the network's own structure.
        prices |= {(b, a): (0.0, 0.0) for a, b in prices if (b, a) not in prices}
        size = 2 + len(node) + len(op_node)
        rows, columns = np.array(list(prices)).T
        order = np.lexsort((columns, rows))
        self.columns = columns[order].astype(np.int32)
        self.starts = np.searchsorted(rows[order], np.arange(size + 1)).astype(np.int32)
        # Of each edge the one back.
        self.reverse = np.lexsort((rows[order], columns[order]))
        self.bytes, self.time = np.array(list(prices.values()))[order].T
        # What is repeated although all that can be is saved is repeated whatever is saved.
        again = self.repeated(save_bytes)
        self.price_of = np.zeros(len(operations), np.int64)
        self.price_of[self.ops] = [
            np.flatnonzero((rows[order] == op_node[op]) & (self.columns == 1))[0] for op in self.ops
        ]
        self.is_unavoidable = np.isin(rows[order], [op_node[op] for op in again]) & (self.columns == 1)

    def repeated(self, saved: Collection[int]) -> set[int]:
        """Find the operations that lead to the targets from what is there and what is saved."""
        again: set[int] = set()
        stack = [v for v in self.targets if v in self.maker and v not in saved]
        while stack:
            op = self.maker[stack.pop()]
            if op not in again:
                again.add(op)
                stack.extend(u for u in self.operations[op].reads if u in self.maker and u not in saved)
        return again

    def cut(self, bytes_per_time: Fraction, free: Collection[int] = (), never: Collection[int] = ()) -> frozenset[int]:
        """The values that a minimum cut saves, where some operations cost nothing and others must not be repeated."""
        if not self.values:
            return frozenset()
        prices = self.bytes + float(bytes_per_time) * self.time
        prices[self.price_of[list(free)]] = 0.0
        prices[self.price_of[list(never)]] = np.inf
        return self._cut(prices)

    def least_time(self) -> frozenset[int]:
        """Of the sets that repeat as little as can be the one with the fewest bytes."""
        if not self.values:
            return frozenset()
        return self._cut(self.bytes + np.where((self.time > 0) & ~self.is_unavoidable, np.inf, 0.0))

    def _cut(self, prices: np.ndarray) -> frozenset[int]:
        from scipy.sparse import csr_array  # noqa: PLC0415 - importing ckptsolvers brings neither SciPy nor networkx
        from scipy.sparse.csgraph import maximum_flow  # noqa: PLC0415 - importing ckptsolvers brings neither SciPy nor networkx

        # SciPy's flows are 32-bit integers. What is rounded away is less than a billionth of the whole.
        is_finite = np.isfinite(prices)
        scale = _LARGEST_SUM / max(1.0, float(prices[is_finite].sum()))
        capacities = np.full(len(prices), _UNCUT, np.int32)
        capacities[is_finite] = np.ceil(prices[is_finite] * scale)
        size = len(self.starts) - 1
        flow: Any = maximum_flow(csr_array((capacities, self.columns, self.starts), shape=(size, size)), 0, 1).flow
        is_open = capacities > flow.data
        # From the source on that is the cut nearest to the targets, back from the sink the one nearest to the inputs.
        is_reached = ~self._reached(1, is_open[self.reverse]) if self.is_early else self._reached(0, is_open)
        is_saved = is_reached[self.value_nodes] & ~is_reached[self.maker_nodes]
        return frozenset(v for v, saved in zip(self.values, is_saved.tolist(), strict=True) if saved)

    def _reached(self, start: int, is_open: np.ndarray) -> np.ndarray:
        """The nodes that lie behind a node along open edges."""
        starts, columns, opened = self.starts.tolist(), self.columns.tolist(), is_open.tolist()
        is_reached = np.zeros(len(starts) - 1, bool)
        reached, stack = {start}, [start]
        while stack:
            u = stack.pop()
            for edge in range(starts[u], starts[u + 1]):
                if opened[edge] and columns[edge] not in reached:
                    reached.add(columns[edge])
                    stack.append(columns[edge])
        is_reached[list(reached)] = True
        return is_reached


class _Corner(NamedTuple):
    """A save set, what it takes, and the operations that it repeats."""

    bytes: int
    time: int
    saved: frozenset[int]
    again: frozenset[int]


def save_sets(
    operations: Sequence[Operation],
    *,
    targets: Collection[int],
    save_bytes: dict[int, int],
    max_cuts: int = 24,
    max_between: int = 0,
    is_early: bool = False,
) -> tuple[frozenset[int], ...]:
    """The lower convex hull of bytes against time: distinct save sets, from the fewest bytes to the least time.

    Between two sets on the hull, the cut at the rate that values both alike finds a set below their chord, or shows
    that there is none (Eisner and Severance, 1976); the widest gap is looked into first.

    Products of the same depth are worth the same time for each of their bytes, so of the sets that save some of them
    all lie on one line, of which the hull has the ends. Those between are found where they are asked for: of the
    costliest operations that one neighbour repeats and the other does not, every choice is tried.

    Args:
        operations: as in `save_set`.
        targets: as in `save_set`.
        save_bytes: as in `save_set`.
        max_cuts: how many minimum cuts at most; the hull is whole if it has fewer than half as many corners.
        max_between: how many more for sets above the hull that no other one beats in both.
        is_early: of sets that cost the same take the one nearest to the inputs, not the one nearest to the targets.

    Returns:
        The sets. The first is empty: everything is recomputed.
    """
    search = _Search(_Network(operations, targets, save_bytes, is_early=is_early))
    hull = search.hull(max_cuts)
    found = search.between(hull, max_between) if max_between else hull
    return tuple(c.saved for c in sorted(found, key=lambda c: (c.bytes, -c.time, sorted(c.saved))))


class _Search:
    """Save sets of a block, by minimum cuts."""

    def __init__(self, network: _Network):
        self.network = network

    def corner(self, saved: frozenset[int]) -> _Corner:
        again = frozenset(self.network.repeated(saved))
        size = sum(self.network.save_bytes[v] for v in saved)
        return _Corner(size, sum(self.network.operations[i].time for i in again), saved, again)

    def hull(self, max_cuts: int) -> set[_Corner]:
        """The corners of the lower convex hull."""
        nothing = self.corner(frozenset())
        if not nothing.time or not self.network.save_bytes:
            return {nothing}
        least_time = self.corner(self.network.least_time())
        hull, gaps = {nothing, least_time}, [(nothing, least_time)]
        for _ in range(max_cuts):
            gaps = [(a, b) for a, b in gaps if b.bytes > a.bytes and b.time < a.time]
            if not gaps:
                break
            gaps.sort(key=_area)
            left, right = gaps.pop()
            rate = _rate(left, right)
            found = self.corner(self.network.cut(rate))
            if found.bytes + rate * found.time < left.bytes + rate * left.time:
                hull.add(found)
                gaps += [(left, found), (found, right)]
        return hull

    def between(self, hull: set[_Corner], max_cuts: int) -> set[_Corner]:
        """The hull, and sets in its gaps that no other one beats; the widest gap is looked into first."""
        found, seen, cut = set(hull), set(), set()
        least = _COSTLY * max(c.time for c in hull)
        unavoidable = self.network.repeated(self.network.save_bytes)
        time = {i: op.time for i, op in enumerate(self.network.operations) if op.time > least and i not in unavoidable}
        while len(cut) < max_cuts:
            gaps = {(a, b) for a, b in itertools.pairwise(_front(found)) if a.time - b.time > least} - seen
            if not gaps:
                break
            gap = max(gaps, key=lambda gap: (_area(gap), -gap[0].bytes))
            seen.add(gap)
            for again in self._choices(*gap, time):
                if again not in cut:
                    cut.add(again)
                    found.add(self.corner(self.network.cut(_rate(*gap), again, time.keys() - again)))
        return set(_front(found, least / 4)) | hull

    def _choices(self, left: _Corner, right: _Corner, time: dict[int, int]) -> Iterator[frozenset[int]]:
        """Which of the costly operations to repeat between two sets: every choice among a few of them.

        Those that one of the two repeats come first, the costliest of them, then the least costly of the others, which
        make finer steps. The rest stay as they are: worth the same for their bytes, they would be exchanged for these.
        """
        differ = left.again ^ right.again
        order = sorted(time, key=lambda i: (0, -time[i], i) if i in differ else (1, time[i], i))
        tried = order[:_MOST_TRIED]
        others = left.again.intersection(order[_MOST_TRIED:])
        for count in range(len(tried) + 1):
            for some in itertools.combinations(tried, count):
                yield others.union(some)


def _front(corners: Collection[_Corner], least_time: float = 0) -> list[_Corner]:
    """The corners that no other one beats, from the fewest bytes on, each of which saves more time than this."""
    front: list[_Corner] = []
    for corner in sorted(corners, key=lambda c: (c.bytes, c.time, sorted(c.saved))):
        if not front or corner.time < front[-1].time - least_time:
            front.append(corner)
    return front


def _area(gap: tuple[_Corner, _Corner]) -> int:
    left, right = gap
    return (right.bytes - left.bytes) * (left.time - right.time)


def _rate(left: _Corner, right: _Corner) -> Fraction:
    """Bytes per time at which two sets are worth the same."""
    return Fraction(right.bytes - left.bytes, left.time - right.time)
