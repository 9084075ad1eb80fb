"""A whole step, its plans chosen so that the measured peak fits."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxckpt.api.arguments import check_argnums, check_flags, check_function
from jaxckpt.api.differentiated import see_differentiated
from jaxckpt.api.host import check_host_budget
from jaxckpt.api.kept import warn_infeasible
from jaxckpt.api.plan import check_limits
from jaxckpt.errors import BudgetError, InfeasibleBudgetError
from jaxckpt.program.static import check_names, places_and_names
from jaxckpt.result.build import build_step
from jaxckpt.result.fitted import Fitted
from jaxckpt.search.budget_search import FAR
from jaxckpt.search.step import Step, StepOptions
from jaxckpt.search.step_search import FoundStep, search_step
from jaxckpt.units import Budget, parse_budget


def fit(
    step: Callable,
    /,
    *args: Any,
    budget: int | str,
    cost: str = "time",
    target: str | None = None,
    donate_argnums: int | Sequence[int] = (),
    solver: Any = "auto",
    host_budget: int | str | None = None,
    keep_checkpoints: bool = True,
    max_compiles: int | None = None,
    on_infeasible: str = "raise",
    donate_argnames: str | Sequence[str] = (),
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
    **kwargs: Any,
) -> Fitted:
    """Choose the plans of the functions that a step differentiates so that the whole step fits the budget.

    Args:
        step: a function that differentiates others with `jax.grad`, `value_and_grad`, `vjp` or `jacrev`. Nothing needs
            a decorator: the outermost functions it differentiates are planned, but those that hold less than 1 % of
            what all of them hold. A function that calls one decorated with `auto_remat` is left to it: without a budget
            that is planned here with its own options, and with one it keeps its plan.
        *args: its arguments: pytrees of arrays or `ShapeDtypeStruct`s. With shardings on a mesh of several devices,
            the budget is for each.
        budget: device bytes of the compiled step: an int, `"16GB"`, `"16GiB"`, or `"80%"` of its unplanned peak.
        cost: what is minimised: "time" or "flops".
        target: a chip's name; None is the default backend.
        donate_argnums: as in `jax.jit`.
        solver: as in `plan`, for functions that are not decorated.
        host_budget: as in `plan`, of the whole step: arguments that live in the host's pinned memory count, and are not
            moved. The step is compiled with the options that its target needs for it.
        keep_checkpoints: as in `plan`, for functions that are not decorated.
        max_compiles: as in `plan`.
        on_infeasible: as in `plan`.
        donate_argnames: as in `jax.jit`.
        static_argnums: as in `jax.jit`.
        static_argnames: as in `jax.jit`.
        **kwargs: named arguments of the step, as in `plan`.

    Returns:
        The jitted step with its plans and what it measured. A step that fits gets plans only where they make it 5 %
        faster, by the model. It takes one compile without plans, unless the budget is
        in bytes and far below, and some three with; a few more where several functions share the budget. What was
        measured is remembered, as in `plan`, and saves compiles the next time.

    Raises:
        BudgetError: a budget that cannot be read, or a host budget where the platform has no such memory.
        OptionError: a cost or a solver that is none, a step that differentiates nothing that can be seen, a static or
            donated argument that it does not have, or a name that is neither an option nor one of its arguments.
        InfeasibleBudgetError: no choice of plans fits.
        ShardingError: arguments on several devices, of which one does not say where it lies.
        TargetError: an unknown target, or a compiler that is not here: a step cannot be fitted without.

    Example:
        >>> import jax, jax.numpy as jnp, jaxckpt
        >>> def loss(w, x):
        ...     for _ in range(8):
        ...         x = jnp.tanh(x @ w)
        ...     return jnp.sum(x**2)
        >>> def step(w, x):
        ...     return w - 0.1 * jax.grad(loss)(w, x)
        >>> w, x = jax.ShapeDtypeStruct((64, 64), jnp.float32), jax.ShapeDtypeStruct((1024, 64), jnp.float32)
        >>> len(fit(step, w, x, budget="80%").plans)
        1
    """
    check_function(step, "fit")
    check_argnums(donate_argnums, "donate_argnums", len(args) + len(kwargs))
    check_flags(keep_checkpoints=keep_checkpoints)
    wanted = parse_budget(budget)
    check_limits(max_compiles, on_infeasible)
    check_names(step, kwargs, "fit")
    see_differentiated()
    options = StepOptions(
        cost=cost,
        target=target,
        solver=solver,
        host_budget=check_host_budget(host_budget, target),
        keep_checkpoints=keep_checkpoints,
        static=places_and_names(step, static_argnums, static_argnames),
        donated=places_and_names(step, donate_argnums, donate_argnames, "donate"),
    )
    whole = Step(step, args, options, kwargs)
    return build_step(search_within(whole, wanted, max_compiles=max_compiles, on_infeasible=on_infeasible))


def search_within(
    whole: Step,
    wanted: Budget,
    reserve_bytes: int = 0,
    *,
    max_compiles: int | None = None,
    on_infeasible: str = "raise",
) -> FoundStep:
    """Find the plans of a step within a budget, some of which is left for others.

    Args:
        whole: the step.
        wanted: its budget.
        reserve_bytes: of it, what is left for others.
        max_compiles: as in `plan`.
        on_infeasible: as in `plan`.

    Raises:
        InfeasibleBudgetError: no choice of plans fits.
        BudgetError: the reserve leaves nothing.
    """
    if wanted.size_bytes is None or not _may_wait(whole, wanted.size_bytes - reserve_bytes):
        budget_bytes = wanted.resolve(whole.measure(whole.without).device_bytes)
    else:
        budget_bytes = wanted.size_bytes
    if budget_bytes <= reserve_bytes:
        raise BudgetError(f"reserve={reserve_bytes:,} leaves nothing of the budget")
    room = budget_bytes - reserve_bytes
    try:
        is_sending = whole.options.host_budget is not None
        on_first = "raise" if is_sending else on_infeasible
        found = search_step(whole, room, max_compiles=max_compiles, on_infeasible=on_first)
    except InfeasibleBudgetError:
        if not is_sending:
            raise
        # Compilers build some programs with more bytes where values are sent to the host.
        found = search_step(whole.without_host(), room, max_compiles=max_compiles, on_infeasible=on_infeasible)
    if found.measurement.device_bytes > room:
        warn_infeasible(room, found.measurement.device_bytes)
    return found


def _may_wait(step: Step, budget_bytes: int) -> bool:
    """Whether the step is expected so far above the budget without plans that nobody need compile that.

    Several functions hold their bytes one after the other or all at once, which the unplanned step says.
    """
    if len(step.peaks) != 1:
        return False
    return step.peaks[0][-1] > FAR * max(0, budget_bytes - step.predicted_bytes(0))
