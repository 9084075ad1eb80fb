"""The judge: replays a schedule's steps, checks every read, and counts peak bytes and work.

No solver reports its own numbers. The simulator knows nothing of recurrences: it holds a set of live values and adds
up what is in it.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from ckptsolvers.errors import InvalidScheduleError
from ckptsolvers.problem import Problem
from ckptsolvers.schedule import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What replaying a schedule found.

    Attributes:
        peak_bytes: most bytes alive at once, cotangents included; what was alive before the program is not.
        work: time of every forward and every rebuild inside backwards. The backwards themselves are the same in
            every schedule and not counted.
        extra_work: work beyond one plain forward sweep.
        host_bytes: most bytes held on the host at once.
        num_forwards: how often each block's forward ran, `[n]`.
        peak_block: the block at whose step the peak stands.
        peak_phase: whether that step was a forward or a backward.
        peak_live: the values held at that step, as positions in `Problem.values`.
        forwards: how often each forward ran, by block, the option it saved for (None for none) and the number of
            outputs it made. Whoever counts work in another unit than the problem's can add it up.
    """

    peak_bytes: int
    work: int
    extra_work: int
    num_forwards: tuple[int, ...]
    peak_block: int
    peak_phase: Literal["forward", "backward"]
    peak_live: tuple[int, ...]
    forwards: Mapping[tuple[int, int | None, int], int] = field(repr=False, compare=False)
    host_bytes: int = 0


def simulate(problem: Problem, schedule: Schedule) -> Judgement:
    """Replay a schedule.

    Args:
        problem: the blocks and values.
        schedule: a tree over them, from any solver.

    Returns:
        The peak, the work and where the peak stands.

    Raises:
        InvalidScheduleError: a step reads a value that is not there, drops one twice, or runs a backward out of order.
    """
    run = _Replay(problem)
    for step in schedule.steps(problem):
        if step.kind == "forward":
            run.forward(step.block, step.option, step.until)
        elif step.kind == "drop":
            run.drop(step.values)
        else:
            run.backward(step.block, step.option)
    return run.judgement()


class _Replay:
    """The state of a replay: live values, saved interiors, waiting cotangents."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.sizes = [value.size_bytes for value in problem.values]
        self.live: set[int] = set()
        self.saved: dict[int, int] = {}  # block -> option
        n = problem.num_blocks
        self.cotangents = {v for v, value in enumerate(problem.values) if value.read_by[-1] == n}
        self.live_bytes = 0
        self.other_bytes = sum(problem.values[v].cotangent_bytes for v in self.cotangents)
        self.host_now = self.host_peak = 0
        self.work = 0
        self.forwards: Counter[tuple[int, int | None, int]] = Counter()
        self.next_backward = n - 1
        self.peak: tuple = (-1, 0, "forward", ())

    def forward(self, k: int, o: int | None, until: int) -> None:
        block = self.problem.blocks[k]
        runs = block if o is None else block.options[o]
        self._check_inputs(k, "forward")
        peak = block.forward_peak_bytes if o is None else block.options[o].peak_until(k, until)
        self._mark(self.live_bytes + self.other_bytes + peak, k, "forward")
        num_wanted = self.problem.num_wanted(k, until)
        outputs = self.problem.outputs[k]
        self._hold(outputs[:num_wanted])
        if o is not None:
            self._hold(outputs[p] for p in block.options[o].saved_outputs)
            self.saved[k] = o
            self.other_bytes += block.options[o].saved_bytes
            self.host_now += block.options[o].host_bytes
            self.host_peak = max(self.host_peak, self.host_now)
        self.work += runs.forward_times[num_wanted]
        self.forwards[k, o, num_wanted] += 1

    def drop(self, values: tuple[int, ...]) -> None:
        if not self.live.issuperset(values):
            missing = sorted(set(values) - self.live)
            raise InvalidScheduleError(f"values {missing} are dropped but were not held")
        self._let_go(values)

    def backward(self, k: int, o: int | None) -> None:
        if k != self.next_backward or o is None or self.saved.pop(k, None) != o:
            raise InvalidScheduleError(f"backward of block {k} under option {o}: not due, or its forward did not save")
        option, values = self.problem.blocks[k].options[o], self.problem.values
        self._check_inputs(k, "backward", o)
        outputs = self.problem.outputs[k]
        own = {outputs[p] for p in option.saved_outputs}
        if not self.live.issuperset(own):
            raise InvalidScheduleError(f"backward of block {k} reads its outputs {sorted(own)}, which are not held")
        # The option's peak holds what it saved and its outputs' cotangents, so they leave the count first.
        self._let_go(own)
        self.other_bytes -= option.saved_bytes
        self.host_now -= option.host_bytes
        for v in outputs:
            if v in self.cotangents:
                self.cotangents.remove(v)
                self.other_bytes -= values[v].cotangent_bytes
        self._mark(self.live_bytes + self.other_bytes + option.backward_peak_bytes, k, "backward")
        for v in self.problem.inputs[k]:
            if v not in self.cotangents:
                self.cotangents.add(v)
                self.other_bytes += values[v].cotangent_bytes
        self.work += option.recompute_time
        self.next_backward -= 1

    def judgement(self) -> Judgement:
        if self.next_backward != -1 or self.live or self.saved:
            raise InvalidScheduleError(f"the schedule ended with {sorted(self.live)} held, backwards left to run")
        peak, block, phase, live = self.peak
        num_forwards = [0] * self.problem.num_blocks
        for (k, _, _), count in self.forwards.items():
            num_forwards[k] += count
        return Judgement(
            peak_bytes=peak,
            work=self.work,
            extra_work=self.work - self.problem.forward_time,
            num_forwards=tuple(num_forwards),
            peak_block=block,
            peak_phase=phase,
            peak_live=live,
            forwards=self.forwards,
            host_bytes=self.host_peak,
        )

    def _check_inputs(self, k: int, phase: str, option: int | None = None) -> None:
        missing = [v for v in self.problem.inputs[k] if v not in self.live]
        if missing and option is not None:
            unread = self.problem.unread(k, option)
            missing = [v for v in missing if v not in unread]
        if missing:
            raise InvalidScheduleError(f"{phase} of block {k} reads values {missing}, which are not held")

    def _hold(self, values: Iterable[int]) -> None:
        for v in values:
            if v not in self.live:
                self.live.add(v)
                self.live_bytes += self.sizes[v]

    def _let_go(self, values: Iterable[int]) -> None:
        for v in set(values):
            self.live.remove(v)
            self.live_bytes -= self.sizes[v]

    def _mark(self, total: int, k: int, phase: str) -> None:
        if total > self.peak[0]:
            self.peak = (total, k, phase, tuple(sorted(self.live)))
