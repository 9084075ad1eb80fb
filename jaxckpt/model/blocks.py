"""A program cut into blocks, each with its options, and the solver's problem over them."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx
from ckptsolvers import Judgement, Keep, Problem, Schedule

from jaxckpt.model.cut import Span
from jaxckpt.model.option import BlockAnalysis, Option, Save, Work
from jaxckpt.program.ir import Program
from jaxckpt.targets.compiler import Layouts


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedBlock:
    """A distinct block at one of its places in a program.

    Attributes:
        span: its equations there.
        number: equal for blocks with the same equations and shapes.
        analysis: what is known of it, in numbers of its own.
        values: `[num_values]`, the program's value for each of those numbers.
    """

    span: Span
    number: int
    analysis: BlockAnalysis
    values: tuple[int, ...]

    @property
    def options(self) -> tuple[Option, ...]:
        """The ways to keep it."""
        return self.analysis.options

    def save(self, option: int) -> Save:
        """What an option saves, in the program's values."""
        return self.options[option].save.placed(self.values)


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """A program cut into blocks, and the solver's problem over them.

    Attributes:
        program: the flat program.
        graph: its graph of equations.
        blocks: `[n]`, in order.
        problem: `[n]` blocks and the values between them, in bytes and in the unit of the plan's cost.
        layouts: what the program's values take on the target.
        unplanned_cost: forward and backward without recomputation, in the unit of the plan's cost.
        unplanned_extra: what leaving everything to JAX takes beyond a forward sweep: the time of loops' stacks.
    """

    program: Program
    graph: nx.DiGraph
    blocks: tuple[PlacedBlock, ...]
    problem: Problem
    layouts: Layouts
    unplanned_cost: int
    unplanned_extra: int

    @functools.cached_property
    def spans(self) -> tuple[Span, ...]:
        """`[n]`, the equations of each block."""
        return tuple(block.span for block in self.blocks)

    @functools.cached_property
    def numbers(self) -> tuple[int, ...]:
        """`[n]`, equal for blocks with the same equations and shapes."""
        return tuple(block.number for block in self.blocks)

    @property
    def once(self) -> tuple[int, ...]:
        """The blocks with side effects, which no region may repeat."""
        return tuple(k for k, block in enumerate(self.blocks) if any(eqn.has_effects for eqn in block.span.equations))

    @functools.cached_property
    def forward_flops(self) -> int:
        """FLOPs of one plain forward sweep."""
        return sum(block.analysis.forward[-1].flops for block in self.blocks)

    def saves(self, schedule: Schedule) -> list[Save]:
        """What each block saves under a schedule, `[n]`."""
        keeps = [node for node, _ in schedule.walk() if isinstance(node, Keep)]
        return [self.blocks[node.block].save(node.option) for node in keeps]

    def flops(self, schedule: Schedule, judgement: Judgement) -> int:
        """FLOPs of all forwards and of all that is recomputed under a schedule, as often as the judge saw them run."""
        forwards = judgement.forwards.items()
        total = sum(count * self._forward(k, option)[num].flops for (k, option, num), count in forwards)
        keeps = (node for node, _ in schedule.walk() if isinstance(node, Keep))
        return total + sum(self.blocks[node.block].options[node.option].recompute.flops for node in keeps)

    def _forward(self, k: int, option: int | None) -> Sequence[Work]:
        block = self.blocks[k]
        return block.analysis.forward if option is None else block.options[option].forward
