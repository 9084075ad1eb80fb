"""A search over candidates that need ever more bytes and ever less work: the cheapest that is measured to fit."""

from collections.abc import Callable, Iterable, Sequence

from jaxckpt.search.surrogate import Surrogate

# A plan that uses less of its budget than this is not left before the one that follows is measured not to fit.
_TOO_LITTLE = 0.9
# What the next compile must be expected to save, as a share of the unplanned step's cost, by the compiles so far.
# On the measured plans of nine models on CPU, at their policies' peaks and forty other budgets each, the search takes
# 2.3 compiles and ends 0.39 % of the step above the cheapest plan that fits. One that never looks beyond a plan that
# did not fit, nor at plans that are dominated by prediction, took 2.0 and ended 0.97 % above. With a record of what was
# measured at other budgets: 1.7 compiles and 0.19 %, against 1.6 and 0.54 %.
_WORTH = (0.0, 0.002, 0.002, 0.004, 0.005, 0.007, 0.012, 0.02, 0.04)
_MAX_COMPILES = 10
# A program is not compiled without plans where the model expects its temporaries to take this many times the room.
FAR = 2.0
# Where everything fits, plans must be modelled to take this share of the step less to be taken all the same.
# Medians of interleaved runs on two CPU cores, modelled and measured: scanned GPT-2 -9.5 and -12 %, scanned Llama -8.1
# and -13 %, the neural ODE -16 and -21 %.
FASTER = 0.05
# How many of the candidates with the least predicted bytes are compiled before a budget is called infeasible, how many
# more at most, and how likely one of those must be to take less.
NUM_LEAST, _MORE_LEAST, _LESS_CHANCE = 4, 4, 0.25
# A candidate that fits with less than this probability is not tried.
_LEAST_CHANCE = 0.05


