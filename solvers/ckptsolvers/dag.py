"""The graph problem: which values to hold and which to compute again, when every value is one node of a DAG.

This is the model of Checkmate, of Kusumoto et al. and of pebbling: nodes in a topological order, each with bytes and
time. A schedule is any list of computes and drops; the training graph's backward nodes are nodes like all others.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ckptsolvers.errors import InvalidProblemError, InvalidScheduleError
from ckptsolvers.problem import check_numbers
from ckptsolvers.proof import Proof

if TYPE_CHECKING:
    import networkx as nx

_LARGEST = 2**60


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A value and the operation that computes it.

    Attributes:
        size_bytes: what holding the value costs.
        time: what computing it costs, each time.
        reads: the nodes it is computed from, all of them before it.
        transient_bytes: what it needs while it is computed, beyond its inputs and itself.
        is_once: it must not be computed twice, as an accumulated gradient or a random draw.
    """

    size_bytes: int
    time: int
    reads: tuple[int, ...] = ()
    transient_bytes: int = 0
    is_once: bool = False


@dataclass(frozen=True)
class Dag:
    """Nodes in a topological order.

    Raises:
        InvalidProblemError: no nodes, a negative or overflowing number, or a node that reads itself or a later one.
    """

    nodes: tuple[Node, ...]

    def __post_init__(self) -> None:
        """Check every node."""
        if not self.nodes:
            raise InvalidProblemError("a graph needs at least one node; nodes is empty")
        for i, node in enumerate(self.nodes):
            check_numbers(f"nodes[{i}]", node.size_bytes, node.time, node.transient_bytes)
            if any(not 0 <= read < i for read in node.reads) or len(set(node.reads)) < len(node.reads):
                raise InvalidProblemError(f"nodes[{i}].reads={node.reads} must be distinct nodes before it")
        n = len(self.nodes)
        if max(sum(node.time for node in self.nodes) * n, sum(map(_most_bytes, self.nodes))) >= _LARGEST:
            raise InvalidProblemError(f"sums of bytes or times overflow 64 bits for {n} nodes")

    @property
    def readers(self) -> tuple[tuple[int, ...], ...]:
        """For each node those that read it, ascending, `[n]`."""
        found: list[list[int]] = [[] for _ in self.nodes]
        for i, node in enumerate(self.nodes):
            for read in node.reads:
                found[read].append(i)
        return tuple(map(tuple, found))

    @property
    def total_time(self) -> int:
        """Time to compute every node once."""
        return sum(node.time for node in self.nodes)


@dataclass(frozen=True, slots=True)
class DagStep:
    """Compute a node or drop its value."""

    kind: Literal["compute", "drop"]
    node: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DagJudgement:
    """What replaying a list of steps found.

    Attributes:
        peak_bytes: most bytes alive at once.
        work: time of every compute.
        num_computes: how often each node was computed, `[n]`.
    """

    peak_bytes: int
    work: int
    num_computes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DagSolution(Proof):
    """A list of steps within a budget, judged by replay.

    Attributes:
        steps: computes and drops, in order.
        judgement: what `simulate_dag` found.
        budget_bytes: what was allowed.
        solver: which solver made it.
        bound_work: no schedule of a class does less work within the budget than this; None where no bound is known.
        bound_for: which class that is.
        solve_s: wall time, judging included.
    """

    steps: tuple[DagStep, ...]
    judgement: DagJudgement
    budget_bytes: int
    solver: str
    bound_work: int | None = None
    bound_for: str = ""
    solve_s: float = 0.0


def simulate_dag(dag: Dag, steps: Iterable[DagStep]) -> DagJudgement:
    """Replay computes and drops: the judge of every graph solver.

    Raises:
        InvalidScheduleError: a compute reads what is not held, a drop finds nothing, a node is never computed, or one
            that must be computed once is computed twice.
    """
    held: set[int] = set()
    peak = now = work = 0
    counts = [0] * len(dag.nodes)
    for step in steps:
        node = dag.nodes[step.node]
        if step.kind == "drop":
            if step.node not in held:
                raise InvalidScheduleError(f"node {step.node} is dropped but was not held")
            held.remove(step.node)
            now -= node.size_bytes
            continue
        missing = [read for read in node.reads if read not in held]
        if missing:
            raise InvalidScheduleError(f"computing node {step.node} reads {missing}, which are not held")
        if step.node not in held:
            held.add(step.node)
            now += node.size_bytes
        peak = max(peak, now + node.transient_bytes)
        work += node.time
        counts[step.node] += 1
    for i, (node, count) in enumerate(zip(dag.nodes, counts, strict=True)):
        if count == 0 or (node.is_once and count > 1):
            raise InvalidScheduleError(f"node {i} was computed {count} times")
    return DagJudgement(peak_bytes=peak, work=work, num_computes=tuple(counts))


def plain_steps(dag: Dag) -> tuple[DagStep, ...]:
    """Compute every node once, in order: the schedule without recomputation."""
    return steps_of_computes(dag, range(len(dag.nodes)))


def steps_of_computes(dag: Dag, computes: Sequence[int]) -> tuple[DagStep, ...]:
    """Drop every value after its last read before it is computed again: the least memory for an order of computes."""
    ends: list[list[int]] = [[] for _ in computes]
    last_read: dict[int, int] = {}
    for place in range(len(computes) - 1, -1, -1):
        node = computes[place]
        ends[last_read.pop(node, place)].append(node)
        for read in dag.nodes[node].reads:
            last_read.setdefault(read, place)
    steps = []
    for node, ending in zip(computes, ends, strict=True):
        steps.append(DagStep("compute", node))
        steps.extend(DagStep("drop", dropped) for dropped in sorted(ending))
    return tuple(steps)


def from_networkx(graph: "nx.DiGraph") -> tuple[Dag, list]:
    """Read a graph whose nodes carry `size_bytes` and `time`, edges going from maker to reader.

    Returns:
        The problem, in the lexicographically first topological order by the nodes' insertion, and the graph's node
        for each position.

    Raises:
        InvalidProblemError: a cycle, which it shows, or a node without one of the two numbers.
    """
    import networkx as nx  # noqa: PLC0415 - importing ckptsolvers brings neither SciPy nor networkx

    place = {name: i for i, name in enumerate(graph.nodes)}
    try:
        order = list(nx.lexicographical_topological_sort(graph, key=place.__getitem__))
    except nx.NetworkXUnfeasible:
        cycle = [edge[0] for edge in nx.find_cycle(graph)]
        raise InvalidProblemError(f"the graph has a cycle through {cycle}") from None
    at = {name: i for i, name in enumerate(order)}
    nodes = []
    for name in order:
        data = graph.nodes[name]
        if "size_bytes" not in data or "time" not in data:
            raise InvalidProblemError(f"node {name!r} needs the attributes size_bytes and time")
        reads = tuple(sorted(at[read] for read in graph.predecessors(name)))
        nodes.append(Node(size_bytes=data["size_bytes"], time=data["time"], reads=reads))
    return Dag(tuple(nodes)), order


def _most_bytes(node: Node) -> int:
    return node.size_bytes + node.transient_bytes
