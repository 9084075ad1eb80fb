"""A loop as a block: its options are plans of one iteration times levels of scans of checkpointed scans.

What an iteration keeps for its backward is stacked once per iteration, whether a compiler would have fused it or not,
so in a loop the residuals of the jaxpr are what counts. With levels, an outer iteration stacks the carry alone and its
inner loop runs again when its backward is due; XLA then copies the chunk of every stacked input, and of its cotangent.
"""

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import numpy as np
from ckptsolvers import Block, Keep, Option, Problem, Schedule, simulate
from ckptsolvers.schedule import Node, region

from jaxckpt import cuts
from jaxckpt.block_model import EVERYTHING, Analysis, LocalBlock, differentiated_ends, outside
from jaxckpt.candidates import chain_schedules
from jaxckpt.kinds.binomial import num_again
from jaxckpt.model.time import Timer, count_flops, stacking_time
from jaxckpt.program import dataflow
from jaxckpt.program.control_flow import Branch, Loop, loop_of
from jaxckpt.program.ir import elements, size_bytes
from jaxckpt.regions import LoopPart, LoopPlan, Saved, Tree
from jaxckpt.targets.chip import Target

_T = TypeVar("_T")

# Beyond this many the solver gains nothing from more, so they stand further apart.
_MAX_OPTIONS = 128
# Three levels are tried with this many lengths each: how they are cut matters little where there are so many.
_MAX_LENGTHS = 8
# Divisions between two plans, and numbers of states, stand so far apart in bytes.
_GROWTH = 1.03
# Outer loops up to this length are given chunks of any size, longer ones of the sizes on a grid.
_MAX_OUTER = 16
# Binomial loops run each iteration again this often at most, on average.
_MAX_AGAIN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Iteration:
    """A plan of the body, and what one iteration takes under it.

    Attributes:
        tree: the plan.
        stacked_bytes: kept from its forward to its backward.
        peak_bytes: most alive at once in its backward.
        whole_peak_bytes: the same where nothing of its forward is there.
        again_time: what it makes again, less what loops inside take to stack without a plan.
        again_flops: the same in FLOPs, of which stacking takes none.
        whole_time: what it makes again where nothing of its forward is there, its results left out.
        whole_flops: the same in FLOPs.
        is_wrapped: one checkpoint stands around the whole.
    """

    tree: Tree
    stacked_bytes: int
    peak_bytes: int
    whole_peak_bytes: int
    again_time: int
    again_flops: int
    whole_time: int
    whole_flops: int
    is_wrapped: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """Bytes of what one iteration reads and makes, and of the cotangents."""

    carry: int
    slices: int
    carry_cotangents: int
    slice_cotangents: int
    const_cotangents: int
    stacked_outputs: int


class _Numbers(NamedTuple):
    """Bytes and time of a loop divided into parts."""

    saved: int
    forward_peak: int
    backward_peak: int
    again: int


@dataclass(frozen=True, slots=True)
class _Part:
    """Iterations run alike: levels and the plan of one iteration."""

    lengths: tuple[int, ...]
    plan: Iteration
    num_states: int | None = None

    @property
    def length(self) -> int:
        return math.prod(self.lengths)

    def __str__(self) -> str:
        levels = " x ".join(map(str, self.lengths))
        return levels if self.num_states is None else f"{levels}, {self.num_states} states"

    @property
    def choice(self) -> LoopPart:
        """What the plan says of it."""
        return LoopPart(lengths=self.lengths, body=self.plan.tree, num_states=self.num_states)

    @property
    def peak_bytes(self) -> int:
        """Most bytes alive at once in an iteration's backward."""
        return self.plan.peak_bytes if self.num_states is None else self.plan.whole_peak_bytes

    def again(self, forward: int, unit: str) -> int:
        """What runs again, in a unit of `Iteration`, of which one iteration's forward takes so much."""
        if self.num_states is not None:
            # An iteration's backward begins with as much of its forward as that needs.
            whole = self.length * getattr(self.plan, f"whole_{unit}")
            return whole + num_again(self.length, self.num_states) * forward
        return self.length * (getattr(self.plan, f"again_{unit}") + (len(self.lengths) - 1) * forward)


