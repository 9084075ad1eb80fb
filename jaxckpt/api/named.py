"""From a function or a step with names of its own to those to save; what `names` and `plan` have in common."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from ckptsolvers.names import needed_names

from jaxckpt.api.arguments import is_differentiated_already
from jaxckpt.api.differentiated import see_differentiated
from jaxckpt.compilation.objective import Objective, objective
from jaxckpt.errors import CompilerError, JaxckptWarning, NotDifferentiableError, OptionError
from jaxckpt.program.ir import Program
from jaxckpt.result.names import NOWHERE, Name, Names
from jaxckpt.search.names import WITHOUT, WRITTEN, FoundNames, NamesRequest, places_of, search_names
from jaxckpt.search.subjects import Named, NamedLoss, NamedStep
from jaxckpt.targets.chip import device_label
from jaxckpt.targets.sharding import described, trace_placed


def choose_names(
    fun: Callable,
    args: tuple[Any, ...],
    request: NamesRequest,
    *,
    cost: str,
    target: str | None,
    argnums: Any = 0,
    has_aux: bool = False,
    donate_argnums: int | Sequence[int] = (),
    wanted: Sequence[str] | None = None,
) -> Names:
    """Choose among a function's names; see `names`."""
    with described(target):
        subject = _subject(fun, args, cost, target, argnums, has_aux, donate_argnums)
        problem = subject.problem()
        if not subject.regions or not (problem.names or any(r.names for r in subject.regions)):
            raise OptionError(_nothing_found(getattr(fun, "__name__", type(fun).__name__), subject))
        if wanted is not None:
            problem = problem.restricted(wanted)
        needed = needed_names(problem)
        problem = problem.restricted([problem.names[i] for i in sorted(needed)])
        try:
            found = search_names(problem, subject, request)
        except CompilerError as error:
            if not request.verify:
                raise
            warnings.warn(f"{error}. Until then this choice is predicted, not measured", JaxckptWarning, stacklevel=4)
            found = search_names(problem, subject, request.predicted())
        return _result(subject, problem, found, request, wanted)


def _subject(
    fun: Callable,
    args: tuple[Any, ...],
    cost: str,
    target: str | None,
    argnums: Any,
    has_aux: bool,
    donate_argnums: int | Sequence[int],
) -> Named:
    @functools.cache
    def programs(keep_checkpoints: bool) -> tuple[Program, Objective]:
        traced = trace_placed(fun, args, keep_checkpoints=keep_checkpoints)
        return traced.program, objective(traced, argnums, has_aux)

    is_step = False
    try:
        is_step = is_differentiated_already(*programs(True))
    except NotDifferentiableError:
        traced = trace_placed(fun, args)
        is_step = any("transpose(" in str(s) for eqn in traced.program.equations for s in eqn.name_stacks)
        if not is_step:
            raise
    if is_step:
        see_differentiated()
        return NamedStep(target=target, cost=cost, step=fun, args=args, donate_argnums=donate_argnums)
    if donate_argnums not in ((), []):
        raise OptionError("donate_argnums is for a step, and this function differentiates nothing itself")
    return NamedLoss(target=target, cost=cost, programs=programs)


def _nothing_found(label: str, subject: Named) -> str:
    if not subject.regions:
        return (
            f"{label} has no jax.checkpoint of its own whose policy could save names. Put one around each layer, or let "
            "jaxckpt.plan choose the regions too. Of a step those are seen whose function it gives to jax.grad, "
            "value_and_grad, vjp or jacrev"
        )
    lines = ", ".join(dict.fromkeys(r.source for r in subject.regions if r.source))
    return (
        f"no value has a name inside the jax.checkpoint regions of {label} ({lines}): name some with "
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
    sizes = {key: m.device_bytes for key, m in found.sizes.items()}
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
        written_peak_bytes=sizes.get(WRITTEN),
        written_flops=written.flops,
        least_peak_bytes=found.least_bytes,
        unplanned_flops=without.flops,
        recompute_flops=chosen.flops - without.flops,
        unplanned_cost=without.cost,
        recompute_cost=chosen.cost - without.cost,
        bound_recompute_cost=round(min(found.bound_work, chosen.cost)) - without.cost,
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
