"""Everything known about one program under one objective: blocks, candidate schedules, and what they measured."""

import functools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from ckptsolvers import Keep

from jaxckpt import apply
from jaxckpt.compilation.measure import Measurement, lowered_for
from jaxckpt.compilation.objective import Objective, measured_specs
from jaxckpt.compilation.pool import side_by_side
from jaxckpt.kinds.base import is_alone, registered
from jaxckpt.model.blocks import Blocks
from jaxckpt.model.cut import Span, cut_program, merged_spans, spans_at
from jaxckpt.model.option import Save
from jaxckpt.model.schedules import Candidate, keep_all
from jaxckpt.model.time import timer
from jaxckpt.program import dataflow
from jaxckpt.program.effects import refuse_effects
from jaxckpt.program.interpret import run
from jaxckpt.program.ir import Program, size_bytes
from jaxckpt.program.same_call import Recent
from jaxckpt.search.candidates import candidates, check_solver
from jaxckpt.search.profile import Profiler
from jaxckpt.search.space import BlockAnalyser
from jaxckpt.targets.chip import find_target
from jaxckpt.targets.sharding import is_on_host, local_bytes, program_split


class Analysis:
    """A program cut, analysed and solved once, with its candidates from least bytes to least work.

    Args:
        program: the flat program.
        objective: what of it is differentiated.
        cost: "time" or "flops".
        solver: a solver's name, or a function `(problem, budget_bytes) -> Schedule`.
        target: the chip's name, None for the default backend.
        split: over how many devices its values are cut; None is as its most finely cut argument is.
        host_budget: bytes of the host that saved values may take; None sends none there.
        is_profiled: compile each distinct block and option on its own, and time it where the device is here.
    """

    def __init__(
        self,
        program: Program,
        objective: Objective,
        cost: str,
        solver: Any,
        target: str | None,
        split: int | None = None,
        *,
        host_budget: int | None = None,
        is_profiled: bool = False,
    ):
        self.split = program_split(program) if split is None else split
        self.program, self.objective, self.target = program, objective, target
        self.chip = find_target(target)
        self.cost, self.solver, self.is_profiled, self.host_budget = cost, solver, is_profiled, host_budget
        self.timer = timer(cost, self.chip)
        is_timed = cost == "time" and target is None
        self.profiler = Profiler(target, self.chip, self.timer, is_timed=is_timed) if is_profiled else None
        check_solver(solver)
        refuse_effects(program, "the planned function")
        self._measured: dict[str | None, Measurement] = {}
        wanted = [program.outputs[i] for i in objective.outputs]
        self.active = dataflow.active_values(
            program, {program.inputs[i] for i in objective.inputs}, {x for x in wanted if isinstance(x, int)}
        )
        dag = dataflow.build_graph(program)
        self.graph = dag
        # Solvers that know one shape of schedule only would find none that goes around a block.
        is_apart = is_logits = lambda eqn: False
        if solver in ("auto", "chain"):
            is_apart = self.chip.compiler.outside_regions(program.avals)
            is_logits = self.chip.compiler.heads(program.avals, program.equations)
        self._analyser = BlockAnalyser(
            timer=self.timer,
            target=self.chip,
            outside_regions=lambda eqn: is_apart(eqn) or is_logits(eqn),
            profiler=self.profiler,
            applier=apply.Application(draws_wait=self.draws_wait),
            # Sizes of the problem are those of all devices together.
            host_budget=None if host_budget is None else max(0, host_budget - self.fixed_host_bytes) * self.split,
        )
        divide = functools.partial(
            cut_program, program, dag, self.active, is_alone=is_alone, is_apart=is_apart, is_head=is_logits
        )
        fine = divide()
        coarse = divide(is_coarse=True) if solver == "auto" else fine
        self.cuts: list[Blocks] = []
        if fine and any(v in self.active for span in fine for v in span.outputs):
            self.cuts = [self._analysed(spans) for spans in ([fine] if len(coarse) == len(fine) else [fine, coarse])]
        # Elsewhere nothing is won by it, and analysing larger blocks takes time.
        wants_identical = solver == "auto" and self.chip.compiler.wants_identical_layers
        repeated = self._add_merged() if wants_identical and self.cuts else ()
        found = candidates([b.problem for b in self.cuts], solver, repeated, self._analyser.host_budget)
        # The Pareto set, and the same with those of each cut that only another cut's dominate by what is predicted.
        self.candidates, self.all_candidates = (
            [self._per_device(c) for c in cs if self._runs_effects_once(c)] for cs in found
        )
        self.forward_flops = sum(dag.nodes[i]["flops"] for i in dag)
        self.unplanned_cost = 0 if self.blocks is None else self.blocks.unplanned_cost

    @property
    def is_modelled(self) -> bool:
        """Whether its bytes are what calibration is about: those of the model, under the planner's own solver."""
        return self.solver == "auto" and not self.is_profiled

    @property
    def draws_wait(self) -> bool:
        """Whether random numbers are made to wait for what is computed before them."""
        return self.chip.compiler.draws_early

    @property
    def blocks(self) -> Blocks | None:
        """The program cut as finely as it is; None where nothing in it is differentiated."""
        return self.cuts[0] if self.cuts else None

    def kind(self, candidate: Candidate) -> int:
        """A number for what a candidate is: plans of one cut share a prediction error, and so do identical ones."""
        if candidate.judgement.host_bytes:
            return len(self.cuts) + 1
        return len(self.cuts) if candidate.is_identical else self._cut(candidate)

    def blocks_of(self, candidate: Candidate) -> Blocks:
        """The blocks that a candidate is about."""
        return self.cuts[self._cut(candidate)]

    def _cut(self, candidate: Candidate) -> int:
        return next(i for i, blocks in enumerate(self.cuts) if blocks.problem is candidate.problem)

    def _runs_effects_once(self, candidate: Candidate) -> bool:
        return all(candidate.judgement.num_forwards[k] == 1 for k in self.blocks_of(candidate).once)

    def _analysed(self, spans: tuple[Span, ...], *, are_repeated: bool = False) -> Blocks:
        return self._analyser.blocks(
            self.program,
            self.graph,
            spans,
            active=self.active,
            arguments=set(self.program.inputs),
            are_repeated=are_repeated,
        )

    def _add_merged(self) -> list[int]:
        """Add a cut whose blocks are what the program repeats; return those that are equal, if there are any."""
        coarse = self.cuts[-1]
        is_plain = [len(b.options) > 1 and not b.analysis.is_planned_inside for b in coarse.blocks]
        numbers = [b.number if plain else None for b, plain in zip(coarse.blocks, is_plain, strict=True)]
        spans = merged_spans(self.program, coarse.spans, numbers)
        if len(spans) == len(coarse.spans):
            return []
        merged = self._analysed(spans, are_repeated=True)
        self.cuts.append(merged)
        alone = {span.positions for span in coarse.spans}
        numbers = [n for n, span in zip(merged.numbers, spans, strict=True) if span.positions not in alone]
        most, _ = Counter(numbers).most_common(1)[0]
        return [k for k, n in enumerate(merged.numbers) if n == most]

    @functools.cached_property
    def fixed_bytes(self) -> int:
        """Arguments, results and gradients: what every plan of the program takes on each device."""
        program, sizes = self.program, [-(-size_bytes(a) // self.split) for a in self.program.avals]
        if program.shardings:
            for v, sharding in zip(program.inputs, program.shardings, strict=True):
                sizes[v] = 0 if is_on_host(sharding) else local_bytes(program.avals[v], sharding)
        read = {v for eqn in program.equations for v in eqn.reads} | set(program.outputs)
        # What it closes over are constants of the user's own program.
        arguments = sum(sizes[v] for v in program.inputs[len(program.closed_over) :] if v in read)
        results = sum(sizes[x] for x in program.outputs if isinstance(x, int))
        gradients = sum(sizes[program.inputs[i]] for i in self.objective.inputs)
        cotangents = (
            0
            if self.objective.is_scalar
            else sum(sizes[x] for i in self.objective.outputs if isinstance(x := program.outputs[i], int))
        )
        return arguments + results + gradients + cotangents

    @functools.cached_property
    def fixed_host_bytes(self) -> int:
        """Arguments that live on the host, on each device's behalf."""
        program = self.program
        pairs = zip(program.inputs, program.shardings, strict=False)
        return sum(local_bytes(program.avals[v], s) for v, s in pairs if is_on_host(s))

    @property
    def saves_anything(self) -> bool:
        """Whether a backward pass reads anything of the forward, without a plan too."""
        if self.blocks is None:
            return False
        options = (option for block in self.blocks.problem.blocks for option in block.options)
        return any(option.saved_bytes or option.backward_peak_bytes for option in options)

    @functools.cached_property
    def unplanned(self) -> Candidate:
        """The schedule that keeps everything, as the program does without a plan."""
        assert self.blocks is not None
        return self._per_device(keep_all(self.blocks.problem))

    def _per_device(self, candidate: Candidate) -> Candidate:
        """What lies between arguments and results is taken to be cut identically; measuring corrects it."""
        judged = candidate.judgement
        peak, host = (-(-size // self.split) for size in (judged.peak_bytes, judged.host_bytes))
        return replace(candidate, judgement=replace(judged, peak_bytes=peak, host_bytes=host))

    def extra_cost(self, candidate: Candidate) -> int:
        """What it takes beyond the program without a plan, in the unit of the cost; less than 0 where it is faster."""
        return candidate.judgement.extra_work - self.blocks_of(candidate).unplanned_extra

    def idle(self, candidate: Candidate) -> int:
        """Time, in the unit of the cost, that it waits for the link to the host; it is in the extra cost."""
        keeps = (node for node, _ in candidate.schedule.walk() if isinstance(node, Keep))
        blocks = self.blocks_of(candidate).blocks
        return sum(blocks[node.block].options[node.option].idle for node in keeps)

    def saved(self, candidate: Candidate) -> list[Save]:
        """What each block's chosen option saves, `[num_blocks]`."""
        return self.blocks_of(candidate).saves(candidate.schedule)

    def recompute_flops(self, candidate: Candidate) -> int:
        """FLOPs beyond the unplanned program's, whatever the plan's cost is counted in."""
        blocks = self.blocks_of(candidate)
        return blocks.flops(candidate.schedule, candidate.judgement) - blocks.forward_flops

    def planned(self, candidate: Candidate, program: Program | None = None) -> Callable[..., list[Any]]:
        """A program under a candidate, as a function of flat inputs.

        Args:
            candidate: one of this analysis.
            program: one with the same fingerprint; None is the analysed one.
        """
        spans, saved = self.blocks_of(candidate).spans, self.saved(candidate)
        if program is not None and program is not self.program:
            # Values are numbered in the order of another trace.
            spans = spans_at(program, [span.positions for span in spans])
        else:
            program = self.program
        return apply.planned(program, spans, candidate.schedule, saved, draws_wait=self.draws_wait)

    def measure(self, candidate: Candidate | None) -> Measurement:
        """Compile the differentiated program under a candidate, or without a plan; each is compiled once."""
        digest = None if candidate is None else candidate.digest
        if digest not in self._measured:
            self._measured[digest] = self._lowered(candidate)()
        return self._measured[digest]

    def measure_all(self, candidates: Iterable[Candidate]) -> None:
        """Compile several candidates side by side; `measure` has them then."""
        new = {c.digest: c for c in candidates if c.digest not in self._measured}
        if len(new) > 1:
            found = side_by_side(map(self._lowered, new.values()))
            self._measured |= dict(zip(new, found, strict=True))

    def _lowered(self, candidate: Candidate | None) -> Callable[[], Measurement]:
        """The differentiated program under a candidate, or without a plan; what is returned compiles it."""
        fun = functools.partial(run, self.program) if candidate is None else self.planned(candidate)
        return lowered_for(
            self.objective.differentiated(fun),
            measured_specs(self.program, self.objective),
            self.target,
            closed_over=self.program.closed_over,
            jit_options=self.jit_options(candidate),
        )

    def jit_options(self, candidate: Candidate | None) -> dict[str, Any]:
        """Keywords of `jax.jit` that a candidate needs."""
        options = self.chip.compiler.offload_options
        is_sending = candidate is not None and candidate.judgement.host_bytes
        return {"compiler_options": dict(options)} if options and is_sending else {}


_ANALYSES: Recent[Analysis] = Recent(4)


def find_analysis(
    program: Program,
    goal: Objective,
    cost: str,
    solver: Any,
    target: str | None,
    is_profiled: bool = False,
    host_budget: int | None = None,
) -> Analysis:
    """The analysis of this program, kept for the next budget; what was compiled for one budget serves the others."""
    chip = find_target(target)  # a user's chip and its compiler may be defined anew under their names
    key = (program.fingerprint(), program.keeps_checkpoints, program.shardings, goal, cost, solver, target, chip)
    key += (chip.compiler, registered(), is_profiled, host_budget, *map(id, program.closed_over))
    rest: dict[str, Any] = {"is_profiled": is_profiled, "host_budget": host_budget}
    make = lambda: Analysis(program, goal, cost, solver, target, **rest)  # noqa: E731
    if program.description.opaque:  # another program may have this fingerprint
        return make()
    return _ANALYSES.get(key, make)
