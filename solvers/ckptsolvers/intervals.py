"""Bytes and times of an interval [s, t) of blocks, and which intervals are identical: the chain recurrence's input."""

import functools
import math
from bisect import bisect_left
from collections.abc import Iterator

import numpy as np

from ckptsolvers.problem import Problem

_MOST_SPLITS = 4096  # intervals whose splits are remembered


class Intervals:
    """Bytes and times of every interval of a problem's blocks.

    In an interval that ends before the program does, what only later blocks read is dead: it is not made, not held.

    Args:
        problem: the blocks and values.

    Attributes:
        waiting: `[n + 1]`, ct(L(t)): cotangents that wait while blocks before t run forward again.
        passing: `[n]`, cotangents alive in the backward of a block that are neither of its outputs nor first made
            there.
    """

    def __init__(self, problem: Problem):
        """Index the values by maker and by reader."""
        n, values = problem.num_blocks, problem.values
        self.problem = problem
        self.waiting = [sum(v.cotangent_bytes for v in values if v.made_by < t <= v.read_by[-1]) for t in range(n + 1)]
        self.passing = [sum(v.cotangent_bytes for v in values if v.made_by < k < v.read_by[-1]) for k in range(n)]
        self._first_readers = [[values[v].read_by[0] for v in made] for made in problem.outputs]
        self._cumulative = [_cumulative([values[v].size_bytes for v in made]) for made in problem.outputs]
        self._forward_peaks = np.array([block.forward_peak_bytes for block in problem.blocks], np.int64)
        order = [v for made in problem.outputs for v in made]
        self._made = np.array([values[v].made_by for v in order], np.int64)
        self._sizes = np.array([values[v].size_bytes for v in order], np.int64)
        self._starts = _cumulative([len(made) for made in problem.outputs])
        self._last_readers = self._all_last_readers(order)
        self._sweeps = self._all_sweeps()
        self._hold_bytes = functools.cache(self._find_hold_bytes)
        # Several tables of one problem, and reading many schedules back, ask for the same again and again.
        self._splits = functools.lru_cache(_MOST_SPLITS)(self._find_splits)

    def num_wanted(self, s: int, t: int) -> int:
        """How many outputs of block s something in (s, t) reads; they are the first ones."""
        readers = self._first_readers[s]
        return len(readers) if t == self.problem.num_blocks else bisect_left(readers, t)

    def hold_bytes(self, s: int, t: int, option: int) -> int:
        """a(s, o): what keeping block s holds above L(s) while the blocks after it, up to t, run."""
        return self._hold_bytes(s, option, self.num_wanted(s, t))

    def _find_hold_bytes(self, s: int, option: int, wanted: int) -> int:
        chosen, sizes = self.problem.blocks[s].options[option], self._cumulative[s]
        extra = sum(sizes[p + 1] - sizes[p] for p in chosen.saved_outputs if p >= wanted)
        return chosen.saved_bytes + sizes[wanted] + extra

    def splits(self, s: int, t: int) -> tuple[np.ndarray, np.ndarray]:
        """For m = s+1..t-1, `[t - s - 1]` each: w(s, m), and the most bytes above L(s) while s..m-1 run forward."""
        return self._splits(s, t)

    def _find_splits(self, s: int, t: int) -> tuple[np.ndarray, np.ndarray]:
        store = self.store_bytes(s, t)
        return store, self.sweep_peaks(s, t, store) + self.waiting[t]

    def store_bytes(self, s: int, t: int) -> np.ndarray:
        """w(s, m), `[t - s - 1]`: bytes of L(m) - L(s) that something before t reads, for m = s+1..t-1."""
        some = slice(self._starts[s], self._starts[t])
        change = np.zeros(t - s + 2, np.int64)
        np.add.at(change, self._made[some] + (1 - s), self._sizes[some])
        np.subtract.at(change, self._last_readers[t][some] + (1 - s), self._sizes[some])
        return change[1 : t - s].cumsum()

    def sweep_peaks(self, s: int, t: int, store_bytes: np.ndarray) -> np.ndarray:
        """Most bytes above L(s) while blocks s..m-1 run forward, `[t - s - 1]`, without the waiting cotangents."""
        before = np.concatenate(([0], store_bytes[:-1]))
        return np.maximum.accumulate(before + self._forward_peaks[s : t - 1])

    def sweep_times(self, t: int) -> np.ndarray:
        """Time of running blocks 0..k-1 forward in an interval that ends at t, `[t + 1]`."""
        return self._sweeps[t]

    def twins(self) -> list[tuple[int, int]]:
        """For each end t an earlier end t' and the longest length up to which intervals that end there are identical.

        [t - l, t) and [t' - l, t') are identical when their blocks, their values' sizes and readers, and the cotangents
        alive around them are the same. Where there is no such t' the length is 0.

        Returns:
            `[n + 1]`. It takes O(n^2) time.
        """
        n = self.problem.num_blocks
        kinds, waiting = np.array(self._kinds()), np.array(self.waiting)
        common = np.zeros(n + 1, np.int64)  # common[t']: longest common suffix of blocks before t and before t'
        found = [(0, 0)]
        for t in range(1, n + 1):
            common[1:] = np.where(kinds == kinds[t - 1], common[:-1] + 1, 0)
            usable = np.where(waiting[:t] == waiting[t], common[:t], 0) if t < n else np.zeros(1, np.int64)
            best = int(usable.argmax())
            found.append((best, int(usable[best])))
        return found

    def _kinds(self) -> list[int]:
        """Number the blocks so that two have the same number when nothing tells them apart but their place."""
        problem, n = self.problem, self.problem.num_blocks
        numbers: dict[tuple, int] = {}
        return [
            numbers.setdefault(
                (block, self.passing[k], _outputs_seen_from(problem, k, n), _drops(problem, k)), len(numbers)
            )
            for k, block in enumerate(problem.blocks)
        ]

    def _all_last_readers(self, order: list[int]) -> list[np.ndarray]:
        """For each t, each value's last reader before t, or its maker where there is none."""
        n, values = self.problem.num_blocks, self.problem.values
        last = self._made.copy()
        read_at: list[list[int]] = [[] for _ in range(n + 1)]
        for i, v in enumerate(order):
            for reader in values[v].read_by:
                read_at[reader].append(i)
        found = [last.copy()]
        for t in range(1, n + 1):
            last[read_at[t - 1]] = t - 1
            if t == n:
                last[read_at[n]] = n
            found.append(last.copy())
        return found

    def _all_sweeps(self) -> list[np.ndarray]:
        problem, n = self.problem, self.problem.num_blocks
        made_for: list[list[int]] = [[] for _ in range(n + 1)]
        for k, readers in enumerate(self._first_readers):
            for reader in readers:
                made_for[reader].append(k)
        wanted, times = [0] * n, np.array([block.forward_times[0] for block in problem.blocks], np.int64)
        found = [np.zeros(1, np.int64)]
        for t in range(1, n + 1):
            for k in made_for[t - 1] + (made_for[n] if t == n else []):
                wanted[k] += 1
                times[k] = problem.blocks[k].forward_times[wanted[k]]
            found.append(np.concatenate(([0], times[:t].cumsum())))
        return found


def memory_unit(problem: Problem, *, max_bytes: int, num_levels: int) -> tuple[int, bool]:
    """Choose the unit of a memory axis of at most `num_levels`, and say whether every size is a multiple of it."""
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
            yield option.last_forward_peak_bytes


def _cumulative(numbers: list[int]) -> list[int]:
    total = [0]
    for number in numbers:
        total.append(total[-1] + number)
    return total


def _outputs_seen_from(problem: Problem, k: int, n: int) -> tuple:
    values = [problem.values[v] for v in problem.outputs[k]]
    return tuple((v.size_bytes, tuple(None if r == n else r - k for r in v.read_by)) for v in values)


def _drops(problem: Problem, k: int) -> tuple:
    """For each option the outputs of the block before that it may drop, as positions."""
    before = problem.outputs[k - 1] if k else ()
    return tuple(
        tuple(sorted(before.index(v) for v in problem.unread(k, o) if v in before))
        for o in range(len(problem.blocks[k].options))
    )
