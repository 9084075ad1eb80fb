"""Schedules worth measuring: a solver's answers from the least bytes to the least work."""

import bisect
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from ckptsolvers import ChainTable, InfeasibleError, Judgement, Keep, Problem, Schedule, simulate
from ckptsolvers.chain import default_num_levels

from jaxckpt.errors import OptionError

_T = TypeVar("_T")

# Candidates stand this far apart in predicted bytes; finer ones differ by less than a compiler's own noise.
_STEP = 1.01
# From the most bytes of a table to the least for which its schedules are taken; below, its levels are too coarse.
_RANGE = 8
# A finer table is worth its time where it is finer by this factor.
_FINER = 1.1
# JAX traces nested checkpoints by recursion, and each level costs it some thirty of Python's thousand frames.
_MAX_DEPTH = 20
_ILP_TIME_S = 3.0
# Programs of up to so many blocks, as those of loops are, get a table this fine: two plans of a body differ in what is
# stacked, which takes many levels, or in what one iteration needs, a part of one of the usual levels.
_FEW_BLOCKS, _FINE_LEVELS = 16, 16_000
# There a candidate with fewer bytes stays beside one whose work is less by no more than this share of a forward.
_NEARLY = 0.003
# More than any budget: what a block needs that must not run without being kept.
NO_ROOM = 2**50
SOLVERS = ("auto", "chain", "chen", "revolve", "lower_sets", "ilp")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A schedule with what the judge says of it, and the problem it is for.

    Attributes:
        schedule: a tree over the problem's blocks.
        judgement: its bytes and work.
        problem: one of the program's.
        is_alike: whether it is of those that treat like blocks alike, whose bytes are off by less.
    """

    schedule: Schedule
    judgement: Judgement
    problem: Problem = field(compare=False, repr=False)
    is_alike: bool = False

    @property
    def digest(self) -> str:
        """A name for the schedule, among those of one program, that is the same everywhere."""
        shown = [self.problem.num_blocks, self.schedule.to_json()]
        return hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]


def check_solver(solver: Any) -> None:
    """Refuse what is neither a solver's name nor a function.

    Raises:
        OptionError: with the names there are.
    """
    if not (callable(solver) or solver in SOLVERS):
        raise OptionError(f"solver={solver!r} is not known; write one of {', '.join(SOLVERS)}, or a function")


def candidates(
    problems: Sequence[Problem], solver: Any, like: Sequence[int] = ()
) -> tuple[list[Candidate], list[Candidate]]:
    """A solver's candidates, least bytes first.

    Args:
        problems: the program's, one for each way to cut it into blocks.
        solver: a solver's name, or a function `(problem, budget_bytes) -> Schedule`.
        like: blocks of the last problem that are equal; plans that treat them alike are candidates of their own.

    Returns:
        Those that no other one beats in both bytes and work, and these with those that only another problem's beat: how
        much more or less than predicted a compiler takes differs from problem to problem.
    """
    judged = [_judged(problem, solver) for problem in problems]
    if like:
        schedules = _alike_schedules(problems[-1], like)
        alike = {c.digest: c for c in _with_judgements(problems[-1], schedules, is_alike=True)}
        judged[-1] = [c for c in judged[-1] if c.digest not in alike]
        judged.append(list(alike.values()))
    best = _unbeaten(itertools.chain(*judged))
    known = {id(candidate) for candidate in best}
    others = [c for found in judged for c in _unbeaten(found) if id(c) not in known] if len(judged) > 1 else []
    return best, sorted([*best, *others], key=_bytes_first)


def _alike_schedules(problem: Problem, like: Sequence[int]) -> Iterator[Schedule]:
    """Schedules with one option for all of some equal blocks, none of them in a region; once for each option.

    A heap that holds the same of each of them has fewer gaps than one that holds a set here and another one there.
    """
    for o in range(len(problem.blocks[like[0]].options)):
        blocks = [
            replace(block, forward_peak_bytes=NO_ROOM, options=block.options[o : o + 1]) if k in like else block
            for k, block in enumerate(problem.blocks)
        ]
        for found in chain_schedules(replace(problem, blocks=tuple(blocks))):
            # No region covers them, so they stand at the outermost level.
            yield Schedule(tuple(Keep(n.start, o) if n.start in like else n for n in found.nodes))


def _bytes_first(candidate: Candidate) -> tuple[int, int]:
    return candidate.judgement.peak_bytes, candidate.judgement.extra_work


def _unbeaten(found: Iterable[Candidate]) -> list[Candidate]:
    best: list[Candidate] = []
    for candidate in sorted(found, key=_bytes_first):
        if not best or candidate.judgement.extra_work < best[-1].judgement.extra_work:
            best.append(candidate)
    return _spread(
        best,
        [c.judgement.peak_bytes for c in best],
        [c.judgement.work for c in best],
        is_fine=all(c.problem.num_blocks <= _FEW_BLOCKS for c in best),
    )


def _judged(problem: Problem, solver: Any) -> list[Candidate]:
    if solver in ("auto", "chain"):
        schedules = chain_schedules(problem, is_fine=problem.num_blocks <= _FEW_BLOCKS)
    elif solver == "chen":
        from ckptsolvers.chen import chen_schedules

        schedules = list(chen_schedules(problem))
    elif solver == "revolve":
        from ckptsolvers.revolve import revolve_schedules

        schedules = list(revolve_schedules(problem))
    else:
        from ckptsolvers.solve import SOLVERS as by_name

        if isinstance(solver, str):
            # It is asked some forty times, so a proof of each answer would take too long.
            limit = {"time_limit_s": _ILP_TIME_S} if solver == "ilp" else {}
            solver = functools.partial(by_name[solver], **limit)
        schedules = _called_schedules(problem, solver)
    return _with_judgements(problem, schedules)


def _with_judgements(problem: Problem, schedules: Iterable[Schedule], *, is_alike: bool = False) -> list[Candidate]:
    """The schedules that JAX can trace, as candidates."""
    return [Candidate(s, simulate(problem, s), problem, is_alike) for s in schedules if s.depth <= _MAX_DEPTH]


def _spread(items: Sequence[_T], sizes: Sequence[float], works: Sequence[int], *, is_fine: bool) -> list[_T]:
    """Of the items within a hundredth in bytes the last one, and the first one that takes hardly more work.

    Args:
        items: from the least bytes to the least work; the first of all is kept too.
        sizes: `[num_items]`, bytes.
        works: `[num_items]`.
        is_fine: whether to take the first ones.
    """
    chosen: list[int] = []
    last = len(items) - 1
    while last >= 0:
        first = bisect.bisect_right(sizes, sizes[last] / _STEP, 0, last)
        spare = _NEARLY * works[-1] if is_fine else -1
        near = next(i for i in range(first, last + 1) if i == last or works[i] <= works[last] + spare)
        chosen += dict.fromkeys((last, near))
        last = first - 1
    return [items[i] for i in sorted({0, *chosen})] if items else []


def chain_schedules(problem: Problem, *, is_fine: bool = False) -> Sequence[Schedule]:
    """Schedules from the least bytes to keeping everything: a table for all, and finer ones where bytes are fewer."""
    most = max(1, keep_all(problem).judgement.peak_bytes)
    num_levels = _FINE_LEVELS if is_fine else default_num_levels(problem.num_blocks) // 2
    schedules: list[Schedule] = []
    about = None
    while most:
        table = ChainTable(problem, max_bytes=most, num_levels=num_levels, about=about)
        about = table.about
        if not table.steps():
            break  # rounded up to the table's resolution, not even keeping everything fits
        low = int(1.5 * table.steps()[0] * table.unit_bytes)
        # A loop left to itself may keep a hundred times what it needs.
        above = most // _RANGE if low * _RANGE < most else low if low * _FINER < most else 0
        schedules = [*_spread_schedules(table, above, is_fine), *schedules]
        most = above
    return schedules


def _spread_schedules(table: ChainTable, above_bytes: int, is_fine: bool) -> list[Schedule]:
    """A table's schedules above a level, as many as are worth judging: that takes longer than solving."""
    levels = [level for level in table.steps() if level * table.unit_bytes > above_bytes]
    chosen = _spread(levels, levels, table.times()[levels].tolist(), is_fine=is_fine)
    return [table.schedule(level) for level in reversed(chosen)]


def keep_all(problem: Problem) -> Candidate:
    """The schedule that leaves every block to JAX, as the program does without a plan."""
    keep_all = Schedule(tuple(Keep(k, len(b.options) - 1) for k, b in enumerate(problem.blocks)))
    return Candidate(keep_all, simulate(problem, keep_all), problem)


def _called_schedules(problem: Problem, solver: Callable[..., Any]) -> list[Schedule]:
    """A solver of budgets, asked at budgets that fall from keeping everything."""
    found, budget = [], max(1, keep_all(problem).judgement.peak_bytes)
    while budget > 0:
        try:
            answer = solver(problem, budget_bytes=budget)
        except InfeasibleError:
            break
        schedule = getattr(answer, "schedule", answer)
        found.append(schedule)
        budget = min(int(budget / 1.05), simulate(problem, schedule).peak_bytes - 1)
    return found
