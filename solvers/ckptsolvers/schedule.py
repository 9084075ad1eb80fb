"""A schedule as a tree of regions, and the flat list of steps it stands for.

`Keep` runs a block and holds what its option says until the block's backward. `Recompute` runs its blocks, drops what
they made, and when their backward is due runs its children as a schedule of their own. The children of a region, like
those of the whole, cover consecutive blocks. Every choice nests, so a schedule is a tree of `jax.checkpoint` calls.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ckptsolvers.errors import InvalidScheduleError
from ckptsolvers.problem import Problem


@dataclass(frozen=True, slots=True)
class Keep:
    """Keep one block under one of its options."""

    block: int
    option: int

    @property
    def start(self) -> int:
        """First block covered."""
        return self.block

    @property
    def stop(self) -> int:
        """First block no longer covered."""
        return self.block + 1


@dataclass(frozen=True, slots=True)
class Recompute:
    """Run the children's blocks, keep nothing, and run the children when their backward is due."""

    children: "tuple[Node, ...]"
    start: int
    stop: int


Node = Keep | Recompute
_CLOSE = object()


def region(children: "tuple[Node, ...]") -> Recompute:
    """Make a `Recompute` over children that cover consecutive blocks.

    Raises:
        InvalidScheduleError: no children.
    """
    if not children:
        raise InvalidScheduleError("a region needs at least one child")
    return Recompute(children, children[0].start, children[-1].stop)


class Step(NamedTuple):
    """One step of the flat list.

    Attributes:
        kind: "forward" runs a block; "drop" frees values; "backward" runs a block's backward.
        block: the block, or -1 for a drop.
        option: what a forward saves and a backward uses; None for a forward that saves nothing.
        until: a forward makes only the outputs that some block before this one reads.
        values: what a drop frees, as positions in `Problem.values`.
    """

    kind: Literal["forward", "drop", "backward"]
    block: int = -1
    option: int | None = None
    until: int = -1
    values: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Schedule:
    """The whole program's tree: nodes that cover blocks 0..n-1 in order."""

    nodes: tuple[Node, ...]

    @property
    def num_regions(self) -> int:
        """How many `Recompute` regions there are, at every depth."""
        return sum(isinstance(node, Recompute) for node, _ in self.walk())

    @property
    def depth(self) -> int:
        """How deep regions nest; 0 without any."""
        return max((depth + isinstance(node, Recompute) for node, depth in self.walk()), default=0)

    def walk(self) -> Iterator[tuple[Node, int]]:
        """Yield every node with its depth, parents first, in block order."""
        stack: list[tuple[Node, int]] = [(node, 0) for node in reversed(self.nodes)]
        while stack:
            node, depth = stack.pop()
            yield node, depth
            if isinstance(node, Recompute):
                stack.extend((child, depth + 1) for child in reversed(node.children))

    def to_json(self) -> list:
        """Nested lists: `[block, option]` for a keep, `{"recompute": [...]}` for a region."""
        done: dict[int, list] = {}

        def shown(nodes: tuple[Node, ...]) -> list:
            return [[x.block, x.option] if isinstance(x, Keep) else {"recompute": done[id(x)]} for x in nodes]

        # Children before parents, so that depth costs no recursion.
        for node, _ in reversed(list(self.walk())):
            if isinstance(node, Recompute):
                done[id(node)] = shown(node.children)
        return shown(self.nodes)

    @classmethod
    def from_json(cls, data: list) -> "Schedule":
        """Read what `to_json` wrote.

        Raises:
            InvalidScheduleError: anything else.
        """
        if not isinstance(data, list):
            raise InvalidScheduleError(f"a schedule is a list of nodes, not {type(data).__name__}")
        # Post-order by hand, so that depth costs no recursion.
        out: list[list[Node]] = [[]]
        tasks: list[object] = list(reversed(data))
        while tasks:
            item = tasks.pop()
            if item is _CLOSE:
                children = out.pop()
                out[-1].append(region(tuple(children)))
            elif isinstance(item, dict) and set(item) == {"recompute"} and isinstance(item["recompute"], list):
                tasks.append(_CLOSE)
                tasks.extend(reversed(item["recompute"]))
                out.append([])
            elif isinstance(item, list) and len(item) == 2 and all(type(x) is int and x >= 0 for x in item):
                out[-1].append(Keep(*item))
            else:
                raise InvalidScheduleError(f"{item!r} is neither [block, option] nor a recompute region")
        return cls(tuple(out[0]))

    def check(self, problem: Problem) -> None:
        """Refuse a tree that does not cover the problem's blocks in order, or names an option that is not there.

        Raises:
            InvalidScheduleError: with the block where it goes wrong.
        """
        at = 0
        for node, _ in self.walk():
            if node.start != at:
                raise InvalidScheduleError(f"a node covers blocks from {node.start} where block {at} is due")
            if isinstance(node, Keep):
                if at >= problem.num_blocks or not 0 <= node.option < len(problem.blocks[at].options):
                    raise InvalidScheduleError(f"block {node.block} has no option {node.option} in this problem")
                at = node.stop
        if at != problem.num_blocks:
            raise InvalidScheduleError(f"the schedule covers {at} of the problem's {problem.num_blocks} blocks")

    def steps(self, problem: Problem) -> Iterator[Step]:
        """Yield the flat list of steps: every forward, drop and backward in the order they happen."""
        self.check(problem)
        n = problem.num_blocks
        # Each task is a sequence to run forward and then backward, a node whose backward is due, or one step.
        tasks: list[tuple] = [("sequence", self.nodes, 0, n)]
        while tasks:
            task = tasks.pop()
            if task[0] == "sequence":
                _, nodes, start, until = task
                yield from _forward_sweep(problem, nodes, start, until)
                # The stack is last in, first out: the last node's backward comes first.
                tasks.extend(
                    ("backward", node, after, until) for node, after in itertools.zip_longest(nodes, nodes[1:])
                )
            else:
                _, node, after, until = task
                gone = _unread_after(problem, node, after, until)
                yield from _drop([v for v in _held_after(problem, node, until) if v not in gone])
                if isinstance(node, Keep):
                    yield Step("backward", node.block, node.option)
                else:
                    tasks.append(("sequence", node.children, node.start, node.stop))


