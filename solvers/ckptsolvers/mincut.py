"""What to save inside a block: a minimum cut between what is there and what the backward reads.

Every needed value is either saved, at the price of its bytes, or made again, at the price of its operation's time,
which needs the operation's operands in turn. For one exchange rate of bytes against time the cheapest choice is a
minimum cut (the selection problem of Picard, "Maximal closure of a graph and applications to combinatorial problems",
1976; torch.compile's partitioner uses the special case in which an operation is either free or never repeated).
Over all rates that gives the lower convex hull of bytes against time; choices off the hull are not found.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

# Of all prices of a network together, and of an edge that no minimum cut cuts: both fit in 32 bits.
_LARGEST_SUM, _UNCUT = 2**30, 2**31 - 1


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
        The saved values of a minimum cut, the one nearest to the inputs. Ties are settled the same way every time.
    """
    return _Network(operations, targets, save_bytes).cut(bytes_per_time)


class _Network:
    """The flow network of a block: its edges are the same for every exchange rate."""

    def __init__(self, operations: Sequence[Operation], targets: Collection[int], save_bytes: dict[int, int]):
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
        self.bytes, self.time = np.array(list(prices.values()))[order].T
        # What is repeated although all that can be is saved is repeated whatever is saved.
        again = _repeated(operations, maker, targets, save_bytes)
        self.is_unavoidable = np.isin(rows[order], [op_node[op] for op in again]) & (self.columns == 1)

    def cut(self, bytes_per_time: Fraction) -> frozenset[int]:
        """The values that a minimum cut saves."""
        return self._cut(self.bytes + float(bytes_per_time) * self.time) if self.values else frozenset()

    def least_time(self) -> frozenset[int]:
        """Of the sets that repeat as little as can be the one with the fewest bytes."""
        if not self.values:
            return frozenset()
        return self._cut(self.bytes + np.where((self.time > 0) & ~self.is_unavoidable, np.inf, 0.0))

    def _cut(self, prices: np.ndarray) -> frozenset[int]:
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import maximum_flow

        # SciPy's flows are 32-bit integers. What is rounded away is less than a billionth of the whole.
        is_finite = np.isfinite(prices)
        scale = _LARGEST_SUM / max(1.0, float(prices[is_finite].sum()))
        capacities = np.full(len(prices), _UNCUT, np.int32)
        capacities[is_finite] = np.ceil(prices[is_finite] * scale)
        size = len(self.starts) - 1
        flow: Any = maximum_flow(csr_array((capacities, self.columns, self.starts), shape=(size, size)), 0, 1).flow
        is_reached = self._reached((capacities > flow.data).tolist())
        is_saved = is_reached[self.value_nodes] & ~is_reached[self.maker_nodes]
        return frozenset(v for v, saved in zip(self.values, is_saved.tolist(), strict=True) if saved)

    def _reached(self, is_open: list[bool]) -> np.ndarray:
        """The nodes that lie behind the source along open edges."""
        starts, columns = self.starts.tolist(), self.columns.tolist()
        is_reached = np.zeros(len(starts) - 1, bool)
        reached, stack = {0}, [0]
        while stack:
            u = stack.pop()
            for edge in range(starts[u], starts[u + 1]):
                if is_open[edge] and columns[edge] not in reached:
                    reached.add(columns[edge])
                    stack.append(columns[edge])
        is_reached[list(reached)] = True
        return is_reached


def _repeated(
    operations: Sequence[Operation], maker: dict[int, int], targets: Collection[int], saved: Collection[int]
) -> set[int]:
    """Find the operations that lead to the targets from what is there and what is saved."""
    again: set[int] = set()
    stack = [v for v in targets if v in maker and v not in saved]
    while stack:
        op = maker[stack.pop()]
        if op not in again:
            again.add(op)
            stack.extend(u for u in operations[op].reads if u in maker and u not in saved)
    return again


def save_sets(
    operations: Sequence[Operation],
    *,
    targets: Collection[int],
    save_bytes: dict[int, int],
    max_cuts: int = 24,
) -> tuple[frozenset[int], ...]:
    """The lower convex hull of bytes against time: distinct save sets, from the fewest bytes to the least time.

    Between two sets on the hull, the cut at the rate that values both alike finds a set below their chord, or shows
    that there is none (Eisner and Severance, 1976); the widest gap is looked into first.

    Args:
        operations: as in `save_set`.
        targets: as in `save_set`.
        save_bytes: as in `save_set`.
        max_cuts: how many minimum cuts at most; the hull is whole if it has fewer than half as many corners.

    Returns:
        The sets. The first is empty: everything is made again.
    """
    maker = {v: i for i, op in enumerate(operations) for v in op.makes}

    def corner(saved: frozenset[int]) -> tuple[int, int, frozenset[int]]:
        again = _repeated(operations, maker, targets, saved)
        return sum(save_bytes[v] for v in saved), sum(operations[i].time for i in again), saved

    network = _Network(operations, targets, save_bytes)

    def cut(rate: Fraction) -> tuple[int, int, frozenset[int]]:
        return corner(network.cut(rate))

    nothing = corner(frozenset())
    if not nothing[1] or not save_bytes:
        return (nothing[2],)
    least_time = corner(network.least_time())
    hull, gaps = {nothing, least_time}, [(nothing, least_time)]
    for _ in range(max_cuts):
        gaps = [(a, b) for a, b in gaps if b[0] > a[0] and b[1] < a[1]]
        if not gaps:
            break
        gaps.sort(key=lambda gap: (gap[1][0] - gap[0][0]) * (gap[0][1] - gap[1][1]))
        left, right = gaps.pop()
        rate = Fraction(right[0] - left[0], left[1] - right[1])
        found = cut(rate)
        if found[0] + rate * found[1] < left[0] + rate * left[1]:
            hull.add(found)
            gaps += [(left, found), (found, right)]
    return tuple(saved for *_, saved in sorted(hull, key=lambda c: (c[0], -c[1], sorted(c[2]))))
