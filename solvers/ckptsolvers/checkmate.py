"""General schedules of a graph as a mixed integer program.

"Checkmate: breaking the memory wall with optimal tensor rematerialization" (Jain, Jain, Nrusimha, Gholami, Abbeel,
Keutzer, Stoica, Gonzalez, 2020), the frontier-advancing formulation of section 4, solved by HiGHS through
`scipy.optimize.milp`. In stage t node t is computed for the first time, after whatever must be computed again:

    R[t, i]     node i is computed in stage t, the first time or again
    S[t, i]     node i is held from stage t - 1 into stage t
    F[t, i, k]  in stage t, node i is freed right after node k is computed
    U[t, k]     bytes alive once node k's turn in stage t is over

This variant gives every reason against freeing its own constraint instead of one big one, which makes the relaxation
tighter and lets F be continuous; it has no variables for stages from which on nothing that reads a node can be of use;
it lets several nodes share a stage, where asked; and it judges what it finds in integers, as the program's numbers are
floats.

Optimal among schedules that compute nodes for the first time in the given order and, between two such (two stages),
each node at most once and in order. Schedules outside that class can be faster, on rare graphs. Relaxed, it gives a
lower bound; rounded (section 5 of the paper: keep what the relaxation holds by more than a threshold, compute what is
then missing), a schedule for when time runs out.

O(n^2 + n edges) variables and constraints; the time is exponential at worst.
"""

import itertools
import math
import time
from collections.abc import Iterator, Sequence

import numpy as np

from ckptsolvers.dag import Dag, DagJudgement, DagSolution, DagStep, plain_steps, simulate_dag, steps_of_computes
from ckptsolvers.errors import InfeasibleError, InvalidProblemError
from ckptsolvers.linear import LinearProgram
from ckptsolvers.solution import check_budget

CLASS = "schedules in stages of the given order (Checkmate's)"
_TOLERANCE = 1e-7
_THRESHOLDS = (0.5, 0.3, 0.1, 0.7, 0.9, 0.01, 0.99)


def solve_checkmate(
    dag: Dag,
    *,
    budget_bytes: int,
    time_limit_s: float = 60.0,
    gap: float = 0.0,
    stages: Sequence[int] | None = None,
) -> DagSolution:
    """Return the general schedule with the least work within the budget.

    Args:
        dag: a whole training graph, such as `training_graph` makes.
        budget_bytes: the most that may be alive at once.
        time_limit_s: when to stop and return the best schedule found, with its gap.
        gap: stop as soon as the work is proven to be within this fraction of the optimum.
        stages: `[n]`, ascending from 0, the stage in which each node is computed first, where several share one, such
            as `BlockGraph.stages`; by default each has its own. Those that share one are computed in a row.

    Returns:
        A judged solution with the solver's bound; proven optimal where the bound meets the work.

    Raises:
        InfeasibleError: nothing in the class fits, or nothing was found in time; `least_bytes` is None then.
        InvalidProblemError: stages that are not such numbers.

    Source: Jain et al. 2020, sections 4 and 5.
    """
    check_budget(budget_bytes)
    started = time.perf_counter()
    plain = plain_steps(dag)
    judged = simulate_dag(dag, plain)
    if judged.peak_bytes <= budget_bytes:
        return _solution(budget_bytes, plain, judged, judged.work, started)
    program = _Program(dag, budget_bytes, stages)
    found = program.solve(time_limit_s=time_limit_s, gap=gap)
    if found.is_infeasible:
        raise InfeasibleError(budget_bytes, None, "checkmate")
    bound = max(dag.total_time, _whole(found.bound, dag.total_time))
    left_s = max(1.0, time_limit_s - (time.perf_counter() - started))
    best = None
    if found.values is not None:
        best = _best(dag, [program.steps(found.values)], budget_bytes) or _tightened(program, budget_bytes, left_s)
    if best is None or not _meets(bound, best[1].work):
        fallback = _best(dag, _roundings(dag, program, left_s), budget_bytes)
        best = min(filter(None, (best, fallback)), key=lambda found: found[1].work, default=None)
    if best is None:
        raise InfeasibleError(budget_bytes, None, "checkmate")
    return _solution(budget_bytes, *best, bound, started)


def relaxed_bound_work(
    dag: Dag, *, budget_bytes: int, time_limit_s: float = 60.0, stages: Sequence[int] | None = None
) -> int | None:
    """Return a lower bound on the work of every schedule in the class, from the linear relaxation; None out of time.

    Raises:
        InfeasibleError: not even fractions of values fit.
    """
    found = _Program(dag, budget_bytes, stages).solve(time_limit_s=time_limit_s, relax=True)
    if found.is_infeasible:
        raise InfeasibleError(budget_bytes, None, "checkmate's relaxation")
    return None if found.values is None else max(dag.total_time, _whole(found.bound, dag.total_time))


