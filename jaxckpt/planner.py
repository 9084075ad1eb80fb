"""From a budget to a plan: choose a candidate, compile it, compare, correct the prediction, choose again."""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from jaxckpt.calibration import Calibration, add_samples, remembered
from jaxckpt.compilation.objective import Objective, objective
from jaxckpt.description import describe, forced_by
from jaxckpt.errors import BudgetError, CompilerError, InfeasibleBudgetError, JaxckptWarning, OptionError
from jaxckpt.ladder import FAR, FASTER, Ladder
from jaxckpt.model.schedules import Candidate
from jaxckpt.model.time import check_cost
from jaxckpt.plans import Plan
from jaxckpt.program.ir import Program
from jaxckpt.search.candidates import check_solver
from jaxckpt.study import Study
from jaxckpt.targets.chip import find_target
from jaxckpt.targets.sharding import trace_placed
from jaxckpt.units import Budget, parse_budget, parse_bytes, show_bytes

# Room left below the budget when nothing is compiled.
_UNVERIFIED_MARGIN, _KNOWN_MARGIN = 0.1, 0.05
# A program that was not compiled without a plan is, if what was measured says that it may come near the budget.
_NEAR = 1.3
# Within a cost, how many more candidates are compiled where the model was too low, by how much it must be.
_MAX_LOWER, _LOWER = 3, 1.02

