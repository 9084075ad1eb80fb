"""Schedules worth measuring: a solver's answers from the least bytes to the least work."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from ckptsolvers import InfeasibleError, Keep, Problem, Schedule, simulate
from ckptsolvers.solve import SCHEDULES
from ckptsolvers.solve import SOLVERS as by_name

from jaxckpt.errors import OptionError
from jaxckpt.model.option import NO_ROOM
from jaxckpt.model.priced import first_senders, on_device, priced
from jaxckpt.model.schedules import FEW_BLOCKS, Candidate, chain_schedules, keep_all, spread_out

# JAX traces nested checkpoints by recursion, and each level costs it some thirty of Python's thousand frames.
_MAX_DEPTH = 20
_ILP_TIME_S = 3.0
# Of `plan` alone: it is no solver of block problems.
NAMES = "names"
# Brute force is for the tests of the others: a program has too many blocks for it.
SOLVERS = ("auto", *(name for name in by_name if name != "brute_force"))


def check_solver(solver: Any) -> None:
    """Refuse what is neither a solver's name nor a function.

    Raises:
        OptionError: with the names there are.
    """
    if isinstance(solver, str) and solver == NAMES:
        raise OptionError(
            'solver="names" chooses a policy to paste into the code, and is for jaxckpt.plan and jaxckpt.names; with '
            "that policy in place nothing else is needed here"
        )
    if not (callable(solver) or solver in SOLVERS):
        raise OptionError(f"solver={solver!r} is not known; write one of {', '.join(SOLVERS)}, or a function")


def candidates(
    problems: Sequence[Problem], solver: Any, repeated: Sequence[int] = (), host_budget: int | None = None
) -> tuple[list[Candidate], list[Candidate]]:
    """A solver's candidates, least bytes first.

    Args:
        problems: the program's, one for each way to cut it into blocks.
        solver: a solver's name, or a function `(problem, budget_bytes) -> Schedule`.
        repeated: identical blocks of the last problem; plans that treat them identically are candidates of their own.
        host_budget: bytes of the host that saved values may take; None where none are sent there.

    Returns:
        Those that no other one beats in both bytes and work, and these with those that only another problem's beat: how
        much more or less than predicted a compiler takes differs from problem to problem.
    """
    judged = [_judged(problem, on_device(problem), solver) for problem in problems]
    if repeated:
        schedules = _identical_schedules(on_device(problems[-1]), repeated)
        identical = {c.digest: c for c in _with_judgements(problems[-1], schedules, is_identical=True)}
        judged[-1] = [c for c in judged[-1] if c.digest not in identical]
        judged.append(list(identical.values()))
    if host_budget is not None and solver in ("auto", "chain"):
        judged += [sending for problem in problems if (sending := _sending(problem, host_budget))]
    best = _unbeaten(itertools.chain(*judged))
    known = {id(candidate) for candidate in best}
    others = [c for found in judged for c in _unbeaten(found) if id(c) not in known] if len(judged) > 1 else []
    return best, sorted([*best, *others], key=_bytes_first)


def _identical_schedules(problem: Problem, repeated: Sequence[int]) -> Iterator[Schedule]:
    """Schedules with one option for all of some identical blocks, none of them in a region; once for each option.

    A heap that holds the same of each of them has fewer gaps than one that holds a set here and another one there.
    """
    # For a v5e, a plan of GPT-2 small that is predicted to take 3,837 MiB has 3,827 live at once in a heap of 4,153. At
    # the bytes of "queries, keys and values" these schedules recompute 12.6 % where the others recompute 14.5.
    for o in range(len(problem.blocks[repeated[0]].options)):
        blocks = [
            replace(block, forward_peak_bytes=NO_ROOM, options=block.options[o : o + 1]) if k in repeated else block
            for k, block in enumerate(problem.blocks)
        ]
        for found in chain_schedules(replace(problem, blocks=tuple(blocks))):
            # No region covers them, so they stand at the outermost level.
            yield Schedule(tuple(Keep(n.start, o) if n.start in repeated else n for n in found.nodes))


def _bytes_first(candidate: Candidate) -> tuple[int, int]:
    return candidate.judgement.peak_bytes, candidate.judgement.extra_work


def _unbeaten(found: Iterable[Candidate]) -> list[Candidate]:
    best: list[Candidate] = []
    for candidate in sorted(found, key=_bytes_first):
        if not best or candidate.judgement.extra_work < best[-1].judgement.extra_work:
            best.append(candidate)
    return spread_out(
        best,
        [c.judgement.peak_bytes for c in best],
        [c.judgement.work for c in best],
        is_fine=all(c.problem.num_blocks <= FEW_BLOCKS for c in best),
    )


def _judged(problem: Problem, given: Problem, solver: Any) -> list[Candidate]:
    """A solver's schedules of the problem that it is given, judged in the one that they are for."""
    if solver in ("auto", "chain"):
        schedules = chain_schedules(given, is_fine=problem.num_blocks <= FEW_BLOCKS)
    elif isinstance(solver, str) and solver in SCHEDULES:
        schedules = list(SCHEDULES[solver](given))
    else:
        if isinstance(solver, str):
            # It is asked some forty times, so a proof of each answer would take too long.
            limit = {"time_limit_s": _ILP_TIME_S} if solver == "ilp" else {}
            solver = functools.partial(by_name[solver], **limit)
        schedules = _called_schedules(given, solver)
    return _with_judgements(problem, schedules)


def _with_judgements(problem: Problem, schedules: Iterable[Schedule], *, is_identical: bool = False) -> list[Candidate]:
    """The schedules that JAX can trace, as candidates."""
    return [Candidate(s, simulate(problem, s), problem, is_identical) for s in schedules if s.depth <= _MAX_DEPTH]


def _sending(problem: Problem, host_budget: int) -> list[Candidate]:
    """Candidates that send values to the host, no more than it has room for, at prices of its bytes."""
    found: dict[str, Candidate] = {}

    def is_within(given: Problem) -> bool:
        schedules = chain_schedules(given, is_fine=problem.num_blocks <= FEW_BLOCKS)
        judged = _with_judgements(problem, schedules)
        found.update({c.digest: c for c in judged if 0 < c.judgement.host_bytes <= host_budget})
        return all(c.judgement.host_bytes <= host_budget for c in judged)

    at_prices = priced(problem, host_budget)
    if at_prices and not is_within(at_prices[0]):
        next(filter(is_within, at_prices[1:]), None)  # at a higher price less is sent
        list(map(is_within, first_senders(problem, host_budget)))
    return list(found.values())


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
