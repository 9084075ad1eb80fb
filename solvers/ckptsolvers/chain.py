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

each where its peaks fit in M. Where block s+1 is kept too, under an option that does not read again what block s made
for it, that value is dropped once s+1 has run forward: P'(s+1, t, M) is the least time under such a start, and (1) may
go on with it. The result is optimal among schedules that nest (persistent schedules), for this order
and these options, when the memory axis is exact. Bytes are rounded up to the axis' resolution, so that a schedule
found for M bytes never needs more.

Intervals that are equal up to a shift, as in a stack of like layers, are solved once: with period p there are O(p n)
of them instead of O(n^2).

Time O(n^3 levels), or O(p n^2 levels), in vectorised NumPy; space O(n^2 levels), or O(p n levels).
"""

import functools
import time
from typing import Literal

import numpy as np

from ckptsolvers.chen import chen_schedules
from ckptsolvers.errors import InfeasibleError, InvalidProblemError
from ckptsolvers.intervals import Intervals, memory_unit
from ckptsolvers.problem import Problem
from ckptsolvers.proof import NESTED
from ckptsolvers.revolve import revolve_schedules
from ckptsolvers.schedule import Keep, Node, Schedule, region
from ckptsolvers.simulate import simulate
from ckptsolvers.solution import Solution, check_budget, least_work

_INF = np.int64(2**60)
_MOST_ROWS = 32  # added up at once: what fits in a core's cache


def solve_chain(problem: Problem, *, budget_bytes: int, num_levels: int | None = None, prove: bool = True) -> Solution:
    """Return the nested schedule with the least work within the budget.

    Sizes are rounded up to the memory axis, so schedules need less than their level says. The table therefore reaches
    a quarter above the budget, and the fastest of its schedules whose judged peak fits is taken.

    Args:
        problem: any blocks and values.
        budget_bytes: the most the judged peak may be.
        num_levels: resolution of the memory axis; by default 500 to 4000, the more the fewer blocks there are.
        prove: solve once more with sizes rounded down, for a bound on the work of every nested schedule. It doubles
            the time where the axis is not exact, and costs nothing where it is.

    Returns:
        A judged solution, proven optimal among nested schedules of this order when the axis is exact or the work
        meets the bound.

    Raises:
        InfeasibleError: no level within the budget has a schedule, nor has one above it that fits after all.

    Source: Beaumont et al. 2019, section 4; Zhao et al. 2023, section 3.
    """
    check_budget(budget_bytes)
    started = time.perf_counter()
    levels = num_levels or default_num_levels(problem.num_blocks)
    _, is_exact = memory_unit(problem, max_bytes=budget_bytes, num_levels=levels)
    above = 0 if is_exact else budget_bytes // 4
    table = ChainTable(problem, max_bytes=budget_bytes + above, num_levels=levels + (0 if is_exact else levels // 4))
    for level in reversed(table.steps()):
        schedule = table.schedule(level)
        judged = simulate(problem, schedule)
        if judged.peak_bytes <= budget_bytes:
            break
    else:
        raise InfeasibleError(budget_bytes, least_peak_bytes(problem), "chain")
    bound = judged.work if is_exact else None
    if bound is None and prove:
        lower = ChainTable(problem, max_bytes=budget_bytes, num_levels=levels, rounding="down")
        bound = int(lower.times()[-1])
    if bound is None:
        bound = least_work(problem)
    return Solution(
        schedule=schedule,
        judgement=judged,
        budget_bytes=budget_bytes,
        solver="chain",
        bound_work=bound,
        bound_for=NESTED,
        solve_s=time.perf_counter() - started,
    )


def least_peak_bytes(problem: Problem, *, num_levels: int = 500) -> int:
    """Return a peak that some nested schedule reaches and none undercuts by more than the axis' rounding.

    The table reaches as far as the lowest peak of the schedules of Chen and of revolve.
    """
    candidates = [*chen_schedules(problem), *revolve_schedules(problem)]
    known = min(simulate(problem, schedule).peak_bytes for schedule in candidates)
    table = ChainTable(problem, max_bytes=known, num_levels=num_levels)
    peaks = [simulate(problem, table.schedule(level)).peak_bytes for level in table.steps()]
    return min([known, *peaks])


def default_num_levels(num_blocks: int) -> int:
    """As fine an axis as takes about a second: 4000 levels up to 70 blocks, 500 from 145 on, then two a block."""
    return max(500, 2 * num_blocks, min(4000, 250_000_000 // (num_blocks**3 // 6 + 1)))


class ChainTable:
    """P(0, n, M) for every M up to a largest budget: the whole trade-off of bytes against time from one solve.

    Args:
        problem: the blocks and values.
        max_bytes: the largest budget of interest.
        num_levels: resolution of the memory axis at most; the unit is max_bytes / num_levels rounded up, or the
            greatest common divisor of all sizes where that is coarser still, and then the axis is exact.
        rounding: "up" for schedules that fit; "down" for bounds: no schedule does less work than `times`.
        about: the problem's intervals, where another table has found out about them.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        max_bytes: int,
        num_levels: int = 500,
        rounding: Literal["up", "down"] = "up",
        about: Intervals | None = None,
    ):
        """Solve every interval, the shorter ones first."""
        if max_bytes < 0 or num_levels < 1:
            raise InvalidProblemError(f"{max_bytes=} must not be negative and {num_levels=} at least 1")
        self.problem = problem
        self.unit_bytes, self.is_exact = memory_unit(problem, max_bytes=max_bytes, num_levels=num_levels)
        self.num_levels = max_bytes // self.unit_bytes
        self._rounding = rounding
        self.about = self._about = about or Intervals(problem)
        # Whether block s, kept under some option, can drop what the block before it made.
        self._may_drop = [
            any(problem.droppable(s, o, s + 1) for o in range(len(block.options)))
            for s, block in enumerate(problem.blocks)
        ]
        # Reading many schedules back asks for the same again and again.
        self._keep_levels = functools.cache(self._find_keep_levels)
        self._drop_levels = functools.cache(self._find_drop_levels)
        self._choose = functools.cache(self._find_choice)
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
        tasks: list[tuple[int, int, int, bool]] = [(0, n, level, False)]
        while tasks:
            s, t, m_level, dropped = tasks.pop()
            if s < 0:
                children = out.pop()
                out[-1].append(region(tuple(children)))
                continue
            if s == t:
                continue
            split, option, used, drops_next = self._choose(s, t, m_level, dropped)
            if split is None:
                out[-1].append(Keep(s, option))
                tasks.append((s + 1, t, m_level - used, drops_next))
            else:
                tasks.append((split, t, m_level - used, False))
                tasks.append((-1, -1, -1, False))
                tasks.append((s, split, m_level, False))
                out.append([])
        return Schedule(tuple(out[0]))

    def _solve(self) -> None:
        n, size = self.problem.num_blocks, self.num_levels + 1
        twins = self._about.twins()
        # Which row of the table holds P(s, t, .); row 0 is the empty interval's.
        self._rows = np.zeros((n + 1, n + 1), np.int32)
        self._table = np.empty((1 + sum(t - length for t, (_, length) in enumerate(twins)), size), np.int64)
        self._table[0] = 0
        # From which level on each row says that something fits.
        self._least_levels = np.zeros(len(self._table), np.int64)
        # P'(s, t, .): block s is kept and drops what it does not read again, at the same M; row 0 fits nothing. The
        # first of a run of shared rows has another block before it than its twin, so other values to drop.
        firsts = [t - length + (length > 0) for t, (_, length) in enumerate(twins)]
        self._drop_rows = np.zeros((n + 1, n + 1), np.int32)
        self._dropped = np.empty((1 + sum(sum(self._may_drop[:first]) for first in firsts), size), np.int64)
        self._dropped[0] = _INF
        self._num_dropped = 1
        rest = np.empty((n + 1, size), np.int64)
        used = 1
        for t in range(1, n + 1):
            twin, length = twins[t]
            alone = t - length
            self._rows[alone:t, t] = self._rows[twin - length : twin, twin]
            self._drop_rows[alone + 1 : t, t] = self._drop_rows[twin - length + 1 : twin, twin]
            self._rows[:alone, t] = np.arange(used, used + alone)
            used += alone
            self._solve_until(t, alone, rest[: t + 1])

    def _solve_until(self, t: int, alone: int, rest: np.ndarray) -> None:
        sweep = self._about.sweep_times(t)
        # rest[m] is P(m, t, .) plus the time of running blocks 0..m-1, so that (2) adds two rows and no number.
        np.take(self._table, self._rows[alone : t + 1, t], axis=0, out=rest[alone:], mode="clip")
        rest[alone:] += sweep[alone:, None]
        if alone < t:
            self._drop(alone, t)
        for s in range(alone - 1, -1, -1):
            best = self._row(s, t)
            self._keep(s, t, best, dropped=False)
            self._drop(s, t)
            if s + 1 < t:
                self._improve_by_splitting(s, t, rest, best)
            np.add(best, sweep[s], out=rest[s])
            self._least_levels[self._rows[s, t]] = np.searchsorted(-best, -_INF, side="right")

    def _drop(self, s: int, t: int) -> None:
        if self._may_drop[s]:
            self._drop_rows[s, t] = self._num_dropped
            self._num_dropped += 1
            self._keep(s, t, self._dropped_row(s, t), dropped=True)

    def _keep(self, s: int, t: int, best: np.ndarray, *, dropped: bool) -> None:
        size = self.num_levels + 1
        best[:] = _INF
        # What may follow a block that saves outputs, and one that does not: there the better of two rows.
        rows = self._rest_rows(s, t)
        after = (rows[0] if len(rows) == 1 else np.minimum(*rows), rows[0])
        for o, option in enumerate(self.problem.blocks[s].options):
            drop = self._drop_levels(s, t, o) if dropped else 0
            if dropped and not drop:
                continue
            held, first, time = self._keep_levels(s, t, o, drop)
            if first >= size:
                continue
            row = after[bool(option.saved_outputs)]
            there = row[first - held : size - held]
            into, beyond = best[first : first + len(there)], best[first + len(there) :]
            np.minimum(into, there + time, out=into)  # (1)
            if len(beyond):  # beyond the axis, a budget is as good as the largest
                np.minimum(beyond, row[-1] + time, out=beyond)

    def _rest_rows(self, s: int, t: int) -> list[np.ndarray]:
        """What may follow keeping block s: any schedule, and, if it saves no outputs, one that drops what it made."""
        rows = [self._row(s + 1, t)]
        if s + 1 < t and self._may_drop[s + 1]:
            rows.append(self._dropped_row(s + 1, t))
        return rows

    def _dropped_row(self, s: int, t: int) -> np.ndarray:
        return self._dropped[self._drop_rows[s, t]]

    def _find_drop_levels(self, s: int, t: int, o: int) -> int:
        sizes = (self.problem.values[v].size_bytes for v in self.problem.droppable(s, o, t))
        total = sum(sizes)
        return -(-total // self.unit_bytes) if self._rounding == "down" else total // self.unit_bytes

    def _improve_by_splitting(self, s: int, t: int, rest: np.ndarray, best: np.ndarray) -> None:
        size = self.num_levels + 1
        store, first = self._split_levels(s, t)
        start_time = self._about.sweep_times(t)[s]
        splits = np.flatnonzero(first < size)
        store, first, ends = store[splits], first[splits], splits + s + 1
        rows = self._rows[s, ends]
        # A split helps from where both of its parts fit to where what was found does as little as it ever can.
        start = np.maximum(self._least_levels[rows], store + self._least_levels[self._rows[ends, t]])
        least = self._table[rows, -1] + rest[ends, size - 1 - store] - start_time
        stop = np.searchsorted(-best, -least)
        kinds = store * size + first
        order = np.flatnonzero((np.maximum(start, first) < stop) & (start < size))
        if not len(order):
            return
        order = order[np.argsort(kinds[order], kind="stable")]
        store, first, start, stop, ends, rows, kinds = (
            x[order] for x in (store, first, start, stop, ends, rows, kinds)
        )
        # Splits that hold the same and need the same, as every period's, are added up together.
        lows = np.flatnonzero(np.concatenate(([True], kinds[1:] != kinds[:-1])))
        starts = np.maximum(first[lows], np.minimum.reduceat(start, lows)).tolist()
        stops, stores = np.maximum.reduceat(stop, lows).tolist(), store[lows].tolist()
        best += start_time
        highs = [*lows[1:].tolist(), len(store)]
        for low, high, start, stop, held in zip(lows.tolist(), highs, starts, stops, stores, strict=True):
            into = best[start:stop]
            for at in range(low, high, _MOST_ROWS):
                some = at if high - low == 1 else slice(at, min(high, at + _MOST_ROWS))
                total = self._table[rows[some], start:stop] + rest[ends[some], start - held : stop - held]  # (2)
                np.minimum(into, total if high - low == 1 else total.min(0), out=into)
        best -= start_time

    def _find_choice(self, s: int, t: int, level: int, dropped: bool) -> tuple[int | None, int, int, bool]:
        """Find the choice behind P(s, t, level), or P': the split or None, the option, the levels held, and P' next."""
        wanted = (self._dropped_row(s, t) if dropped else self._row(s, t)).item(level)
        rows = self._rest_rows(s, t)
        for o, option in enumerate(self.problem.blocks[s].options):
            drop = self._drop_levels(s, t, o) if dropped else 0
            held, first, time = self._keep_levels(s, t, o, drop)
            if first > level or (dropped and not drop):
                continue
            left = min(level - held, self.num_levels)
            for is_dropped, after in enumerate(rows[:1] if option.saved_outputs else rows):
                if after.item(left) + time == wanted:
                    return None, o, level - left, bool(is_dropped)
        store, first = self._split_levels(s, t)
        splits = np.flatnonzero(first <= level)
        ends = splits + s + 1
        sweep = self._about.sweep_times(t)
        total = self._table[self._rows[ends, t], level - store[splits]] + self._table[self._rows[s, ends], level]
        best = int((total + sweep[ends]).argmin())
        return int(ends[best]), -1, int(store[splits[best]]), False

    def _find_keep_levels(self, s: int, t: int, o: int, drop: int) -> tuple[int, int, int]:
        """What keeping block s holds beyond what it drops, from which level on it fits, and its time."""
        option, about = self.problem.blocks[s].options[o], self._about
        held = self._units(about.hold_bytes(s, t, o)) if s + 1 < t else 0
        forward = self._units(option.peak_until(s, t) + about.waiting[t])
        backward = self._units(option.backward_peak_bytes + about.passing[s])
        time = option.forward_times[about.num_wanted(s, t)] + option.recompute_time
        return held - drop, max(held - drop, forward, backward - drop, 0), time

    def _split_levels(self, s: int, t: int) -> tuple[np.ndarray, np.ndarray]:
        """What each split holds and from which level on it fits, each `[t - s - 1]`."""
        store, peaks = self._about.splits(s, t)
        held = self._units(store)
        return held, np.maximum(held, self._units(peaks))

    def _units(self, size_bytes):
        return size_bytes // self.unit_bytes if self._rounding == "down" else -(-size_bytes // self.unit_bytes)

    def _row(self, s: int, t: int) -> np.ndarray:
        return self._table[self._rows[s, t]]
