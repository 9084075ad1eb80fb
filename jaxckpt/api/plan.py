"""From a function and a budget to a plan."""

import functools
import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, overload

from jaxckpt.api.arguments import check_argnums, check_flags, check_function, is_count, refuse_differentiated
from jaxckpt.api.host import check_host_budget
from jaxckpt.api.kept import kept_or_made, warn_infeasible
from jaxckpt.api.measure import measure
from jaxckpt.api.named import choose_names, named_loss
from jaxckpt.compilation.measure import Measurement
from jaxckpt.compilation.objective import Objective, objective
from jaxckpt.errors import BudgetError, CompilerError, JaxckptWarning, OptionError
from jaxckpt.model.time import check_cost
from jaxckpt.program.ir import Program
from jaxckpt.program.static import bound_call
from jaxckpt.result.build import build
from jaxckpt.result.names import Names
from jaxckpt.result.plan import Plan
from jaxckpt.search.analysis import find_analysis
from jaxckpt.search.calibration import Calibration
from jaxckpt.search.candidates import NAMES, check_solver
from jaxckpt.search.planner import search
from jaxckpt.search.request import Request
from jaxckpt.targets.sharding import described, trace_placed
from jaxckpt.units import parse_budget, parse_bytes, show_bytes


@overload
def plan(fun: Callable, /, *args: Any, solver: Literal["names"], **options: Any) -> Names: ...


@overload
def plan(fun: Callable, /, *args: Any, solver: Any = "auto", **options: Any) -> Plan: ...