def analyse_loop(local: LocalBlock, timer: Timer, target: Target, analyse: Callable) -> Analysis:
    """Analyse a block whose last equation is a loop; the others are cheap and lead to the loop's operands.

    Args:
        local: the block.
        timer: times of equations.
        target: the chip.
        analyse: analyses the body's blocks.

    Returns:
        Its options; the last one leaves it to JAX.
    """
    loop = loop_of(local.span.equations[-1])
    assert loop is not None
    active = _active(loop, local)
    body = Body(loop, active, timer, target, analyse)
    model = _LoopModel(local, loop, body, active, timer, target)
    iterations = list(body.iterations())
    plans = pareto(iterations, lambda i: (i.stacked_bytes, i.peak_bytes, i.again_time))
    divisions = itertools.chain(
        _levels(loop.length, plans),
        _mixes(loop.length, plans),
        _binomial(loop.length, iterations, model.sizes.carry),
    )
    # One level of one plan is what the others are mixed from, and what they mean to beat.
    is_plain = lambda item: len(item[1]) == 1 and str(item[1][0]) == str(loop.length)  # noqa: E731
    chosen = _thin([(model.numbers(parts), parts) for parts in divisions], is_plain)
    kept = [(*model.options(parts), parts) for _, parts in chosen]
    everything, everything_flops = model.everything()
    block, flops_block = model.blocks()
    saved = [LoopPlan(parts=tuple(part.choice for part in parts)) for *_, parts in kept]
    return Analysis(
        block=replace(block, options=(*(x[0] for x in kept), everything)),
        flops_block=replace(flops_block, options=(*(x[1] for x in kept), everything_flops)),
        saved=(*saved, None),
        unread=(model.unread(),) * (len(kept) + 1),
        unplanned_cost=(
            loop.length * (body.whole.unplanned_cost + _summing(loop, active, timer)) + everything.recompute_time
        ),
        residual_bytes=everything.saved_bytes,
        transients=(
            *(model.transient(parts) for *_, parts in kept),
            everything.backward_peak_bytes - everything.saved_bytes,
        ),
    )


class Body:
    """One iteration, or a branch: its blocks, cut as finely as any program and not at all, and its plans."""

    def __init__(self, loop: Loop | Branch, active: set[int], timer: Timer, target: Target, analyse: Callable):
        program = loop.body
        self.loop = loop
        dag = dataflow.build_graph(program)
        cut = cuts.cut(program, dag, active)
        one = cuts.spans_at(program, [range(len(program.equations))])
        self.cuts = [
            analyse(
                program,
                dag,
                spans,
                active=active,
                # Carry and slices are there in every iteration; what stacking them costs is counted by the loop.
                arguments=set(program.inputs),
                timer=timer,
                target=target,
                invariant=loop.consts,
            )
            for spans in ([one] if len(cut) < 2 else [one, cut])
        ]
        self.whole = self.cuts[0]

    @property
    def forward_time(self) -> int:
        """Of all it makes."""
        return self.whole.problem.forward_time

    @property
    def forward_flops(self) -> int:
        """The same in FLOPs."""
        return self.whole.flops_problem.forward_time

    @property
    def forward_peak_bytes(self) -> int:
        """Most bytes alive in it."""
        return self.whole.problem.blocks[0].forward_peak_bytes

    def everything(self) -> Iteration:
        """What JAX does without a plan."""
        last = len(self.whole.problem.blocks[0].options) - 1
        return next(self._iterations(self.whole, [Schedule((Keep(0, last),))]))

    def iterations(self) -> Iterator[Iteration]:
        """The plans: schedules of the blocks as they are, and inside one checkpoint around the body."""
        for blocks in self.cuts:
            if len(blocks.spans) == 1:
                schedules = [Schedule((Keep(0, o),)) for o in range(len(blocks.problem.blocks[0].options))]
            else:
                schedules = chain_schedules(blocks.problem)
            yield from self._iterations(blocks, schedules)

    def _iterations(self, blocks, schedules: Iterable[Schedule]) -> Iterator[Iteration]:
        problems = (blocks.problem, blocks.flops_problem)
        # What is run again makes no results: they went to the next iteration long ago.
        bare = tuple(map(_without_results, problems))
        stacked = _with_peaks(blocks.problem, blocks.stacked_peaks)  # what is saved lies in stacks
        positions = tuple(s.positions for s in blocks.spans)
        without = blocks.unplanned_extra
        for inside in schedules:
            judged, in_flops = (simulate(problem, inside) for problem in problems)
            apart = judged if stacked is blocks.problem else simulate(stacked, inside)
            whole, whole_in_flops = (simulate(problem, inside) for problem in bare)
            saved = tuple(blocks.choices[n.block][n.option] for n, _ in inside.walk() if isinstance(n, Keep))
            for is_wrapped in (False, True):
                schedule = Schedule((region(inside.nodes),)) if is_wrapped else inside
                yield Iteration(
                    tree=Tree(blocks=positions, schedule=schedule, saved=saved),
                    stacked_bytes=self._stacked(blocks, schedule.nodes, saved),
                    peak_bytes=(whole if is_wrapped else apart).peak_bytes,
                    whole_peak_bytes=(whole if is_wrapped else judged).peak_bytes,
                    again_time=(whole.work if is_wrapped else judged.extra_work) - without,
                    again_flops=whole_in_flops.work if is_wrapped else in_flops.extra_work,
                    whole_time=whole.work - without,
                    whole_flops=whole_in_flops.work,
                    is_wrapped=is_wrapped,
                )

    def _stacked(self, blocks, nodes: Sequence[Node], saved: Sequence[Saved]) -> int:
        """What an iteration hands from its forward to its backward: what regions read, and what is saved."""
        free = {*self.loop.consts, *self.loop.slices}
        held: set[int] = set()
        total = 0
        for node in nodes:
            spans = blocks.spans[node.start : node.stop]
            made = {v for span in spans for v in span.outputs}
            held.update(v for span in spans for v in span.inputs if v not in made)
            choice = saved[node.start] if isinstance(node, Keep) else ()
            if isinstance(choice, tuple):
                held.update(choice)
            elif isinstance(node, Keep):
                total += (
                    blocks.residual_bytes[node.block]
                    if choice is None
                    else blocks.problem.blocks[node.block].options[node.option].saved_bytes
                )
        return total + sum(map(blocks.layouts.held_bytes, held - free))


