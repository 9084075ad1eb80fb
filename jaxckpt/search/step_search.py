"""Whole steps: the plans of the functions it differentiates, chosen so that the step's measured peak fits.

The gradients of a step are temporaries, its optimizer state is an argument, and donated arguments give their buffers
back: only compiling the step says what it takes. The functions it differentiates share what is left. Where their peaks
do not coincide they keep to one common limit; where what they hold adds up, bytes go where they save most. The
unplanned step says which of the two it is, and in the end each gets what the others leave.
"""

from dataclasses import dataclass
from typing import NoReturn

from jaxckpt.compilation.cache import digest
from jaxckpt.compilation.measure import Measurement
from jaxckpt.errors import InfeasibleBudgetError
from jaxckpt.model.schedules import Candidate
from jaxckpt.program.constants import jaxpr_constant_bytes
from jaxckpt.search.analysis import Analysis
from jaxckpt.search.budget_search import FASTER, BudgetSearch
from jaxckpt.search.calibration import Calibration, add_samples, remembered_of
from jaxckpt.search.found import Found
from jaxckpt.search.shared_budget import Picks, apart, together
from jaxckpt.search.step import Step
from jaxckpt.search.surrogate import Surrogate
from jaxckpt.units import show_bytes

# A function that could save less than this share of the cost is not worth a compile of its own.
_WORTH = 0.005
_MAX_RAISES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundStep:
    """The options that a search chose for the functions of a step.

    Attributes:
        step: what was searched.
        picks: the chosen option of each function that has any.
        functions: of each planned function, in the order they are differentiated. Their peaks are predicted: it is
            the step that was measured.
        measurement: of the step with the chosen options.
        unplanned: the same without plans; None if it was not compiled.
        budget_bytes: what had to hold it.
        num_compiles: how many steps were compiled.
        is_stopped: whether `max_compiles` ended the search.
        calibration: hash of the calibration record; None without one.
    """

    step: Step
    picks: Picks
    functions: tuple[Found, ...]
    measurement: Measurement
    unplanned: Measurement | None
    budget_bytes: int
    num_compiles: int
    calibration: str | None
    is_stopped: bool = False


def search_step(
    step: Step, budget_bytes: int, *, max_compiles: int | None = None, on_infeasible: str = "raise"
) -> FoundStep:
    """Choose the cheapest plans that are measured to fit; whether they are needed is known if it was compiled without.

    Args:
        step: what to search.
        budget_bytes: of the compiled step.
        max_compiles: after so many the search stops with the best that fits.
        on_infeasible: "least" takes the plans with the least bytes where nothing fits.

    Raises:
        InfeasibleBudgetError: no choice of plans fits.
    """
    unplanned = step.measured.get(step.without)
    picks, calibration, is_stopped = step.without, None, False
    is_needed = unplanned is None or unplanned.device_bytes > budget_bytes
    if is_needed or step.least_cost <= -FASTER:
        record = remembered_of(step.programs, step.target)
        calibration = record.hash if record.samples else None
        found, search = _searched(step, budget_bytes, record, max_compiles) if step.keys else (None, None)
        is_stopped = search is not None and search.is_stopped
        if is_needed and found is None:
            if on_infeasible == "raise":
                refuse(step, budget_bytes, least=search.least_bytes if search else None, is_stopped=is_stopped)
            step.measure(step.without)
            allowed = [picks for picks in step.measured if not step.is_over_on_host(picks)]
            found = min(allowed or [step.without], key=lambda picks: step.measured[picks].device_bytes)
        if found is not None and (is_needed or step.cost(found) <= -FASTER):
            picks = found
    return FoundStep(
        step=step,
        picks=picks,
        functions=tuple(_functions(step, picks)),
        measurement=step.measured[picks],
        unplanned=unplanned,
        budget_bytes=budget_bytes,
        num_compiles=len(step.measured),
        calibration=calibration,
        is_stopped=is_stopped,
    )


def _searched(
    step: Step, budget_bytes: int, record: Calibration, max_compiles: int | None
) -> tuple[Picks | None, BudgetSearch]:
    """The cheapest picks on one path from the least bytes to the least work that fit, and the search."""
    adds_up = _adds_up(step)
    path = (together if adds_up else apart)(step.peaks, step.costs)
    combine = sum if adds_up else max
    predicted = [combine(row[i] for row, i in zip(step.peaks, picks, strict=True)) for picks in path]
    without = combine(row[-1] for row in step.peaks)
    state, offset = _outside(step, without)
    costs = [step.cost(picks) for picks in path]
    # What the unplanned step says of gradients is part of what the samples are relative to.
    name = digest((step.name, adds_up, step.without in step.measured))
    search = BudgetSearch(
        Surrogate(
            state + offset,
            prior_ratio=lambda size: record.ratio(name, max(1, size) / max(1, without)),
            spread=record.spread(name),
        ),
        predicted,
        costs,
        lambda i: step.measure(path[i]).device_bytes,
        kinds=[int(step.is_sending(picks)) for picks in path],
        is_refused=lambda i: step.is_over_on_host(path[i]),
        num_before=int(step.without in step.measured),
        max_compiles=max_compiles,
    )
    for i, picks in enumerate(path):
        if picks in step.measured and picks != step.without:
            search.observe(i, step.measured[picks].device_bytes)
    chosen = search.cheapest(budget_bytes)
    own = [i for i in sorted(search.known) if not search.kinds[i]]
    found = [(predicted[i] / max(1, without), search.ratio(i), 0) for i in own]
    add_samples(record, name, found)
    if chosen is None or adds_up or search.is_stopped:
        return None if chosen is None else path[chosen], search
    most = len(step.measured) + _MAX_RAISES if max_compiles is None else max_compiles
    return _raised(step, path[chosen], budget_bytes, min(_MAX_RAISES, most - len(step.measured))), search


