"""A plan put together from a analysis, the candidate that was chosen, and the numbers it was chosen by."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from ckptsolvers import Keep

from jaxckpt import _compat
from jaxckpt.model.schedules import Candidate
from jaxckpt.program.control_flow import loop_of
from jaxckpt.program.ir import show_aval, size_bytes
from jaxckpt.result.plan import Plan, SavedGroup, line_digests
from jaxckpt.search.analysis import Analysis
from jaxckpt.targets.chip import device_label


def build_plan(analysis: Analysis, candidate: Candidate | None, **found: Any) -> Plan:
    """Put a plan together from a analysis, a candidate, and the numbers it was found with."""
    program = analysis.program
    blocks = None if candidate is None else analysis.blocks_of(candidate)
    chosen = (
        {"saved": (), "schedule": None, "blocks": (), "block_saves": (), "block_labels": ()}
        if candidate is None or blocks is None
        else {
            "saved": saved_groups(analysis, candidate),
            "schedule": candidate.schedule,
            "blocks": tuple(span.positions for span in blocks.spans),
            "block_saves": tuple(analysis.saved(candidate)),
            "block_labels": tuple(map(_label, blocks.spans)),
        }
    )
    return Plan(
        forward_flops=analysis.forward_flops,
        recompute_flops=0 if candidate is None else analysis.recompute_flops(candidate),
        recompute_cost=0 if candidate is None else analysis.extra_cost(candidate),
        unplanned_cost=analysis.unplanned_cost,
        cost=analysis.cost,
        solver=analysis.solver if isinstance(analysis.solver, str) else getattr(analysis.solver, "__name__", "custom"),
        target=device_label(analysis.target),
        fingerprint=program.fingerprint(),
        jax_version=_compat.JAX_VERSION,
        keeps_checkpoints=program.keeps_checkpoints,
        is_profiled=analysis.is_profiled,
        parameter_bytes=sum(size_bytes(program.avals[program.inputs[i]]) for i in analysis.objective.inputs),
        lines=line_digests(program),
        unknown=tuple(sorted(set().union(*(analysis.graph.nodes[i]["unknown"] for i in analysis.graph)))),
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


def saved_groups(analysis: Analysis, candidate: Candidate) -> tuple[SavedGroup, ...]:
    """What the schedule's outermost level holds from the forward pass to the backward, grouped by equal blocks."""
    program, blocks = analysis.program, analysis.blocks_of(candidate)
    maker = {v: eqn for eqn in program.equations for v in eqn.outputs}
    groups: dict[tuple, list[int]] = {}
    saved = analysis.saved(candidate)
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
    found += _unnamed_groups(analysis, candidate)
    return tuple(sorted(found, key=lambda g: -g.size_bytes))


def _unnamed_groups(analysis: Analysis, candidate: Candidate) -> Iterator[SavedGroup]:
    """What is held without a name: stacks of loops, and what JAX keeps of conditionals and other blocks."""
    blocks, saved = analysis.blocks_of(candidate), analysis.saved(candidate)
    groups: dict[tuple[int, int, int], list[int]] = {}
    for node in candidate.schedule.nodes:
        if isinstance(node, Keep) and not isinstance(saved[node.block], tuple):
            size = blocks.problem.blocks[node.block].options[node.option].saved_bytes
            if size:
                groups.setdefault((blocks.classes[node.block], node.option, size), []).append(node.block)
    for (*_, size), members in groups.items():
        eqn = blocks.spans[members[0]].equations[-1]
        loop = loop_of(eqn)
        yield SavedGroup(
            source=eqn.source,
            primitive=eqn.primitive.name,
            scope=eqn.scope,
            shape_dtype="what JAX keeps" if loop is None else f"stacks of {loop.length} iterations",
            count=len(members),
            size_bytes=len(members) * size,
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
