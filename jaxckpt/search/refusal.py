"""What an infeasible budget is refused with: the values that stand at the least peak."""

from jaxckpt.model.schedules import Candidate
from jaxckpt.program.describe import show_aval
from jaxckpt.program.ir import size_bytes
from jaxckpt.search.analysis import Analysis


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