class _Program:
    """The program's variables and constraints; bytes are in units of the budget, time in units of one plain run."""

    def __init__(self, dag: Dag, budget_bytes: int, stages: Sequence[int] | None = None):
        self.dag, self.readers = dag, dag.readers
        self.stage_of = _checked(stages, len(dag.nodes))
        self.last_stage = _last_stages(dag, self.stage_of, self.readers)
        self.num_stages = self.stage_of[-1] + 1
        self.lp = LinearProgram()
        self._unit, self._time = max(1, budget_bytes), max(1, dag.total_time)
        self._compute: dict[tuple[int, int], int] = {}
        self._hold: dict[tuple[int, int], int] = {}
        self._add_variables()
        for t in range(self.num_stages):
            self._add_dependencies(t)
            self._add_memory(t)

    def solve(self, *, time_limit_s: float, gap: float = 0.0, relax: bool = False):
        return self.lp.solve(time_limit_s=time_limit_s, gap=gap, relax=relax)

    def held(self, values: np.ndarray) -> np.ndarray:
        """What is held into each stage, `[num_stages, n]`."""
        held = np.zeros((self.num_stages, len(self.dag.nodes)))
        for where, at in self._hold.items():
            held[where] = values[at]
        return held

    def steps(self, values: np.ndarray) -> tuple[DagStep, ...]:
        """The steps of a solution, which drop every value as soon as nothing later needs it."""
        computed = sorted(where for where, at in self._compute.items() if values[at] > 0.5)
        return steps_of_computes(self.dag, [i for _, i in computed])

    def round(self, held: np.ndarray) -> tuple[DagStep, ...]:
        """Hold what is given where it can be, and compute whatever is then missing."""
        nodes = self.dag.nodes
        keep, computed = held.astype(bool), np.zeros(held.shape, bool)
        for i, node in enumerate(nodes):
            computed[self.stage_of[i], i] = True
            if node.is_once:
                keep[self.stage_of[i] + 1 : self.last_stage[i] + 1, i] = True
        for t in range(self.num_stages):
            if t:
                keep[t] &= keep[t - 1] | computed[t - 1]
            for k in range(len(nodes) - 1, -1, -1):
                if computed[t, k]:
                    for read in nodes[k].reads:
                        computed[t, read] |= not keep[t, read]
        return steps_of_computes(self.dag, np.nonzero(computed)[1].tolist())

    def _add_variables(self) -> None:
        for i, node in enumerate(self.dag.nodes):
            born = self.stage_of[i]
            # What is made once is there for every reader's first time.
            stays = max((self.stage_of[k] for k in self.readers[i]), default=born) if node.is_once else born
            for t in range(born, self.last_stage[i] + 1):
                if t == born or not node.is_once:
                    fixed = 1.0 if t == born else None
                    self._compute[t, i] = self.lp.add_binary(cost=node.time / self._time, fixed=fixed)
                if t > born:
                    self._hold[t, i] = self.lp.add_binary(fixed=1.0 if t <= stays else None)

    def _terms(self, t: int, i: int, sign: float = 1.0) -> dict[int, float]:
        """R[t, i] + S[t, i], as far as the two exist."""
        places = (self._compute.get((t, i)), self._hold.get((t, i)))
        return {place: sign for place in places if place is not None}

    def _add_dependencies(self, t: int) -> None:
        for k, node in enumerate(self.dag.nodes):
            if (t, k) in self._compute:
                for read in node.reads:
                    self.lp.add_at_most({self._compute[t, k]: 1.0, **self._terms(t, read, -1.0)}, 0.0)
            if (t, k) in self._hold:
                self.lp.add_at_most({self._hold[t, k]: 1.0, **self._terms(t - 1, k, -1.0)}, 0.0)
                if (t, k) in self._compute:
                    self.lp.add_at_most(self._terms(t, k), 1.0)

    def _add_memory(self, t: int) -> None:
        """U[t, k] <= budget for every k computed in stage t, from U[t, k - 1] by what k adds and what is freed."""
        sizes = [node.size_bytes / self._unit for node in self.dag.nodes]
        held = {self._hold[t, i]: size for i, size in enumerate(sizes) if (t, i) in self._hold}
        before: dict[int, float] = held
        for k, node in enumerate(self.dag.nodes):
            if (t, k) not in self._compute:
                continue
            place = self._compute[t, k]
            during = dict(before)
            during[place] = during.get(place, 0.0) + sizes[k]
            used = self.lp.add_continuous(upper=1.0)
            self.lp.add_equal({**during, used: -1.0}, 0.0)
            if node.transient_bytes:
                self.lp.add_at_most({used: 1.0, place: node.transient_bytes / self._unit}, 1.0)
            before = {used: 1.0}
            for i in (*node.reads, k):
                freed = self._add_free(t, i, k)
                if freed is not None:
                    before[freed] = -sizes[i]

    def _add_free(self, t: int, i: int, k: int) -> int | None:
        """F[t, i, k]: only if k is computed, nothing later in the stage reads i, and i is not held on."""
        if not self.dag.nodes[i].size_bytes:
            return None
        later = [self._compute[t, j] for j in self.readers[i] if j > k and (t, j) in self._compute]
        against = [*later, *([self._hold[t + 1, i]] if (t + 1, i) in self._hold else [])]
        if any(self.lp.is_fixed_to_one(place) for place in against):
            return None
        freed = self.lp.add_continuous(upper=1.0)
        self.lp.add_at_most({freed: 1.0, self._compute[t, k]: -1.0}, 0.0)
        for place in against:
            self.lp.add_at_most({freed: 1.0, place: 1.0}, 1.0)
        return freed


