"""Optimal nested schedules over blocks in a fixed order: the chain recurrence, extended to DAGs by live intervals.

The recurrence is that of "Optimal checkpointing for heterogeneous chains: how to train deep neural networks with
limited memory" (Beaumont, Eyraud-Dubois, Hermann, Joly, Shilova, 2019; the algorithm of the tool Rotor), with several
options per block as in "Rockmate" (Zhao et al., 2023). It is extended here in two ways. What storing cut m costs when
cut s is held is bytes(L(m) - L(s)), so skip connections are counted once and no chain is needed. And in an interval
that is being recomputed, what only later blocks read is dead and neither made nor held.

With L(s) held and M bytes above it for everything else, cotangents included, P(s, t, M) is the least time to run
forward and backward of blocks s..t-1:

    (1) keep s with option o:      f(s, o) + g(s, o) + P(s+1, t, M - a(s, o))
    (2) recompute blocks s..m-1:   f(s) + ... + f(m-1) + P(m, t, M - w(s, m)) + P(s, m, M)

each where its peaks fit in M. The result is optimal among schedules that nest (persistent schedules), for this order
and these options, when the memory axis is exact. Bytes are rounded up to the axis' resolution, so that a schedule
found for M bytes never needs more.

Intervals that are equal up to a shift, as in a stack of like layers, are solved once: with period p there are O(p n)
of them instead of O(n^2).

Time O(n^3 levels), or O(p n^2 levels), in vectorised NumPy; space O(n^2 levels), or O(p n levels).
"""

import math
from collections.abc import Iterator
from typing import Literal

import numpy as np

from ckptsolvers.errors import InfeasibleError, InvalidProblemError
from ckptsolvers.intervals import Intervals
from ckptsolvers.problem import Problem
from ckptsolvers.schedule import Keep, Node, Schedule, region

_INF = np.int64(2**60)


