"""From a function or a step with names of its own to those to save; what `names` and `plan` have in common."""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ckptsolvers.names import needed_names

from jaxckpt.api.arguments import check_flags, name_of
from jaxckpt.compilation.objective import Objective, objective
from jaxckpt.errors import CompilerError, JaxckptWarning, OptionError
from jaxckpt.model.time import check_cost
from jaxckpt.program.ir import Program
from jaxckpt.result.names import NOWHERE, Name, Names
from jaxckpt.search.names import WITHOUT, WRITTEN, FoundNames, NamesRequest, places_of, search_names
from jaxckpt.search.subjects import Named, NamedLoss
from jaxckpt.targets.chip import device_label
from jaxckpt.targets.sharding import described, trace_placed
from jaxckpt.units import parse_budget, parse_bytes, show_bytes


def named_loss(
    fun: Callable,
    args: tuple[Any, ...],
    cost: str,
    target: str | None,
    argnums: Any,
    has_aux: bool,
    kwargs: Mapping[str, Any] = MappingProxyType({}),
) -> NamedLoss:
    """A function that is differentiated here.

    Raises:
        NotDifferentiableError: nothing to differentiate.
    """
    check_cost(cost)

    @functools.cache
    def programs(keep_checkpoints: bool) -> tuple[Program, Objective]:
        with described(target):
            traced = trace_placed(fun, args, dict(kwargs), keep_checkpoints=keep_checkpoints)
        return traced.program, objective(traced, argnums, has_aux)

    return NamedLoss(target=target, cost=cost, label=name_of(fun), programs=programs)


def choose_names(
    subject: Named,
    *,
    budget: Any,
    reserve: Any,
    verify: bool,
    max_compiles: int | None,
    on_infeasible: str,
    only: Sequence[str] | None = None,
) -> Names:
    """Choose among the names of a function or a step; see `names`."""
    check_flags(verify=verify)
    if only is not None and (isinstance(only, str) or not all(isinstance(name, str) for name in only)):
        raise OptionError(f'only={only!r} is not accepted; write a list of names, such as ["query_proj", "mlpwo"]')
    request = NamesRequest(
        budget=parse_budget(budget),
        reserve_bytes=parse_bytes(reserve, "reserve", least=0),
        verify=verify,
        max_compiles=max_compiles,
        on_infeasible=on_infeasible,
    )
    with described(subject.target):
        made = _chosen(subject, request, None if only is None else list(only))
    if made.peak_bytes > made.budget_bytes:
        warnings.warn(
            f'nothing fits budget={show_bytes(made.budget_bytes)}: as on_infeasible="least" asks for, the names with '
            f"the least bytes are saved, which takes {show_bytes(made.peak_bytes)}",
            JaxckptWarning,
            stacklevel=3,
        )
    return made


def _chosen(subject: Named, request: NamesRequest, only: Sequence[str] | None) -> Names:
    problem = subject.problem()
    if not problem.names and not any(region.names for region in subject.regions):
        raise OptionError(_nothing_found(subject))
    if only is not None:
        problem = problem.restricted(only)
    needed = needed_names(problem)
    problem = problem.restricted([problem.names[i] for i in sorted(needed)])
    try:
        found = search_names(problem, subject, request)
    except CompilerError as error:
        if not request.verify:
            raise
        warnings.warn(f"{error}. Until then this choice is predicted, not measured", JaxckptWarning, stacklevel=4)
        found = search_names(problem, subject, request.predicted())
    return _result(subject, problem, found, request, only)


def _nothing_found(subject: Named) -> str:
    if not subject.regions:
        return (
            f"{subject.label} has no jax.checkpoint of its own whose policy could save names. Put one around each "
            "layer, or let jaxckpt.plan choose the regions too. Of a step those are seen that stand in functions it "
            "gives to jax.grad, value_and_grad, vjp or jacrev"
        )
    lines = ", ".join(dict.fromkeys(r.source for r in subject.regions if r.source))
    return (
        f"no value has a name inside the jax.checkpoint regions of {subject.label} ({lines}): name some with "
        "jax.ad_checkpoint.checkpoint_name, or let jaxckpt.plan choose (keep_checkpoints=False)"
    )


def _result(
    subject: Named, problem: Any, found: FoundNames, request: NamesRequest, wanted: Sequence[str] | None
) -> Names:
    saved = frozenset(problem.names[i] for i in found.choice.saved)
    without, chosen, written = (subject.counted(t) for t in (WITHOUT, saved, WRITTEN))
    of = {name: rest for name, *rest in places_of(problem, found.choice)}
    policy_names = dict.fromkeys(name for r in subject.regions for name in sorted(r.told))
    everything = dict.fromkeys([*subject.lines, *(wanted or ()), *policy_names])
    inside = {name for r in subject.regions for name in r.names}
    made = []
    for name in everything:
        if wanted is not None and name not in wanted:
            continue
        is_saved, size, spared = of.get(name, (False, 0, 0))
        made.append(
            Name(
                name=name,
                place="device" if is_saved else "remat",
                size_bytes=size,
                spared_cost=spared,
                source=subject.lines.get(name, ""),
                idle="" if name in of else _idle(name, subject, inside),
            )
        )
    # What saving takes is in the choice's time, and not in the program.
    cost = found.choice.work if subject.cost == "time" else chosen.flops
    return Names(
        target=found.measurement.target if found.measurement else device_label(subject.target, 1),
        cost=subject.cost,
        budget_bytes=found.budget_bytes,
        reserve_bytes=request.reserve_bytes,
        names=tuple(made),
        measurement=found.measurement,
        predicted_peak_bytes=found.predicted_bytes,
        unplanned_peak_bytes=found.unplanned_bytes,
        is_unplanned_measured=found.is_unplanned_measured,
        written_peak_bytes=None if found.written is None else found.written.device_bytes,
        written_flops=written.flops,
        least_peak_bytes=found.least_bytes,
        unplanned_flops=without.flops,
        recompute_flops=chosen.flops - without.flops,
        unplanned_cost=without.cost,
        recompute_cost=cost - without.cost,
        bound_recompute_cost=round(min(found.bound_work, cost)) - without.cost,
        num_judged=found.num_judged,
        is_stopped=found.is_stopped,
        num_compiles=found.num_compiles,
        regions=tuple(subject.regions),
    )


def _idle(name: str, subject: Named, inside: set[str]) -> str:
    """Why saving a name does nothing."""
    if name not in subject.lines:
        return NOWHERE
    if name not in inside:
        return "it stands outside of every jax.checkpoint"
    return "nothing in the backward pass needs it"