class _LoopModel:
    """Bytes and times of the whole loop, divided into parts."""

    def __init__(self, local: LocalBlock, loop: Loop, body: Body, active: set[int], timer: Timer, target: Target):
        self.is_cpu = target.platform == "cpu"
        self._stacking = lambda part: stacking_time(timer, target, self._moved(part))
        self.local, self.loop, self.body = local, loop, body
        size = lambda vs: sum(size_bytes(loop.body.avals[v]) for v in vs)  # noqa: E731
        results = loop.body.outputs[loop.num_carry :]
        self.sizes = _Sizes(
            carry=size(loop.carry),
            slices=size(loop.slices),
            carry_cotangents=size(v for v in loop.carry if v in active),
            slice_cotangents=size(v for v in loop.slices if v in active),
            const_cotangents=size(v for v in loop.consts if v in active),
            stacked_outputs=sum(size_bytes(loop.body.avals[x] if isinstance(x, int) else x.aval) for x in results),
        )
        # A compiler that rounds operands of products does so once before the loop, for all iterations.
        rounded = lambda vs: sum(map(layouts.held_bytes, layouts.narrow.intersection(vs)))  # noqa: E731
        layouts = body.whole.layouts
        self.rounded_bytes = rounded(loop.consts) + loop.length * rounded(loop.slices)
        *self.before, self.eqn = local.span.equations
        self.outside = outside(local)

    def numbers(self, parts: Sequence[_Part]) -> _Numbers:
        """What parts take, in bytes and in units of the plan's cost."""
        saved = list(itertools.accumulate(map(self._saved, parts), initial=self.outside.operands))
        # The parts' results and cotangents are put together in the end. A GPU reads slices of what is there in place;
        # on CPU they are copies from the forward on, of which a part's is gone when its cotangents are there.
        cut = self.loop.length if len(parts) > 1 else 0
        copies = cut * self.sizes.slices if self.is_cpu else 0
        joined = max(cut * self.sizes.slice_cotangents, copies)
        if self.is_cpu:
            # The longest part's cotangents are written where they belong, those of the others beside the copies.
            joined += (self.loop.length - max(part.length for part in parts)) * self.sizes.slice_cotangents
        made = cut * self.sizes.stacked_outputs
        # The last part's backward comes first, and what it saved is gone before the one before it begins.
        backward = [held + self._inner(part) + part.peak_bytes for held, part in zip(saved[1:], parts, strict=True)]
        forward = [held + self._chunk(part.lengths) for held, part in zip(saved[1:], parts, strict=True)]
        moving = 2 * self.sizes.carry_cotangents + self.sizes.slices + self.sizes.slice_cotangents
        joined += self.rounded_bytes
        copies += self.rounded_bytes
        return _Numbers(
            saved[-1] + copies,
            copies + made + self.outside.results + 2 * self.sizes.carry + max(forward) + self.body.forward_peak_bytes,
            joined + moving + max(backward) + self.outside.cotangents,
            # A solver takes no gains; only loops inside that stack less could make more than this one's stacks take.
            max(0, sum(part.again(self.body.forward_time, "time") + self._stacking(part) for part in parts)),
        )

    def transient(self, parts: Sequence[_Part]) -> int:
        """Bytes alive in the backward beyond what is saved, if nothing of that is freed before the end."""
        needs = [self._inner(part) + part.peak_bytes for part in parts]
        held = itertools.accumulate(map(self._saved, parts), initial=self.outside.operands)
        freeing = max(h + need for (_, h), need in zip(itertools.pairwise(held), needs, strict=True))
        return self.numbers(parts).backward_peak - freeing + max(needs)

    def options(self, parts: Sequence[_Part], name: str = "") -> tuple[Option, Option]:
        """The option in units of the plan's cost, and in FLOPs."""
        numbers = self.numbers(parts)
        option = Option(
            name=name or f"scan {' + '.join(map(str, parts))}",
            saved_bytes=numbers.saved,
            recompute_time=numbers.again,
            forward_times=self._option_times(self.body.forward_time),
            forward_peak_bytes=numbers.forward_peak,
            backward_peak_bytes=numbers.backward_peak,
        )
        in_flops = replace(
            option,
            recompute_time=sum(part.again(self.body.forward_flops, "flops") for part in parts),
            forward_times=self._option_times(self.body.forward_flops),
        )
        return option, in_flops

    def everything(self) -> tuple[Option, Option]:
        """The option that leaves the loop to JAX."""
        return self.options([_Part((self.loop.length,), self.body.everything())], EVERYTHING)

    def blocks(self) -> tuple[Block, Block]:
        """The block without its options, in units of the plan's cost and in FLOPs."""
        block = Block(
            forward_times=self._forward_times(self.body.forward_time),
            forward_peak_bytes=(
                self.outside.results
                + self.outside.operands
                + 2 * self.sizes.carry
                + self.sizes.slices
                + self.body.forward_peak_bytes
            ),
            options=(),
        )
        return block, replace(block, forward_times=self._forward_times(self.body.forward_flops))

    def unread(self) -> tuple[int, ...]:
        """Positions of the block's inputs that its backward does not read: what starts the carry is stacked."""
        first, last = self.loop.num_consts, self.loop.num_consts + self.loop.num_carry
        start = {x for x in self.eqn.inputs[first:last] if isinstance(x, int)}
        others = {v for eqn in self.before for v in eqn.reads}
        others |= {x for x in (*self.eqn.inputs[:first], *self.eqn.inputs[last:]) if isinstance(x, int)}
        return tuple(i for i, v in enumerate(self.local.span.inputs) if v in start - others)

    def _saved(self, part: _Part) -> int:
        """What a part stacks during the forward: what starts its outermost iterations, or what each iteration keeps."""
        if part.num_states is not None:
            # One more for the state that is being worked on.
            return (part.num_states + 1) * self.sizes.carry
        return part.lengths[0] * (self.sizes.carry if len(part.lengths) > 1 else part.plan.stacked_bytes)

    def _moved(self, part: _Part) -> int:
        """What all of its iterations stack, the inner levels' when they run again too."""
        if part.num_states is not None:
            return part.length * self.sizes.carry
        starts = itertools.accumulate(part.lengths[:-1], operator.mul)
        return sum(starts) * self.sizes.carry + part.length * part.plan.stacked_bytes

    def _inner(self, part: _Part) -> int:
        """What the inner levels stack once they run again, with the chunks they read and those of the cotangents."""
        if part.num_states is not None or len(part.lengths) == 1:
            return self.sizes.const_cotangents
        *outer, innermost = part.lengths[1:]
        stacks = sum(outer) * self.sizes.carry + innermost * part.plan.stacked_bytes
        chunks = sum(math.prod(part.lengths[i:]) for i in range(1, len(part.lengths)))
        chunks *= self.sizes.slices + self.sizes.slice_cotangents
        return stacks + chunks + len(part.lengths) * self.sizes.const_cotangents

    def _chunk(self, lengths: tuple[int, ...]) -> int:
        return math.prod(lengths[1:]) * (self.sizes.slices + self.sizes.stacked_outputs)

    def _option_times(self, one: int) -> tuple[int, ...]:
        # What is stacked takes the whole loop to make, even where nobody wants its results.
        return (self.loop.length * one,) * (len(self.local.outputs) + 1)

    def _forward_times(self, one: int) -> tuple[int, ...]:
        return (0, *[self.loop.length * one] * len(self.local.outputs))