_STUDIES: dict[tuple, Study] = {}
_MAX_STUDIES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a plan is asked to do."""

    budget: Budget | None
    max_cost: float | None
    cost: str = "time"
    solver: Any = "auto"
    target: str | None = None
    reserve_bytes: int = 0
    verify: bool = True
    calibration: Calibration | str | None = "auto"
    profile: bool = False


def plan(
    fun: Callable,
    *args: Any,
    budget: int | str | None = None,
    max_cost: float | None = None,
    cost: str = "time",
    solver: Any = "auto",
    target: str | None = None,
    reserve: int | str = 0,
    verify: bool = True,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    calibration: Calibration | str | None = "auto",
    keep_checkpoints: bool = True,
    profile: bool = False,
) -> Plan:
    """Find the cheapest recomputation plan of a function's value and gradient within a budget.

    Args:
        fun: a function of pytrees; leaves that are not arrays are static.
        *args: arrays or `ShapeDtypeStruct`s. With shardings on a mesh of several devices, sizes are those of each.
        budget: device bytes: an int, `"8GB"`, `"8GiB"`, or `"80%"` of the unplanned peak.
        max_cost: instead of a budget, the most the step may cost as a fraction of the unplanned cost, such as 1.1.
        cost: what is minimised: "time", modelled for the target, or "flops".
        solver: "auto", "chain", "chen", "revolve", "lower_sets", "ilp" (for a dozen blocks at most), or a function
            `(problem, budget_bytes=...) -> Schedule`.
        target: a chip's name; None is the default backend.
        reserve: device bytes to leave for what lives outside the function, as a budget is written.
        verify: compile the plan and measure it; otherwise it is predicted, and a margin is left.
        argnums: as in `jax.grad`.
        has_aux: as in `jax.grad`.
        calibration: a record of how far predictions are off; "auto" is what earlier plans left in the user's cache, and
            None uses and keeps nothing. The plan is a function of the program, the target, the versions and the record,
            whose hash it carries.
        keep_checkpoints: leave the function's own `jax.checkpoint` calls as they are; otherwise they are inlined, and
            the plan alone decides what is recomputed.
        profile: compile each distinct block and option for the target on its own first, and time it where the target is
            the device that is here, instead of modelling it. That takes a small compile for each.

    Returns:
        The plan. Its `str` is the report. Where everything fits its schedule is None, unless a plan makes loops stack
        so much less that the step is modelled to be 5 % faster.

    Raises:
        BudgetError: a budget that cannot be read, neither or both of `budget` and `max_cost`, or a reserve without a
            budget.
        OptionError: a cost, a solver or a calibration that is none.
        InfeasibleBudgetError: no plan fits.
        NotDifferentiableError: nothing to differentiate.
        ShardingError: arguments on several devices, of which one does not say where it lies.
        TargetError: an unknown target, or a topology that it does not have.
        UnsupportedProgramError: side effects inside the function.

    Where the target's compiler is not installed or fails, a warning says so and the plan is predicted, as with
    `verify=False`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def loss(w, x):
        ...     for _ in range(8):
        ...         x = jnp.tanh(x @ w)
        ...     return jnp.sum(x**2)
        >>> w, x = jax.ShapeDtypeStruct((64, 64), jnp.float32), jax.ShapeDtypeStruct((1024, 64), jnp.float32)
        >>> plan(loss, w, x, budget="80%").measured_peak_bytes is not None
        True
    """
    request = make_request(budget, max_cost, cost, solver, target, reserve, verify, calibration, profile)
    traced = trace_placed(fun, args, keep_checkpoints=keep_checkpoints)
    return plan_program(traced.program, objective(traced, argnums, has_aux), request)


def make_request(
    budget: Any,
    max_cost: Any,
    cost: str,
    solver: Any,
    target: str | None,
    reserve: Any,
    verify: bool,
    calibration: Any = "auto",
    profile: bool = False,
) -> Request:
    """Check the arguments that do not depend on the program.

    Raises:
        BudgetError: with what is accepted.
        OptionError: a cost, a solver or a calibration that is none.
    """
    check_cost(cost)
    check_solver(solver)
    if not (calibration is None or calibration == "auto" or isinstance(calibration, Calibration)):
        raise OptionError(
            f'calibration={calibration!r} is not accepted; write "auto", None, or a record: Calibration.load(path)'
        )
    if (budget is None) == (max_cost is None):
        raise BudgetError("give exactly one of budget (bytes) and max_cost (a fraction of the unplanned cost)")
    if max_cost is not None and (isinstance(max_cost, bool) or not isinstance(max_cost, int | float)):
        raise BudgetError(f"max_cost={max_cost!r} is not a number; 1.1 allows 10 % more than the unplanned cost")
    if max_cost is not None and not 1 <= max_cost < math.inf:
        raise BudgetError(f"max_cost={max_cost!r} is below 1; 1.1 allows 10 % more than the unplanned cost")
    reserve_bytes = parse_bytes(reserve, "reserve", least=0)
    if max_cost is not None and reserve_bytes:
        raise BudgetError(f"reserve={reserve!r} is taken off a budget, and max_cost={max_cost!r} has none")
    return Request(
        budget=None if budget is None else parse_budget(budget),
        max_cost=max_cost,
        cost=cost,
        solver=solver,
        target=target,
        reserve_bytes=reserve_bytes,
        verify=verify,
        calibration=calibration,
        profile=profile,
    )


def plan_program(program: Program, goal: Objective, request: Request, cache_dir: str | None = None) -> Plan:
    """Plan a flat program, with the calibration record that is kept in this directory.

    It is planned from prediction, with a warning, where its target cannot be compiled for.
    """
    try:
        study = find_study(program, goal, request.cost, request.solver, request.target, request.profile)
        return _Search(study, request, cache_dir).run()
    except CompilerError as error:
        if not request.verify:
            raise
        warnings.warn(f"{error}. Until then this plan is predicted, not measured", JaxckptWarning, stacklevel=3)
        study = find_study(program, goal, request.cost, request.solver, request.target)
        return _Search(study, replace(request, verify=False), cache_dir).run()


def find_study(
    program: Program, goal: Objective, cost: str, solver: Any, target: str | None, is_profiled: bool = False
) -> Study:
    """The study of this program, kept for the next budget; what was compiled for one budget serves the others."""
    chip = find_target(target)  # a user's chip may be defined anew under its name
    key = (program.fingerprint(), program.keeps_checkpoints, program.shardings, goal, cost, solver, target, chip)
    key += (is_profiled,)
    study = _STUDIES.pop(key, None) or Study(program, goal, cost, solver, target, is_profiled=is_profiled)
    _STUDIES[key] = study
    while len(_STUDIES) > _MAX_STUDIES:
        _STUDIES.pop(next(iter(_STUDIES)))
    return study


class _Search:
    """One request on one study, with measurements of its own, so that a plan depends on nothing but its record."""

    def __init__(self, study: Study, request: Request, cache_dir: str | None):
        self.study, self.request, self.cache_dir = study, request, cache_dir
        self.candidates = study.rungs
        self.program = study.program.fingerprint()
        self.record = self._record()
        self.all_bytes = study.unplanned.judgement.peak_bytes if self.candidates else 0
        self.unplanned: int | None = None  # measured device bytes
        self.ladder = Ladder(
            study.fixed_bytes,
            [c.judgement.peak_bytes for c in self.candidates],
            [study.extra_cost(c) / max(1, study.unplanned_cost) for c in self.candidates],
            self._measure,
            kinds=[study.kind(c) for c in self.candidates],
            expected=self._expected,
            before=self._before(),
            spread=self.record.spread(self.program) if self.record else 0.0,
            prepare=lambda numbers: study.measure_all(self.candidates[i] for i in numbers),
        )
        self.modelled = [math.ceil(self.ladder.corrected(i)) for i in range(len(self.candidates))]

    def run(self) -> Plan:
        if self.request.budget is None:
            found = self._within_cost(self._unplanned_bytes())
        else:
            found = self._within_budget(self.request.budget)
        self._remember()
        return found

    def _within_budget(self, wanted: Budget) -> Plan:
        certain = self.request.verify and not self._may_wait(wanted)
        unplanned = self._unplanned_bytes() if certain else self._expected_unplanned()
        budget = wanted.resolve(unplanned) - self.request.reserve_bytes
        if budget <= 0 < self.request.reserve_bytes:
            raise BudgetError(f"reserve={self.request.reserve_bytes:,} leaves nothing of the budget")
        # Of a percentage the prediction cancels out.
        is_guess = not self.request.verify and wanted.size_bytes is not None
        needed = (unplanned - self.study.fixed_bytes) * (self._margin if is_guess else 1)
        if self.study.fixed_bytes + needed <= budget:
            return self._plan(self._faster(budget), budget, unplanned)
        if not self.candidates:
            self._refuse(budget, unplanned, unplanned, None)
        return self._verified(budget) if self.request.verify else self._predicted(budget, unplanned)

    def _record(self) -> Calibration | None:
        """The record to plan with; None where there is none, or an empty one."""
        chosen = self.request.calibration
        if chosen == "auto" and self.study.is_modelled:
            chosen = remembered(self.study.program, self.request.target, self.cache_dir)
        return chosen if isinstance(chosen, Calibration) and chosen.samples else None

    def _expected(self, predicted_bytes: int) -> float:
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
        if self.request.calibration is None or not self.ladder.known or not self.study.is_modelled:
            return
        ladder, record = self.ladder, remembered(self.study.program, self.request.target, self.cache_dir)
        found = [
            (ladder.predicted_bytes[i] / max(1, self.all_bytes), ladder.ratio(i), ladder.kinds[i])
            for i in sorted(ladder.known)
        ]
        add_samples(record, self.program, found, self.cache_dir)

    def _may_wait(self, wanted: Budget) -> bool:
        """Whether the budget is so far below what the model expects without a plan that nobody need compile that."""
        if wanted.size_bytes is None or not self.candidates:
            return False
        room = wanted.size_bytes - self.request.reserve_bytes - self.study.fixed_bytes
        return self._expected_unplanned() - self.study.fixed_bytes > FAR * max(0, room)

    def _expected_unplanned(self) -> int:
        return math.ceil(self.ladder.corrected_bytes(self.all_bytes))

    def _unplanned_bytes(self) -> int:
        if not self.request.verify:
            return self._expected_unplanned()
        if self.unplanned is None:
            self.unplanned = self.study.measure(None).device_bytes
        return self.unplanned

    def _verified(self, budget: int) -> Plan:
        self.ladder.num_before = int(self.unplanned is not None)
        chosen = self.ladder.cheapest(budget)
        # The model may have been too high by so much that no plan is needed.
        is_in_doubt = self.unplanned is None and (chosen is None or self._expected_unplanned() <= _NEAR * budget)
        if is_in_doubt and self._unplanned_bytes() <= budget:
            return self._plan(self._faster(budget), budget, self._unplanned_bytes())
        if chosen is None:
            least = self.ladder.least()
            self._refuse(budget, self._unplanned_bytes(), self.ladder.known[least], self.candidates[least])
        return self._plan(chosen, budget, self.unplanned or self._expected_unplanned())

    def _measure(self, i: int) -> int:
        candidate = self.candidates[i]
        return self.study.measure(candidate).device_bytes

    def _faster(self, budget: int) -> int | None:
        """The fastest plan within the budget where none is needed, if it is that much faster: loops may stack less."""
        if min(self.ladder.costs, default=0.0) > -FASTER:
            return None
        found = self.ladder.cheapest(budget) if self.request.verify else self._expected_best(budget)
        return None if found is None or self.ladder.costs[found] > -FASTER else found

    def _predicted(self, budget: int, unplanned: int) -> Plan:
        chosen = self._expected_best(budget)
        if chosen is None:
            at = min(range(len(self.candidates)), key=self.ladder.corrected)
            least = self.study.fixed_bytes + math.ceil(self._needed(at))
            self._refuse(budget, unplanned, least, self.candidates[at])
        return self._plan(chosen, budget, unplanned)

    def _expected_best(self, budget: int) -> int | None:
        """The cheapest candidate that is expected to fit, a margin left."""
        room = budget - self.study.fixed_bytes
        needed = [self._needed(i) for i in range(len(self.candidates))]
        inside = [i for i, size in enumerate(needed) if size <= room]
        return min(inside, key=lambda i: (self.ladder.costs[i], needed[i]), default=None)

    def _needed(self, i: int) -> float:
        """Bytes beyond the fixed ones to leave for a candidate that is not measured."""
        return self._margin * (self.ladder.corrected(i) - self.study.fixed_bytes)

    @functools.cached_property
    def _margin(self) -> float:
        """What to multiply predicted bytes beyond the fixed ones with where nothing is measured."""
        knows = self.record is not None and self.record.knows(self.program)
        return 1 + (_KNOWN_MARGIN if knows else _UNVERIFIED_MARGIN)

    def _within_cost(self, unplanned: int) -> Plan:
        assert self.request.max_cost is not None
        # A limit that is another program's cost can be met exactly, whatever floats make of it.
        allowed = round((self.request.max_cost - 1) * self.study.unplanned_cost)
        inside = [i for i, c in enumerate(self.candidates) if self.study.extra_cost(c) <= allowed]
        if not inside:
            return self._plan(None, None, unplanned)
        if not self.request.verify:
            return self._plan(inside[0], None, unplanned)
        best = inside[0]
        alike = next((i for i in inside if self.candidates[i].is_alike), best)
        best = min(best, alike, key=self.ladder.measured)
        for _ in range(_MAX_LOWER):
            # Where the model was too low, one that it puts below what was measured may take less, and costs less.
            most = self.ladder.measured(best) - self.study.fixed_bytes
            lower = [
                i for i in inside if self.ladder.predicted_bytes[i] * _LOWER <= most and i not in self.ladder.known
            ]
            if not lower:
                break
            best = min(best, lower[-1], key=self.ladder.measured)
        return self._plan(None if self.ladder.measured(best) >= unplanned else best, None, unplanned)

    def _refuse(self, budget: int, unplanned: int, least: int, candidate: Candidate | None) -> NoReturn:
        self._remember()
        reserve = self.request.reserve_bytes
        left = f", of which reserve={show_bytes(reserve)} leaves {show_bytes(budget)}" if reserve else ""
        forced = forced_by(self.study, candidate) if candidate else ()
        label = "measured" if self.request.verify else "predicted"
        least = min(least, unplanned)
        at = "".join(f"\n  {what}: {show_bytes(size)}{' at ' + line if line else ''}" for what, size, line in forced)
        raise InfeasibleBudgetError(
            f"no plan fits budget={show_bytes(budget + reserve)}{left}. The least feasible peak is {show_bytes(least)} "
            f"({label}); without a plan it is {show_bytes(unplanned)} ({label}). What stands at the least peak:{at}",
            budget_bytes=budget,
            least_peak_bytes=least,
            unplanned_peak_bytes=unplanned,
            measured=self.request.verify,
            forced_by=forced,
        )

    def _plan(self, chosen: int | None, budget: int | None, unplanned: int) -> Plan:
        known = self.ladder.known
        # The candidate with the least predicted bytes may have been measured on the way.
        least = math.ceil(self.ladder.corrected(0)) if self.candidates else unplanned
        measured = self.unplanned
        following = None if chosen is None else self.ladder.following(chosen)
        return describe(
            self.study,
            None if chosen is None else self.candidates[chosen],
            budget_bytes=budget,
            max_cost=self.request.max_cost,
            unplanned_peak_bytes=unplanned,
            predicted_peak_bytes=unplanned if chosen is None else self.modelled[chosen],
            measured_peak_bytes=measured if chosen is None else known.get(chosen),
            next_peak_bytes=None if following is None else known.get(following),
            least_peak_bytes=min(unplanned, known.get(0, least), *known.values()),
            is_unplanned_measured=self.unplanned is not None,
            is_least_measured=0 in known,
            num_compiles=len(known) + (self.unplanned is not None),
            calibration=self.record.hash if self.record else None,
        )
