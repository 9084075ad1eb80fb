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
    import networkx as nx
    from networkx.algorithms.flow import boykov_kolmogorov

    maker = {v: i for i, op in enumerate(operations) for v in op.makes}
    wanted, stack = set(), [v for v in targets if v in maker]
    while stack:
        v = stack.pop()
        if v not in wanted:
            wanted.add(v)
            stack.extend(u for u in operations[maker[v]].reads if u in maker)
    if not wanted:
        return frozenset()
    # A value on the source side must be available; an operation there is repeated. An edge without capacity is uncut.
    graph = nx.DiGraph()
    graph.add_node("source")
    for v in sorted(wanted):
        op = maker[v]
        if v in save_bytes:
            graph.add_edge(v, ("op", op), capacity=save_bytes[v] * bytes_per_time.denominator)
        else:
            graph.add_edge(v, ("op", op))
    for op in sorted({maker[v] for v in wanted}):
        graph.add_edge(("op", op), "sink", capacity=operations[op].time * bytes_per_time.numerator)
        for u in operations[op].reads:
            if u in maker:
                graph.add_edge(("op", op), u)
    for v in sorted(v for v in targets if v in maker):
        graph.add_edge("source", v)
    _, (reachable, _) = nx.minimum_cut(graph, "source", "sink", flow_func=boykov_kolmogorov)
    return frozenset(v for v in wanted if v in reachable and ("op", maker[v]) not in reachable)


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
        again: set[int] = set()
        stack = [v for v in targets if v in maker and v not in saved]
        while stack:
            op = maker[stack.pop()]
            if op not in again:
                again.add(op)
                stack.extend(u for u in operations[op].reads if u in maker and u not in saved)
        return sum(save_bytes[v] for v in saved), sum(operations[i].time for i in again), saved

    def cut(rate: Fraction) -> tuple[int, int, frozenset[int]]:
        return corner(save_set(operations, targets=targets, save_bytes=save_bytes, bytes_per_time=rate))

    nothing = corner(frozenset())
    if not nothing[1] or not save_bytes:
        return (nothing[2],)
    least_time = cut(Fraction(sum(save_bytes.values()) + 1))
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
