"""What the backward of a branch needs while all that its forward handed over stays where it is.

The operands of a conditional live until it ends, so unlike in a program nothing that was saved is freed on the way.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckptsolvers import Block, Keep, Option, Problem, Schedule, simulate
from ckptsolvers.schedule import Node, region

from jaxckpt.apply import run_conditional
from jaxckpt.kinds.body import Body, Iteration
from jaxckpt.model.joint import Joint, LocalBlock, differentiate, differentiated_ends, outside
from jaxckpt.model.option import EVERYTHING, BlockAnalysis, dominates
from jaxckpt.model.pareto import pareto
from jaxckpt.model.time import Timer
from jaxckpt.model.tree import BranchPlan, Tree
from jaxckpt.program import dataflow
from jaxckpt.program.control_flow import Branch, branches_of
from jaxckpt.program.ir import size_bytes
from jaxckpt.targets.chip import Target


def transient_bytes(blocks: Any, node: Node) -> int:
    """Most bytes alive at once in the backward of one node of a schedule, beyond what was handed over.

    Args:
        blocks: the branch's blocks.
        node: one of its schedule's outermost nodes.

    Returns:
        Bytes.
    """
    if isinstance(node, Keep):
        option = blocks.problem.blocks[node.block].options[node.option]
        transients = blocks.transients[node.block]
        if transients:
            return transients[node.option]
        # A checkpoint copies what it is given, since a conditional's operands are not its own.
        return option.backward_peak_bytes - (option.saved_bytes if option.name == EVERYTHING else 0)
    alone = Schedule((_shifted(node, node.start),))
    return simulate(_part(blocks.problem, node.start, node.stop), alone).peak_bytes


def _shifted(node: Node, by: int) -> Node:
    if isinstance(node, Keep):
        return Keep(node.block - by, node.option)
    return region(tuple(_shifted(child, by) for child in node.children))


def _part(problem: Problem, start: int, stop: int) -> Problem:
    """Consecutive blocks on their own: what they make for others is held by those, and takes nothing here."""
    kept = [i for k in range(start, stop) for i in problem.outputs[k]]
    values = []
    for i in kept:
        value = problem.values[i]
        inside = tuple(r - start for r in value.read_by if r < stop)
        is_last = len(inside) < len(value.read_by)
        values.append(
            replace(
                value,
                size_bytes=0 if is_last else value.size_bytes,
                made_by=value.made_by - start,
                read_by=(*inside, stop - start) if is_last else inside,
            )
        )
    # Positions among inputs and outputs mean others here; they only let go of something earlier.
    blocks = tuple(
        replace(block, options=tuple(replace(o, saved_outputs=(), unread_inputs=()) for o in block.options))
        for block in problem.blocks[start:stop]
    )
    return Problem(blocks=blocks, values=tuple(values))


# Each is differentiated by JAX, which takes some hundredths of a second.
_MAX_OPTIONS = 16
# Sizes below the largest one by more than this many halvings are one size.
_MAX_HALVINGS = 8


def analyse_conditional(local: LocalBlock, timer: Timer, target: Target, analyse: Callable) -> BlockAnalysis:
    """Analyse a block whose last equation is a conditional; the others are cheap and lead to its operands.

    Args:
        local: the block.
        timer: times of equations.
        target: the chip.
        analyse: analyses the branches' blocks.

    Returns:
        Its options; the last one leaves it to JAX.
    """
    arms = [_Arm(branch, local, timer, target, analyse) for branch in branches_of(local.span.equations[-1])]
    model = _Model(local, arms)
    found = [model.options(picks) for picks in _distinct(_picks(arms))]
    found = [x for i, x in enumerate(found) if not any(_replaces(y, x, j < i) for j, y in enumerate(found) if j != i)]
    everything = model.options([arm.everything for arm in arms], EVERYTHING)
    block, flops_block = model.blocks()
    options = [*found, everything]
    return BlockAnalysis(
        block=replace(block, options=tuple(x.option for x in options)),
        flops_block=replace(flops_block, options=tuple(x.in_flops for x in options)),
        saved=(*(x.plan for x in found), None),
        unread=tuple(x.unread for x in options),
        transients=tuple(x.option.backward_peak_bytes - x.option.saved_bytes for x in options),
        unplanned_cost=max(arm.cost for arm in arms),
        residual_bytes=everything.option.saved_bytes,
    )


class _Arm:
    """A branch with its plans."""

    def __init__(self, branch: Branch, local: LocalBlock, timer: Timer, target: Target, analyse: Callable):
        self.branch = branch
        self._transients: dict[int, int] = {}  # by identity of plans, all of which are kept
        active = _active(branch, local)
        self.body = Body(branch, active, timer, target, analyse) if active else None
        if self.body is None:
            self.everything = _untouched(branch)
            self.plans = [self.everything]
            self.cost = self.forward_time = self.forward_flops = self.forward_peak_bytes = 0
            return
        self.everything = self.body.everything()
        self._all = plans = [self.everything, *self.body.iterations()]
        self.plans = pareto(plans, lambda p: (p.stacked_bytes, self.peak_bytes(p), p.again_time))
        self.cost = self.body.whole.unplanned_cost
        self.forward_time, self.forward_flops = self.body.forward_time, self.body.forward_flops
        self.forward_peak_bytes = self.body.forward_peak_bytes

    def transient_bytes(self, plan: Iteration) -> int:
        """Most alive at once in the backward, beyond what came from the forward: that stays until the end."""
        if self.body is None:
            return 0
        if id(plan) not in self._transients:
            self._transients[id(plan)] = self._transient_bytes(plan)
        return self._transients[id(plan)]

    def peak_bytes(self, plan: Iteration) -> int:
        """Most alive at once in the backward, what came from the forward with it."""
        return plan.stacked_bytes + self.transient_bytes(plan)

    def _transient_bytes(self, plan: Iteration) -> int:
        assert self.body is not None
        blocks = next(b for b in self.body.cuts if tuple(s.positions for s in b.spans) == plan.tree.blocks)
        return max(transient_bytes(blocks, node) for node in plan.tree.schedule.nodes)


def _untouched(branch: Branch) -> Iteration:
    """What is done with a branch that no tangent flows through."""
    positions = tuple(range(len(branch.body.equations)))
    tree = Tree(
        blocks=(positions,) if positions else (),
        schedule=Schedule((Keep(0, 0),) if positions else ()),
        saved=(None,) if positions else (),
    )
    return Iteration(
        tree=tree,
        stacked_bytes=0,
        peak_bytes=0,
        whole_peak_bytes=0,
        again_time=0,
        again_flops=0,
        whole_time=0,
        whole_flops=0,
        is_wrapped=False,
    )


def _active(branch: Branch, local: LocalBlock) -> set[int]:
    """The branch's values that tangents flow through."""
    body = branch.body
    inputs, outputs = differentiated_ends(local, body, local.span.equations[-1].inputs[1:])
    active = dataflow.active_values(body, inputs, outputs)
    return active if any(v in active for e in body.equations for v in e.outputs) else set()