class BudgetSearch:
    """Candidates from least predicted bytes to least work, and what those compiled so far measured.

    Args:
        surrogate: what bytes to expect of a candidate; it learns what is measured.
        predicted_bytes: `[num_candidates]` beyond the fixed ones, ascending.
        costs: `[num_candidates]` work beyond the unplanned program's, as a fraction of that.
        measure: compiles a candidate and returns its device bytes.
        kinds: `[num_candidates]`; candidates of one kind are off by like bytes. Within a kind costs descend.
        num_before: compiles that were made already, such as that of the program without a plan.
        prepare: is told of several candidates that `measure` is about to be asked for, to compile them side by side.
        max_compiles: after so many, those before included, the search stops with what it has.
        is_refused: whether a candidate that was measured is not to be chosen whatever it takes of the device.

    Attributes:
        known: measured device bytes by candidate.
        is_stopped: whether `max_compiles` ended a search that would have gone on.
        least_bytes: the least device bytes, once `least` has found them.
    """

    def __init__(
        self,
        surrogate: Surrogate,
        predicted_bytes: Sequence[int],
        costs: Sequence[float],
        measure: Callable[[int], int],
        *,
        kinds: Sequence[int] | None = None,
        num_before: int = 0,
        prepare: Callable[[Sequence[int]], None] = lambda numbers: None,
        max_compiles: int | None = None,
        is_refused: Callable[[int], bool] = lambda i: False,
    ):
        self.is_refused = is_refused
        self.surrogate, self.predicted_bytes, self.costs = surrogate, predicted_bytes, costs
        self.kinds = kinds or [0] * len(predicted_bytes)
        self.num_before = num_before
        self.known: dict[int, int] = {}
        self.max_compiles, self.is_stopped = max_compiles, False
        self.least_bytes: int | None = None
        self._measure, self._prepare = measure, prepare

    def cheapest(self, budget_bytes: int) -> int | None:
        """Find the cheapest candidate worth compiling that is measured to fit; None if none does.

        The next one to compile is that of largest expected improvement: what it costs less than the best so far, times
        the probability that it fits. The search ends when that is not worth a compile, and uses nine tenths of the
        budget unless the next one is measured not to fit. It depends on what was expected, on the measurements it
        makes, and on nothing else.
        """
        while len(self.known) < _MAX_COMPILES:
            i = self._guess(budget_bytes)
            if i is None and self._best(budget_bytes) is None and self.least_bytes is None and not self.is_stopped:
                # Where that is infeasible it is known now; where not, there may be something cheaper.
                self.least()
            elif i is None or not self._may_compile():
                break
            else:
                self.measured(i)
        if self._best(budget_bytes) is None and self.least_bytes is None:
            self.least()
        return self._best(budget_bytes)

    def least(self) -> int | None:
        """Of the candidates with the least predicted bytes, the one measured least; the same ones every time.

        More are compiled as long as one is not unlikely to take less. That depends on what is measured here and on
        nothing else, so that the least has the same bytes whatever was asked for before. None where nothing is known
        because `max_compiles` forbids it.
        """
        own = self.surrogate.fresh()
        first = range(min(NUM_LEAST, len(self.predicted_bytes)))
        self._prepare([i for i in first if i not in self.known][: self._num_left()])
        numbers: list[int] = []
        following: int | None = 0
        while following is not None:
            if following not in self.known and not self._may_compile():
                return self._least_of(self.known)
            own.observe(self.predicted_bytes[following], self.kinds[following], self.measured(following))
            numbers.append(following)
            following = len(numbers) if len(numbers) < len(first) else self._may_be_less(numbers, own)
        found = self._least_of(numbers)
        self.least_bytes = self.known[found] if found is not None else min(self.known[i] for i in numbers)
        return found

    def _least_of(self, numbers: Iterable[int]) -> int | None:
        return min((i for i in numbers if not self.is_refused(i)), key=lambda i: (self.known[i], i), default=None)

    def _may_be_less(self, numbers: Sequence[int], own: Surrogate) -> int | None:
        """The candidate that is most likely to take less than these; None where none is likely enough."""
        if len(numbers) >= NUM_LEAST + _MORE_LEAST:
            return None
        least = min(self.known[i] for i in numbers)
        chances = {
            i: own.chance(size, self.kinds[i], least - 1)
            for i, size in enumerate(self.predicted_bytes)
            if i not in numbers
        }
        found = max(chances, key=lambda i: chances[i], default=None)
        return None if found is None or chances[found] < _LESS_CHANCE else found

    def _num_left(self) -> int:
        """How many may still be compiled."""
        if self.max_compiles is None:
            return len(self.predicted_bytes)
        return max(0, self.max_compiles - self.num_before - len(self.known))

    def _may_compile(self) -> bool:
        self.is_stopped = self.is_stopped or not self._num_left()
        return not self.is_stopped

    def measured(self, i: int) -> int:
        """Device bytes of a candidate; each is compiled once."""
        if i not in self.known:
            self.observe(i, self._measure(i))
        return self.known[i]

    def observe(self, i: int, device_bytes: int) -> None:
        """Learn what a candidate measured."""
        self.known[i] = device_bytes
        self.surrogate.observe(self.predicted_bytes[i], self.kinds[i], device_bytes)

    def following(self, i: int) -> int | None:
        """Of the candidates that cost less, the one with the least predicted bytes; None where there is none."""
        cheaper = (j for j, cost in enumerate(self.costs) if cost < self.costs[i])
        return min(cheaper, key=lambda j: self.predicted_bytes[j], default=None)

    def corrected(self, i: int) -> float:
        """Device bytes to expect of a candidate, from what is expected of all and was measured of its neighbours."""
        return self.surrogate.mean(self.predicted_bytes[i], self.kinds[i])

    def ratio(self, i: int) -> float:
        """Measured over predicted bytes of a candidate that was measured."""
        return (self.known[i] - self.surrogate.fixed_bytes) / max(1, self.predicted_bytes[i])

    def _best(self, budget_bytes: int) -> int | None:
        """The cheapest candidate that was measured to fit."""
        fits = [i for i, size in self.known.items() if size <= budget_bytes and not self.is_refused(i)]
        return min(fits, key=lambda i: (self.costs[i], self.known[i]), default=None)

    def _guess(self, budget_bytes: int) -> int | None:
        """The candidate of largest expected improvement; None where none is worth a compile."""
        best = self._best(budget_bytes)
        cheaper = [i for i in range(len(self.costs)) if best is None or self.costs[i] < self.costs[best]]
        chances = {
            i: self.surrogate.chance(self.predicted_bytes[i], self.kinds[i], budget_bytes)
            for i in cheaper
            if i not in self.known
        }
        likely = {i: chance for i, chance in chances.items() if chance >= _LEAST_CHANCE}
        if best is None:
            found = self._expected_to_fit(likely)
            if found is None and not self.known:
                found = max(likely, key=lambda i: likely[i], default=None)
            return found
        improvement = {i: chance * (self.costs[best] - self.costs[i]) for i, chance in likely.items()}
        found = max(improvement, key=lambda i: improvement[i], default=None)
        if found is not None and improvement[found] >= _WORTH[min(len(self.known) + self.num_before, len(_WORTH) - 1)]:
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
