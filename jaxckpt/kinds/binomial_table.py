"""Where the states of a binomial loop go, as tables whose size does not depend on how often iterations run again.

A part of the loop is reversed from the state in front of it: that runs forward to the part's last iteration, and states
are held where the binomial schedule splits what is left. The last iteration is reversed first, and then, from the last
to the first, the parts between the states, each of which may run again once less. Parts that are equally long, have as
many states and may run again as often are reversed equally, so each of these is worked out once.

Source: Griewank and Walther, "Algorithm 799: revolve", 2000.
"""

import functools
from dataclasses import dataclass

import numpy as np
from ckptsolvers.revolve import num_forwards, num_repeats, split_length

# A part: how many iterations, and how many states, the one in front of it among them.
_Part = tuple[int, int]


@dataclass(frozen=True, slots=True)
class BinomialTable:
    """Where states go, in the order in which iterations run; slot `num_states` holds whatever came last.

    A part that may hold k states starts from slot k - 1. It holds the state at its first stop in slot k - 2, the one at
    its second in slot k - 3, and so on.

    Attributes:
        first: `[n]`, the slot of the state in front of each iteration in the forward loop.
        restored: `[n]`, the slot from which an iteration's backward starts.
        start: `[n]`, the iteration that the state in that slot stands in front of.
        stop: `[n]`, where the stops of the part that starts there begin in `stops`.
        stops: how many iterations after its start a part holds states, ascending, and -1 after the last one.
    """

    first: np.ndarray
    restored: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    stops: np.ndarray


@functools.lru_cache(maxsize=64)
def binomial_table(length: int, num_states: int) -> BinomialTable:
    """The table of a loop, made in time and space that hardly depend on how often iterations run again.

    Args:
        length: n, at least 1.
        num_states: states held at once, the initial one included; from 1 to n.
    """
    repeats = num_repeats(length, num_states)
    whole = (length, num_states)
    levels: list[dict[_Part, np.ndarray]] = [{} for _ in range(repeats + 1)]
    levels[repeats][whole] = _splits(whole, repeats)
    for r in range(repeats, 0, -1):
        for (_, c), lengths in levels[r].items():
            for i in np.flatnonzero(lengths > 1).tolist():
                part = (int(lengths[i]), c - i)
                if part not in levels[r - 1]:
                    levels[r - 1][part] = _splits(part, r - 1)
    stops: list[np.ndarray] = []
    num_stops = 0
    inner: dict[_Part, np.ndarray] = {}
    for level in levels:
        made = {}
        for part, lengths in level.items():
            made[part] = _reversal(part, lengths, num_stops, inner)
            stops.append(np.append(np.cumsum(lengths)[:-1], -1))
            num_stops += len(stops[-1])
        inner = made
    start, restored, stop = inner[whole]
    first = np.full(length, num_states, np.int32)
    held = np.concatenate([[0], stops[-1][:-1]])
    first[held] = num_states - 1 - np.arange(len(held))
    # The forward loop runs the last iteration too, and its state is there still: nothing was written since.
    start[-1], restored[-1] = length - 1, first[-1]
    return BinomialTable(first, restored, start, stop, np.concatenate(stops).astype(np.int32))


def num_again(length: int, num_states: int) -> int:
    """How many iterations the backward loop runs again to reach the states it has not held."""
    return num_forwards(length, num_states) - (length - 1)


def _splits(part: _Part, repeats: int) -> np.ndarray:
    """Lengths of the parts between a part's states: all of its iterations but the last one."""
    length, c = part
    if repeats == 1:
        return np.ones(length - 1, np.int64)
    lengths = []
    while length > 1:
        lengths.append(split_length(length, c, repeats))
        length, c = length - lengths[-1], c - 1
    return np.asarray(lengths, np.int64)


def _reversal(part: _Part, lengths: np.ndarray, stop: int, inner: dict[_Part, np.ndarray]) -> np.ndarray:
    """Of each iteration the start, the slot and the stops, `[3, n]`; starts count from the part's own."""
    n, c = part
    table = np.zeros((3, n), np.int32)
    begins = np.cumsum(lengths) - lengths
    table[0, :-1] = np.repeat(begins, lengths)
    # Parts of one iteration have no stops.
    table[1, begins] = c - 1 - np.arange(len(begins))
    for i in np.flatnonzero(lengths > 1).tolist():
        begin, end = int(begins[i]), int(begins[i] + lengths[i])
        start, table[1, begin:end], table[2, begin:end] = inner[int(lengths[i]), c - i]
        table[0, begin:end] += start
    table[:, -1] = 0, c - 1, stop
    return table
