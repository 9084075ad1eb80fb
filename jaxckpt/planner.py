"""From a budget to a plan: choose a candidate, compile it, compare, correct the prediction, choose again."""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import jax

from jaxckpt import _compat, shardings, targets
from jaxckpt.errors import BudgetError, CompilerError, InfeasibleBudgetError, JaxckptWarning
from jaxckpt.ladder import Ladder
from jaxckpt.measurement import Objective, objective
from jaxckpt.plans import Plan, SavedGroup, line_digests
from jaxckpt.study import Candidate, Study
from jaxckpt.trace import Program, show_aval, size_bytes
from jaxckpt.units import Budget, parse_budget, parse_bytes, show_bytes

# Room left below the budget when nothing is compiled.
_UNVERIFIED_MARGIN = 0.1
_UNPLANNED = "unplanned"

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

    Returns:
        The plan. Its `str` is the report.

    Raises:
        BudgetError: a budget that cannot be read, or neither or both of `budget` and `max_cost`.
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
    request = make_request(budget, max_cost, cost, solver, target, reserve, verify)
    traced = shardings.trace_placed(fun, args)
    return plan_program(traced.program, objective(traced, argnums, has_aux), request)


def make_request(
    budget: Any, max_cost: Any, cost: str, solver: Any, target: str | None, reserve: Any, verify: bool
) -> Request:
    """Check the arguments that do not depend on the program.

    Raises:
        BudgetError: with what is accepted.
    """
    if (budget is None) == (max_cost is None):
        raise BudgetError("give exactly one of budget (bytes) and max_cost (a fraction of the unplanned cost)")
    if max_cost is not None and (isinstance(max_cost, bool) or not isinstance(max_cost, int | float)):
        raise BudgetError(f"max_cost={max_cost!r} is not a number; 1.1 allows 10 % more than the unplanned cost")
    if max_cost is not None and not 1 <= max_cost < math.inf:
        raise BudgetError(f"max_cost={max_cost!r} is below 1; 1.1 allows 10 % more than the unplanned cost")
    return Request(
        budget=None if budget is None else parse_budget(budget),
        max_cost=max_cost,
        cost=cost,
        solver=solver,
        target=target,
        reserve_bytes=parse_bytes(reserve, "reserve", least=0),
        verify=verify,
    )


def plan_program(program: Program, goal: Objective, request: Request) -> Plan:
    """Plan a flat program; from prediction, with a warning, where its target cannot be compiled for."""
    study = _study(program, goal, request)
    try:
        return _Search(study, request).run()
    except CompilerError as error:
        if not request.verify:
            raise
        warnings.warn(f"{error}. Until then this plan is predicted, not measured", JaxckptWarning, stacklevel=3)
        return _Search(study, replace(request, verify=False)).run()


def _study(program: Program, goal: Objective, request: Request) -> Study:
    """The study of this program, kept for the next budget; what was compiled for one budget serves the others."""
    chip = targets.find(request.target)  # a user's chip may be defined anew under its name
    key = (program.fingerprint(), program.shardings, goal, request.cost, request.solver, request.target, chip)
    study = _STUDIES.pop(key, None) or Study(program, goal, request.cost, request.solver, request.target)
    _STUDIES[key] = study
    while len(_STUDIES) > _MAX_STUDIES:
        _STUDIES.pop(next(iter(_STUDIES)))
    return study


