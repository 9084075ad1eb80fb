"""How a loop may be divided into parts: levels of nested scans, two plans side by side, binomial loops."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from jaxckpt.kinds.binomial_table import num_again
from jaxckpt.kinds.body import Iteration
from jaxckpt.kinds.scan_run import LoopPart
from jaxckpt.model.option import Work
from jaxckpt.model.pareto import pareto

# Three levels are tried with this many lengths each: how they are cut matters little where there are so many.
_MAX_LENGTHS = 8
# Divisions between two plans, and numbers of states, stand so far apart in bytes.
_GROWTH = 1.03
# Outer loops up to this length are given chunks of any size, longer ones of the sizes on a grid.
_MAX_OUTER = 16
# Binomial loops run each iteration again this often at most, on average.
_MAX_AGAIN = 3


@dataclass(frozen=True, slots=True)
class Part:
    """Iterations run alike: levels and the plan of one iteration."""

    lengths: tuple[int, ...]
    plan: Iteration
    num_states: int | None = None

    @property
    def length(self) -> int:
        """How many iterations."""
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

    def again(self, forward: Work) -> Work:
        """What runs again, where one iteration's forward takes so much."""
        if self.num_states is not None:
            # An iteration's backward begins with as much of its forward as that needs.
            again = num_again(self.length, self.num_states)
            return self.length * self.plan.whole + again * forward
        return self.length * (self.plan.again + (len(self.lengths) - 1) * forward)


def levels(length: int, plans: Sequence[Iteration]) -> Iterator[tuple[Part, ...]]:
    """Every plan at one to three levels.

    Levels are divisors of the length, and a grid where those are few; what is left over runs last, at one level. It
    need not run twice, so the last chunk is left over even where the length divides.
    """
    sizes = sorted({d for d in range(2, length) if length % d == 0} | {g for g in _grid(length) if g < length})
    few = sizes[:: max(1, -(-len(sizes) // _MAX_LENGTHS))]
    inners = [*((size,) for size in sizes), *itertools.product(few, repeat=2)]
    for plan in plans:
        yield (Part((length,), plan),)
        for inner in inners:
            num, left = divmod(length, math.prod(inner))
            for outer, rest in ((num, left), (num - 1, left + math.prod(inner))):
                if outer > 1 and rest != 1:
                    yield (Part((outer, *inner), plan), *([Part((rest,), plan)] if rest else []))
        for outer, size in _few_chunks(length):
            yield Part((outer, size), plan), Part((length - outer * size,), plan)


def _few_chunks(length: int) -> Iterator[tuple[int, int]]:
    """Two levels whose outer one is short: chunks no longer than what is left over, which takes most of the bytes."""
    for outer in range(2, min(_MAX_OUTER, math.isqrt(length)) + 1):
        rest, most = -(-length // (outer + 1)), -(-length // outer) if outer > 2 else length
        while rest < most and length - rest >= outer:
            yield outer, (length - rest) // outer
            rest = max(rest + 1, math.ceil(rest * _GROWTH))


def mixes(length: int, plans: Iterable[Iteration]) -> Iterator[tuple[Part, ...]]:
    """Two plans side by side, those that are neighbours on the convex hull of bytes against time."""
    size = lambda plan: length * plan.stacked_bytes + plan.peak_bytes  # noqa: E731
    hull: list[Iteration] = []
    for plan in pareto(plans, lambda p: (size(p), p.again.time)):
        while len(hull) > 1 and _is_above(hull[-1], hull[-2], plan, size):
            hull.pop()
        hull.append(plan)
    for less, more in itertools.pairwise(hull):
        # The one that holds more comes last: its backward is over before the other one's needs room.
        for num in _counts(size(less), more.stacked_bytes - less.stacked_bytes, length - 1):
            # One iteration is no loop to a compiler, which then mixes it with what is around it.
            if 1 < num < length - 1:
                yield Part((length - num,), less), Part((num,), more)


def _is_above(plan: Iteration, left: Iteration, right: Iteration, size: Callable[[Iteration], int]) -> bool:
    """Whether a plan lies on or above the line between two others."""
    bytes_left, bytes_right = size(plan) - size(left), size(right) - size(left)
    return (left.again.time - plan.again.time) * bytes_right <= (left.again.time - right.again.time) * bytes_left


def _counts(base_bytes: int, each_bytes: int, most: int) -> Iterator[int]:
    """Numbers of things, each of which makes the whole so much larger than the one before."""
    num = 1
    while num <= most:
        yield num
        enough = ((base_bytes + num * each_bytes) * _GROWTH - base_bytes) / each_bytes if each_bytes > 0 else 2 * num
        num = max(num + 1, math.ceil(enough))


def binomial_divisions(length: int, plans: Iterable[Iteration], carry_bytes: int) -> Iterator[tuple[Part, ...]]:
    """Binomial loops, where they do not run iterations again too many times."""
    # Nothing of an iteration is held for another one, so what its plan saves does not matter.
    for plan in pareto((p for p in plans if not p.is_wrapped), lambda p: (p.whole_peak_bytes, p.whole.time)):
        for count in _counts(plan.whole_peak_bytes, carry_bytes, length - 1):
            if num_again(length, count) <= _MAX_AGAIN * length:
                yield (Part((length,), plan, count),)


def _grid(length: int) -> set[int]:
    return {round(2 ** (i / 2)) for i in range(2, 2 * length.bit_length())}
