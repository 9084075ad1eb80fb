"""Everything known about one program under one objective: blocks, candidate schedules, and what they measured."""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ckptsolvers import ChainTable, InfeasibleError, Judgement, Keep, Schedule, simulate
from ckptsolvers.chain import default_num_levels

from jaxckpt import apply, cuts, graph, targets
from jaxckpt.blocks import Blocks, analyse
from jaxckpt.errors import OptionError
from jaxckpt.measurement import Measurement, Objective, compiled_bytes, cotangent_specs, input_specs
from jaxckpt.trace import Program, refuse_effects, run, size_bytes

# Candidates stand this far apart in predicted bytes; finer ones differ by less than a compiler's own noise.
_STEP = 1.01
# JAX traces nested checkpoints by recursion, and each level costs it some thirty of Python's thousand frames.
_MAX_DEPTH = 20
_ILP_TIME_S = 3.0
_SOLVERS = ("auto", "chain", "chen", "revolve", "lower_sets", "ilp")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A schedule with what the judge says of it."""

    schedule: Schedule
    judgement: Judgement

    @property
    def digest(self) -> str:
        """A name for the schedule that is the same everywhere."""
        return hashlib.sha256(json.dumps(self.schedule.to_json()).encode()).hexdigest()[:16]


class Study:
    """A program cut, analysed and solved once, with its candidates from least bytes to least work.

    Args:
        program: the flat program.
        objective: what of it is differentiated.
        cost: "time" or "flops".
        solver: a solver's name, or a function `(problem, budget_bytes) -> Schedule`.
        target: the chip's name, None for the default backend.
    """

    def __init__(self, program: Program, objective: Objective, cost: str, solver: Any, target: str | None):
        self.program, self.objective, self.target = program, objective, target
        self.chip = targets.find(target)
        self.cost, self.solver = cost, solver
        if not (callable(solver) or solver in _SOLVERS):
            raise OptionError(f"solver={solver!r} is not known; write one of {', '.join(_SOLVERS)}, or a function")
        refuse_effects(program, "the planned function")
        self._measured: dict[str, Measurement] = {}
        wanted = [program.outputs[i] for i in objective.outputs]
        self.active = graph.active_values(
            program, {program.inputs[i] for i in objective.inputs}, {x for x in wanted if isinstance(x, int)}
        )
        dag = graph.build_graph(program)
        spans = cuts.cut(program, dag, self.active)
        self.blocks: Blocks | None = None
        self.candidates: list[Candidate] = []
        if spans and any(v in self.active for span in spans for v in span.outputs):
            self.blocks = analyse(
                program,
                dag,
                spans,
                active=self.active,
                arguments=set(program.inputs),
                timer=targets.timer(cost, self.chip),
                target=self.chip,
            )
            self.candidates = _candidates(self.blocks, solver)
        self.graph = dag
        self.forward_flops = sum(dag.nodes[i]["flops"] for i in dag)
        self.unplanned_cost = 0 if self.blocks is None else self.blocks.unplanned_cost

    @property
    def fixed_bytes(self) -> int:
        """Arguments, results and gradients: what every plan of the program takes."""
        program, sizes = self.program, [size_bytes(a) for a in self.program.avals]
        read = {v for eqn in program.equations for v in eqn.reads} | set(program.outputs)
        arguments = sum(sizes[v] for v in program.inputs if v in read)
        results = sum(sizes[x] for x in program.outputs if isinstance(x, int))
        gradients = sum(sizes[program.inputs[i]] for i in self.objective.inputs)
        cotangents = (
            0
            if self.objective.is_scalar
            else sum(sizes[x] for i in self.objective.outputs if isinstance(x := program.outputs[i], int))
        )
        return arguments + results + gradients + cotangents

    @property
    def unplanned(self) -> Candidate:
        """The schedule that keeps everything, as the program does without a plan."""
        assert self.blocks is not None
        return _keep_all(self.blocks)

    def saved(self, schedule: Schedule) -> list[apply.Saved]:
        """What each block's chosen option saves, `[num_blocks]`."""
        assert self.blocks is not None
        keeps = [node for node, _ in schedule.walk() if isinstance(node, Keep)]
        return [self.blocks.choices[node.block][node.option].saved for node in keeps]

    def recompute_flops(self, schedule: Schedule) -> int:
        """FLOPs beyond the unplanned program's, whatever the plan's cost is counted in."""
        assert self.blocks is not None
        return simulate(self.blocks.flops_problem, schedule).extra_work

    def planned(self, schedule: Schedule) -> Callable[..., list[Any]]:
        """The program under a schedule, as a function of flat inputs."""
        assert self.blocks is not None
        return apply.planned(self.program, self.blocks.spans, schedule, self.saved(schedule))

    def measure(self, schedule: Schedule | None, digest: str) -> Measurement:
        """Compile the differentiated program under a schedule, or without one; each is compiled once."""
        if digest not in self._measured:
            fun = functools.partial(run, self.program) if schedule is None else self.planned(schedule)
            specs = [*input_specs(self.program), *cotangent_specs(self.program, self.objective)]
            self._measured[digest] = compiled_bytes(self.objective.differentiated(fun), specs, self.target)
        return self._measured[digest]