class ChainTable:
    """P(0, n, M) for every M up to a largest budget: the whole trade-off of bytes against time from one solve.

    Args:
        problem: the blocks and values.
        max_bytes: the largest budget of interest.
        num_levels: resolution of the memory axis at most; the unit is max_bytes / num_levels rounded up, or the
            greatest common divisor of all sizes where that is coarser still, and then the axis is exact.
        rounding: "up" for schedules that fit; "down" for bounds: no schedule does less work than `times`.
    """

    def __init__(
        self, problem: Problem, *, max_bytes: int, num_levels: int = 500, rounding: Literal["up", "down"] = "up"
    ):
        """Solve every interval, the shorter ones first."""
        if max_bytes < 0 or num_levels < 1:
            raise InvalidProblemError(f"{max_bytes=} must not be negative and {num_levels=} at least 1")
        self.problem = problem
        self.unit_bytes, self.is_exact = _unit(problem, max_bytes, num_levels)
        self.num_levels = max_bytes // self.unit_bytes
        self._rounding = rounding
        self._about = Intervals(problem)
        self._solve()

    def times(self) -> np.ndarray:
        """Least work at each memory level, `[num_levels + 1]`; never rising, and `2**60` where nothing fits."""
        return self._row(0, self.problem.num_blocks)

    def level(self, budget_bytes: int) -> int:
        """The memory level a budget allows."""
        return min(self.num_levels, max(0, budget_bytes) // self.unit_bytes)

    def steps(self) -> list[int]:
        """The levels at which the least work falls: one schedule of the trade-off each, ascending."""
        times = self.times()
        falls = np.flatnonzero(np.diff(times, prepend=_INF) < 0)
        return falls.tolist()

    def schedule(self, level: int) -> Schedule:
        """Read the schedule of a memory level back from the table.

        Raises:
            InfeasibleError: nothing fits at this level.
        """
        n = self.problem.num_blocks
        if self.times()[level] >= _INF:
            steps = self.steps()
            least = steps[0] * self.unit_bytes if steps else None
            raise InfeasibleError(level * self.unit_bytes, least, "chain")
        # Post-order by hand: nested intervals may be deeper than Python's stack.
        out: list[list[Node]] = [[]]
        tasks: list[tuple[int, int, int]] = [(0, n, level)]
        while tasks:
            s, t, m_level = tasks.pop()
            if s < 0:
                children = out.pop()
                out[-1].append(region(tuple(children)))
                continue
            if s == t:
                continue
            split, option, used = self._choose(s, t, m_level)
            if split is None:
                out[-1].append(Keep(s, option))
                tasks.append((s + 1, t, m_level - used))
            else:
                tasks.append((split, t, m_level - used))
                tasks.append((-1, -1, -1))
                tasks.append((s, split, m_level))
                out.append([])
        return Schedule(tuple(out[0]))

    def _solve(self) -> None:
        n, size = self.problem.num_blocks, self.num_levels + 1
        twins = self._about.twins()
        # Which row of the table holds P(s, t, .); row 0 is the empty interval's.
        self._rows = np.zeros((n + 1, n + 1), np.int32)
        self._table = np.empty((1 + sum(t - length for t, (_, length) in enumerate(twins)), size), np.int64)
        self._table[0] = 0
        used = 1
        for t in range(1, n + 1):
            twin, length = twins[t]
            alone = t - length
            self._rows[alone:t, t] = self._rows[twin - length : twin, twin]
            self._rows[:alone, t] = np.arange(used, used + alone)
            used += alone
            self._solve_until(t, alone)

    def _solve_until(self, t: int, alone: int) -> None:
        sweep = self._about.sweep_times(t)
        # rest[m] is P(m, t, .) plus the time of running blocks 0..m-1, so that (2) adds two rows and no number.
        rest = np.empty((t + 1, self.num_levels + 1), np.int64)
        rest[alone:] = self._table[self._rows[alone : t + 1, t]] + sweep[alone:, None]
        for s in range(alone - 1, -1, -1):
            best = self._row(s, t)
            best[:] = self._best_split(s, t, rest) - sweep[s]
            self._improve_by_keeping(s, t, best)
            np.minimum(best, _INF, out=best)
            rest[s] = best + sweep[s]

    def _best_split(self, s: int, t: int, rest: np.ndarray) -> np.ndarray:
        size = self.num_levels + 1
        best, total = np.full(size, 2 * _INF), np.empty(size, np.int64)
        store, first = self._split_levels(s, t)
        splits = np.flatnonzero(first < size)
        parts = zip(
            (splits + s + 1).tolist(),
            first[splits].tolist(),
            store[splits].tolist(),
            self._rows[s, s + 1 : t][splits].tolist(),
            strict=True,
        )
        for m, start, held, inner in parts:
            into, least = total[start:], best[start:]
            np.add(rest[m, start - held : size - held], self._table[inner, start:], out=into)  # (2)
            np.minimum(least, into, out=least)
        return best

    def _improve_by_keeping(self, s: int, t: int, best: np.ndarray) -> None:
        after, size = self._row(s + 1, t), self.num_levels + 1
        for o in range(len(self.problem.blocks[s].options)):
            held, first, time = self._keep_levels(s, t, o)
            if first < size:
                np.minimum(best[first:], after[first - held : size - held] + time, out=best[first:])  # (1)

    def _choose(self, s: int, t: int, level: int) -> tuple[int | None, int, int]:
        """Find the choice behind P(s, t, level): the split or None, the option, and the levels it holds."""
        wanted = self._row(s, t)[level]
        for o in range(len(self.problem.blocks[s].options)):
            held, first, time = self._keep_levels(s, t, o)
            if first <= level and self._row(s + 1, t)[level - held] + time == wanted:
                return None, o, held
        store, first = self._split_levels(s, t)
        splits = np.flatnonzero(first <= level)
        ends = splits + s + 1
        sweep = self._about.sweep_times(t)
        total = self._table[self._rows[ends, t], level - store[splits]] + self._table[self._rows[s, ends], level]
        best = int((total + sweep[ends]).argmin())
        return int(ends[best]), -1, int(store[splits[best]])

    def _keep_levels(self, s: int, t: int, o: int) -> tuple[int, int, int]:
        """What keeping block s holds, from which level on it fits, and its time."""
        option, about = self.problem.blocks[s].options[o], self._about
        held = self._units(about.hold_bytes(s, t, o)) if s + 1 < t else 0
        peak = max(option.forward_peak_bytes + about.waiting[t], option.backward_peak_bytes + about.passing[s])
        time = option.forward_times[about.num_wanted(s, t)] + option.recompute_time
        return held, max(held, self._units(peak)), time

    def _split_levels(self, s: int, t: int) -> tuple[np.ndarray, np.ndarray]:
        """What each split holds and from which level on it fits, each `[t - s - 1]`."""
        if t == s + 1:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        store = self._about.store_bytes(s, t)
        peaks = self._about.sweep_peaks(s, t, store) + self._about.waiting[t]
        held = self._units(store)
        return held, np.maximum(held, self._units(peaks))

    def _units(self, size_bytes):
        return size_bytes // self.unit_bytes if self._rounding == "down" else -(-size_bytes // self.unit_bytes)

    def _row(self, s: int, t: int) -> np.ndarray:
        return self._table[self._rows[s, t]]


def _unit(problem: Problem, max_bytes: int, num_levels: int) -> tuple[int, bool]:
    """The unit of the memory axis, and whether every size is a multiple of it."""
    divisor = math.gcd(*_all_sizes(problem))
    unit = max(1, -(-max_bytes // num_levels))
    if divisor == 0 or unit <= divisor:
        return max(unit, divisor), True
    return unit, False


def _all_sizes(problem: Problem) -> Iterator[int]:
    for value in problem.values:
        yield from (value.size_bytes, value.cotangent_bytes)
    for block in problem.blocks:
        yield block.forward_peak_bytes
        for option in block.options:
            yield from (option.saved_bytes, option.forward_peak_bytes, option.backward_peak_bytes)
