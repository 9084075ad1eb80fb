"""A loop as a block: its options are plans of one iteration times levels of scans of checkpointed scans.

What an iteration keeps for its backward is stacked once per iteration, whether a compiler would have fused it or not,
so in a loop the residuals of the jaxpr are what counts. With levels, an outer iteration stacks the carry alone and its
inner loop runs again when its backward is due; XLA then copies the chunk of every stacked input, and of its cotangent.
"""

import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from jaxckpt.kinds import offload
from jaxckpt.kinds.base import Analyser
from jaxckpt.kinds.body import Body
from jaxckpt.kinds.scan_divisions import Part, binomial_divisions, levels, mixes
from jaxckpt.kinds.scan_run import LoopPlan
from jaxckpt.model.joint import LocalBlock, differentiated_ends, outside
from jaxckpt.model.option import LEFT_NAME, LEFT_TO_JAX, BlockAnalysis, Option, Place, Save, Work, on_device
from jaxckpt.model.pareto import pareto
from jaxckpt.model.time import Timer, count_flops, stacking_time
from jaxckpt.program import dataflow
from jaxckpt.program.control_flow import Loop, loop_of
from jaxckpt.program.ir import elements, size_bytes

_T = TypeVar("_T")

# Beyond this many the solver gains nothing from more, so they stand further apart.
_MAX_OPTIONS = 128
# What travels to the host and back takes the room of so many iterations' values on the device.
_WINDOW = 2


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
    host: int = 0
    idle: int = 0


def analyse_loop(local: LocalBlock, analyser: Analyser) -> BlockAnalysis:
    """Analyse a block whose last equation is a loop; the others are cheap and lead to the loop's operands.

    Args:
        local: the block.
        analyser: analyses the body's blocks.

    Returns:
        Its options; the last one leaves it to JAX.
    """
    loop = loop_of(local.span.equations[-1])
    assert loop is not None
    active = _active(loop, local)
    body = Body(loop, active, analyser)
    model = _LoopModel(local, loop, body, active, analyser)
    iterations = list(body.iterations())
    plans = pareto(iterations, lambda i: (i.stacked_bytes, i.peak_bytes, i.again.time))
    divisions = itertools.chain(
        levels(loop.length, plans),
        mixes(loop.length, plans),
        binomial_divisions(loop.length, iterations, model.sizes.carry),
    )
    # One level of one plan is what the others are mixed from, and what they mean to beat.
    is_plain = lambda item: len(item[1]) == 1 and str(item[1][0]) == str(loop.length)  # noqa: E731
    chosen = _thin([(model.numbers(parts), parts) for parts in divisions], is_plain)
    if sending := offload.offloaded(body, iterations, analyser):
        divisions = offload.divisions(loop.length, plans, sending, analyser.host_budget or 0)
        chosen += _thin([(model.numbers(parts), parts) for parts in divisions], lambda item: False)
    left = model.left_to_jax()
    summing = _summing(loop, active, analyser.timer)
    return BlockAnalysis(
        forward=model.forward(),
        forward_peak_bytes=model.forward_peak_bytes(),
        options=(*(model.option(parts) for _, parts in chosen), left),
        unplanned_cost=loop.length * (body.whole.unplanned_cost + summing) + left.recompute.time,
        residual_bytes=left.saved_bytes,
    )


