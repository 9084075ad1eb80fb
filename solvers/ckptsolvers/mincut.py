"""What to save inside a block: a minimum cut between what is there and what the backward reads.

Every needed value is either saved, at the price of its bytes, or made again, at the price of its operation's time,
which needs the operation's operands in turn. For one exchange rate of bytes against time the cheapest choice is a
minimum cut (the selection problem of Picard, "Maximal closure of a graph and applications to combinatorial problems",
1976; torch.compile's partitioner uses the special case in which an operation is either free or never repeated).
Sweeping the rate gives the lower convex hull of bytes against time; choices off the hull are not found.
"""

from collections.abc import Collection, Iterable, Sequence
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
    num_rates: int = 8,
) -> tuple[frozenset[int], ...]:
    """Sweep the exchange rate: distinct save sets, from the fewest bytes to the least time.

    Args:
        operations: as in `save_set`.
        targets: as in `save_set`.
        save_bytes: as in `save_set`.
        num_rates: how many rates lie between nothing saved and nothing repeated, evenly on a logarithmic scale.

    Returns:
        The sets. The first is empty: everything is made again.
    """
    found: dict[frozenset[int], None] = {frozenset(): None}
    for rate in _rates(operations, save_bytes, num_rates):
        chosen = save_set(operations, targets=targets, save_bytes=save_bytes, bytes_per_time=rate)
        found.setdefault(chosen)
    return tuple(found)


def _rates(operations: Sequence[Operation], save_bytes: dict[int, int], num_rates: int) -> Iterable[Fraction]:
    sizes = [b for b in save_bytes.values() if b]
    times = [op.time for op in operations if op.time]
    if not sizes or not times:
        return []
    low, high = min(sizes) / sum(times), sum(sizes) / min(times) + 1
    step = (high / low) ** (1 / max(1, num_rates - 1))
    # Rates need not be exact: a short fraction keeps the capacities small and the same on every machine.
    return [Fraction(low * step**i).limit_denominator(10**9) or Fraction(1, 10**9) for i in range(num_rates)]