class _Search:
    """One request on one study, with measurements of its own, so that a plan depends on nothing else."""

    def __init__(self, study: Study, request: Request):
        self.study, self.request = study, request
        self.candidates = study.candidates
        self.ladder = Ladder(study.fixed_bytes, [c.judgement.peak_bytes for c in self.candidates], self._measure)

    def run(self) -> Plan:
        unplanned = self._unplanned_bytes()
        if self.request.budget is None:
            return self._within_cost(unplanned)
        budget = self.request.budget.resolve(unplanned) - self.request.reserve_bytes
        if budget <= 0:
            raise BudgetError(f"reserve={self.request.reserve_bytes:,} leaves nothing of the budget")
        if unplanned <= budget:
            return self._plan(None, budget, unplanned)
        if not self.candidates:
            self._refuse(budget, unplanned, unplanned, None)
        return self._verified(budget, unplanned) if self.request.verify else self._predicted(budget, unplanned)

    def _unplanned_bytes(self) -> int:
        if self.request.verify:
            return self.study.measure(None, _UNPLANNED).device_bytes
        peak = self.study.unplanned.judgement.peak_bytes if self.candidates else 0
        return self.study.fixed_bytes + peak

    def _verified(self, budget: int, unplanned: int) -> Plan:
        chosen = self.ladder.cheapest(budget)
        if chosen is None:
            least = self.ladder.least()
            self._refuse(budget, unplanned, self.ladder.known[least], self.candidates[least])
        return self._plan(chosen, budget, unplanned)

    def _measure(self, i: int) -> int:
        candidate = self.candidates[i]
        return self.study.measure(candidate.schedule, candidate.digest).device_bytes

    def _predicted(self, budget: int, unplanned: int) -> Plan:
        room = budget - self.study.fixed_bytes
        inside = [i for i, c in enumerate(self.candidates) if c.judgement.peak_bytes * (1 + _UNVERIFIED_MARGIN) <= room]
        if not inside:
            least = math.ceil(self.candidates[0].judgement.peak_bytes * (1 + _UNVERIFIED_MARGIN))
            self._refuse(budget, unplanned, self.study.fixed_bytes + least, self.candidates[0])
        return self._plan(inside[-1], budget, unplanned)

    def _within_cost(self, unplanned: int) -> Plan:
        assert self.request.max_cost is not None
        allowed = int((self.request.max_cost - 1) * self.study.unplanned_cost)
        inside = [i for i, c in enumerate(self.candidates) if c.judgement.extra_work <= allowed]
        if not inside:
            return self._plan(None, None, unplanned)
        if self.request.verify and self.ladder.measured(inside[0]) >= unplanned:
            return self._plan(None, None, unplanned)
        return self._plan(inside[0], None, unplanned)

    def _refuse(self, budget: int, unplanned: int, least: int, candidate: Candidate | None) -> NoReturn:
        forced = _forced_by(self.study, candidate) if candidate else ()
        label = "measured" if self.request.verify else "predicted"
        least = min(least, unplanned)
        at = "".join(f"\n  {what}: {show_bytes(size)}{' at ' + line if line else ''}" for what, size, line in forced)
        raise InfeasibleBudgetError(
            f"no plan fits budget={show_bytes(budget)}. The least feasible peak is {show_bytes(least)} ({label}); "
            f"without a plan it is {show_bytes(unplanned)} ({label}). What stands at the least peak:{at}",
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
        measured = unplanned if self.request.verify else None
        return describe(
            self.study,
            None if chosen is None else self.candidates[chosen],
            budget_bytes=budget,
            max_cost=self.request.max_cost,
            unplanned_peak_bytes=unplanned,
            measured_peak_bytes=measured if chosen is None else known.get(chosen),
            next_peak_bytes=None if chosen is None else known.get(chosen + 1),
            least_peak_bytes=min(unplanned, known.get(0, least)),
            is_unplanned_measured=self.request.verify,
            is_least_measured=0 in known,
            num_compiles=len(known) + self.request.verify,
        )


def describe(study: Study, candidate: Candidate | None, *, unplanned_peak_bytes: int, **found: Any) -> Plan:
    """Put a plan together from a study, a candidate, and the numbers it was found with."""
    blocks, program = study.blocks, study.program
    predicted = unplanned_peak_bytes if candidate is None else study.fixed_bytes + candidate.judgement.peak_bytes
    chosen = (
        {"saved": (), "schedule": None, "blocks": (), "block_saves": (), "block_labels": ()}
        if candidate is None or blocks is None
        else {
            "saved": _saved_groups(study, candidate),
            "schedule": candidate.schedule,
            "blocks": tuple(span.positions for span in blocks.spans),
            "block_saves": tuple(study.saved(candidate.schedule)),
            "block_labels": tuple(map(_label, blocks.spans)),
        }
    )
    return Plan(
        unplanned_peak_bytes=unplanned_peak_bytes,
        predicted_peak_bytes=predicted,
        forward_flops=study.forward_flops,
        recompute_flops=0 if candidate is None else study.recompute_flops(candidate.schedule),
        recompute_cost=0 if candidate is None else candidate.judgement.extra_work,
        unplanned_cost=study.unplanned_cost,
        cost=study.cost,
        solver=study.solver if isinstance(study.solver, str) else getattr(study.solver, "__name__", "custom"),
        target=study.target or jax.default_backend(),
        fingerprint=program.fingerprint(),
        jax_version=_compat.JAX_VERSION,
        parameter_bytes=sum(size_bytes(program.avals[program.inputs[i]]) for i in study.objective.inputs),
        lines=line_digests(program),
        unknown=tuple(sorted(set().union(*(study.graph.nodes[i]["unknown"] for i in study.graph)))),
        **chosen,
        **found,
    )


def _label(span: Any) -> str:
    """The scope and the operations that tell a block from others."""
    eqn = max(
        span.equations, key=lambda e: (e.primitive.name in ("dot_general", "conv_general_dilated"), e.scope != "")
    )
    heavy = Counter(e.primitive.name for e in span.equations).most_common(1)[0][0]
    name = eqn.primitive.name if eqn.primitive.name in ("dot_general", "conv_general_dilated") else heavy
    return f"{eqn.scope} {name}".strip()


def _saved_groups(study: Study, candidate: Candidate) -> tuple[SavedGroup, ...]:
    """What the schedule's outermost level holds from the forward pass to the backward, grouped by equal blocks."""
    assert study.blocks is not None
    program, blocks = study.program, study.blocks
    maker = {v: eqn for eqn in program.equations for v in eqn.outputs}
    groups: dict[tuple, list[int]] = {}
    saved = study.saved(candidate.schedule)
    held: list[tuple[int, int]] = []  # block, value
    for node in candidate.schedule.nodes:
        last = node.stop - 1
        crossing = {v for span in blocks.spans[node.stop :] for v in span.inputs}
        made = [(k, v) for k in range(node.start, node.stop) for v in blocks.spans[k].outputs if v in crossing]
        held += made
        if node.start == last and hasattr(node, "option"):
            names = saved[last]
            held += [(last, v) for v in names if (last, v) not in made] if isinstance(names, tuple) else []
    for k, v in dict.fromkeys(held):
        position = blocks.spans[k].positions
        index = next(i for i, eqn in enumerate(blocks.spans[k].equations) if v in eqn.outputs)
        groups.setdefault((blocks.classes[k], index, len(position)), []).append(v)
    found = []
    for values in groups.values():
        eqn = maker[values[0]]
        found.append(
            SavedGroup(
                source=eqn.source,
                primitive=eqn.primitive.name,
                scope=eqn.scope,
                shape_dtype=show_aval(program.avals[values[0]]),
                count=len(values),
                size_bytes=sum(size_bytes(program.avals[v]) for v in values),
            )
        )
    return tuple(sorted(found, key=lambda g: -g.size_bytes))


def _forced_by(study: Study, candidate: Candidate, most: int = 5) -> tuple[tuple[str, int, str], ...]:
    """The largest values at the schedule's peak: those held, and those of the block that runs there."""
    assert study.blocks is not None
    program, judged = study.program, candidate.judgement
    spans = study.blocks.spans
    crossing = [v for span in spans for v in span.outputs]
    span = spans[judged.peak_block]
    values = {crossing[i] for i in judged.peak_live} | {v for eqn in span.equations for v in eqn.outputs}
    maker = {v: eqn for eqn in program.equations for v in eqn.outputs}
    largest = sorted(values, key=lambda v: (-size_bytes(program.avals[v]), v))[:most]
    shown = [
        (
            f"{show_aval(program.avals[v])} of {maker[v].primitive.name}",
            size_bytes(program.avals[v]),
            maker[v].source,
        )
        for v in largest
    ]
    fixed = ("arguments, results and gradients", study.fixed_bytes, "")
    return (fixed, *shown)