class _LoopModel:
    """Bytes and times of the whole loop, divided into parts."""

    def __init__(self, local: LocalBlock, loop: Loop, body: Body, active: set[int], analyser: Analyser):
        timer, target = analyser.timer, analyser.target
        self.copies_slices = target.compiler.copies_slices
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

    def numbers(self, parts: Sequence[Part]) -> _Numbers:
        """What parts take, in bytes and in units of the plan's cost."""
        saved = list(itertools.accumulate(map(self._saved, parts), initial=self.outside.operands))
        # The parts' results and cotangents are put together in the end. Where slices are copies, a part's is gone when
        # its cotangents are there.
        cut = self.loop.length if len(parts) > 1 else 0
        copies = cut * self.sizes.slices if self.copies_slices else 0
        joined = max(cut * self.sizes.slice_cotangents, copies)
        if self.copies_slices:
            # The longest part's cotangents are written where they belong, those of the others beside the copies.
            joined += (self.loop.length - max(part.length for part in parts)) * self.sizes.slice_cotangents
        made = cut * self.sizes.stacked_outputs
        # The last part's backward comes first, and what it saved is gone before the one before it begins.
        backward = [held + self._inner(part) + part.peak_bytes for held, part in zip(saved[1:], parts, strict=True)]
        forward = [held + self._chunk(part.lengths) for held, part in zip(saved[1:], parts, strict=True)]
        backward, forward = (
            [size + _WINDOW * part.plan.host_bytes for size, part in zip(sizes, parts, strict=True)]
            for sizes in (backward, forward)
        )
        moving = 2 * self.sizes.carry_cotangents + self.sizes.slices + self.sizes.slice_cotangents
        joined += self.rounded_bytes
        copies += self.rounded_bytes
        return _Numbers(
            saved[-1] + copies,
            copies + made + self.outside.results + 2 * self.sizes.carry + max(forward) + self.body.forward_peak_bytes,
            joined + moving + max(backward) + self.outside.cotangents,
            # A solver takes no gains; only loops inside that stack less could make more than this one's stacks take.
            max(0, sum(part.again(self.body.forward).time + self._stacking(part) for part in parts)),
            sum(part.length * part.plan.host_bytes for part in parts),
            sum(part.length * part.plan.idle for part in parts),
        )

    def transient(self, parts: Sequence[Part]) -> int:
        """Bytes alive in the backward beyond what is saved, if nothing of that is freed before the end."""
        needs = [self._inner(part) + part.peak_bytes for part in parts]
        held = itertools.accumulate(map(self._saved, parts), initial=self.outside.operands)
        freeing = max(h + need for (_, h), need in zip(itertools.pairwise(held), needs, strict=True))
        return self.numbers(parts).backward_peak - freeing + max(needs)

    def option(self, parts: Sequence[Part], name: str = "", save: Save | None = None) -> Option:
        """The option that runs the loop in these parts."""
        numbers = self.numbers(parts)
        return Option(
            name=name or f"scan {' + '.join(map(str, parts))}",
            save=save or LoopPlan(parts=tuple(part.choice for part in parts)),
            saved=on_device(numbers.saved) | ({Place.HOST: numbers.host} if numbers.host else {}),
            idle=numbers.idle,
            recompute=Work(numbers.again, sum(part.again(self.body.forward).flops for part in parts)),
            # What is stacked takes the whole loop to make, even where nobody wants its results.
            forward=(self.loop.length * self.body.forward,) * (len(self.local.outputs) + 1),
            forward_peak_bytes=numbers.forward_peak,
            backward_peak_bytes=numbers.backward_peak,
            unread_inputs=self.unread_inputs,
            transient_bytes=self.transient(parts),
        )

    def left_to_jax(self) -> Option:
        """The option that leaves the loop to JAX."""
        option = self.option([Part((self.loop.length,), self.body.left_to_jax())], LEFT_NAME, LEFT_TO_JAX)
        return replace(option, transient_bytes=option.backward_peak_bytes - option.saved_bytes)

    def forward(self) -> tuple[Work, ...]:
        """Work to make the first j outputs where nothing is saved, `[num_outputs + 1]`."""
        return (Work(), *[self.loop.length * self.body.forward] * len(self.local.outputs))

    def forward_peak_bytes(self) -> int:
        """Most bytes alive at once then."""
        carried = 2 * self.sizes.carry + self.sizes.slices
        return self.outside.results + self.outside.operands + carried + self.body.forward_peak_bytes

    @functools.cached_property
    def unread_inputs(self) -> tuple[int, ...]:
        """Positions of the block's inputs that its backward does not read: what starts the carry is stacked."""
        first, last = self.loop.num_consts, self.loop.num_consts + self.loop.num_carry
        start = {x for x in self.eqn.inputs[first:last] if isinstance(x, int)}
        others = {v for eqn in self.before for v in eqn.reads}
        others |= {x for x in (*self.eqn.inputs[:first], *self.eqn.inputs[last:]) if isinstance(x, int)}
        return tuple(i for i, v in enumerate(self.local.span.inputs) if v in start - others)

    def _saved(self, part: Part) -> int:
        """What a part stacks during the forward: what starts its outermost iterations, or what each iteration keeps."""
        if part.num_states is not None:
            # One more for the state that is being worked on.
            return (part.num_states + 1) * self.sizes.carry
        return part.lengths[0] * (self.sizes.carry if len(part.lengths) > 1 else part.plan.stacked_bytes)

    def _moved(self, part: Part) -> int:
        """What all of its iterations stack, the inner levels' when they run again too."""
        if part.num_states is not None:
            return part.length * self.sizes.carry
        starts = itertools.accumulate(part.lengths[:-1], operator.mul)
        # What goes to the host is written and read like a stack.
        stacked = part.plan.stacked_bytes + part.plan.host_bytes
        return sum(starts) * self.sizes.carry + part.length * stacked

    def _inner(self, part: Part) -> int:
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


def _thin(
    items: Sequence[tuple[_Numbers, _T]], is_wanted: Callable[[tuple[_Numbers, _T]], bool]
) -> list[tuple[_Numbers, _T]]:
    """Those that are best by what they save or by their peak, for the time they take; of these, not too many."""
    by_saved = lambda x: (x[0].saved, x[0].again + x[0].idle)  # noqa: E731
    by_peak = lambda x: (max(x[0].forward_peak, x[0].backward_peak), x[0].again + x[0].idle)  # noqa: E731
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
