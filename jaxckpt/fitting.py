"""Whole steps: the plans of the decorated functions inside, chosen so that the step's measured peak fits.

The gradients of a step are temporaries, its optimizer state is an argument, and donated arguments give their buffers
back: only compiling the step says what it takes. The functions inside that `auto_remat` decorates without a budget
share what is left. Where their peaks do not coincide they keep to one common limit; where what they hold adds up, bytes
go where they save most. The unplanned step says which of the two it is, and in the end each gets what the others leave.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from jaxckpt.calibration import Calibration, add_samples, remembered_of
from jaxckpt.compilation.cache import digest
from jaxckpt.compilation.measure import Measurement
from jaxckpt.description import describe
from jaxckpt.errors import InfeasibleBudgetError
from jaxckpt.ladder import FAR, FASTER, Ladder
from jaxckpt.model.schedules import Candidate
from jaxckpt.plans import Plan
from jaxckpt.sharing import Picks, apart, together
from jaxckpt.steps import Step
from jaxckpt.study import Study
from jaxckpt.units import parse_budget, show_bytes

# A function that could save less than this share of the cost is not worth a compile of its own.
_WORTH = 0.005
_MAX_RAISES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A step whose plans fit.

    Attributes:
        step: jitted, with the plans inside.
        plans: of the decorated functions, in the order they are differentiated. Their peaks are predicted: it is the
            step that was measured.
        measurement: of the whole step.
        unplanned: the same without plans; None where it was expected so far above the budget, in bytes, that nobody
            compiled it.
        num_compiles: how many steps were compiled to find it.
        next_bytes: the least that was measured at a batch larger by one, which does not fit; None from `fit`.
        calibration: the hash of the record it was found with; None without one.
        batch: what `largest_batch` found; None from `fit`.
    """

    step: Callable
    plans: tuple[Plan, ...]
    measurement: Measurement
    unplanned: Measurement | None
    num_compiles: int
    batch: int | None = None
    next_bytes: int | None = None
    calibration: str | None = None


def fit(
    step: Callable,
    *args: Any,
    budget: int | str,
    cost: str = "time",
    target: str | None = None,
    donate_argnums: int | Sequence[int] = (),
) -> Fitted:
    """Choose the plans of the decorated functions inside a step so that the whole step fits the budget.

    Args:
        step: a function that differentiates functions decorated with `auto_remat` without a budget. Those with a
            budget of their own keep their plans.
        *args: its arguments: pytrees of arrays or `ShapeDtypeStruct`s. With shardings on a mesh of several devices,
            the budget is for each.
        budget: device bytes of the compiled step: an int, `"16GB"`, `"16GiB"`, or `"80%"` of its unplanned peak.
        cost: what is minimised: "time" or "flops".
        target: a chip's name; None is the default backend.
        donate_argnums: as in `jax.jit`.

    Returns:
        The jitted step with its plans and what it measured. A step that fits gets plans only where they make it 5 %
        faster, by the model. It takes one compile without plans, unless the budget is
        in bytes and far below, and some three with; a few more where several functions share the budget. What was
        measured is remembered, as in `plan`, and saves compiles the next time.

    Raises:
        BudgetError: a budget that cannot be read.
        OptionError: a cost that is none, or a step that differentiates no decorated function.
        InfeasibleBudgetError: no choice of plans fits.
        ShardingError: arguments on several devices, of which one does not say where it lies.
        TargetError: an unknown target, or a compiler that is not here: a step cannot be fitted without.

    Example:
        >>> import jax, jax.numpy as jnp, jaxckpt
        >>> @jaxckpt.auto_remat
        ... def loss(w, x):
        ...     for _ in range(8):
        ...         x = jnp.tanh(x @ w)
        ...     return jnp.sum(x**2)
        >>> def step(w, x):
        ...     return w - 0.1 * jax.grad(loss)(w, x)
        >>> w, x = jax.ShapeDtypeStruct((64, 64), jnp.float32), jax.ShapeDtypeStruct((1024, 64), jnp.float32)
        >>> len(fit(step, w, x, budget="80%").plans)
        1
    """
    wanted = parse_budget(budget)
    whole = Step(step, args, cost, target, donate_argnums)
    if wanted.size_bytes is None or not _may_wait(whole, wanted.size_bytes):
        return fitted(whole, wanted.resolve(whole.measure(whole.without).device_bytes))
    return fitted(whole, wanted.size_bytes)


def _may_wait(step: Step, budget_bytes: int) -> bool:
    """Whether the step is expected so far above the budget without plans that nobody need compile that.

    Several functions hold their bytes one after the other or all at once, which the unplanned step says.
    """
    if len(step.peaks) != 1:
        return False
    return step.peaks[0][-1] > FAR * max(0, budget_bytes - step.predicted_bytes(0))


