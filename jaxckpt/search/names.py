"""From a budget to the names to save: judged by what is done again, and confirmed by the compiler.

Which choices are worth a compile is decided as in `budget_search`, by what is expected of their bytes. What a name
holds is known exactly, and what a compiler makes of it nearly: where a value is saved, the buffer goes that it was made
again in. So the error of each name is a random variable in proportion to its bytes, correlated with those of the
others, and every measurement says something about all choices (a Gaussian process with a linear kernel).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from ckptsolvers.names import (
    MOST_JUDGED,
    NameChoice,
    NameProblem,
    all_name_choices,
    judge_names,
    name_bytes,
    solve_names,
)

from jaxckpt.compilation.measure import Measurement
from jaxckpt.errors import BudgetError, InfeasibleBudgetError
from jaxckpt.units import Budget, short_bytes, show_bytes

# Names that are saved; `WRITTEN` and `WITHOUT` stand for regions as they are written, and for none.
Treatment = frozenset[str] | str
WRITTEN, WITHOUT = "written", "without"

# Choices are compiled at most so many times, by default.
_MOST_COMPILES = 14
# What a compiler makes of a name's bytes is off by such a share, of its own and with all others.
_OWN_ERROR, _COMMON_ERROR, _NOISE = 0.15, 0.25, 0.005
# A cheaper choice that fits with less probability than this is not compiled: among the first compiles, and later.
_LEAST_CHANCE, _LATE_CHANCE, _MANY_COMPILES = 0.05, 0.2, 8
# What is left of a budget where nothing is measured, of what is predicted.
_UNVERIFIED_MARGIN = 0.1
# Of the choices that hold less than nothing saved, so many are tried where that does not fit.
_NUM_LEAST = 3


class Subject(Protocol):
    """A function or a step, differentiated, with its regions under any treatment."""

    def measure(self, treatment: Treatment) -> Measurement:
        """Compile it for the target."""
        ...

    def predict(self, treatment: Treatment) -> int:
        """Device bytes from the model."""
        ...

    def written_names(self) -> frozenset[str] | None:
        """The names that its regions save as they are written, where they save nothing else."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class NamesRequest:
    """What is asked for; see `jaxckpt.names` for each."""

    budget: Budget
    reserve_bytes: int = 0
    verify: bool = True
    max_compiles: int | None = None
    on_infeasible: str = "raise"

    def predicted(self) -> "NamesRequest":
        """The same without compiles."""
        return replace(self, verify=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundNames:
    """What a search returns.

    Attributes:
        choice: the names to save.
        budget_bytes: what they had to fit.
        measurement: of them; None where nothing was compiled.
        predicted_bytes: what was expected of them before they were measured.
        written: of the program as it is written; None where that was not compiled.
        unplanned_bytes: without the program's own checkpoints.
        is_unplanned_measured: or predicted.
        least_bytes: the least that was measured, or predicted where nothing was.
        bound_work: no choice that is expected to fit costs less.
        num_judged: how many choices were judged; None for branch and bound.
        is_stopped: whether `max_compiles` ended a search that would have gone on.
        num_compiles: how many programs were compiled.
    """

    choice: NameChoice
    budget_bytes: int
    measurement: Measurement | None
    predicted_bytes: int
    written: Measurement | None
    unplanned_bytes: int
    is_unplanned_measured: bool
    least_bytes: int
    bound_work: float
    num_judged: int | None
    is_stopped: bool
    num_compiles: int


def search_names(problem: NameProblem, subject: Subject, request: NamesRequest) -> FoundNames:
    """Find the names to save with the least work that the compiler confirms to fit.

    Raises:
        InfeasibleBudgetError: no choice fits.
        BudgetError: the reserve leaves nothing.
    """
    return _Search(problem, subject, request).run()


class _Search:
    def __init__(self, problem: NameProblem, subject: Subject, request: NamesRequest):
        self.problem, self.subject, self.request = problem, subject, request
        self.nothing = judge_names(problem, ())
        self.all = all_name_choices(problem) if len(problem.names) <= MOST_JUDGED else None
        self.sizes: dict[Treatment, Measurement] = {}
        self.known: dict[tuple[int, ...], NameChoice] = {}
        self.expected: dict[tuple[int, ...], float] = {}  # before they were measured
        self.written: Measurement | None = None
        self.is_stopped = False
        self.bound_work = math.inf

    def run(self) -> FoundNames:
        unplanned = self._unplanned()
        budget = self.request.budget.resolve(unplanned) - self.request.reserve_bytes
        if budget <= 0:
            raise BudgetError(f"reserve={self.request.reserve_bytes:,} leaves nothing of the budget")
        if not self.request.verify:
            return self._predicted(budget, unplanned)
        self._measure(self.nothing)
        self.surrogate = _Surrogate(self.problem, self.nothing, self._bytes(self.nothing))
        self._measure_written()
        fits = [c for c in self.known.values() if self._bytes(c) <= budget]
        best = self._improved(budget, min(fits, key=lambda c: c.work, default=None))
        if best is None:
            best = self._least(budget, unplanned)
        expected = self.expected.get(best.saved, self._bytes(best))
        return self._found(best, budget, unplanned, self.sizes[self._names(best)], round(expected))

    def _measure_written(self) -> None:
        """Measure the program as it is written; where that is one of the choices, it tells about the others."""
        if not self._may_compile(stops=False):
            return
        names = self.subject.written_names()
        if names is None:
            self.written = self.sizes[WRITTEN] = self.subject.measure(WRITTEN)
            return
        numbers = [i for i, name in enumerate(self.problem.names) if name in names]
        choice = judge_names(self.problem, numbers)
        if choice.saved not in self.known:
            self._measure(choice)
        self.written = self.sizes[self._names(choice)]

    def _improved(self, budget: int, best: NameChoice | None) -> NameChoice | None:
        """The cheapest choice that is measured to fit, and that no cheaper one is likely to."""
        while (choice := self._next(budget, best)) is not None:
            if not self._may_compile():
                self.bound_work = min(self.bound_work, choice.work)  # nobody knows whether it fits
                break
            self._measure(choice)
            if self._bytes(choice) <= budget and (best is None or choice.work < best.work):
                best = choice
        if best is not None:
            self.bound_work = min(self.bound_work, best.work)
        return best

    def _next(self, budget: int, best: NameChoice | None) -> NameChoice | None:
        """The next choice to compile: the cheapest that is expected to fit, then those that may fit yet."""
        if self.all is None:
            return self._next_bounded(budget, best)
        open_ = [c for c in self.all if c.saved not in self.known and (best is None or c.work < best.work)]
        expected = [self.surrogate.expected(c) for c in open_]
        for choice, size in zip(open_, expected, strict=True):
            if size <= budget:
                return choice
        chances = [self.surrogate.chance(c, budget) for c in open_]
        likely = max(range(len(open_)), key=chances.__getitem__, default=None)
        return None if likely is None or chances[likely] < self._least_chance else open_[likely]

    @property
    def _least_chance(self) -> float:
        return _LEAST_CHANCE if len(self.known) < _MANY_COMPILES else _LATE_CHANCE

    def _next_bounded(self, budget: int, best: NameChoice | None) -> NameChoice | None:
        for spread in (0.0, 1.5):
            problem, most = self.surrogate.scaled(budget, spread)
            answer = solve_names(problem, most_bytes=most, without=self.known)
            if not spread:
                self.bound_work = answer.bound_work
            if answer.choice is None:
                continue
            choice = judge_names(self.problem, answer.choice.saved)
            is_better = choice.saved not in self.known and (best is None or choice.work < best.work)
            if is_better and (not spread or self.surrogate.chance(choice, budget) >= self._least_chance):
                return choice
        return None

    def _least(self, budget: int, unplanned: int) -> NameChoice:
        """The choice with the least bytes, or a refusal of the budget."""
        less = [c for c in self.all or () if c.held_bytes < self.nothing.held_bytes]
        candidates = sorted(less, key=lambda c: (self.surrogate.expected(c), c.work))
        for choice in candidates[:_NUM_LEAST]:
            if choice.saved not in self.known and self._may_compile():
                self._measure(choice)
        least = min(self.known.values(), key=lambda c: (self._bytes(c), c.work))
        if self.request.on_infeasible == "raise" and self._bytes(least) > budget:
            self._refuse(budget, self._bytes(least), unplanned)
        self.bound_work = min(self.bound_work, least.work)
        return least

    def _predicted(self, budget: int, unplanned: int) -> FoundNames:
        """The cheapest choice that is predicted to fit, a margin left."""
        nothing = self.subject.predict(frozenset())
        expected = lambda c: nothing + c.held_bytes - self.nothing.held_bytes  # noqa: E731
        room = math.floor(budget / (1 + _UNVERIFIED_MARGIN))
        most = room - nothing + self.nothing.held_bytes
        if self.all is not None:
            best = next((c for c in self.all if c.held_bytes <= most), None)
            self.bound_work = best.work if best else math.inf
        else:
            answer = solve_names(self.problem, most_bytes=most)
            best, self.bound_work = answer.choice, answer.bound_work
        if best is None:
            if self.request.on_infeasible == "raise":
                self._refuse(budget, nothing, unplanned)
            best = self.nothing
        return self._found(best, budget, unplanned, None, expected(best), nothing)

    def _refuse(self, budget: int, least: int, unplanned: int) -> None:
        """Say that no choice fits.

        Raises:
            InfeasibleBudgetError: always.
        """
        label = "measured" if self.sizes else "predicted"
        needed = math.ceil(least * (1 if self.sizes else 1 + _UNVERIFIED_MARGIN))
        shown = show_bytes(least) if self.sizes else f"about {short_bytes(needed)}"
        asked = budget + self.request.reserve_bytes
        raise InfeasibleBudgetError(
            f"no choice of names fits budget={show_bytes(asked)}. The least is {shown} ({label}, {len(self.sizes)} "
            f"compiles); without the function's own jax.checkpoint calls it takes {short_bytes(unplanned)}. The "
            "regions stay as they are written; jaxckpt.plan with keep_checkpoints=False chooses others",
            budget_bytes=budget,
            least_peak_bytes=least if self.sizes else None,
            expected_least_bytes=needed,
            unplanned_peak_bytes=unplanned,
            measured=WITHOUT in self.sizes,
            num_compiles=len(self.sizes),
            forced_by=(("the program with none of the names saved", least, ""),),
        )

    def _unplanned(self) -> int:
        """Device bytes without the program's own checkpoints; a share of a budget is one of them."""
        if not self.request.verify or self.request.budget.share is None:
            return self.subject.predict(WITHOUT)
        self.sizes[WITHOUT] = self.subject.measure(WITHOUT)
        return self.sizes[WITHOUT].device_bytes

    def _measure(self, choice: NameChoice) -> None:
        self.known[choice.saved] = choice
        found = self.sizes[self._names(choice)] = self.subject.measure(self._names(choice))
        if choice is not self.nothing:
            self.expected[choice.saved] = self.surrogate.expected(choice)
            self.surrogate.observe(choice, found.device_bytes)

    def _bytes(self, choice: NameChoice) -> int:
        return self.sizes[self._names(choice)].device_bytes

    def _names(self, choice: NameChoice) -> frozenset[str]:
        return frozenset(self.problem.names[i] for i in choice.saved)

    def _may_compile(self, *, stops: bool = True) -> bool:
        most = self.request.max_compiles
        may = len(self.known) < _MOST_COMPILES if most is None else len(self.sizes) < most
        self.is_stopped = self.is_stopped or (stops and not may)
        return may

    def _found(
        self,
        choice: NameChoice,
        budget: int,
        unplanned: int,
        measurement: Measurement | None,
        predicted: int,
        least: int | None = None,
    ) -> FoundNames:
        if least is None:
            least = min(self._bytes(c) for c in self.known.values())
        return FoundNames(
            choice=choice,
            budget_bytes=budget,
            measurement=measurement,
            predicted_bytes=predicted,
            written=self.written,
            unplanned_bytes=unplanned,
            is_unplanned_measured=WITHOUT in self.sizes,
            least_bytes=least,
            bound_work=min(self.bound_work, choice.work),
            num_judged=None if self.all is None else len(self.all),
            is_stopped=self.is_stopped,
            num_compiles=len(self.sizes),
        )


@dataclass(eq=False)
class _Surrogate:
    """Device bytes to expect of a choice, from what was measured with nothing saved and of others."""

    problem: NameProblem
    nothing: NameChoice
    nothing_bytes: int
    _seen: list[tuple[np.ndarray, float]] = field(default_factory=list)

    def observe(self, choice: NameChoice, device_bytes: int) -> None:
        """Learn what a choice measured."""
        self._seen.append((self._sizes(choice), device_bytes - self._modelled(choice)))

    def expected(self, choice: NameChoice) -> float:
        """The mean."""
        errors, _ = self._errors()
        return self._modelled(choice) + float(self._sizes(choice) @ errors)

    def chance(self, choice: NameChoice, budget_bytes: int) -> float:
        """The probability that a choice fits."""
        errors, covariance = self._errors()
        sizes = self._sizes(choice)
        mean = self._modelled(choice) + float(sizes @ errors)
        spread = math.sqrt(max(0.0, float(sizes @ covariance @ sizes)) + (_NOISE * self.nothing_bytes) ** 2)
        return 0.5 * math.erfc((mean - budget_bytes) / (spread * math.sqrt(2)))

    def scaled(self, budget_bytes: int, spread: float) -> tuple[NameProblem, int]:
        """The problem with each name's bytes as expected, less so many of its standard deviations, and the limit."""
        errors, covariance = self._errors()
        factors = np.maximum(0.0, 1 + errors - spread * np.sqrt(np.maximum(0.0, np.diag(covariance))))
        values = (replace(v, size_bytes=round(v.size_bytes * factors[v.name])) for v in self.problem.values)
        return replace(self.problem, values=tuple(values)), budget_bytes - self.nothing_bytes + self.nothing.held_bytes

    def _modelled(self, choice: NameChoice) -> float:
        return self.nothing_bytes + choice.held_bytes - self.nothing.held_bytes

    def _sizes(self, choice: NameChoice) -> np.ndarray:
        return np.array(name_bytes(self.problem, choice), dtype=float)

    def _errors(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each name, by how many times its bytes it is off: mean and covariance given what was measured."""
        n = len(self.problem.names)
        prior = _OWN_ERROR**2 * np.eye(n) + _COMMON_ERROR**2 * np.ones((n, n))
        if not self._seen:
            return np.zeros(n), prior
        seen = np.array([sizes for sizes, _ in self._seen])
        off = np.array([error for _, error in self._seen])
        cross = prior @ seen.T
        noise = (_NOISE * self.nothing_bytes) ** 2 * np.eye(len(off))
        gain = np.linalg.solve(seen @ cross + noise, cross.T).T
        return gain @ off, prior - gain @ cross.T


def places_of(problem: NameProblem, choice: NameChoice) -> Iterator[tuple[str, bool, int, int]]:
    """Of each name: whether it is saved, what it holds if it is, and how much work that spares, beside the others."""
    for i, name in enumerate(problem.names):
        others = [j for j in choice.saved if j != i]
        with_, without = judge_names(problem, [*others, i]), judge_names(problem, others)
        yield name, i in choice.saved, name_bytes(problem, with_)[i], without.work - with_.work
