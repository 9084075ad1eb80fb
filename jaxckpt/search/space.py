"""Blocks as the solver sees them: every distinct block analysed once, and the problem over all of them."""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import networkx as nx
from ckptsolvers import Block, Problem, Value

from jaxckpt.apply import Application
from jaxckpt.kinds.base import Profiler, kind_of
from jaxckpt.model.blocks import Blocks, PlacedBlock
from jaxckpt.model.cut import Span
from jaxckpt.model.joint import LocalBlock
from jaxckpt.model.option import BlockAnalysis
from jaxckpt.model.schedules import keep_all
from jaxckpt.model.time import Timer, count_flops
from jaxckpt.program import primitives
from jaxckpt.program.control_flow import loop_of
from jaxckpt.program.ir import Equation, Program, elements
from jaxckpt.targets.chip import Target
from jaxckpt.targets.rules import Layouts


@dataclass(frozen=True, kw_only=True)
class BlockAnalyser:
    """Analyses the blocks of a program, and, through the kinds of blocks, those of the programs inside them.

    Attributes:
        timer: what equations cost, in the unit of the plan's cost.
        target: the chip, whose compiler decides what is materialised.
        outside_regions: which operations that tangents flow through no region may cover.
        host_budget: bytes of the host that saved values may take; None where none are sent there.
        profiler: puts what is measured of a distinct block in the place of what is modelled.
        applier: runs programs under plans, for kinds whose options are found by differentiating those.
        known: what is known of the blocks of other cuts of the same program, by signature; new ones are added.
    """

    timer: Timer
    target: Target
    outside_regions: Callable[[Equation], bool] = lambda eqn: False
    host_budget: int | None = None
    profiler: Profiler | None = None
    applier: Application = field(default_factory=Application)
    known: dict[str, tuple[int, BlockAnalysis]] = field(default_factory=dict)

    def is_apart(self, eqn: Equation) -> bool:
        """Whether no region may cover an operation that tangents flow through."""
        return self.outside_regions(eqn)

    def inside(
        self,
        program: Program,
        graph: nx.DiGraph,
        spans: Sequence[Span],
        *,
        active: Collection[int],
        invariant: Collection[int],
    ) -> Blocks:
        """Analyse the blocks of a program that a block runs, such as a loop's body; see `kinds.base.Analyser`."""
        analyser = BlockAnalyser(timer=self.timer, target=self.target, profiler=self.profiler, applier=self.applier)
        arguments = set(program.inputs)
        return analyser.blocks(program, graph, spans, active=active, arguments=arguments, invariant=invariant)

    def blocks(
        self,
        program: Program,
        graph: nx.DiGraph,
        spans: Sequence[Span],
        *,
        active: Collection[int],
        arguments: Collection[int],
        invariant: Collection[int] | None = None,
        are_repeated: bool = False,
    ) -> Blocks:
        """Analyse every distinct block once and put the solver's problem together.

        Args:
            program: the flat program.
            graph: its graph.
            spans: its blocks in order.
            active: values that tangents flow through.
            arguments: values that are there before the program and cost nothing to hold.
            invariant: where the program is a loop's body, its inputs that are the same in every iteration.
            are_repeated: whether blocks may be treated identically, so that each wants more options.
        """
        results = {x for x in program.outputs if isinstance(x, int)}
        layouts = self.target.compiler.layouts(program.avals, program.equations, read_by_derivatives=True)
        values, place = _crossing_values(spans, active, results, layouts)
        placed = []
        for span in spans:
            local = LocalBlock(
                program,
                span,
                active,
                arguments,
                results,
                invariant,
                layouts,
                is_last=span is spans[-1],
                is_repeated=are_repeated,
            )
            key = local.signature()
            if key not in self.known:
                kind = kind_of(span.equations[-1], bool(local.active_outputs))
                self.known[key] = len(self.known), kind.analyse(local, self)
            number, analysis = self.known[key]
            placed.append(PlacedBlock(span=span, number=number, analysis=analysis, values=tuple(local.values)))
        blocks = [_solver_block(block, place) for block in placed]
        if self.target.compiler.heads_wait_for_loops:
            blocks = _with_head_waiting(blocks, spans, layouts, self.outside_regions)
        problem = Problem(blocks=tuple(blocks), values=values)
        cost = sum(block.analysis.unplanned_cost for block in placed)
        return Blocks(
            program=program,
            graph=graph,
            blocks=tuple(placed),
            problem=problem,
            layouts=layouts,
            unplanned_cost=cost + (_summing(program, spans, active) if self.timer is count_flops else 0),
            unplanned_extra=keep_all(problem).judgement.extra_work,
        )


def _summing(program: Program, spans: Sequence[Span], active: Collection[int]) -> int:
    """FLOPs of adding up the cotangents of what several blocks read."""
    num_readers = Counter(v for span in spans for v in span.inputs if v in active)
    return sum((num - 1) * elements(program.avals[v]) for v, num in num_readers.items())


def _with_head_waiting(
    blocks: Sequence[Block], spans: Sequence[Span], layouts: Layouts, is_apart: Callable[[Equation], bool]
) -> list[Block]:
    """The blocks, with logits alive in the backward of loops before them."""
    found, waiting = [], 0
    for block, span in zip(reversed(blocks), reversed(spans), strict=True):
        last = span.equations[-1]
        if primitives.is_matmul(last) and is_apart(last):
            waiting += sum(map(layouts.full_bytes.__getitem__, span.outputs))
        if loop_of(last) is not None:
            options = (replace(o, backward_peak_bytes=o.backward_peak_bytes + waiting) for o in block.options)
            block = replace(block, options=tuple(options))
        found.append(block)
    return found[::-1]


def _crossing_values(
    spans: Sequence[Span], active: Collection[int], results: Collection[int], layouts: Layouts
) -> tuple[tuple[Value, ...], dict[int, int]]:
    """The solver's values, and where each of the program's stands among them."""
    readers: dict[int, list[int]] = {}
    for k, span in enumerate(spans):
        for v in span.inputs:
            readers.setdefault(v, []).append(k)
    values, place = [], {}
    for k, span in enumerate(spans):
        for v in span.outputs:
            place[v] = len(values)
            values.append(
                Value(
                    # A result of the program has its own buffer, which the budget counts as output.
                    size_bytes=0 if v in results else layouts.held_bytes(v),
                    made_by=k,
                    read_by=(*readers.get(v, ()), *((len(spans),) if v in results else ())),
                    cotangent_bytes=layouts.full_bytes[v] if v in active and readers.get(v) else 0,
                )
            )
    return tuple(values), place


def _solver_block(placed: PlacedBlock, place: dict[int, int]) -> Block:
    """A block in the solver's problem, its inputs counted as the problem counts them there."""
    inputs, analysis = placed.span.inputs, placed.analysis
    order = {p: i for i, p in enumerate(sorted(place[v] for v in inputs if v in place))}
    position = [order[place[v]] if v in place else None for v in inputs]
    options = (
        option.for_solver(tuple(p for i in option.unread_inputs if (p := position[i]) is not None))
        for option in analysis.options
    )
    return Block(
        forward_times=tuple(work.time for work in analysis.forward),
        forward_peak_bytes=analysis.forward_peak_bytes,
        options=tuple(options),
    )