def _checked(stages: Sequence[int] | None, num_nodes: int) -> Sequence[int]:
    if stages is None:
        return range(num_nodes)
    if len(stages) != num_nodes or stages[0] or any(b - a not in (0, 1) for a, b in itertools.pairwise(stages)):
        raise InvalidProblemError(
            f"{stages=} must be a stage for each of {num_nodes} nodes: 0, then the same or the next"
        )
    return stages


def _last_stages(dag: Dag, stage_of: Sequence[int], readers: Sequence[Sequence[int]]) -> list[int]:
    """The last stage in which each node can be of use: a reader may be computed again, for readers of its own."""
    last = list(stage_of)
    for i in range(len(last) - 1, -1, -1):
        last[i] = max([last[i], *(stage_of[k] if dag.nodes[k].is_once else last[k] for k in readers[i])])
    return last


def _tightened(
    program: _Program, budget_bytes: int, time_limit_s: float
) -> tuple[tuple[DagStep, ...], DagJudgement] | None:
    """Solve for a little less: floats let a schedule through whose integer peak is above the budget."""
    dag, less = program.dag, budget_bytes - budget_bytes // 100_000 - 1
    program = _Program(dag, less, program.stage_of)
    found = program.solve(time_limit_s=time_limit_s)
    return None if found.values is None else _best(dag, [program.steps(found.values)], budget_bytes)


def _roundings(dag: Dag, program: _Program, time_limit_s: float) -> Iterator[tuple[DagStep, ...]]:
    """Round the relaxation at a few thresholds, then a few patterns."""
    relaxed = program.solve(time_limit_s=time_limit_s, relax=True)
    if relaxed.values is not None:
        held = program.held(relaxed.values)
        yield from (program.round(held > threshold) for threshold in _THRESHOLDS)
    yield from map(program.round, _patterns(dag, program))


def _patterns(dag: Dag, program: _Program) -> Iterator[np.ndarray]:
    """Hold every d-th node, and what is read within the next few stages: Chen's segments where there are any."""
    n = len(dag.nodes)
    until_use = np.full((program.num_stages, n), n + 1)
    for i, readers in enumerate(program.readers):
        for k in readers:
            stages = np.arange(program.stage_of[k] + 1)
            until_use[stages, i] = np.minimum(until_use[stages, i], program.stage_of[k] - stages)
    for distance in (2, 3, 4, 6, 8, 12, 16, n + 1):
        for soon in (1, 2, 4, 8, 16):
            yield (until_use <= soon) | (np.arange(n) % distance == distance - 1)


def _best(dag: Dag, candidates, budget_bytes: int) -> tuple[tuple[DagStep, ...], DagJudgement] | None:
    fitting = _fitting(dag, candidates, budget_bytes)
    return min(fitting, key=lambda found: (found[1].work, found[1].peak_bytes), default=None)


def _fitting(dag: Dag, candidates, budget_bytes: int) -> Iterator[tuple[tuple[DagStep, ...], DagJudgement]]:
    for steps in candidates:
        judged = simulate_dag(dag, steps)
        if judged.peak_bytes <= budget_bytes:
            yield steps, judged


def _whole(bound: float, total_time: int) -> int:
    """The least integer of work that a bound in units of the plain run allows, up to the solver's tolerance."""
    return 0 if not math.isfinite(bound) else math.ceil(bound * total_time * (1 - _TOLERANCE) - _TOLERANCE)


def _meets(bound: int, work: int) -> bool:
    return work - bound <= 2 * _TOLERANCE * work


def _solution(
    budget_bytes: int, steps: tuple[DagStep, ...], judged: DagJudgement, bound: int, started: float
) -> DagSolution:
    is_proven = _meets(bound, judged.work)
    return DagSolution(
        steps=steps,
        judgement=judged,
        budget_bytes=budget_bytes,
        solver="checkmate",
        bound_work=judged.work if is_proven else bound,
        bound_for=CLASS,
        solve_s=time.perf_counter() - started,
    )
