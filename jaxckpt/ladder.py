"""A search over candidates that need ever more bytes and ever less work: the cheapest that is measured to fit."""

from collections.abc import Callable, Sequence

import numpy as np

# A candidate that uses this share of its budget is not worth another compile, one below the other is.
_ENOUGH, _TOO_LITTLE = 0.99, 0.9
# From this share of the temporaries' room on, how much of the unplanned step's cost the next guess must save, by the
# compiles so far; below it, any guess that saves something is tried.
_MOSTLY, _WORTH = 0.95, (0.0, 0.003, 0.01)
# A guess that is this much too large may fit all the same, and is tried where it saves as much.
_NEAR = 0.03
_MAX_COMPILES = 10
# A program is not compiled without plans where the model expects its temporaries to take this many times the room.
FAR = 2.0
# How many of the candidates with the least predicted bytes are compiled before a budget is called infeasible.
NUM_LEAST = 4
# Room left when the guess before was too large: the next one should fit.
_AFTER_MISS = 0.01
# Plans whose predicted bytes are this far apart hold the same buffers of the compiler's own. Over pairs of plans of one
# program on CPU and H100 the bytes of one that is 10 % to 60 % larger or smaller are then off by 2.2 and 3.1 % in the
# median, and by 3.6 % with the ratio of measured to predicted bytes instead.
_ALIKE = 1.3


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


class Ladder:
    """Candidates from least predicted bytes to least work, and what those compiled so far measured.

    Args:
        fixed_bytes: what every candidate takes.
        predicted_bytes: `[num_candidates]` beyond that, ascending.
        costs: `[num_candidates]` work beyond the unplanned program's, as a fraction of that, descending.
        measure: compiles a candidate and returns its device bytes.
        expected: measured over predicted bytes to expect at a candidate before anything is measured.
        certain: predicted bytes at which that was measured of the same program.
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
        expected: Callable[[int], float] = lambda predicted_bytes: 1.0,
        certain: Sequence[float] = (),
        spread: float = 0.0,
        num_before: int = 0,
        prepare: Callable[[Sequence[int]], None] = lambda numbers: None,
    ):
        self.fixed_bytes, self.predicted_bytes, self.costs = fixed_bytes, predicted_bytes, costs
        self.expected, self.certain, self.spread, self.num_before = expected, certain, spread, num_before
        self.known: dict[int, int] = {}  # candidate -> measured device bytes
        self._measure, self._prepare = measure, prepare

    def cheapest(self, budget_bytes: int) -> int | None:
        """Find the last candidate worth compiling that is measured to fit; None if none does.

        It uses nine tenths of the budget, or the next one is measured not to fit, unless that takes too many compiles.
        It depends on what was expected, on the measurements it makes, and on nothing else.
        """
        fits = max((i for i, size in self.known.items() if size <= budget_bytes), default=-1)
        over = min((i for i in self.known if i > fits), default=len(self.predicted_bytes))
        while over - fits > 1 and len(self.known) < _MAX_COMPILES:
            i = self._guess(fits, over, budget_bytes)
            if i is None or self._is_enough(fits, i, budget_bytes):
                break
            if self.measured(i) <= budget_bytes:
                fits = i
            else:
                over = i
        if fits < 0:
            fits = self.least()
        return fits if self.known[fits] <= budget_bytes else None

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

    def corrected(self, i: int) -> float:
        """Device bytes to expect of a candidate, from what is expected of all and was measured of its neighbours."""
        return self.corrected_bytes(self.predicted_bytes[i])

    def corrected_bytes(self, predicted_bytes: int) -> float:
        """The same of a schedule with these predicted bytes."""
        offsets = dict.fromkeys(self.certain, 0.0)
        for i, measured in self.known.items():
            offsets[self.predicted_bytes[i]] = measured - self._expected_bytes(self.predicted_bytes[i])
        places = sorted(offsets) if self.known else []
        return self._expected_bytes(predicted_bytes) + offset_at(predicted_bytes, places, [offsets[p] for p in places])

    def _expected_bytes(self, predicted_bytes: int) -> float:
        return self.fixed_bytes + predicted_bytes * self.expected(predicted_bytes)

    def ratio(self, i: int) -> float:
        """Measured over predicted bytes of a candidate that was measured."""
        return (self.known[i] - self.fixed_bytes) / max(1, self.predicted_bytes[i])

    def _guess(self, fits: int, over: int, budget_bytes: int) -> int | None:
        """The cheapest candidate between the two that should fit; None where none is worth trying."""
        margin = self.spread if not self.known else _AFTER_MISS if fits < 0 else 0.0
        room = budget_bytes - self.fixed_bytes
        inside = [i for i in range(fits + 1, over) if (self.corrected(i) - self.fixed_bytes) * (1 + margin) <= room]
        if inside:
            return inside[-1]
        # The correction says that nothing more fits. Where much is left, or much to be won, one step further shows it.
        if fits >= 0:
            is_near = self.corrected(fits + 1) - self.fixed_bytes <= room * (1 + _NEAR)
            worth = _WORTH[min(len(self.known), len(_WORTH) - 1)] if self._used(fits, budget_bytes) >= _MOSTLY else 0.0
            is_cheap = self.costs[fits] - self.costs[fits + 1] >= worth
            return fits + 1 if self.known[fits] < _TOO_LITTLE * budget_bytes or (is_near and is_cheap) else None
        return None if 0 in self.known else 0

    def _used(self, i: int, budget_bytes: int) -> float:
        """The share of the temporaries' room that a candidate was measured to take."""
        return (self.known[i] - self.fixed_bytes) / max(1, budget_bytes - self.fixed_bytes)

    def _is_enough(self, fits: int, following: int, budget_bytes: int) -> bool:
        """Whether the candidate that fits is so good that the following one is not worth a compile."""
        if fits < 0 or self.known[fits] < _TOO_LITTLE * budget_bytes:
            return False
        saved = self.costs[fits] - self.costs[following]
        used = self._used(fits, budget_bytes)
        is_late = len(self.known) + self.num_before >= len(_WORTH)
        return is_late or used >= _ENOUGH or (used >= _MOSTLY and saved < _WORTH[len(self.known)])
