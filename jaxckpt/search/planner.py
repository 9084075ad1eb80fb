"""From a budget to a candidate: choose one, compile it, compare, correct the prediction, choose again."""

import math

from jaxckpt.errors import BudgetError
from jaxckpt.search.analysis import Analysis
from jaxckpt.search.budget_search import FAR, FASTER, BudgetSearch
from jaxckpt.search.calibration import Calibration, add_samples, remembered
from jaxckpt.search.found import Found
from jaxckpt.search.refusal import Refusal, refuse
from jaxckpt.search.request import Request
from jaxckpt.search.surrogate import Surrogate
from jaxckpt.units import Budget

# A program that was not compiled without a plan is, if what was measured says that it may come near the budget.
_NEAR = 1.3
# Within a cost, how many more candidates are compiled where the model was too low, by how much it must be.
_MAX_LOWER, _LOWER = 3, 1.02


def search(analysis: Analysis, request: Request, cache_dir: str | None = None) -> Found:
    """Find the cheapest candidate within a budget, or the one of fewest bytes within a cost.

    Args:
        analysis: of the program.
        request: what is asked for.
        cache_dir: where the calibration record is kept; None is the user's cache directory.

    Raises:
        BudgetError: the reserve leaves nothing of the budget.
        InfeasibleBudgetError: no candidate fits.
        CompilerError: the target's compiler is not here, or failed.
    """
    return _Search(analysis, request, cache_dir).run()