def _candidates(blocks: Blocks, solver: Any) -> list[Candidate]:
    """Candidates of a solver that no other one beats in both bytes and work, least bytes first."""
    problem = blocks.problem
    if solver in ("auto", "chain"):
        schedules = _chain_schedules(blocks)
    elif solver == "chen":
        from ckptsolvers.chen import chen_schedules

        schedules = list(chen_schedules(problem))
    elif solver == "revolve":
        from ckptsolvers.revolve import revolve_schedules

        schedules = list(revolve_schedules(problem))
    else:
        from ckptsolvers.solve import SOLVERS

        if isinstance(solver, str):
            # It is asked some forty times, so a proof of each answer would take too long.
            limit = {"time_limit_s": _ILP_TIME_S} if solver == "ilp" else {}
            solver = functools.partial(SOLVERS[solver], **limit)
        schedules = _called_schedules(blocks, solver)
    judged = [Candidate(s, simulate(problem, s)) for s in schedules if s.depth <= _MAX_DEPTH]
    judged.sort(key=lambda c: (c.judgement.peak_bytes, c.judgement.work))
    best: list[Candidate] = []
    for candidate in judged:
        if not best or candidate.judgement.work < best[-1].judgement.work:
            best.append(candidate)
    return _spread(best)


def _spread(candidates: list[Candidate]) -> list[Candidate]:
    """Leave out a candidate where the next one costs hardly more bytes and less work."""
    spread: list[Candidate] = []
    for candidate in reversed(candidates):
        if not spread or candidate.judgement.peak_bytes * _STEP <= spread[-1].judgement.peak_bytes:
            spread.append(candidate)
    if candidates and spread[-1] is not candidates[0]:
        spread.append(candidates[0])
    return spread[::-1]


def _chain_schedules(blocks: Blocks) -> Sequence[Schedule]:
    """Schedules from the least bytes to keeping everything: two tables, the finer one where bytes are few."""
    problem, most = blocks.problem, max(1, _keep_all(blocks).judgement.peak_bytes)
    num_levels = default_num_levels(problem.num_blocks) // 2
    coarse = ChainTable(problem, max_bytes=most, num_levels=num_levels)
    if not coarse.steps():
        return []  # rounded up to the table's resolution, not even keeping everything fits
    least = coarse.steps()[0] * coarse.unit_bytes
    fine = ChainTable(problem, max_bytes=int(1.5 * least), num_levels=num_levels)
    return [*_spread_schedules(fine, 0), *_spread_schedules(coarse, int(1.5 * least))]


def _spread_schedules(table: ChainTable, above_bytes: int) -> list[Schedule]:
    """A table's schedules above a level, as many as are worth judging: that takes longer than solving."""
    levels: list[int] = []
    for level in reversed(table.steps()):
        if level * table.unit_bytes > above_bytes and (not levels or level * _STEP <= levels[-1]):
            levels.append(level)
    return [table.schedule(level) for level in levels]


def _keep_all(blocks: Blocks) -> Candidate:
    keep_all = Schedule(tuple(Keep(k, len(b.options) - 1) for k, b in enumerate(blocks.problem.blocks)))
    return Candidate(keep_all, simulate(blocks.problem, keep_all))


def _called_schedules(blocks: Blocks, solver: Callable[..., Any]) -> list[Schedule]:
    """A solver of budgets, asked at budgets that fall from keeping everything."""
    found, budget = [], max(1, _keep_all(blocks).judgement.peak_bytes)
    while budget > 0:
        try:
            answer = solver(blocks.problem, budget_bytes=budget)
        except InfeasibleError:
            break
        schedule = getattr(answer, "schedule", answer)
        found.append(schedule)
        budget = min(int(budget / 1.05), simulate(blocks.problem, schedule).peak_bytes - 1)
    return found