def _summing(loop: Loop, active: set[int], timer: Timer) -> int:
    """What an iteration takes to add its cotangents of the constants to those of the others."""
    if timer is not count_flops:
        return 0
    return sum(elements(loop.body.avals[v]) for v in loop.consts if v in active)


def _active(loop: Loop, local: LocalBlock) -> set[int]:
    """The body's values that tangents flow through; the carry's are found by going round until nothing changes."""
    program, eqn = loop.body, local.span.equations[-1]
    inputs, outputs = differentiated_ends(local, program, eqn.inputs)
    carry_out = program.outputs[: loop.num_carry]
    while True:
        active = dataflow.active_values(program, inputs, outputs)
        reached = dataflow.reached_values(program, inputs)
        more_in = {v for v, x in zip(loop.carry, carry_out, strict=True) if x in reached} - inputs
        more_out = {
            x for v, x in zip(loop.carry, carry_out, strict=True) if v in active and isinstance(x, int)
        } - outputs
        if not more_in and not more_out:
            return active
        inputs |= more_in
        outputs |= more_out


def _without_results(problem: Problem) -> Problem:
    """The problem of running again for the backward alone: nobody reads what only the program's end reads."""
    n = problem.num_blocks
    wanted = [i for i, v in enumerate(problem.values) if v.read_by[0] < n]
    values = [replace(v, read_by=tuple(r for r in v.read_by if r < n)) for v in (problem.values[i] for i in wanted)]
    blocks = []
    for k, block in enumerate(problem.blocks):
        made = problem.outputs[k]
        # Results that nothing else reads come last among a block's outputs.
        num = sum(problem.values[v].read_by[0] < n for v in made)
        options = [
            replace(
                option,
                forward_times=option.forward_times[: num + 1],
                saved_outputs=tuple(p for p in option.saved_outputs if p < num),
            )
            for option in block.options
        ]
        blocks.append(replace(block, forward_times=block.forward_times[: num + 1], options=tuple(options)))
    return Problem(blocks=tuple(blocks), values=tuple(values))


