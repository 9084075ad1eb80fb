"""One iteration of a loop, or one branch of a conditional: its blocks, and plans of it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from ckptsolvers import Keep, Problem, Schedule, simulate
from ckptsolvers.schedule import Node, region

from jaxckpt.kinds.base import Analyser, is_alone
from jaxckpt.model.blocks import Blocks
from jaxckpt.model.cut import cut_program, spans_at
from jaxckpt.model.option import Save, Work
from jaxckpt.model.schedules import chain_schedules
from jaxckpt.model.tree import Tree
from jaxckpt.program import dataflow
from jaxckpt.program.control_flow import Branch, Loop


@dataclass(frozen=True, slots=True, kw_only=True)
class Iteration:
    """A plan of the body, and what one iteration takes under it.

    Attributes:
        tree: the plan.
        stacked_bytes: kept from its forward to its backward.
        peak_bytes: most alive at once in its backward.
        whole_peak_bytes: the same where nothing of its forward is there.
        again: what it recomputes; of its time, what loops inside take to stack without a plan is taken off.
        whole: what it recomputes where nothing of its forward is there, its results left out.
        is_wrapped: one checkpoint stands around the whole.
        host_bytes: kept on the host from its forward to its backward, beside `stacked_bytes`.
        idle: time that it waits for the link to the host.
    """

    tree: Tree
    stacked_bytes: int
    peak_bytes: int
    whole_peak_bytes: int
    again: Work
    whole: Work
    is_wrapped: bool
    host_bytes: int = 0
    idle: int = 0


class Body:
    """One iteration, or a branch: its blocks, cut as finely as any program and not at all, and its plans."""

    def __init__(self, loop: Loop | Branch, active: set[int], analyser: Analyser):
        program = loop.body
        self.loop = loop
        dag = dataflow.build_graph(program)
        cut = cut_program(program, dag, active, is_alone=is_alone)
        one = spans_at(program, [range(len(program.equations))])
        self.cuts = [
            # Carry and slices are there in every iteration; what stacking them costs is counted by the loop.
            analyser.inside(program, dag, spans, active=active, invariant=loop.consts)
            for spans in ([one] if len(cut) < 2 else [one, cut])
        ]
        self.whole = self.cuts[0]

    @property
    def forward(self) -> Work:
        """Of all it makes."""
        return self.whole.blocks[0].analysis.forward[-1]

    @property
    def forward_peak_bytes(self) -> int:
        """Most bytes alive in it."""
        return self.whole.problem.blocks[0].forward_peak_bytes

    def left_to_jax(self) -> Iteration:
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

    def read_carries(self, iteration: Iteration) -> list[int]:
        """Inputs of the body, no stacks already, that its backward reads under a plan of it as a whole."""
        (span,), (block,) = self.whole.spans, self.whole.blocks
        (node,) = iteration.tree.schedule.nodes
        # Where the body is recomputed in parts, so is all that leads to what they read.
        unread = block.options[node.option].unread_inputs if isinstance(node, Keep) else ()
        free = {*self.loop.consts, *self.loop.slices}
        return [v for i, v in enumerate(span.inputs) if i not in unread and v not in free]

    def _iterations(self, blocks: Blocks, schedules: Iterable[Schedule]) -> Iterator[Iteration]:
        # What is run again makes no results: they went to the next iteration long ago.
        bare = _without_results(blocks.problem)
        # What is saved lies in stacks.
        stacked = _read_from_stacks(blocks)
        positions = tuple(s.positions for s in blocks.spans)
        without = blocks.unplanned_extra
        for inside in schedules:
            judged = simulate(blocks.problem, inside)
            apart = judged if stacked is blocks.problem else simulate(stacked, inside)
            whole = simulate(bare, inside)
            saved = tuple(blocks.saves(inside))
            whole_work = Work(whole.work - without, blocks.flops(inside, whole))
            extra = Work(judged.extra_work - without, blocks.flops(inside, judged) - blocks.forward_flops)
            for is_wrapped in (False, True):
                schedule = Schedule((region(inside.nodes),)) if is_wrapped else inside
                yield Iteration(
                    tree=Tree(blocks=positions, schedule=schedule, saved=saved),
                    stacked_bytes=self._stacked(blocks, schedule.nodes, saved),
                    peak_bytes=(whole if is_wrapped else apart).peak_bytes,
                    whole_peak_bytes=(whole if is_wrapped else judged).peak_bytes,
                    again=whole_work if is_wrapped else extra,
                    whole=whole_work,
                    is_wrapped=is_wrapped,
                )

    def _stacked(self, blocks: Blocks, nodes: Sequence[Node], saved: Sequence[Save]) -> int:
        """What an iteration hands from its forward to its backward: what regions read, and what is saved."""
        free = {*self.loop.consts, *self.loop.slices}
        held: set[int] = set()
        total = 0
        for node in nodes:
            spans = blocks.spans[node.start : node.stop]
            made = {v for span in spans for v in span.outputs}
            held.update(v for span in spans for v in span.inputs if v not in made)
            if not isinstance(node, Keep):
                continue
            analysis, save = blocks.blocks[node.block].analysis, saved[node.block]
            held.update(save.named_values)
            if save.is_left_to_jax:
                total += analysis.residual_bytes
            elif not save.is_by_name:
                total += analysis.options[node.option].saved_bytes
        return total + sum(map(blocks.layouts.held_bytes, held - free))


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


def _read_from_stacks(blocks: Blocks) -> Problem:
    """The problem where what is saved is read from stacks that are counted elsewhere."""
    if all(option.stacked_peak_bytes is None for block in blocks.blocks for option in block.options):
        return blocks.problem
    read = [
        replace(
            block,
            options=tuple(
                o if option.stacked_peak_bytes is None else replace(o, backward_peak_bytes=option.stacked_peak_bytes)
                for o, option in zip(block.options, placed.options, strict=True)
            ),
        )
        for block, placed in zip(blocks.problem.blocks, blocks.blocks, strict=True)
    ]
    return replace(blocks.problem, blocks=tuple(read))