def plan(
    fun: Callable,
    /,
    *args: Any,
    budget: int | str | None = None,
    max_cost: float | None = None,
    cost: str = "time",
    solver: Any = "auto",
    target: str | None = None,
    reserve: int | str = 0,
    host_budget: int | str | None = None,
    verify: bool = True,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    calibration: Calibration | str | None = "auto",
    keep_checkpoints: bool = True,
    profile: bool = False,
    max_compiles: int | None = None,
    on_infeasible: str = "raise",
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
    cache_dir: str | os.PathLike | None = None,
    **kwargs: Any,
) -> Plan | Names:
    """Find the cheapest recomputation plan of a function's value and gradient within a budget.

    Args:
        fun: a function of pytrees; leaves that are not arrays are static.
        *args: arrays or `ShapeDtypeStruct`s. With shardings on a mesh of several devices, sizes are those of each.
        budget: device bytes: an int, `"8GB"`, `"8GiB"`, or `"80%"` of the unplanned peak.
        max_cost: instead of a budget, the most the step may cost as a fraction of the unplanned cost, such as 1.1.
        cost: what is minimised: "time", modelled for the target, or "flops".
        solver: "auto", another solver's name (docs/guide.md lists them), or a function
            `(problem, budget_bytes=...) -> Schedule`. "names" leaves the function's own `jax.checkpoint` regions where
            they are and chooses which of its own names they save, as `jaxckpt.names` does.
        target: a chip's name; None is the default backend.
        reserve: device bytes to leave for what lives outside the function, as a budget is written.
        host_budget: bytes of the host's pinned memory that saved values may take on each device's behalf, written as a
            budget, but no percentage; chips that share a host share its memory, so divide. None sends nothing there.
            Where it says more than anything needs, that is no error.
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
        max_compiles: after so many compiles the best plan that was measured to fit is used; None is no such limit.
        on_infeasible: "raise", or "least" to take the plan with the least bytes, with a warning, where none fits.
        static_argnums: positional arguments to treat as static, as in `auto_remat`.
        static_argnames: arguments to treat as static by name, as in `auto_remat`.
        cache_dir: where the plan and the calibration record are kept, for `auto_remat` with this directory too, and
            found again. None keeps the record in the user's cache directory, and no plan.
        **kwargs: named arguments of `fun`, like `args`. One that has the name of an option goes in by place.

    Returns:
        The plan, or with `solver="names"` the names. Its `str` is the report. Where everything fits its schedule is
        None, unless a plan makes loops stack so much less that the step is modelled to be 5 % faster.

    Raises:
        BudgetError: a budget that cannot be read, neither or both of `budget` and `max_cost`, a reserve without a
            budget, or a host budget where the platform has no such memory.
        OptionError: a cost, a solver or a calibration that is none, a host budget with `solver="names"`, a static
            argument that `fun` does not have, or a name that is neither an option nor an argument of it.
        InfeasibleBudgetError: no plan fits.
        NotDifferentiableError: nothing to differentiate, or a function that differentiates already.
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
    check_function(fun, "plan")
    check_argnums(argnums)
    check_flags(has_aux=has_aux, keep_checkpoints=keep_checkpoints)
    if isinstance(solver, str) and solver == NAMES:
        if max_cost is not None or budget is None or profile or not keep_checkpoints:
            raise OptionError('solver="names" takes a budget and keeps checkpoints; it has no max_cost and no profile')
        if host_budget is not None:
            raise OptionError(
                'solver="names" chooses what is saved on the device and sends nothing to the host: leave host_budget '
                "out, or take another solver"
            )
        if cache_dir is not None or calibration != "auto":
            raise OptionError('solver="names" keeps nothing and reads no record; leave cache_dir and calibration out')
        check_limits(max_compiles, on_infeasible)
        call = bound_call(fun, args, kwargs, static_argnums, static_argnames, "plan")
        subject = named_loss(call.fun, call.args, cost, target, argnums, has_aux, call.kwargs)
        refuse_differentiated(*subject.programs(True), "plan")
        return choose_names(
            subject,
            budget=budget,
            reserve=reserve,
            verify=verify,
            max_compiles=max_compiles,
            on_infeasible=on_infeasible,
        )
    request = make_request(
        budget,
        max_cost,
        cost,
        solver,
        target,
        reserve,
        verify,
        calibration,
        profile,
        max_compiles=max_compiles,
        on_infeasible=on_infeasible,
        host_budget=host_budget,
    )
    call = bound_call(fun, args, kwargs, static_argnums, static_argnames, "plan")
    kept_at = None if cache_dir is None else str(cache_dir)
    with described(target):
        traced = trace_placed(call.fun, call.args, call.kwargs, keep_checkpoints=keep_checkpoints)
        program, goal = traced.program, objective(traced, argnums, has_aux)
        refuse_differentiated(program, goal, "plan")
        make = functools.partial(plan_program, program, goal, request, kept_at)
        made = make() if kept_at is None else kept_or_made(program, goal, request, kept_at, make)
    is_share = request.budget is not None and request.budget.size_bytes is None
    if keep_checkpoints or not is_share or made.measured_peak_bytes is None:
        return made
    options: dict[str, Any] = {"target": target, "argnums": argnums, "has_aux": has_aux, "differentiate": True}
    return _beside_as_written(made, lambda: measure(call.fun, *call.args, **options, **call.kwargs))


def _beside_as_written(made: Plan, measured: Callable[[], Measurement]) -> Plan:
    """Say what the function takes as it is written: a share was given of the bytes without its own checkpoints."""
    written = measured().device_bytes
    if made.peak_bytes > written:
        warnings.warn(
            "the budget is a share of what the function takes without its own checkpoints, "
            f"{show_bytes(made.unplanned_peak_bytes)}; as it is written it takes {show_bytes(written)}, which is less "
            f"than the plan's {show_bytes(made.peak_bytes)}",
            JaxckptWarning,
            stacklevel=3,
        )
    return replace(made, written_peak_bytes=written)


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
    *,
    max_compiles: int | None = None,
    on_infeasible: str = "raise",
    host_budget: Any = None,
) -> Request:
    """Check the arguments that do not depend on the program.

    Raises:
        BudgetError: with what is accepted.
        OptionError: a cost, a solver or a calibration that is none, or another option that makes no sense.
    """
    check_cost(cost)
    check_solver(solver)
    check_limits(max_compiles, on_infeasible)
    check_flags(verify=verify, profile=profile)
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
        host_budget_bytes=check_host_budget(host_budget, target),
        budget=None if budget is None else parse_budget(budget),
        max_cost=max_cost,
        cost=cost,
        solver=solver,
        target=target,
        reserve_bytes=reserve_bytes,
        verify=verify,
        calibration=calibration,
        profile=profile,
        max_compiles=max_compiles,
        on_infeasible=on_infeasible,
    )


def check_limits(max_compiles: Any, on_infeasible: Any) -> None:
    """Refuse limits of a search that make no sense.

    Raises:
        OptionError: with what is accepted.
    """
    if max_compiles is not None and not (is_count(max_compiles) and int(max_compiles) >= 1):
        raise OptionError(
            f"max_compiles={max_compiles!r} is not a number of compiles; write 1 or more, None for no limit, or "
            "verify=False to compile nothing"
        )
    if on_infeasible not in ("raise", "least"):
        raise OptionError(f'on_infeasible={on_infeasible!r} is not accepted; write "raise" or "least"')


def plan_program(program: Program, goal: Objective, request: Request, cache_dir: str | None = None) -> Plan:
    """Plan a flat program, with the calibration record that is kept in this directory.

    It is planned from prediction, with a warning, where its target cannot be compiled for.
    """
    try:
        return _planned(program, goal, request, cache_dir)
    except CompilerError as error:
        if not request.verify:
            raise
        warnings.warn(f"{error}. Until then this plan is predicted, not measured", JaxckptWarning, stacklevel=3)
        return _planned(program, goal, replace(request, verify=False, profile=False), cache_dir)


def _planned(program: Program, goal: Objective, request: Request, cache_dir: str | None) -> Plan:
    analysis = find_analysis(
        program, goal, request.cost, request.solver, request.target, request.profile, request.host_budget_bytes
    )
    made = build(search(analysis, request, cache_dir))
    if made.budget_bytes is not None and made.peak_bytes > made.budget_bytes:
        warn_infeasible(made.budget_bytes, made.peak_bytes)
    return made