class _Search:
    """One request on one analysis, with measurements of its own, so that a plan depends on nothing but its record."""

    def __init__(self, analysis: Analysis, request: Request, cache_dir: str | None):
        self.analysis, self.request, self.cache_dir = analysis, request, cache_dir
        self.candidates = analysis.all_candidates
        self.program = analysis.program.fingerprint()
        self.record = self._record()
        self.all_bytes = analysis.unplanned.judgement.peak_bytes if analysis.saves_anything else 0
        self.unplanned: int | None = None  # measured device bytes
        self.search = BudgetSearch(
            Surrogate(
                analysis.fixed_bytes,
                prior_ratio=self._prior_ratio,
                before=self._before(),
                spread=self.record.spread(self.program) if self.record else 0.0,
                unplanned_bytes=self.all_bytes,
            ),
            [c.judgement.peak_bytes for c in self.candidates],
            [analysis.extra_cost(c) / max(1, analysis.unplanned_cost) for c in self.candidates],
            self._measure,
            kinds=[analysis.kind(c) for c in self.candidates],
            prepare=lambda numbers: analysis.measure_all(self.candidates[i] for i in numbers),
            max_compiles=request.max_compiles,
            is_refused=self._is_over_on_host,
        )
        self.modelled = [math.ceil(self.search.corrected(i)) for i in range(len(self.candidates))]

    def run(self) -> Found:
        if self.request.budget is None:
            found = self._within_cost(self._unplanned_bytes())
        else:
            found = self._within_budget(self.request.budget)
        self._remember()
        return found

    def _within_budget(self, wanted: Budget) -> Found:
        if self._is_hopeless(left := (wanted.size_bytes or 0) - self.request.reserve_bytes):
            return self._least(left, self._expected_unplanned())
        certain = self.request.verify and not self._may_wait(wanted)
        unplanned = self._unplanned_bytes() if certain else self._expected_unplanned()
        budget = wanted.resolve(unplanned) - self.request.reserve_bytes
        if budget <= 0 < self.request.reserve_bytes:
            raise BudgetError(f"reserve={self.request.reserve_bytes:,} leaves nothing of the budget")
        # Of a percentage the prediction cancels out.
        is_guess = not self.request.verify and wanted.size_bytes is not None
        if (self._unplanned_at_most() if is_guess else unplanned) <= budget:
            return self._found(self._faster(budget), budget, unplanned)
        if not self.candidates or self._is_hopeless(budget):
            return self._least(budget, unplanned)
        return self._verified(budget) if self.request.verify else self._predicted(budget, unplanned)

    def _record(self) -> Calibration | None:
        """The record to plan with; None where there is none, or an empty one."""
        chosen = self.request.calibration
        if chosen == "auto" and self.analysis.is_modelled:
            chosen = remembered(self.analysis.program, self.request.target, self.cache_dir)
        return chosen if isinstance(chosen, Calibration) and chosen.samples else None

    def _prior_ratio(self, predicted_bytes: int) -> float:
        """Measured over predicted temporaries, as the record has it of other programs."""
        if self.record is None or self.record.knows(self.program):
            return 1.0
        return self.record.ratio(self.program, max(1, predicted_bytes) / max(1, self.all_bytes))

    def _before(self) -> list[tuple[int, int, float]]:
        """What the record has of this very program."""
        own = self.record.of(self.program) if self.record else ()
        places = [(s, round(s.fraction * self.all_bytes)) for s in own]
        return [(s.kind, place, place * s.ratio) for s, place in places]

    def _remember(self) -> None:
        """Add what was measured to the record on disk."""
        if self.request.calibration is None or not self.search.known or not self.analysis.is_modelled:
            return
        search, record = self.search, remembered(self.analysis.program, self.request.target, self.cache_dir)
        # How far off plans are that send values to the host says nothing of others, and the other way round.
        found = [
            (search.predicted_bytes[i] / max(1, self.all_bytes), search.ratio(i), search.kinds[i])
            for i in sorted(search.known)
            if not self.candidates[i].judgement.host_bytes
        ]
        add_samples(record, self.program, found, self.cache_dir)

    def _may_wait(self, wanted: Budget) -> bool:
        """Whether the budget is so far below what the model expects without a plan that nobody need compile that."""
        if wanted.size_bytes is None or not self.candidates:
            return False
        room = wanted.size_bytes - self.request.reserve_bytes - self.analysis.fixed_bytes
        return self._expected_unplanned() - self.analysis.fixed_bytes > FAR * max(0, room)

    def _expected_unplanned(self) -> int:
        return math.ceil(self.search.surrogate.mean(self.all_bytes))

    def _unplanned_at_most(self) -> float:
        """Device bytes that the program hardly exceeds without a plan."""
        return max(self._expected_unplanned(), self.search.surrogate.at_most(self.all_bytes, 0))

    def _unplanned_bytes(self) -> int:
        if not self.request.verify:
            return self._expected_unplanned()
        if self.unplanned is None:
            self.unplanned = self.analysis.measure(None).device_bytes
        return self.unplanned

    def _is_hopeless(self, budget: int) -> bool:
        """Whether arguments, results and gradients alone are more, which no compile need say.

        What each of several devices holds of them is known after a compile only.
        """
        return not self.analysis.program.shardings and 0 < budget < self.analysis.fixed_bytes

    def _verified(self, budget: int) -> Found:
        self.search.num_before = int(self.unplanned is not None)
        chosen = self.search.cheapest(budget)
        # The model may have been too high by so much that no plan is needed.
        may_compile = not self.search.is_stopped
        is_in_doubt = self.unplanned is None and (chosen is None or self._expected_unplanned() <= _NEAR * budget)
        is_in_doubt = is_in_doubt and may_compile
        if is_in_doubt and self._unplanned_bytes() <= budget:
            return self._found(self._faster(budget), budget, self._unplanned_bytes())
        if chosen is None:
            return self._least(budget, self._unplanned_bytes())
        return self._found(chosen, budget, self.unplanned or self._expected_unplanned())

    def _measure(self, i: int) -> int:
        candidate = self.candidates[i]
        return self.analysis.measure(candidate).device_bytes

    def _is_over_on_host(self, i: int) -> bool:
        """Whether a candidate that was measured takes more of the host than it may."""
        most = self.request.host_budget_bytes
        return (
            most is not None
            and self.candidates[i].judgement.host_bytes > 0
            and self.analysis.measure(self.candidates[i]).host_bytes > most
        )

    def _faster(self, budget: int) -> int | None:
        """The fastest plan within the budget where none is needed, if it is that much faster: loops may stack less."""
        if min(self.search.costs, default=0.0) > -FASTER:
            return None
        found = self.search.cheapest(budget) if self.request.verify else self._expected_best(budget)
        return None if found is None or self.search.costs[found] > -FASTER else found

    def _predicted(self, budget: int, unplanned: int) -> Found:
        chosen = self._expected_best(budget)
        return self._least(budget, unplanned) if chosen is None else self._found(chosen, budget, unplanned)

    def _expected_best(self, budget: int) -> int | None:
        """The cheapest candidate that is expected to fit, a margin left."""
        needed = [self._needed(i) for i in range(len(self.candidates))]
        inside = [i for i, size in enumerate(needed) if size <= budget]
        return min(inside, key=lambda i: (self.search.costs[i], needed[i]), default=None)

    def _needed(self, i: int) -> float:
        """Device bytes to leave for a candidate that is not measured."""
        return self.search.surrogate.at_most(self.search.predicted_bytes[i], self.search.kinds[i])

    def _within_cost(self, unplanned: int) -> Found:
        assert self.request.max_cost is not None
        # A limit that is another program's cost can be met exactly, whatever floats make of it.
        allowed = round((self.request.max_cost - 1) * self.analysis.unplanned_cost)
        inside = [i for i, c in enumerate(self.candidates) if self.analysis.extra_cost(c) <= allowed]
        if not inside:
            return self._found(None, None, unplanned)
        if not self.request.verify:
            return self._found(inside[0], None, unplanned)
        best = inside[0]
        identical = next((i for i in inside if self.candidates[i].is_identical), best)
        best = min(best, identical, key=self._measured_bytes)
        for _ in range(_MAX_LOWER):
            # Where the model was too low, one that it puts below what was measured may take less, and costs less.
            most = self.search.measured(best) - self.analysis.fixed_bytes
            lower = [
                i for i in inside if self.search.predicted_bytes[i] * _LOWER <= most and i not in self.search.known
            ]
            if not lower:
                break
            best = min(best, lower[-1], key=self._measured_bytes)
        return self._found(None if self._measured_bytes(best) >= unplanned else best, None, unplanned)

    def _measured_bytes(self, i: int) -> float:
        """Device bytes of a candidate; no number of them makes up for more on the host than there may be."""
        size = self.search.measured(i)
        return math.inf if self._is_over_on_host(i) else size

    def _least(self, budget: int, unplanned: int) -> Found:
        """Refuse a budget, or take the least plan that there is, if that is asked for."""
        if self.request.verify and self.candidates:
            chosen = self.search.least()
        else:
            chosen = self._expected_least() if self.candidates else None
        self._remember()
        if self.request.on_infeasible == "raise":
            refuse(self._refusal(budget, unplanned))
        if not self.candidates:
            return self._found(None, budget, unplanned)
        if self.search.least_bytes is not None:
            unplanned = self._unplanned_bytes()
        is_less = chosen is not None and self._bytes_of(chosen) < unplanned
        return self._found(chosen if is_less else None, budget, unplanned)

    def _bytes_of(self, i: int) -> int:
        """Device bytes of a candidate: measured, else expected."""
        return self.search.known.get(i, math.ceil(self.search.corrected(i)))

    def _expected_least(self) -> int:
        return min(range(len(self.candidates)), key=self.search.corrected)

    def _refusal(self, budget: int, unplanned: int) -> Refusal:
        """What to say of a budget that nothing is known to fit into."""
        search, least, candidate, expected = self.search, None, None, unplanned
        if self.candidates:
            at = min(search.known, key=lambda i: search.known[i], default=self._expected_least())
            candidate = self.candidates[at]
            # Below this an unverified plan is refused too.
            guess = math.ceil(min(map(self._needed, range(len(self.candidates)))))
            expected = min(unplanned, search.known.get(at, guess))
            if search.least_bytes is not None:
                least = expected = min(unplanned, search.least_bytes)
        elif self.unplanned is not None:
            least = self.unplanned
        return Refusal(
            analysis=self.analysis,
            candidate=candidate,
            budget_bytes=budget,
            reserve_bytes=self.request.reserve_bytes,
            least_peak_bytes=least,
            expected_least_bytes=expected,
            unplanned_peak_bytes=unplanned,
            is_measured=self.unplanned is not None,
            is_hopeless=self._is_hopeless(budget),
            max_compiles=self.request.max_compiles if search.is_stopped else None,
            num_compiles=self._num_compiles,
        )

    def _worse_on_host(self) -> int:
        """How many plans that send values to the host were compiled and take more than is predicted without."""
        sending = [i for i in self.search.known if self.candidates[i].judgement.host_bytes]
        kept = [i for i, c in enumerate(self.candidates) if not c.judgement.host_bytes]
        limits = {
            i: min((self._bytes_of(k) for k in kept if self.search.costs[k] <= self.search.costs[i]), default=None)
            for i in sending
        }
        return sum(most is not None and self.search.known[i] > most for i, most in limits.items())

    @property
    def _num_compiles(self) -> int:
        return len(self.search.known) + (self.unplanned is not None)

    def _found(self, chosen: int | None, budget: int | None, unplanned: int) -> Found:
        known = self.search.known
        expected = min((self._bytes_of(i) for i in range(len(self.candidates))), default=unplanned)
        least = self.search.least_bytes
        if least is not None or (not self.candidates and self.unplanned is not None):
            least = expected = unplanned if least is None else min(unplanned, least)
        candidate = None if chosen is None else self.candidates[chosen]
        is_measured = self.unplanned is not None if candidate is None else chosen in known
        following = None if chosen is None else self.search.following(chosen)
        worse = self._worse_on_host()
        return Found(
            analysis=self.analysis,
            candidate=candidate,
            budget_bytes=budget,
            host_budget_bytes=self.request.host_budget_bytes,
            num_worse_on_host=worse,
            max_cost=self.request.max_cost,
            unplanned_peak_bytes=unplanned,
            predicted_peak_bytes=unplanned if chosen is None else self.modelled[chosen],
            measurement=self.analysis.measure(candidate) if is_measured else None,
            next_peak_bytes=None if following is None else known.get(following),
            least_peak_bytes=least,
            expected_least_bytes=min(unplanned, expected),
            is_unplanned_measured=self.unplanned is not None,
            is_stopped=self.search.is_stopped,
            num_compiles=self._num_compiles,
            calibration=self.record.hash if self.record else None,
        )
