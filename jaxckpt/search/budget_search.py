"""A search over candidates that need ever more bytes and ever less work: the cheapest that is measured to fit."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

# A plan that uses less of its budget than this is not left before the one that follows is measured not to fit.
_TOO_LITTLE = 0.9
# What the next compile must be expected to save, as a share of the unplanned step's cost, by the compiles so far.
_WORTH = (0.0, 0.002, 0.002, 0.004, 0.005, 0.007, 0.012, 0.02, 0.04)
_MAX_COMPILES = 10
# A program is not compiled without plans where the model expects its temporaries to take this many times the room.
FAR = 2.0
# Where everything fits, plans must be modelled to take this share of the step less to be taken all the same.
FASTER = 0.05
# How many of the candidates with the least predicted bytes are compiled before a budget is called infeasible.
NUM_LEAST = 4
# Plans whose predicted bytes are this far apart hold the same buffers of the compiler's own. Over pairs of plans of one
# program on CPU and H100 the bytes of one that is 10 % to 60 % larger or smaller are then off by 2.2 and 3.1 % in the
# median, and by 3.6 % with the ratio of measured to predicted bytes instead.
_ALIKE = 1.3
# How far predictions may be off, as shares of the bytes: before anything is measured, beside a plan of another kind, of
# a plan e times as large as the nearest that is known, and of one that is all but known.
_UNKNOWN, _OTHER_KIND, _PER_FOLD, _LEAST = 0.04, 0.03, 0.08, 0.002
# What plans of one kind are off by is half of what those of another kind are, give or take as much.
_SHARED = 0.5
# A candidate that fits with less than this probability is not tried.
_LEAST_CHANCE = 0.05


def offset_at(place: float, places: Sequence[float], offsets: Sequence[float]) -> float:
    """How far measured bytes are from expected ones, from what is known of a few plans.

    A compiler's own buffers are as large in plans of like size, and a share of what much smaller ones take.

    Args:
        place: predicted bytes.
        places: `[num_known]` predicted bytes, ascending.
        offsets: `[num_known]` measured less expected bytes.
    """
    if not places:
        return 0.0
    return float(np.interp(place, places, offsets)) * min(1.0, _ALIKE * place / max(1e-9, places[0]))


class BudgetSearch:
    """Candidates from least predicted bytes to least work, and what those compiled so far measured.

    Args:
        fixed_bytes: what every candidate takes.
        predicted_bytes: `[num_candidates]` beyond that, ascending.
        costs: `[num_candidates]` work beyond the unplanned program's, as a fraction of that.
        measure: compiles a candidate and returns its device bytes.
        kinds: `[num_candidates]`; candidates of one kind are off by like bytes. Within a kind costs descend.
        expected: measured over predicted bytes to expect at a candidate before anything is measured.
        before: what was measured of the same program: kinds, predicted bytes and measured ones beyond the fixed ones.
        spread: how far from that the first one may be.
        num_before: compiles that were made already, such as that of the program without a plan.
        prepare: is told of several candidates that `measure` is about to be asked for, to compile them side by side.
    """

    def __init__(
        self,
        fixed_bytes: int,
        predicted_bytes: Sequence[int],
        costs: Sequence[float],
        measure: Callable[[int], int],
        *,
        kinds: Sequence[int] | None = None,
        expected: Callable[[int], float] = lambda predicted_bytes: 1.0,
        before: Sequence[tuple[int, int, float]] = (),
        spread: float = 0.0,
        num_before: int = 0,
        prepare: Callable[[Sequence[int]], None] = lambda numbers: None,
    ):
        self.fixed_bytes, self.predicted_bytes, self.costs = fixed_bytes, predicted_bytes, costs
        self.kinds = kinds or [0] * len(predicted_bytes)
        self.expected, self.before, self.spread, self.num_before = functools.cache(expected), before, spread, num_before
        self.known: dict[int, int] = {}  # candidate -> measured device bytes
        self._measure, self._prepare = measure, prepare
        self._known_offsets: dict[tuple[int | None, int], tuple[dict[int, float], dict[int, float]]] = {}

    def cheapest(self, budget_bytes: int) -> int | None:
        """Find the cheapest candidate worth compiling that is measured to fit; None if none does.

        The next one to compile is the one that is expected to save most, by how cheap it is and how likely it fits;
        the search ends when that is not worth a compile, and uses nine tenths of the budget unless the next one is
        measured not to fit. It depends on what was expected, on the measurements it makes, and on nothing else.
        """
        while len(self.known) < _MAX_COMPILES:
            i = self._guess(budget_bytes)
            if i is None:
                break
            self.measured(i)
        best = self._best(budget_bytes)
        if best is None:
            best = self.least()
        return best if self.known[best] <= budget_bytes else None

    def least(self) -> int:
        """Of the candidates with the least predicted bytes, the one measured least; the same ones every time."""
        least = range(min(NUM_LEAST, len(self.predicted_bytes)))
        self._prepare([i for i in least if i not in self.known])
        return min(least, key=lambda i: (self.measured(i), i))

    def measured(self, i: int) -> int:
        """Device bytes of a candidate; each is compiled once."""
        if i not in self.known:
            self.known[i] = self._measure(i)
        return self.known[i]

    def following(self, i: int) -> int | None:
        """Of the candidates that cost less, the one with the least predicted bytes; None where there is none."""
        cheaper = (j for j, cost in enumerate(self.costs) if cost < self.costs[i])
        return min(cheaper, key=lambda j: self.predicted_bytes[j], default=None)

    def corrected(self, i: int) -> float:
        """Device bytes to expect of a candidate, from what is expected of all and was measured of its neighbours."""
        return self.corrected_bytes(self.predicted_bytes[i], self.kinds[i])

    def corrected_bytes(self, predicted_bytes: int, kind: int | None = None) -> float:
        """The same of a schedule with these predicted bytes, of a kind or of any."""
        return self._expected_bytes(predicted_bytes) + self._offset(predicted_bytes, kind)[0]

    def _offset(self, predicted_bytes: int, kind: int | None) -> tuple[float, float]:
        """How far measured bytes are from expected ones, and the variance of that as a share of the bytes, squared."""
        size, found = max(1, predicted_bytes), []
        for is_other, offsets in enumerate(self._offsets(kind)):
            if offsets:
                offset = offset_at(predicted_bytes, list(offsets), list(offsets.values()))
                offset *= _SHARED if is_other else 1
                other = _OTHER_KIND + abs(offset) / size if is_other else 0.0
                found.append((offset, _LEAST**2 + _PER_FOLD**2 * _far(size, offsets) + other**2))
        if not found:
            return 0.0, _UNKNOWN**2
        # What is near says more than what is far, and what is of the same kind more than what is of another one.
        weights = sum(1 / variance for _, variance in found)
        mean = sum(offset / variance for offset, variance in found) / weights
        apart = sum(((offset - mean) / size) ** 2 / variance for offset, variance in found)
        return mean, (1 + apart) / weights

    def _offsets(self, kind: int | None) -> tuple[dict[int, float], dict[int, float]]:
        """By predicted bytes, how far measured ones are from expected ones: of this kind, and of others."""
        key = kind, len(self.known)
        if key not in self._known_offsets:
            measured = [(self.kinds[i], self.predicted_bytes[i], self.known[i] - self.fixed_bytes) for i in self.known]
            same, others = {}, {}
            for k, p, size in sorted([*self.before, *measured], key=lambda x: x[1]):
                (same if kind in (None, k) else others)[p] = size + self.fixed_bytes - self._expected_bytes(p)
            self._known_offsets[key] = same, others
        return self._known_offsets[key]

    def _expected_bytes(self, predicted_bytes: int) -> float:
        return self.fixed_bytes + predicted_bytes * self.expected(predicted_bytes)

    def ratio(self, i: int) -> float:
        """Measured over predicted bytes of a candidate that was measured."""
        return (self.known[i] - self.fixed_bytes) / max(1, self.predicted_bytes[i])

    def _best(self, budget_bytes: int) -> int | None:
        """The cheapest candidate that was measured to fit."""
        fits = [i for i, size in self.known.items() if size <= budget_bytes]
        return min(fits, key=lambda i: (self.costs[i], self.known[i]), default=None)

    def _guess(self, budget_bytes: int) -> int | None:
        """The candidate that is worth most to compile next; None where none is worth it."""
        best = self._best(budget_bytes)
        cheaper = [i for i in range(len(self.costs)) if best is None or self.costs[i] < self.costs[best]]
        chances = {i: self._chance(i, budget_bytes) for i in cheaper if i not in self.known}
        likely = {i: chance for i, chance in chances.items() if chance >= _LEAST_CHANCE}
        if best is None:
            found = self._expected_to_fit(likely)
            found = max(likely, key=lambda i: likely[i], default=0) if found is None else found
            return found if found in chances else None
        saved = {i: chance * (self.costs[best] - self.costs[i]) for i, chance in likely.items()}
        found = max(saved, key=lambda i: saved[i], default=None)
        if found is not None and saved[found] >= _WORTH[min(len(self.known) + self.num_before, len(_WORTH) - 1)]:
            return found
        if self.known[best] >= _TOO_LITTLE * budget_bytes:
            return None
        following = self._expected_to_fit(chances)
        following = self.following(best) if following is None else following
        return None if following in self.known else following

    def _expected_to_fit(self, chances: dict[int, float]) -> int | None:
        """The cheapest candidate that is more likely to fit than not."""
        expected = (i for i, chance in chances.items() if chance >= 0.5)
        return min(expected, key=lambda i: self.costs[i], default=None)

    def _chance(self, i: int, budget_bytes: int) -> float:
        """How likely a candidate fits, from how far it is from those that are known."""
        offset, variance = self._offset(self.predicted_bytes[i], self.kinds[i])
        size = self._expected_bytes(self.predicted_bytes[i]) + offset - self.fixed_bytes
        margin = 0.0 if self.known else self.spread
        room = budget_bytes - self.fixed_bytes
        off = (room - size * (1 + margin)) / max(1e-9, abs(size) * math.sqrt(variance))
        # Student's distribution with two degrees of freedom: errors many times the usual one are rare, but there are.
        return 0.5 + off / (2 * math.sqrt(2 + off * off))


def _far(size: int, places: Iterable[int]) -> float:
    """How far a size is from the nearest that are known, in e-folds: a walk's way beyond them, a bridge's between."""
    folds = [math.log(max(1, place) / size) for place in places]
    sides = [x for x in folds if x >= 0], [-x for x in folds if x <= 0]
    return 1 / sum(1 / max(1e-9, min(side)) for side in sides if side)