def _adds_up(step: Step) -> bool:
    """Whether the functions hold their bytes at the same time, as one does that reads the other's result."""
    at_once, in_turn = sum(row[-1] for row in step.peaks), max(row[-1] for row in step.peaks)
    unplanned = step.measured.get(step.without)
    return len(step.peaks) > 1 and unplanned is not None and unplanned.temp_bytes > (at_once + in_turn) / 2


def _outside(step: Step, unplanned_bytes: int) -> tuple[int, int]:
    """Arguments and results, and what else is alive with the functions' temporaries: gradients, as far as measured."""
    measured = step.measured.get(step.without)
    if measured is None:
        return step.state_bytes, step.gradient_bytes
    state = measured.device_bytes - measured.temp_bytes
    return state, min(max(0, measured.temp_bytes - unplanned_bytes), step.gradient_bytes)


def _raised(step: Step, picks: Picks, budget_bytes: int, most_raises: int) -> Picks:
    """Give each function what the others leave: those whose own peak is not the step's recompute less."""
    left = most_raises if len(picks) > 1 else 0
    for f in sorted(range(len(picks)), key=lambda f: -step.costs[f][picks[f]]):
        # No plan at all comes last, where no plan is faster than that.
        most = len(step.options_of[f]) - (step.costs[f][-1] > min(step.costs[f]))
        fits, over = picks[f], most
        while left and over - fits > 1 and step.costs[f][fits] - step.costs[f][over - 1] >= _WORTH:
            # The fastest first, then halfway.
            i = over - 1 if over == most else (fits + over) // 2
            tried = (*picks[:f], i, *picks[f + 1 :])
            left -= tried not in step.measured
            if step.measure(tried).device_bytes <= budget_bytes and not step.is_over_on_host(tried):
                fits, picks = i, tried
            else:
                over = i
    return picks


def _functions(step: Step, picks: Picks) -> list[Found]:
    chosen = {key: row[i] for key, row, i in zip(step.keys, step.options_of, picks, strict=True)}
    return [_found(analysis, chosen.get(key)) for key, analysis in step.analyses.items()]


def _found(analysis: Analysis, candidate: Candidate | None) -> Found:
    peak = lambda c: analysis.fixed_bytes + (c.judgement.peak_bytes if c else 0)  # noqa: E731
    unplanned = peak(analysis.unplanned if analysis.candidates else None)
    return Found(
        analysis=analysis,
        candidate=candidate,
        unplanned_peak_bytes=unplanned,
        predicted_peak_bytes=peak(candidate) if candidate else unplanned,
        expected_least_bytes=peak(analysis.candidates[0] if analysis.candidates else None),
        host_budget_bytes=analysis.host_budget,
    )


def refuse(
    step: Step, budget: int, what: str = "the step", *, least: int | None = None, is_stopped: bool = False
) -> NoReturn:
    """Say that no plans fit, with the least that was measured and what none of them changes.

    Args:
        step: what was searched.
        budget: in bytes.
        what: is refused.
        least: the least device bytes; None where that was not looked for.
        is_stopped: whether `max_compiles` ended the search.

    Raises:
        InfeasibleBudgetError: always.
    """
    unplanned = step.measure(step.without)
    known = min(m.device_bytes for m in step.measured.values())
    if not is_stopped:
        least = known if least is None else min(least, unplanned.device_bytes)
    state = unplanned.device_bytes - unplanned.temp_bytes
    gradients = f", and the gradients {show_bytes(step.gradient_bytes)}"
    if state + step.gradient_bytes > budget:
        gradients += ": together more than the budget. Cut the arguments over more devices, or keep less state"
    if constants := jaxpr_constant_bytes(step.closed):
        gradients += f". Arrays that it closes over, {show_bytes(constants)}, are constants, which no plan changes"
    said = "no plans were found in max_compiles that fit" if is_stopped else "no plans fit"
    named = f"The least feasible peak is {show_bytes(least or known)} (measured)"
    if is_stopped:
        named = f"The least that was measured is {show_bytes(known)}"
    raise InfeasibleBudgetError(
        f"{said} {what} into budget={show_bytes(budget)}. {named}; without plans it is "
        f"{show_bytes(unplanned.device_bytes)} (measured, {len(step.measured)} compiles). Arguments and results, such "
        f"as parameters and optimizer state, take {show_bytes(state)} of it, which no plan changes{gradients}",
        budget_bytes=budget,
        least_peak_bytes=None if is_stopped else least,
        expected_least_bytes=least or known,
        unplanned_peak_bytes=unplanned.device_bytes,
        measured=True,
        num_compiles=len(step.measured),
        forced_by=(("arguments and results of the step", state, ""),),
    )
