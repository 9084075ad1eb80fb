"""What a user gets, put together from what a search found."""

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

from ckptsolvers import Keep

from jaxckpt import _compat
from jaxckpt.compilation.compiled import flags
from jaxckpt.kinds.base import kind_of
from jaxckpt.model.option import Place
from jaxckpt.model.schedules import Candidate
from jaxckpt.program.constants import jaxpr_constant_bytes, program_constant_bytes
from jaxckpt.program.describe import show_aval
from jaxckpt.program.ir import size_bytes
from jaxckpt.result.fitted import Fitted
from jaxckpt.result.plan import Plan, SavedGroup, digest_schedule, line_digests
from jaxckpt.search.analysis import Analysis
from jaxckpt.search.found import Found
from jaxckpt.search.step_search import FoundStep
from jaxckpt.targets.chip import device_label


def build(found: Found) -> Plan:
    """Put a plan together from what a search found."""
    analysis, candidate, measured = found.analysis, found.candidate, found.measurement
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
    sent = 0 if candidate is None else candidate.judgement.host_bytes
    return Plan(
        schedule_digest=digest_schedule(
            program.fingerprint(),
            program.keeps_checkpoints,
            chosen["schedule"],
            chosen["blocks"],
            chosen["block_saves"],
            analysis.draws_wait,
        ),
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
        draws_wait=analysis.draws_wait,
        is_profiled=analysis.is_profiled,
        parameter_bytes=sum(size_bytes(program.avals[program.inputs[i]]) for i in analysis.objective.inputs),
        constant_bytes=program_constant_bytes(program),
        lines=line_digests(program),
        unknown=tuple(sorted(set().union(*(analysis.graph.nodes[i]["unknown"] for i in analysis.graph)))),
        budget_bytes=found.budget_bytes,
        max_cost=found.max_cost,
        host_budget_bytes=found.host_budget_bytes,
        predicted_host_bytes=analysis.fixed_host_bytes + sent,
        measured_host_bytes=None if measured is None or measured.is_host_predicted else measured.host_bytes,
        link_bytes=sent,
        idle_time=0 if candidate is None else analysis.idle(candidate),
        num_worse_on_host=found.num_worse_on_host,
        unplanned_peak_bytes=found.unplanned_peak_bytes,
        predicted_peak_bytes=found.predicted_peak_bytes,
        measured_peak_bytes=None if measured is None else measured.device_bytes,
        is_at_most=measured is not None and measured.is_at_most,
        num_rematerialized=None if measured is None else measured.num_rematerialized,
        num_recomputed=None if measured is None else measured.num_recomputed,
        num_asked=None if measured is None else measured.num_asked,
        flags=() if measured is None else flags(os.environ),
        next_peak_bytes=found.next_peak_bytes,
        least_peak_bytes=found.least_peak_bytes,
        is_unplanned_measured=found.is_unplanned_measured,
        expected_least_bytes=found.expected_least_bytes,
        is_stopped=found.is_stopped,
        num_compiles=found.num_compiles,
        calibration=found.calibration,
        split=analysis.split,
        **chosen,
    )


def build_step(found: FoundStep) -> Fitted:
    """Put a fitted step together: the step that runs, and a plan for each function it differentiates."""
    return Fitted(
        step=found.step.jitted(found.picks),
        plans=tuple(map(build, found.functions)),
        measurement=found.measurement,
        unplanned=found.unplanned,
        budget_bytes=found.budget_bytes,
        num_compiles=found.num_compiles,
        is_stopped=found.is_stopped,
        calibration=found.calibration,
        constant_bytes=jaxpr_constant_bytes(found.step.closed),
        found=found,
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
            held += [(last, v) for v in names.named_values if (last, v) not in made]
    for k, v in dict.fromkeys(held):
        position = blocks.spans[k].positions
        index = next(i for i, eqn in enumerate(blocks.spans[k].equations) if v in eqn.outputs)
        groups.setdefault((blocks.numbers[k], index, len(position)), []).append(v)
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
    groups: dict[tuple[int, int, int, Place], list[int]] = {}
    for node in candidate.schedule.nodes:
        if isinstance(node, Keep) and not saved[node.block].is_by_name:
            for place, size in blocks.blocks[node.block].options[node.option].saved.items():
                if size:
                    groups.setdefault((blocks.numbers[node.block], node.option, size, place), []).append(node.block)
    for (*_, size, place), members in groups.items():
        eqn = blocks.spans[members[0]].equations[-1]
        yield SavedGroup(
            source=eqn.source,
            primitive=eqn.primitive.name,
            scope=eqn.scope,
            shape_dtype=kind_of(eqn, is_active=True).held(eqn),
            count=len(members),
            size_bytes=len(members) * size,
            place=place.value,
        )
