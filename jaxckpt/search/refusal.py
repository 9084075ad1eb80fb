"""What an infeasible budget is refused with: the least peak, the values that stand there, and what may help."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from jaxckpt.errors import InfeasibleBudgetError
from jaxckpt.model.schedules import Candidate
from jaxckpt.program.constants import program_constant_bytes
from jaxckpt.program.describe import show_aval
from jaxckpt.program.flatten import has_checkpoints
from jaxckpt.program.ir import size_bytes
from jaxckpt.search.analysis import Analysis
from jaxckpt.units import short_bytes, show_bytes

# A plan that takes more than this share of the unplanned bytes saves nothing to speak of.
_SAVES = 0.99


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """What is known of a budget that is refused.

    Attributes:
        analysis: of the program.
        candidate: the plan that takes least, as far as known; None where there is none.
        budget_bytes: what was asked for, `reserve_bytes` taken off.
        reserve_bytes: of the budget, what is kept for others.
        least_peak_bytes: the least device bytes, measured; None where they were not.
        expected_least_bytes: the same, predicted where they were not.
        unplanned_peak_bytes: without a plan.
        is_measured: whether those were measured.
        is_hopeless: whether arguments, results and gradients alone are more than the budget.
        max_compiles: the limit at which the search stopped; None where it did not.
        num_compiles: how many programs were compiled.
    """

    analysis: Analysis
    candidate: Candidate | None
    budget_bytes: int
    reserve_bytes: int
    least_peak_bytes: int | None
    expected_least_bytes: int
    unplanned_peak_bytes: int
    is_measured: bool
    is_hopeless: bool
    max_compiles: int | None
    num_compiles: int


def refuse(known: Refusal) -> NoReturn:
    """Say that no plan fits, and why.

    Raises:
        InfeasibleBudgetError: always.
    """
    forced = forced_by(known.analysis, known.candidate) if known.candidate else ()
    at = "".join(f"\n  {what}: {show_bytes(size)}{' at ' + line if line else ''}" for what, size, line in forced)
    raise InfeasibleBudgetError(
        " ".join([*_sentences(known), f"What stands at the least peak:{at}" if at else ""]).rstrip(),
        budget_bytes=known.budget_bytes,
        least_peak_bytes=known.least_peak_bytes,
        expected_least_bytes=known.expected_least_bytes,
        unplanned_peak_bytes=known.unplanned_peak_bytes,
        measured=known.is_measured,
        num_compiles=known.num_compiles,
        forced_by=forced,
    )


def _sentences(known: Refusal) -> Iterator[str]:
    asked, reserve = known.budget_bytes + known.reserve_bytes, known.reserve_bytes
    left = f", of which reserve={show_bytes(reserve)} leaves {show_bytes(known.budget_bytes)}" if reserve else ""
    compiles = f"{known.num_compiles} compile{'' if known.num_compiles == 1 else 's'}"
    if known.max_compiles is None:
        yield f"no plan fits budget={show_bytes(asked)}{left}."
    else:
        yield (
            f"no plan was found to fit budget={show_bytes(asked)}{left} in max_compiles={known.max_compiles}; with "
            "more compiles there may be one."
        )
    if known.is_hopeless:
        fixed = show_bytes(known.analysis.fixed_bytes)
        yield f"Arguments, results and gradients alone take {fixed}, which no plan changes."
    if known.least_peak_bytes is not None:
        yield f"The least feasible peak is {show_bytes(known.least_peak_bytes)} (measured, {compiles});"
    else:
        yield f"The least feasible peak is about {short_bytes(known.expected_least_bytes)} (predicted, {compiles});"
    if known.is_measured:
        yield f"without a plan it is {show_bytes(known.unplanned_peak_bytes)} (measured)."
    else:
        yield f"without a plan it is about {short_bytes(known.unplanned_peak_bytes)} (predicted)."
    if known.expected_least_bytes > _SAVES * known.unplanned_peak_bytes:
        yield "No plan saves anything here."
    program = known.analysis.program
    if constants := program_constant_bytes(program):
        yield (
            f"Arrays that it closes over, {show_bytes(constants)}, are constants, which no plan changes: they are in "
            "these bytes on TPUs, and beside them elsewhere."
        )
    if program.keeps_checkpoints and has_checkpoints(program.equations):
        yield (
            "The function's own jax.checkpoint calls are left as they are; keep_checkpoints=False "
            "(--inline-checkpoints) lets the plan replace them."
        )


def forced_by(analysis: Analysis, candidate: Candidate, most: int = 5) -> tuple[tuple[str, int, str], ...]:
    """The largest values at the schedule's peak: those held, and those of the block that runs there."""
    program, judged = analysis.program, candidate.judgement
    spans = analysis.blocks_of(candidate).spans
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
    fixed = ("arguments, results and gradients", analysis.fixed_bytes, "")
    return (fixed, *shown)
