"""The entry point, what it picks, bad input, and the import's cost."""

import dataclasses
import subprocess
import sys

import pytest
from ckptsolvers import (
    InfeasibleError,
    InvalidProblemError,
    Keep,
    Option,
    Problem,
    Schedule,
    chain,
    cite,
    region,
    simulate,
    solve,
    solve_chain,
)
from ckptsolvers.brute import brute_force_frontier
from ckptsolvers.problem import Block, Value
from ckptsolvers.revolve import revolve_schedule
from ckptsolvers.solution import least_work
from ckptsolvers.solve import SOLVERS
from hypothesis import given, settings
from strategies import problems

MIXED = chain([1, 2, 3, 4, 5, 6], [3, 1, 4, 1, 5, 9], options=[[(2, 0), (0, 1)]] * 6)


def test_auto_picks_by_structure_and_says_why():
    uniform = chain([1] * 12, [2] * 12)
    assert solve(uniform, budget_bytes=10).solver == "revolve"
    assert solve(MIXED, budget_bytes=20).solver == "chain"
    plain = solve(MIXED, budget_bytes=1000)
    assert (plain.solver, plain.judgement.extra_work, plain.is_optimal) == ("plain", 0, True)
    assert all(solve(problem, budget_bytes=20).reason for problem in (uniform, MIXED))


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_every_name_solves(name):
    solution = solve(MIXED, budget_bytes=25, solver=name)
    assert solution.judgement == simulate(MIXED, solution.schedule)
    assert solution.judgement.peak_bytes <= 25
    best = solve(MIXED, budget_bytes=25).judgement.work
    assert solution.judgement.work >= best
    assert solution.bound_work is not None and solution.bound_work <= best
    assert solution.gap is not None and solution.is_optimal == (solution.gap == 0)
    assert ("optimal among" if solution.is_optimal else "% above the least of") in str(solution)
    assert name == "brute_force" or cite(solution.solver)


def test_a_solution_without_a_bound_says_so():
    found = solve_chain(MIXED, budget_bytes=25)
    found = dataclasses.replace(found, bound_work=None)
    assert found.gap is None and not found.is_optimal and found.optimal_for is None
    assert str(found) == f"chain: work {found.judgement.work}, peak 24 of 25 bytes; no bound is known"


@settings(max_examples=60)
@given(problems(max_blocks=4))
def test_nothing_does_less_than_the_least_work(problem):
    assert least_work(problem) <= brute_force_frontier(problem)[-1][1]


def test_callables_and_unknown_names():
    assert solve(MIXED, budget_bytes=25, solver=solve_chain).solver == "chain"
    with pytest.raises(InvalidProblemError, match="solver='magic' is not one of auto"):
        solve(MIXED, budget_bytes=25, solver="magic")


@pytest.mark.parametrize("budget", [-1, 1.5, True, "1GB", float("nan")])
def test_bad_budgets_are_refused(budget):
    with pytest.raises(InvalidProblemError, match="whole number of bytes"):
        solve(MIXED, budget_bytes=budget)


def test_a_budget_below_the_least_says_the_least():
    with pytest.raises(InfeasibleError) as error:
        solve(MIXED, budget_bytes=1)
    least = error.value.least_bytes
    assert least is not None and solve(MIXED, budget_bytes=least).judgement.peak_bytes == least


@pytest.mark.parametrize("size", [-1, 1.0, float("nan"), 2**60, True, None])
def test_bad_sizes_are_refused(size):
    with pytest.raises(InvalidProblemError):
        chain([1], [size])
    with pytest.raises(InvalidProblemError):
        chain([size], [1])


def test_bad_structures_are_refused():
    option = Option(
        name="a", saved_bytes=0, recompute_time=0, forward_times=(0,), forward_peak_bytes=0, backward_peak_bytes=0
    )
    block = Block(forward_times=(0,), forward_peak_bytes=0, options=(option,))
    with pytest.raises(InvalidProblemError, match="at least one block"):
        Problem(blocks=(), values=())
    with pytest.raises(InvalidProblemError, match="ascending blocks after"):
        Problem(blocks=(block,), values=(Value(size_bytes=1, made_by=0, read_by=(0,)),))
    with pytest.raises(InvalidProblemError, match="must be 2 ascending times"):
        Problem(blocks=(block,), values=(Value(size_bytes=1, made_by=0, read_by=(1,)),))
    with pytest.raises(InvalidProblemError, match="overflow"):
        chain([2**59] * 8, [1] * 8)


@settings(max_examples=30)
@given(problems(max_blocks=5))
def test_schedules_survive_json(problem):
    for count in range(1, problem.num_blocks + 1):
        schedule = revolve_schedule(problem.num_blocks, count)
        assert Schedule.from_json(schedule.to_json()) == schedule


def test_deep_schedules_survive_json():
    deep = revolve_schedule(10_000, 1)
    again = Schedule.from_json(deep.to_json())
    assert (again.depth, again.num_regions) == (deep.depth, deep.num_regions) == (9_999, 9_999)


@pytest.mark.parametrize("data", [3, [[0]], [[0, -1]], [{"recompute": 3}], [{"recompute": []}], ["x"], [[0, True]]])
def test_other_json_is_refused(data):
    with pytest.raises(ValueError):
        Schedule.from_json(data)


def test_regions_nest_in_the_tree():
    schedule = Schedule((region((region((Keep(0, 0),)), Keep(1, 0))), Keep(2, 0)))
    assert (schedule.depth, schedule.num_regions) == (2, 2)


def test_the_import_brings_no_scipy_and_no_networkx():
    code = "import sys, ckptsolvers; print(sorted({'scipy', 'networkx', 'jax'} & set(sys.modules)))"
    env = {"PYTHONPATH": ":".join(sys.path), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
