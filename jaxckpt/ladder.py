"""A search over candidates that need ever more bytes and ever less work: the cheapest that is measured to fit."""

from collections.abc import Callable, Sequence

# A candidate that uses this share of its budget is not worth another compile.
_ENOUGH = 0.99
_MAX_COMPILES = 10
# How many of the candidates with the least predicted bytes are compiled before a budget is called infeasible.
_NUM_LEAST = 4


class Ladder:
    """Candidates from least predicted bytes to least work, and what those compiled so far measured.

    Args:
        fixed_bytes: what every candidate takes.
        predicted_bytes: `[num_candidates]` beyond that, ascending.
        measure: compiles a candidate and returns its device bytes.
    """

    def __init__(self, fixed_bytes: int, predicted_bytes: Sequence[int], measure: Callable[[int], int]):
        self.fixed_bytes, self.predicted_bytes = fixed_bytes, predicted_bytes
        self.known: dict[int, int] = {}  # candidate -> measured device bytes
        self._measure = measure

    def cheapest(self, budget_bytes: int) -> int | None:
        """Find the last candidate before one that is measured not to fit, or the least one; None if that is too large.

        It depends on the measurements it makes and on nothing else.
        """
        fits, over = -1, len(self.predicted_bytes)
        while over - fits > 1 and len(self.known) < _MAX_COMPILES:
            i = self._guess(fits, over, budget_bytes)
            if i is None:
                break
            if self.measured(i) <= budget_bytes:
                fits = i
                if self.known[i] >= _ENOUGH * budget_bytes:
                    break
            else:
                over = i
        if fits < 0:
            fits = self.least()
        return fits if self.known[fits] <= budget_bytes else None

    def least(self) -> int:
        """Of the candidates with the least predicted bytes, the one measured least; the same ones every time."""
        return min(range(min(_NUM_LEAST, len(self.predicted_bytes))), key=lambda i: (self.measured(i), i))

    def measured(self, i: int) -> int:
        """Device bytes of a candidate; each is compiled once."""
        if i not in self.known:
            self.known[i] = self._measure(i)
        return self.known[i]

    def corrected(self, i: int) -> float:
        """Predicted device bytes, temporaries scaled as those of the nearest measured candidates were."""
        predicted = self.predicted_bytes[i]
        if not self.known:
            return self.fixed_bytes + predicted
        below = max((k for k in self.known if k <= i), default=None)
        above = min((k for k in self.known if k >= i), default=None)
        if below is None or above is None or below == above:
            nearest = above if below is None else below
            assert nearest is not None
            return self.fixed_bytes + predicted * self._ratio(nearest)
        low, high = self.predicted_bytes[below], self.predicted_bytes[above]
        share = (predicted - low) / max(1, high - low)
        return self.fixed_bytes + predicted * (self._ratio(below) * (1 - share) + self._ratio(above) * share)

    def _ratio(self, i: int) -> float:
        return (self.known[i] - self.fixed_bytes) / max(1, self.predicted_bytes[i])

    def _guess(self, fits: int, over: int, budget_bytes: int) -> int | None:
        """The cheapest candidate between the two that should fit, by the prediction corrected by what was measured."""
        inside = [i for i in range(fits + 1, over) if self.corrected(i) <= budget_bytes]
        if inside:
            return inside[-1]
        # The correction says that nothing more fits: one step further shows it, or the least one does.
        if fits >= 0:
            return fits + 1
        return None if 0 in self.known else 0
