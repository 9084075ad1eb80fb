"""One iteration of a loop, or one branch of a conditional: its blocks, and plans of it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from ckptsolvers import Keep, Problem, Schedule, simulate
from ckptsolvers.schedule import Node, region

from jaxckpt.model.cut import cut_program, spans_at
from jaxckpt.model.schedules import chain_schedules
from jaxckpt.model.time import Timer
from jaxckpt.model.tree import Saved, Tree
from jaxckpt.program import dataflow
from jaxckpt.program.control_flow import Branch, Loop
from jaxckpt.targets.chip import Target


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


class Body:
    """One iteration, or a branch: its blocks, cut as finely as any program and not at all, and its plans."""

    def __init__(self, loop: Loop | Branch, active: set[int], timer: Timer, target: Target, analyse: Callable):
        program = loop.body
        self.loop = loop
        dag = dataflow.build_graph(program)
        cut = cut_program(program, dag, active)
        one = spans_at(program, [range(len(program.equations))])
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
