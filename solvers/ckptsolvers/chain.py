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

Time O(n^3 levels) in vectorised NumPy, space O(n^2 levels).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ckptsolvers.errors import InfeasibleError
from ckptsolvers.problem import Problem
from ckptsolvers.schedule import Keep, Node, Schedule, region

_INF = np.int64(2**60)


@dataclass(frozen=True, slots=True)
class _Interval:
    """What the recurrence needs of the interval [s, t), each `[t - s - 1]` over the splits m = s+1..t-1."""

    store: np.ndarray  # w(s, m): bytes of L(m) - L(s) that something before t reads
    sweep: np.ndarray  # time of running blocks s..m-1 forward
    peak: np.ndarray  # most bytes above L(s) while they run, without the waiting cotangents


class ChainTable:
    """P(0, n, M) for every M up to a largest budget: the whole trade-off of bytes against time from one solve.

    Args:
        problem: the blocks and values.
        max_bytes: the largest budget of interest.
        num_levels: resolution of the memory axis; the unit is max_bytes / num_levels, rounded up.
    """

    def __init__(self, problem: Problem, *, max_bytes: int, num_levels: int = 500):
        self.problem = problem
        self.unit_bytes = max(1, -(-max_bytes // num_levels))
        self.num_levels = max_bytes // self.unit_bytes
        n = problem.num_blocks
        self._waiting = _waiting_cotangents(problem)
        self._passing = _passing_cotangents(problem)
        self._forward = [np.array([0] + [_sweep_time(problem, k, t) for k in range(t)]).cumsum() for t in range(n + 1)]
        self._table = np.full((n + 1, n + 1, self.num_levels + 1), _INF)
        self._choice = np.zeros((n, n + 1, self.num_levels + 1), np.int32)
        self._table[np.arange(n + 1), np.arange(n + 1)] = 0
        for t in range(1, n + 1):
            self._solve_until(t)

    def times(self) -> np.ndarray:
        """Least work at each memory level, `[num_levels + 1]`; never rising, and `2**60` where nothing fits."""
        return self._table[0, self.problem.num_blocks]

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
        if self._table[0, n, level] >= _INF:
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
            choice = int(self._choice[s, t, m_level])
            if choice < 0:
                option = -choice - 1
                out[-1].append(Keep(s, option))
                if s + 1 < t:
                    held = self._units(self._hold(s, t, option))
                    tasks.append((s + 1, t, m_level - held))
            else:
                m, store = choice, int(self._interval_of(s, t).store[choice - s - 1])
                tasks.append((m, t, m_level - self._units(store)))
                tasks.append((-1, -1, -1))
                tasks.append((s, m, m_level))
                out.append([])
        return Schedule(tuple(out[0]))

    def _units(self, size_bytes: int) -> int:
        return -(-size_bytes // self.unit_bytes)

    def _solve_until(self, t: int) -> None:
        levels = np.arange(self.num_levels + 1)
        # Row m holds P(m, t, .) with num_levels infinities in front, so that a negative budget reads infinity.
        padded = np.full((t + 1, 2 * self.num_levels + 1), _INF)
        padded[t, self.num_levels :] = 0
        flat = padded.reshape(-1)
        for s, interval in self._intervals(t):
            best, choice = self._best_keep(s, t, padded)
            if len(interval.store):
                store = np.minimum(-(-interval.store // self.unit_bytes), self.num_levels)
                need = -(-(interval.peak + self._waiting[t]) // self.unit_bytes)
                row = np.arange(s + 1, t) * padded.shape[1] + self.num_levels - store
                rest = flat[row[:, None] + levels]
                total = rest + self._table[s, s + 1 : t] + interval.sweep[:, None]  # (2)
                total[(levels < need[:, None]) | (total > _INF)] = _INF
                m = total.argmin(0)
                least = total[m, levels]
                wins = least < best
                best = np.where(wins, least, best)
                choice = np.where(wins, m + s + 1, choice)
            self._table[s, t] = best
            self._choice[s, t] = choice
            padded[s, self.num_levels :] = best

    def _best_keep(self, s: int, t: int, padded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        best = np.full(self.num_levels + 1, _INF)
        choice = np.full(self.num_levels + 1, -1, np.int32)
        wanted = self.problem.num_wanted(s, t)
        for o, option in enumerate(self.problem.blocks[s].options):
            held = self._units(self._hold(s, t, option=o)) if s + 1 < t else 0
            peak = max(option.forward_peak_bytes + self._waiting[t], option.backward_peak_bytes + self._passing[s])
            first = max(held, self._units(peak))
            if first > self.num_levels:
                continue
            rest = padded[s + 1, self.num_levels + first - held : 2 * self.num_levels + 1 - held]
            total = rest + (option.forward_times[wanted] + option.recompute_time)  # (1)
            wins = total < best[first:]
            best[first:][wins] = total[wins]
            choice[first:][wins] = -o - 1
        return best, choice

    def _hold(self, s: int, t: int, option: int) -> int:
        """a(s, o): what keeping block s holds above L(s) while the blocks after it run."""
        chosen, problem = self.problem.blocks[s].options[option], self.problem
        made = set(problem.outputs[s][: problem.num_wanted(s, t)])
        made |= {problem.outputs[s][p] for p in chosen.saved_outputs}
        return chosen.saved_bytes + sum(problem.values[v].size_bytes for v in made)

    def _interval_of(self, s: int, t: int) -> _Interval:
        return next(interval for start, interval in self._intervals(t) if start == s)

    def _intervals(self, t: int) -> Iterator[tuple[int, _Interval]]:
        """Yield (s, interval) for s = t-1 down to 0; each step adds one block's values to the stores."""
        problem, n = self.problem, self.problem.num_blocks
        store = np.zeros(t + 1, np.int64)
        forward = self._forward[t]
        peaks = np.array([block.forward_peak_bytes for block in problem.blocks[:t]], np.int64)
        for s in range(t - 1, -1, -1):
            for v in problem.outputs[s]:
                value = problem.values[v]
                last = max((r for r in value.read_by if r < t or t == n), default=s)
                store[s + 1 : last + 1] += value.size_bytes
            running = np.maximum.accumulate(np.concatenate(([0], store[s + 1 : t])) + peaks[s:t])
            yield s, _Interval(store[s + 1 : t], forward[s + 1 : t] - forward[s], running[:-1])


def _sweep_time(problem: Problem, k: int, t: int) -> int:
    return problem.blocks[k].forward_times[problem.num_wanted(k, t)]


def _waiting_cotangents(problem: Problem) -> list[int]:
    """ct(L(t)) for every cut t: cotangents that wait while blocks before t run forward again."""
    n = problem.num_blocks
    return [sum(v.cotangent_bytes for v in problem.values if v.made_by < t <= v.read_by[-1]) for t in range(n + 1)]


def _passing_cotangents(problem: Problem) -> list[int]:
    """Cotangents alive in the backward of block k that are neither of its outputs nor first made there."""
    n = problem.num_blocks
    return [sum(v.cotangent_bytes for v in problem.values if v.made_by < k < v.read_by[-1]) for k in range(n)]