def _with_peaks(problem: Problem, peaks: Sequence[Sequence[int]]) -> Problem:
    """The problem with other peaks of its options' backwards, where there are any."""
    if not any(peaks):
        return problem
    blocks = [
        replace(
            block,
            options=tuple(replace(o, backward_peak_bytes=p) for o, p in zip(block.options, some, strict=True)),
        )
        if some
        else block
        for block, some in zip(problem.blocks, peaks, strict=True)
    ]
    return replace(problem, blocks=tuple(blocks))


def _levels(length: int, plans: Sequence[Iteration]) -> Iterator[tuple[_Part, ...]]:
    """Every plan at one to three levels.

    Levels are divisors of the length, and a grid where those are few; what is left over runs last, at one level. It
    need not run twice, so the last chunk is left over even where the length divides.
    """
    sizes = sorted({d for d in range(2, length) if length % d == 0} | {g for g in _grid(length) if g < length})
    few = sizes[:: -(-len(sizes) // _MAX_LENGTHS)]
    inners = [*((size,) for size in sizes), *itertools.product(few, repeat=2)]
    for plan in plans:
        yield (_Part((length,), plan),)
        for inner in inners:
            num, left = divmod(length, math.prod(inner))
            for outer, rest in ((num, left), (num - 1, left + math.prod(inner))):
                if outer > 1 and rest != 1:
                    yield (_Part((outer, *inner), plan), *([_Part((rest,), plan)] if rest else []))
        for outer, size in _few_chunks(length):
            yield _Part((outer, size), plan), _Part((length - outer * size,), plan)


def _few_chunks(length: int) -> Iterator[tuple[int, int]]:
    """Two levels whose outer one is short: chunks no longer than what is left over, which takes most of the bytes."""
    for outer in range(2, min(_MAX_OUTER, math.isqrt(length)) + 1):
        rest, most = -(-length // (outer + 1)), -(-length // outer) if outer > 2 else length
        while rest < most and length - rest >= outer:
            yield outer, (length - rest) // outer
            rest = max(rest + 1, math.ceil(rest * _GROWTH))


def _mixes(length: int, plans: Iterable[Iteration]) -> Iterator[tuple[_Part, ...]]:
    """Two plans side by side, those that are neighbours on the convex hull of bytes against time."""
    size = lambda plan: length * plan.stacked_bytes + plan.peak_bytes  # noqa: E731
    hull: list[Iteration] = []
    for plan in pareto(plans, lambda p: (size(p), p.again_time)):
        while len(hull) > 1 and _is_above(hull[-1], hull[-2], plan, size):
            hull.pop()
        hull.append(plan)
    for less, more in itertools.pairwise(hull):
        # The one that holds more comes last: its backward is over before the other one's needs room.
        for num in _counts(size(less), more.stacked_bytes - less.stacked_bytes, length - 1):
            # One iteration is no loop to a compiler, which then mixes it with what is around it.
            if 1 < num < length - 1:
                yield _Part((length - num,), less), _Part((num,), more)


def _is_above(plan: Iteration, left: Iteration, right: Iteration, size: Callable[[Iteration], int]) -> bool:
    """Whether a plan lies on or above the line between two others."""
    bytes_left, bytes_right = size(plan) - size(left), size(right) - size(left)
    return (left.again_time - plan.again_time) * bytes_right <= (left.again_time - right.again_time) * bytes_left


def _counts(base_bytes: int, each_bytes: int, most: int) -> Iterator[int]:
    """Numbers of things, each of which makes the whole so much larger than the one before."""
    num = 1
    while num <= most:
        yield num
        enough = ((base_bytes + num * each_bytes) * _GROWTH - base_bytes) / each_bytes if each_bytes > 0 else 2 * num
        num = max(num + 1, math.ceil(enough))


def _binomial(length: int, plans: Iterable[Iteration], carry_bytes: int) -> Iterator[tuple[_Part, ...]]:
    """Binomial loops, where they do not run iterations again too many times."""
    # Nothing of an iteration is held for another one, so what its plan saves does not matter.
    for plan in pareto((p for p in plans if not p.is_wrapped), lambda p: (p.whole_peak_bytes, p.whole_time)):
        for count in _counts(plan.whole_peak_bytes, carry_bytes, length - 1):
            if num_again(length, count) <= _MAX_AGAIN * length:
                yield (_Part((length,), plan, count),)


def _grid(length: int) -> set[int]:
    return {round(2 ** (i / 2)) for i in range(2, 2 * length.bit_length())}


def pareto(items: Iterable[_T], key: Callable[[_T], tuple[int, ...]]) -> list[_T]:
    """Items that no other one beats in everything, in the order of their keys."""
    pairs = sorted(((key(x), x) for x in items), key=lambda pair: pair[0])
    keys = np.array([k for k, _ in pairs], np.float64)
    best: list[int] = []
    for i in range(len(pairs)):
        if not (keys[best] <= keys[i]).all(axis=1).any():
            best.append(i)
    return [pairs[i][1] for i in best]


def _thin(
    items: Sequence[tuple[_Numbers, _T]], is_wanted: Callable[[tuple[_Numbers, _T]], bool]
) -> list[tuple[_Numbers, _T]]:
    """Those that are best by what they save or by their peak, for the time they take; of these, not too many."""
    by_saved = lambda x: (x[0].saved, x[0].again)  # noqa: E731
    by_peak = lambda x: (max(x[0].forward_peak, x[0].backward_peak), x[0].again)  # noqa: E731
    chosen = {id(x): x for by in (by_saved, by_peak) for x in _spread(pareto(items, by), lambda x, by=by: by(x)[0])}
    chosen |= {id(x): x for x in items if is_wanted(x)}
    return pareto(chosen.values(), lambda x: x[0])


def _spread(items: Sequence[_T], size: Callable[[_T], int]) -> list[_T]:
    """At most so many, as evenly as may be: of those that lie close together, the one that takes most bytes."""
    step = 1.0
    while True:
        spread: list[_T] = []
        for item in reversed(items):
            if not spread or size(item) * step <= size(spread[-1]) or item is items[0]:
                spread.append(item)
        if len(spread) <= _MAX_OPTIONS // 2:
            return spread
        step = 1.5 * step - 0.5 if step > 1 else 1.002
