"""Whole steps: the plans of the decorated functions inside, chosen so that the step's measured peak fits.

The gradients of a step are temporaries, its optimizer state is an argument, and donated arguments give their buffers
back: only compiling the step says what it takes. The functions inside that `auto_remat` decorates without a budget
share one limit on their temporaries, each takes its cheapest schedule below it, and the limit is searched for.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import jax

from jaxckpt import _compat
from jaxckpt.errors import InfeasibleBudgetError, OptionError
from jaxckpt.ladder import Ladder
from jaxckpt.measurement import Measurement, Objective, compiled_bytes
from jaxckpt.plans import Plan
from jaxckpt.shardings import step_split
from jaxckpt.study import Candidate, Study
from jaxckpt.trace import Program, run
from jaxckpt.units import parse_budget, show_bytes

# What decorated functions ask while a step is traced; jit traces again when it changes.
FITTING = jax.make_user_context(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A step whose plans fit.

    Attributes:
        step: jitted, with the plans inside.
        plans: of the decorated functions, in the order they are differentiated. Their peaks are predicted: it is the
            step that was measured.
        measurement: of the whole step.
        unplanned: the same without plans.
        num_compiles: how many steps were compiled to find it.
    """

    step: Callable
    plans: tuple[Plan, ...]
    measurement: Measurement
    unplanned: Measurement
    num_compiles: int


@dataclass(eq=False)
class _Choice:
    """What every decorated function does: its cheapest schedule below a limit, or no plan at all."""

    cost: str
    target: str | None
    split: int = 1
    studies: dict[tuple, Study] = field(default_factory=dict)
    limit_bytes: int | None = None

    def planned(self, program: Program, goal: Objective, *, is_forward_mode: bool = False) -> Callable[..., list[Any]]:
        key = (program.fingerprint(), goal)
        if key not in self.studies:
            # Inside shard_map shapes are those of one device already.
            split = 1 if jax.sharding.get_abstract_mesh().manual_axes else self.split
            self.studies[key] = Study(program, goal, self.cost, "auto", self.target, split)
        study = self.studies[key]
        if self.limit_bytes is None or not study.candidates:
            return functools.partial(run, program)
        schedule = cheapest_below(study, self.limit_bytes).schedule
        return study.planned(schedule, is_forward_mode=is_forward_mode)

    def at(self, limit_bytes: int) -> "_Choice":
        return _Choice(self.cost, self.target, self.split, self.studies, limit_bytes)


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
        The jitted step with its plans and what it measured. It takes one compile without plans, and two to ten with.

    Raises:
        OptionError: the step differentiates no decorated function.
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

    def compiled(choice: _Choice) -> Measurement:
        return compiled_bytes(_under(choice, step), args, target, donate_argnums)

    free = _Choice(cost, target, step_split(args))
    unplanned = compiled(free)
    studies = [study for study in free.studies.values() if study.candidates]
    if not free.studies:
        raise OptionError(
            f"{getattr(step, '__name__', 'the step')} differentiates no function that auto_remat decorates without a "
            "budget, so there is nothing to plan; decorate the loss with @jaxckpt.auto_remat"
        )
    budget_bytes = wanted.resolve(unplanned.device_bytes)
    if unplanned.device_bytes <= budget_bytes:
        plans = tuple(_plan(study, None, unplanned) for study in free.studies.values())
        return Fitted(
            step=_jitted(free, step, donate_argnums),
            plans=plans,
            measurement=unplanned,
            unplanned=unplanned,
            num_compiles=1,
        )
    limits = sorted({c.judgement.peak_bytes for study in studies for c in study.candidates})
    measured: dict[int, Measurement] = {}

    def measure(i: int) -> int:
        measured[i] = compiled(free.at(limits[i]))
        return measured[i].device_bytes

    fixed = unplanned.device_bytes - unplanned.temp_bytes
    ladder = Ladder(fixed, limits, measure)
    chosen = ladder.cheapest(budget_bytes) if limits else None
    if chosen is None:
        least = ladder.known[ladder.least()] if limits else unplanned.device_bytes
        _refuse(budget_bytes, min(least, unplanned.device_bytes), unplanned)
    final = free.at(limits[chosen])
    return Fitted(
        step=_jitted(final, step, donate_argnums),
        plans=tuple(_plan(study, cheapest_below(study, limits[chosen]), unplanned) for study in studies),
        measurement=measured[chosen],
        unplanned=unplanned,
        num_compiles=1 + len(measured),
    )


def cheapest_below(study: Study, limit_bytes: int) -> Candidate:
    """A study's cheapest candidate within a limit on temporaries, or the one with the least."""
    inside = [c for c in study.candidates if c.judgement.peak_bytes <= limit_bytes]
    return inside[-1] if inside else study.candidates[0]


def _under(choice: _Choice, step: Callable) -> Callable:
    @functools.wraps(step)
    def chosen(*args: Any) -> Any:
        with FITTING(choice):
            return step(*args)

    return chosen


def _jitted(choice: _Choice, step: Callable, donate_argnums: int | Sequence[int]) -> Callable:
    options = dict(_compat.CPU_REMAT_OPTIONS) if jax.default_backend() == "cpu" else None
    return jax.jit(_under(choice, step), donate_argnums=donate_argnums, compiler_options=options or None)


def _plan(study: Study, candidate: Candidate | None, unplanned: Measurement) -> Plan:
    from jaxckpt.planner import describe

    return describe(
        study,
        candidate,
        budget_bytes=None,
        max_cost=None,
        unplanned_peak_bytes=study.fixed_bytes + (study.unplanned.judgement.peak_bytes if study.candidates else 0),
        measured_peak_bytes=None,
        next_peak_bytes=None,
        least_peak_bytes=study.fixed_bytes + (study.candidates[0].judgement.peak_bytes if study.candidates else 0),
        is_unplanned_measured=False,
        is_least_measured=False,
        num_compiles=0,
    )


def _refuse(budget: int, least: int, unplanned: Measurement) -> NoReturn:
    state = unplanned.device_bytes - unplanned.temp_bytes
    raise InfeasibleBudgetError(
        f"no plans fit the step into budget={show_bytes(budget)}. The least feasible peak is {show_bytes(least)} "
        f"(measured); without plans it is {show_bytes(unplanned.device_bytes)} (measured). Arguments and results, such "
        f"as parameters and optimizer state, take {show_bytes(state)} of it, which no plan changes",
        budget_bytes=budget,
        least_peak_bytes=least,
        unplanned_peak_bytes=unplanned.device_bytes,
        measured=True,
        forced_by=(("arguments and results of the step", state, ""),),
    )
