"""Blocks as the solver sees them: what each way to keep a block saves, repeats and needs."""

import functools
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import networkx as nx
from ckptsolvers import Block, Problem, Value

from jaxckpt.kinds.cond_options import analyse_conditional
from jaxckpt.kinds.effect import effectful, outside_regions_only
from jaxckpt.kinds.plain import analyse_block
from jaxckpt.kinds.scan_options import analyse_loop
from jaxckpt.model.cut import Span
from jaxckpt.model.joint import LocalBlock
from jaxckpt.model.option import BlockAnalysis
from jaxckpt.model.schedules import keep_all
from jaxckpt.model.time import Timer, count_flops
from jaxckpt.model.tree import Saved
from jaxckpt.program import primitives
from jaxckpt.program.control_flow import branches_of, loop_of
from jaxckpt.program.ir import Equation, Program, elements
from jaxckpt.targets.chip import Target
from jaxckpt.targets.rules import Layouts

Profiler = Callable[[LocalBlock, BlockAnalysis], BlockAnalysis]


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """A program cut into blocks, and the solver's problem over them.

    Attributes:
        program: the flat program.
        graph: its graph of equations.
        spans: `[n]`, the equations of each block.
        problem: `[n]` blocks and the values between them, in bytes and units of the plan's cost.
        flops_problem: the same with FLOPs for times, to count a schedule's recomputation with.
        choices: `[n]`, for each block what each of its options saves.
        residual_bytes: `[n]`, what a loop would stack of each block when it is left to JAX.
        classes: `[n]`, equal for blocks with the same equations and shapes.
        unplanned_cost: forward and backward without recomputation, in units of the plan's cost.
        unplanned_extra: what leaving everything to JAX takes beyond a forward sweep: the time of loops' stacks.
        once: the blocks with side effects, which no region may repeat.
        transients: `[n]`, for each option of a loop or a conditional the most bytes alive in its backward beyond what
            is saved, were nothing of that freed; empty for other blocks.
        stacked_peaks: `[n]`, for each option of a loop's whole body the most bytes alive in its backward where what it
            saved is read from stacks; empty for other blocks.
        layouts: what the program's values take on the target.
    """

    program: Program
    graph: nx.DiGraph
    spans: tuple[Span, ...]
    problem: Problem
    flops_problem: Problem
    choices: tuple[tuple[Saved, ...], ...]
    residual_bytes: tuple[int, ...]
    layouts: Layouts
    classes: tuple[int, ...]
    unplanned_cost: int
    unplanned_extra: int
    once: tuple[int, ...] = ()
    transients: tuple[tuple[int, ...], ...] = ()
    stacked_peaks: tuple[tuple[int, ...], ...] = ()


def analyse(
    program: Program,
    graph: nx.DiGraph,
    spans: Sequence[Span],
    *,
    active: Collection[int],
    arguments: Collection[int],
    timer: Timer,
    target: Target,
    invariant: Collection[int] | None = None,
    known: dict[str, tuple[int, BlockAnalysis]] | None = None,
    is_apart: Callable[[Equation], bool] = lambda eqn: False,
    profiler: Profiler | None = None,
    are_repeated: bool = False,
) -> Blocks:
    """Analyse every distinct block once and put the solver's problem together.

    Args:
        program: the flat program.
        graph: its graph.
        spans: its blocks in order.
        active: values that tangents flow through.
        arguments: values that are there before the program and cost nothing to hold.
        timer: times of equations, in the unit of the plan's cost.
        target: the chip, whose compiler decides what is materialised.
        invariant: where the program is a loop's body, its inputs that are the same in every iteration.
        known: what is known of the blocks of other cuts of the same program, by signature; new ones are added.
        is_apart: which operations that tangents flow through no region may cover; each is a block of its own.
        profiler: puts what is measured of a distinct block in the place of what is modelled.
        are_repeated: whether blocks may be treated alike, so that each wants more options.

    Returns:
        The problem, with what stands behind its options.
    """
    results = {x for x in program.outputs if isinstance(x, int)}
    layouts = target.compiler.layouts(program.avals, program.equations, read_by_derivatives=True)
    values, place = _crossing_values(spans, active, results, layouts)
    known = {} if known is None else known
    blocks, flops_blocks, choices, classes, residual_bytes, cost = [], [], [], [], [], 0
    transients, stacked_peaks = [], []
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
        if key not in known:
            known[key] = len(known), _analyse_one(local, timer, target, is_apart, profiler)
        number, analysis = known[key]
        classes.append(number)
        cost += analysis.unplanned_cost
        blocks.append(_placed(analysis.block, analysis, span, place))
        flops_blocks.append(_placed(analysis.flops_block, analysis, span, place))
        choices.append(tuple(_globalised(saved, local.values) for saved in analysis.saved))
        residual_bytes.append(analysis.residual_bytes)
        transients.append(analysis.transients)
        stacked_peaks.append(analysis.stacked_peaks)
    if target.compiler.heads_wait_for_loops:
        blocks = _with_head_waiting(blocks, spans, layouts, is_apart)
    once = tuple(k for k, span in enumerate(spans) if any(eqn.effects for eqn in span.equations))
    problem = Problem(blocks=tuple(blocks), values=values)
    return Blocks(
        program=program,
        graph=graph,
        spans=tuple(spans),
        problem=problem,
        flops_problem=Problem(blocks=tuple(flops_blocks), values=values),
        once=once,
        choices=tuple(choices),
        residual_bytes=tuple(residual_bytes),
        classes=tuple(classes),
        unplanned_cost=cost + (_summing(program, spans, active) if timer is count_flops else 0),
        unplanned_extra=keep_all(problem).judgement.extra_work,
        transients=tuple(transients),
        stacked_peaks=tuple(stacked_peaks),
        layouts=layouts,
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


def _analyse_one(
    local: LocalBlock,
    timer: Timer,
    target: Target,
    is_apart: Callable[[Equation], bool],
    profiler: Profiler | None,
) -> BlockAnalysis:
    last = local.span.equations[-1]
    if last.effects and local.active_outputs:
        return outside_regions_only(analyse_block(local, timer, target))
    if last.effects:
        return outside_regions_only(effectful(local))
    inside = functools.partial(analyse, profiler=profiler)
    if loop_of(last) is not None and local.active_outputs:
        return analyse_loop(local, timer, target, inside)
    if branches_of(last) and local.active_outputs:
        return analyse_conditional(local, timer, target, inside)
    found = analyse_block(local, timer, target)
    if profiler is not None:
        found = profiler(local, found)
    return outside_regions_only(found) if local.active_outputs and is_apart(last) else found


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


def _globalised(saved: Saved, values: Sequence[int]) -> Saved:
    return tuple(values[i] for i in saved) if isinstance(saved, tuple) else saved


def _placed(block: Block, analysis: BlockAnalysis, span: Span, place: dict[int, int]) -> Block:
    """A distinct block at one of its places: inputs counted as the problem counts them there."""
    order = {p: i for i, p in enumerate(sorted(place[v] for v in span.inputs if v in place))}
    options = [
        replace(option, unread_inputs=tuple(order[place[v]] for v in span.inputs if v in place and v in unread))
        for option, positions in zip(block.options, analysis.unread, strict=True)
        if (unread := {span.inputs[i] for i in positions}) is not None
    ]
    return replace(block, options=tuple(options))