def _picks(arms: Sequence[_Arm]) -> Iterator[list[Iteration]]:
    """A plan for each branch: the quickest that hold no more than a number of bytes, and that peak no higher."""
    for size in (lambda arm, p: p.stacked_bytes, lambda arm, p: arm.peak_bytes(p)):
        for limit in _limits([size(arm, p) for arm in arms for p in arm.plans]):
            picks = []
            for arm in arms:
                least = min(size(arm, p) for p in arm.plans)
                inside = [p for p in arm.plans if size(arm, p) <= max(limit, least)]
                picks.append(min(inside, key=lambda p, arm=arm: (p.again_time, size(arm, p))))
            yield picks


def _limits(sizes: Sequence[int]) -> Iterator[int]:
    """The largest of some sizes, and others that stand as far apart as leaves half of the options to each kind."""
    falling = sorted(set(sizes), reverse=True)
    ratio = (falling[0] / max(1, falling[-1], falling[0] >> _MAX_HALVINGS)) ** (2 / _MAX_OPTIONS)
    last = None
    for size in falling:
        if last is None or size * ratio <= last or size == falling[-1]:
            yield size
            last = size


def _distinct(picks: Iterable[list[Iteration]]) -> list[list[Iteration]]:
    return list({tuple(map(id, p)): p for p in picks}.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """An option with what stands behind it."""

    option: Option
    in_flops: Option
    plan: BranchPlan
    unread: tuple[int, ...]


def _replaces(a: _Found, b: _Found, is_first: bool) -> bool:
    """Whether an option is as good as another one in everything; of two equal ones the first stays."""
    return dominates(a.option, b.option) and (is_first or not dominates(b.option, a.option))


class _Model:
    """Bytes and times of the whole conditional under a plan for each branch."""

    def __init__(self, local: LocalBlock, arms: Sequence[_Arm]):
        self.local, self.arms = local, arms
        self.outside = outside(local)

    def options(self, picks: Sequence[Iteration], name: str = "") -> _Found:
        """One option, in units of the plan's cost and in FLOPs."""
        plan = BranchPlan(branches=tuple(p.tree for p in picks))
        joint = self._differentiated(None if name else plan)
        size = lambda v: size_bytes(joint.avals[v])  # noqa: E731
        outputs = [joint.value.get(v, -1) for v in self.local.outputs]
        saved = sum(size(v) for v in joint.residuals if v not in outputs)
        inner = max(arm.transient_bytes(p) for arm, p in zip(self.arms, picks, strict=True))
        option = Option(
            name=name or "branches",
            saved_bytes=saved,
            recompute_time=self._again(picks, "time"),
            forward_times=self._times("forward_time", is_saved=saved > 0),
            forward_peak_bytes=self.outside.results + saved + max(arm.forward_peak_bytes for arm in self.arms),
            backward_peak_bytes=saved + inner + self.outside.cotangents,
            saved_outputs=tuple(i for i, v in enumerate(outputs) if v in joint.residuals),
        )
        in_flops = replace(
            option,
            recompute_time=self._again(picks, "flops"),
            forward_times=self._times("forward_flops", is_saved=saved > 0),
        )
        read = {v for eqn in joint.backward for v in eqn.reads}
        inputs = (joint.value[v] for v in self.local.span.inputs)
        return _Found(
            option=option,
            in_flops=in_flops,
            plan=plan,
            unread=tuple(i for i, v in enumerate(inputs) if v not in read),
        )

    def blocks(self) -> tuple[Block, Block]:
        """The block without its options, in units of the plan's cost and in FLOPs."""
        block = Block(
            forward_times=self._times("forward_time"),
            forward_peak_bytes=(
                self.outside.results + self.outside.operands + max(arm.forward_peak_bytes for arm in self.arms)
            ),
            options=(),
        )
        return block, replace(block, forward_times=self._times("forward_flops"))

    def _times(self, unit: str, is_saved: bool = False) -> tuple[int, ...]:
        one = max(getattr(arm, unit) for arm in self.arms)
        return (one if is_saved else 0, *[one] * len(self.local.outputs))

    def _again(self, picks: Sequence[Iteration], unit: str) -> int:
        return max(0, *(getattr(p, f"again_{unit}") for p in picks))

    def _differentiated(self, plan: BranchPlan | None) -> Joint:
        if plan is None:
            return differentiate(self.local)
        return differentiate(self.local, functools.partial(run_conditional, self.local.span.equations, plan, "jaxckpt"))
