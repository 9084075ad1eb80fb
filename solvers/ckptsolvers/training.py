"""Training graphs: from a forward graph, and from a block problem, so that nested and general schedules compare."""

import itertools
from collections.abc import Iterator, Sequence

from ckptsolvers.dag import Dag, DagStep, Node
from ckptsolvers.errors import InvalidProblemError
from ckptsolvers.problem import Problem
from ckptsolvers.schedule import Schedule


def training_graph(forward: Dag, *, backward_times: Sequence[int] | None = None) -> Dag:
    """Append to a forward graph, whose last node is the loss, one gradient node per node before it, last first.

    The gradient of node v reads the gradient of every node that reads v, and everything those nodes read. A linear
    graph of n + 1 nodes gives 2 n + 1 nodes; node j reads j - 1 and, for j > n, 2 n - j.

    Args:
        forward: the forward graph; only the last node may have no reader.
        backward_times: `[n]`, time of each node's gradient but the loss's; by default what its readers take forward.

    Raises:
        InvalidProblemError: another node that nobody reads.
    """
    readers, last = forward.readers, len(forward.nodes) - 1
    nodes = list(forward.nodes)
    for v in range(last - 1, -1, -1):
        if not readers[v]:
            raise InvalidProblemError(f"node {v} is read by nobody; only the last node may be the loss")
        reads = {gradient_of(w, last) for w in readers[v]}
        reads |= {read for w in readers[v] for read in forward.nodes[w].reads}
        time = backward_times[v] if backward_times else sum(forward.nodes[w].time for w in readers[v])
        nodes.append(Node(size_bytes=forward.nodes[v].size_bytes, time=time, reads=tuple(sorted(reads))))
    return Dag(tuple(nodes))


def gradient_of(node: int, last: int) -> int:
    """Where `training_graph` puts the gradient of a forward node; the loss stands for its own."""
    return 2 * last - node


class BlockGraph:
    """A block problem stated as a graph, so that general schedules can be compared with nested ones.

    Each block becomes a forward node, a backward node of no size, and one node for each cotangent, made by the first
    backward that contributes to it. Everything but the forward nodes is computed once. `steps` turns a nested
    schedule into steps on this graph with the same work, and a peak that is no higher.

    Attributes:
        dag: the graph.
        forward: the node of each block's forward, `[n]`.
        backward: the node of each block's backward, `[n]`.
        cotangent: the node of each value's cotangent, for the values that have one.
        stages: `[num_nodes]`, for `solve_checkmate`: nothing runs between a backward and the cotangents it makes.

    Raises:
        InvalidProblemError: a block with more than one option, not exactly one output, saved interiors, or work that
            does not go into its output.
    """

    def __init__(self, problem: Problem):
        """Lay the nodes out in an order that a plain sweep computes them in."""
        n = problem.num_blocks
        self.problem = problem
        self._nodes: list[Node] = []
        self.cotangent: dict[int, int] = {}
        for v, value in enumerate(problem.values):
            if value.read_by[-1] == n:
                self._add_cotangent(v, ())
        first = len(self._nodes)
        self.forward = tuple(range(first, first + n))
        for k in range(n):
            self._nodes.append(self._forward_node(k))
        backward: list[int] = []
        for k in range(n - 1, -1, -1):
            node = self._backward_node(k, tuple(backward[-1:]))
            backward.append(len(self._nodes))
            self._nodes.append(node)
            for v in problem.inputs[k]:
                self._add_cotangent(v, tuple(backward[-1:]))
        self.backward = tuple(reversed(backward))
        self.dag = Dag(tuple(self._nodes))
        joined = set(self.cotangent.values()) - {0}
        self.stages = tuple(itertools.accumulate((i not in joined for i in range(1, len(self._nodes))), initial=0))

    def steps(self, schedule: Schedule) -> Iterator[DagStep]:
        """Yield a nested schedule's steps on the graph."""
        problem = self.problem
        outside = {v for v, value in enumerate(problem.values) if value.read_by[-1] == problem.num_blocks}
        yield from (DagStep("compute", node) for v, node in sorted(self.cotangent.items()) if v in outside)
        made = set(outside)
        for step in schedule.steps(problem):
            k = step.block
            if step.kind == "drop":
                yield from (DagStep("drop", self.forward[problem.values[v].made_by]) for v in step.values)
            elif step.kind == "forward":
                if problem.num_wanted(k, step.until) or (step.option is not None and self._own(k)):
                    yield DagStep("compute", self.forward[k])
            else:
                yield DagStep("compute", self.backward[k])
                yield from (DagStep("drop", self.forward[problem.values[v].made_by]) for v in self._own(k))
                yield from (DagStep("drop", self.cotangent[v]) for v in problem.outputs[k] if v in self.cotangent)
                new = [v for v in problem.inputs[k] if v in self.cotangent and v not in made]
                yield from (DagStep("compute", self.cotangent[v]) for v in new)
                made.update(new)

    def _add_cotangent(self, v: int, reads: tuple[int, ...]) -> None:
        size = self.problem.values[v].cotangent_bytes
        if size and v not in self.cotangent:
            self.cotangent[v] = len(self._nodes)
            self._nodes.append(Node(size_bytes=size, time=0, reads=reads, is_once=True))

    def _own(self, k: int) -> list[int]:
        """The outputs of block k that its own backward reads."""
        return [self.problem.outputs[k][p] for p in self.problem.blocks[k].options[0].saved_outputs]

    def _forward_node(self, k: int) -> Node:
        problem, block, outputs = self.problem, self.problem.blocks[k], self.problem.outputs[k]
        if len(block.options) != 1 or len(outputs) != 1 or block.options[0].saved_bytes or block.forward_times[0]:
            raise InvalidProblemError(f"block {k} must have one output, one option and save nothing inside")
        size = sum(problem.values[v].size_bytes for v in outputs)
        return Node(
            size_bytes=size,
            time=block.forward_times[1],
            reads=tuple(sorted(self.forward[problem.values[v].made_by] for v in problem.inputs[k])),
            transient_bytes=max(0, block.forward_peak_bytes - size),
        )

    def _backward_node(self, k: int, previous: tuple[int, ...]) -> Node:
        problem, option = self.problem, self.problem.blocks[k].options[0]
        inputs, outputs, own = problem.inputs[k], problem.outputs[k], self._own(k)
        again = [v for v in inputs if v not in problem.unread(k, 0)]
        reads = {*previous, *(self.forward[problem.values[v].made_by] for v in (*again, *own))}
        reads |= {self.cotangent[v] for v in (*inputs, *outputs) if v in self.cotangent}
        # The option's peak holds these, which are nodes here.
        counted = sum(problem.values[v].cotangent_bytes for v in outputs if v in self.cotangent)
        counted += sum(problem.values[v].size_bytes for v in own)
        return Node(
            size_bytes=0,
            time=option.recompute_time,
            reads=tuple(sorted(reads)),
            transient_bytes=max(0, option.backward_peak_bytes - counted),
            is_once=True,
        )