def fitted(step: Step, budget_bytes: int, batch: int | None = None) -> Fitted:
    """Choose the cheapest plans that are measured to fit; whether they are needed is known if it was compiled without.

    Raises:
        InfeasibleBudgetError: no choice of plans fits.
    """
    unplanned = step.measured.get(step.without)
    picks, calibration = step.without, None
    is_needed = unplanned is None or unplanned.device_bytes > budget_bytes
    if is_needed or step.least_cost <= -FASTER:
        record = remembered_of(step.programs, step.target)
        calibration = record.hash if record.samples else None
        found = _searched(step, budget_bytes, record) if step.keys else None
        if is_needed and found is None:
            refuse(step, budget_bytes)
        if found is not None and (is_needed or step.cost(found) <= -FASTER):
            picks = found
    return Fitted(
        step=step.jitted(picks),
        plans=tuple(_plans(step, picks)),
        measurement=step.measured[picks],
        unplanned=unplanned,
        num_compiles=len(step.measured),
        batch=batch,
        calibration=calibration,
    )


def _searched(step: Step, budget_bytes: int, record: Calibration) -> Picks | None:
    """The cheapest picks on one path from the least bytes to the least work that fit."""
    adds_up = _adds_up(step)
    path = (together if adds_up else apart)(step.peaks, step.costs)
    combine = sum if adds_up else max
    predicted = [combine(row[i] for row, i in zip(step.peaks, picks, strict=True)) for picks in path]
    without = combine(row[-1] for row in step.peaks)
    state, offset = _outside(step, without)
    costs = [step.cost(picks) for picks in path]
    # What the unplanned step says of gradients is part of what the samples are relative to.
    name = digest((step.name, adds_up, step.without in step.measured))
    ladder = Ladder(
        state + offset,
        predicted,
        costs,
        lambda i: step.measure(path[i]).device_bytes,
        expected=lambda size: record.ratio(name, max(1, size) / max(1, without)),
        spread=record.spread(name),
        num_before=int(step.without in step.measured),
    )
    known = ((i, step.measured[p]) for i, p in enumerate(path) if p in step.measured and p != step.without)
    ladder.known |= {i: measured.device_bytes for i, measured in known}
    chosen = ladder.cheapest(budget_bytes)
    found = [(predicted[i] / max(1, without), ladder.ratio(i), 0) for i in sorted(ladder.known)]
    add_samples(record, name, found)
    if chosen is None or adds_up:
        return None if chosen is None else path[chosen]
    return _raised(step, path[chosen], budget_bytes)


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


def _raised(step: Step, picks: Picks, budget_bytes: int) -> Picks:
    """Give each function what the others leave: those whose own peak is not the step's recompute less."""
    left = _MAX_RAISES if len(picks) > 1 else 0
    for f in sorted(range(len(picks)), key=lambda f: -step.costs[f][picks[f]]):
        # No plan at all comes last, where no plan is faster than that.
        most = len(step.options[f]) - (step.costs[f][-1] > min(step.costs[f]))
        fits, over = picks[f], most
        while left and over - fits > 1 and step.costs[f][fits] - step.costs[f][over - 1] >= _WORTH:
            # The fastest first, then halfway.
            i = over - 1 if over == most else (fits + over) // 2
            tried = (*picks[:f], i, *picks[f + 1 :])
            left -= tried not in step.measured
            if step.measure(tried).device_bytes <= budget_bytes:
                fits, picks = i, tried
            else:
                over = i
    return picks


def _plans(step: Step, picks: Picks) -> list[Plan]:
    chosen = {key: row[i] for key, row, i in zip(step.keys, step.options, picks, strict=True)}
    return [_plan(study, chosen.get(key)) for key, study in step.free.studies.items()]


def _plan(study: Study, candidate: Candidate | None) -> Plan:
    peak = lambda c: study.fixed_bytes + (c.judgement.peak_bytes if c else 0)  # noqa: E731
    unplanned = peak(study.unplanned if study.candidates else None)
    return describe(
        study,
        candidate,
        budget_bytes=None,
        max_cost=None,
        unplanned_peak_bytes=unplanned,
        predicted_peak_bytes=peak(candidate) if candidate else unplanned,
        measured_peak_bytes=None,
        next_peak_bytes=None,
        least_peak_bytes=peak(study.candidates[0] if study.candidates else None),
        is_unplanned_measured=False,
        is_least_measured=False,
        num_compiles=0,
        calibration=None,
    )


def refuse(step: Step, budget: int, what: str = "the step") -> NoReturn:
    """Say that no plans fit, with the least that was measured and what none of them changes.

    Raises:
        InfeasibleBudgetError: always.
    """
    unplanned = step.measure(step.without)
    least = min(m.device_bytes for m in step.measured.values())
    state = unplanned.device_bytes - unplanned.temp_bytes
    gradients = f", and the gradients {show_bytes(step.gradient_bytes)}"
    if state + step.gradient_bytes > budget:
        gradients += ": together more than the budget. Cut the arguments over more devices, or keep less state"
    raise InfeasibleBudgetError(
        f"no plans fit {what} into budget={show_bytes(budget)}. The least feasible peak is {show_bytes(least)} "
        f"(measured); without plans it is {show_bytes(unplanned.device_bytes)} (measured). Arguments and results, such "
        f"as parameters and optimizer state, take {show_bytes(state)} of it, which no plan changes{gradients}",
        budget_bytes=budget,
        least_peak_bytes=least,
        unplanned_peak_bytes=unplanned.device_bytes,
        measured=True,
        forced_by=(("arguments and results of the step", state, ""),),
    )
