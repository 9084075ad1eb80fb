"""A conditional's options: a plan for each of its branches.

JAX hands what any branch keeps for its backward from the forward conditional to the backward one, and every branch
returns room for all of it, values of one shape shared between branches. What an option holds is therefore read off
JAX's own derivative of the planned conditional. A conditional takes as long as its dearest branch.

The operands of a conditional live until it ends, so unlike in a program nothing that was saved is freed on the way.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from ckptsolvers import Keep, Problem, Schedule, simulate
from ckptsolvers.schedule import Node, region

from jaxckpt.kinds.base import Analyser, Applier
from jaxckpt.kinds.body import Body, Iteration
from jaxckpt.kinds.cond_run import BranchPlan, run_conditional
from jaxckpt.model.blocks import Blocks
from jaxckpt.model.joint import Joint, LocalBlock, differentiate, differentiated_ends, outside
from jaxckpt.model.option import LEFT_NAME, LEFT_TO_JAX, BlockAnalysis, Option, Save, Work, dominates, on_device
from jaxckpt.model.pareto import pareto
from jaxckpt.model.tree import Tree
from jaxckpt.program import dataflow
from jaxckpt.program.control_flow import Branch, branches_of
from jaxckpt.program.ir import size_bytes

# Each is differentiated by JAX, which takes some hundredths of a second.
_MAX_OPTIONS = 16
# Sizes below the largest one by more than this many halvings are one size.
_MAX_HALVINGS = 8


def analyse_conditional(local: LocalBlock, analyser: Analyser) -> BlockAnalysis:
    """Analyse a block whose last equation is a conditional; the others are cheap and lead to its operands.

    Args:
        local: the block.
        analyser: analyses the branches' blocks, and runs branches under plans.

    Returns:
        Its options; the last one leaves it to JAX.
    """
    arms = [_Arm(branch, local, analyser) for branch in branches_of(local.span.equations[-1])]
    model = _Model(local, arms, analyser.applier)
    found = [model.option(picks) for picks in _distinct(_picks(arms))]
    found = [x for i, x in enumerate(found) if not any(_replaces(y, x, j < i) for j, y in enumerate(found) if j != i)]
    left = model.left_to_jax()
    return BlockAnalysis(
        forward=model.forward(),
        forward_peak_bytes=model.forward_peak_bytes(),
        options=(*found, left),
        unplanned_cost=max(arm.cost for arm in arms),
        residual_bytes=left.saved_bytes,
    )


class _Arm:
    """A branch with its plans."""

    def __init__(self, branch: Branch, local: LocalBlock, analyser: Analyser):
        self.branch = branch
        self._transients: dict[int, int] = {}  # by identity of plans, all of which are kept
        active = _active(branch, local)
        self.body = Body(branch, active, analyser) if active else None
        if self.body is None:
            self.left = _untouched(branch)
            self.plans = [self.left]
            self.cost = self.forward_peak_bytes = 0
            self.forward = Work()
            return
        self.left = self.body.left_to_jax()
        self._all = plans = [self.left, *self.body.iterations()]
        self.plans = pareto(plans, lambda p: (p.stacked_bytes, self.peak_bytes(p), p.again.time))
        self.cost = self.body.whole.unplanned_cost
        self.forward = self.body.forward
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
        saved=(LEFT_TO_JAX,) if positions else (),
    )
    return Iteration(
        tree=tree,
        stacked_bytes=0,
        peak_bytes=0,
        whole_peak_bytes=0,
        again=Work(),
        whole=Work(),
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
                picks.append(min(inside, key=lambda p, arm=arm: (p.again.time, size(arm, p))))
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


def _replaces(a: Option, b: Option, is_first: bool) -> bool:
    """Whether an option is as good as another one in everything; of two equal ones the first stays."""
    return dominates(a, b) and (is_first or not dominates(b, a))


class _Model:
    """Bytes and work of the whole conditional under a plan for each branch."""

    def __init__(self, local: LocalBlock, arms: Sequence[_Arm], applier: Applier):
        self.local, self.arms, self.applier = local, arms, applier
        self.outside = outside(local)

    def option(self, picks: Sequence[Iteration]) -> Option:
        """The option that runs each branch under a plan."""
        plan = BranchPlan(branches=tuple(p.tree for p in picks))
        run = functools.partial(run_conditional, self.local.span.equations, plan, "jaxckpt", applier=self.applier)
        return self._option("branches", plan, picks, differentiate(self.local, run))

    def left_to_jax(self) -> Option:
        """The option that leaves the conditional to JAX."""
        return self._option(LEFT_NAME, LEFT_TO_JAX, [arm.left for arm in self.arms], differentiate(self.local))

    def _option(self, name: str, save: Save, picks: Sequence[Iteration], joint: Joint) -> Option:
        size = lambda v: size_bytes(joint.avals[v])  # noqa: E731
        outputs = [joint.value.get(v, -1) for v in self.local.outputs]
        saved = sum(size(v) for v in joint.residuals if v not in outputs)
        inner = max(arm.transient_bytes(p) for arm, p in zip(self.arms, picks, strict=True))
        read = {v for eqn in joint.backward for v in eqn.reads}
        inputs = (joint.value[v] for v in self.local.span.inputs)
        backward_peak = saved + inner + self.outside.cotangents
        return Option(
            name=name,
            save=save,
            saved=on_device(saved),
            recompute=Work(max(0, *(p.again.time for p in picks)), max(0, *(p.again.flops for p in picks))),
            forward=self.forward(is_saved=saved > 0),
            forward_peak_bytes=self.outside.results + saved + max(arm.forward_peak_bytes for arm in self.arms),
            backward_peak_bytes=backward_peak,
            saved_outputs=tuple(i for i, v in enumerate(outputs) if v in joint.residuals),
            unread_inputs=tuple(i for i, v in enumerate(inputs) if v not in read),
            transient_bytes=backward_peak - saved,
        )

    def forward(self, *, is_saved: bool = False) -> tuple[Work, ...]:
        """Work to make the first j outputs, `[num_outputs + 1]`: that of the dearest branch."""
        one = Work(max(arm.forward.time for arm in self.arms), max(arm.forward.flops for arm in self.arms))
        return (one if is_saved else Work(), *[one] * len(self.local.outputs))

    def forward_peak_bytes(self) -> int:
        """Most bytes alive at once in the forward where nothing is saved."""
        return self.outside.results + self.outside.operands + max(arm.forward_peak_bytes for arm in self.arms)


def transient_bytes(blocks: Blocks, node: Node) -> int:
    """Most bytes alive at once in the backward of one node of a schedule, beyond what was handed over.

    Args:
        blocks: the branch's blocks.
        node: one of its schedule's outermost nodes.

    Returns:
        Bytes.
    """
    if isinstance(node, Keep):
        option = blocks.blocks[node.block].options[node.option]
        if option.transient_bytes is not None:
            return option.transient_bytes
        # A checkpoint copies what it is given, since a conditional's operands are not its own.
        return option.backward_peak_bytes - (option.saved_bytes if option.is_left_to_jax else 0)
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