def _forward_sweep(problem: Problem, nodes: tuple[Node, ...], start: int, until: int) -> Iterator[Step]:
    before: Node | None = None
    for node in nodes:
        for k in range(node.start, node.stop):
            option = node.option if isinstance(node, Keep) else None
            yield Step("forward", k, option, until)
            if isinstance(node, Recompute):
                yield from _drop(_dead_inside(problem, node, k, until))
        if before is not None:
            yield from _drop(_unread_after(problem, before, node, until))
        before = node


def _unread_after(problem: Problem, node: Node, after: Node | None, until: int) -> list[int]:
    """What a kept block made for the kept one after it, which does not read it again: gone once that one has run."""
    if not (isinstance(node, Keep) and isinstance(after, Keep)):
        return []
    if problem.blocks[node.block].options[node.option].saved_outputs:
        return []
    return problem.droppable(after.block, after.option, until)


def _dead_inside(problem: Problem, node: Recompute, k: int, until: int) -> list[int]:
    """What a region made and no block after k reads: block k was the last to, or nobody was."""
    touched = {*problem.inputs[k], *problem.outputs[k]}
    values = problem.values
    return sorted(
        v
        for v in touched
        if values[v].made_by >= node.start
        and problem.is_wanted(values[v], values[v].made_by, until)
        and not problem.is_wanted(values[v], k, until)
    )


def _held_after(problem: Problem, node: Node, until: int) -> list[int]:
    """What the node made that was held for the nodes after it; what its own option saved stays."""
    if isinstance(node, Keep):
        saved = problem.blocks[node.block].options[node.option].saved_outputs
        keep = {problem.outputs[node.block][p] for p in saved}
        made = problem.outputs[node.block]
        return [v for v in made if v not in keep and problem.is_wanted(problem.values[v], node.block, until)]
    return [
        v
        for k in range(node.start, node.stop)
        for v in problem.outputs[k]
        if problem.is_wanted(problem.values[v], node.stop - 1, until)
    ]


def _drop(values: list[int]) -> Iterator[Step]:
    if values:
        yield Step("drop", values=tuple(values))
