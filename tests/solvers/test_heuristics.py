"""Chen and revolve: always accepted by the judge, never better than the optimum, counts as published."""

import functools
import itertools
import os
import subprocess
import sys
import time
from collections import Counter
from math import comb, isqrt

import pytest
from ckptsolvers import InfeasibleError, chain, simulate, solve_chain, solve_chen, solve_revolve
from ckptsolvers.brute import brute_force_frontier, solve_brute_force
from ckptsolvers.chen import chen_schedules, greedy_cuts, segments
from ckptsolvers.revolve import is_uniform_chain, num_forwards, revolve_actions, revolve_schedule, revolve_schedules
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import problems, replay

SOLVERS = [solve_chen, solve_revolve, solve_chain, solve_brute_force]


@settings(max_examples=40)
@given(problems(max_blocks=4))
def test_every_solver_at_every_budget(problem):
    frontier = brute_force_frontier(problem)
    budgets = sorted({peak + d for peak, _ in frontier for d in (0, 1)})
    for solve in SOLVERS:
        works = []
        for budget in budgets:
            optimum = min(work for peak, work in frontier if peak <= budget)
            try:
                solution = solve(problem, budget_bytes=budget)
            except InfeasibleError as error:
                assert solve in (solve_chen, solve_revolve)
                assert error.least_bytes is not None and error.least_bytes > budget
                continue
            assert solution.judgement == simulate(problem, solution.schedule)
            assert solution.judgement.peak_bytes <= budget
            assert solution.judgement.work >= optimum
            if solution.is_optimal:
                assert solution.judgement.work == solution.bound_work == optimum
            works.append(solution.judgement.work)
        assert works == sorted(works, reverse=True)
        if solve in (solve_chain, solve_brute_force):
            assert len(works) == len(budgets)


@settings(max_examples=40)
@given(problems(max_blocks=4))
def test_below_the_least_peak_the_error_says_the_least(problem):
    least = brute_force_frontier(problem)[0][0]
    if least == 0:
        return
    with pytest.raises(InfeasibleError) as error:
        solve_chain(problem, budget_bytes=least - 1)
    assert error.value.least_bytes == least


def test_chen_needs_two_square_roots_and_one_more_forward():
    n = 100
    problem = chain([1] * n, [1] * n)
    solution = solve_chen(problem, budget_bytes=2 * isqrt(n))
    assert solution.judgement.peak_bytes <= 2 * isqrt(n)
    assert solution.judgement.extra_work < n
    with pytest.raises(InfeasibleError, match="chen found no schedule"):
        solve_chen(problem, budget_bytes=isqrt(n))


def test_chen_does_not_recompute_the_last_segment():
    assert segments((2, 4), (0,) * 6).nodes[2:] == segments((), (0,) * 6).nodes[4:]


def test_the_greedy_cuts_where_the_threshold_is_passed():
    assert greedy_cuts([3, 3, 3, 9, 1], 6) == (2, 3, 4)
    assert greedy_cuts([3, 3, 3, 9, 1], 100) == ()


@settings(max_examples=40)
@given(problems(max_blocks=5))
def test_candidates_are_distinct_and_valid(problem):
    for schedules in (chen_schedules, revolve_schedules):
        made = list(schedules(problem))
        for schedule in made:
            simulate(problem, schedule)
        assert schedules is revolve_schedules or max(Counter(made).values()) == 1


@functools.cache
def least_forwards(n, c):
    if n == 1:
        return 0
    if c == 0:
        return 10**9
    return min(m + least_forwards(m, c) + least_forwards(n - m, c - 1) for m in range(1, n))


def test_the_closed_form_is_the_recurrence_up_to_sixty_steps():
    for n in range(1, 61):
        for c in range(1, 13):
            assert num_forwards(n, c) == least_forwards(n, c)


def test_the_counts_for_all_200_steps_and_20_states():
    """Griewank and Walther's r n - beta(c + 1, r - 1), with r found by counting up."""
    for c in range(1, 21):
        r = 0
        for n in range(1, 201):
            while comb(c + r, c) < n:
                r += 1
            expected = r * n - (comb(c + r, c + 1) if r else 0)
            assert num_forwards(n, c) == expected
            if n % 7 == 0:
                assert sum(a.stop - a.step for a in revolve_actions(n, c) if a.kind == "advance") == expected
    assert [num_forwards(10, c) for c in (1, 2, 3, 9)] == [45, 20, 15, 9]
    assert [num_forwards(10, c, turns=True) for c in (1, 2, 3)] == [55, 30, 25]


@given(st.integers(1, 60), st.integers(1, 12))
def test_actions_reverse_the_chain(num_steps, num_states):
    replay(revolve_actions(num_steps, num_states), num_steps, num_states)


@settings(max_examples=30)
@given(st.integers(1, 20), st.integers(1, 10), st.integers(1, 5), st.integers(1, 5))
def test_revolve_is_optimal_on_uniform_chains(n, budget, time_each, size):
    problem = chain([time_each] * n, [size] * n)
    assert is_uniform_chain(problem)
    try:
        solution = solve_revolve(problem, budget_bytes=budget * size)
    except InfeasibleError as error:
        assert error.least_bytes == min(2, n) * size > budget * size
        return
    assert solution.is_optimal
    assert solution.judgement.work == solve_chain(problem, budget_bytes=budget * size).judgement.work
    states = max(1, min(n - 1, budget - 1))
    assert solution.judgement.work == (num_forwards(n, states) + 1) * time_each


SOME = [(n, c) for n, c in itertools.product(range(2, 201, 11), (1, 2, 3, 7, 20)) if c < n and (c > 1 or n < 60)]
MANY = [(n, c) for n in range(2, 201, 3) for c in range(1, min(20, n - 1) + 1)]


@pytest.mark.parametrize("counts", [SOME, pytest.param(MANY, marks=pytest.mark.slow)], ids=["some", "many"])
def test_the_checkpoint_schedules_package_agrees(counts):
    package = pytest.importorskip("checkpoint_schedules")
    for n, c in counts:
        forwards = 0
        for action in package.Revolve(n, c):
            if isinstance(action, package.Forward):
                forwards += action.n1 - action.n0
            if isinstance(action, package.EndReverse):
                break
        assert forwards == num_forwards(n, c, turns=True), (n, c)


def test_ten_thousand_steps_take_no_recursion_and_little_time():
    def run():
        started = time.perf_counter()
        revolve_schedule(10_000, 100)
        return time.perf_counter() - started

    # It takes about 0.03 s; the limit leaves room for a busy machine.
    assert min(run() for _ in range(5)) < 0.3
    assert revolve_schedule(10_000, 100).depth < 100
    assert revolve_schedule(10_000, 1).depth == 9_999


SCRIPT = """
import json, random
from ckptsolvers import chain, solve
from ckptsolvers.checkmate import solve_checkmate
from ckptsolvers.lower_sets_dag import solve_lower_sets_dag
from ckptsolvers.dag import Dag, Node
from ckptsolvers.solve import SOLVERS
from ckptsolvers.training import training_graph
rng = random.Random(1)
draw = lambda top: [rng.randint(1, top) for _ in range(6)]
problem = chain(draw(9), draw(9), cotangent_bytes=draw(3), options=[[(a, 0), (0, b)] for a, b in zip(draw(9), draw(9))])
for name in SOLVERS:
    print(json.dumps(solve(problem, budget_bytes=40, solver=name).schedule.to_json()))
forward = Dag(tuple(Node(size_bytes=a, time=a, reads=(i - 1,) if i else ()) for i, a in enumerate(draw(5))))
print(solve_checkmate(training_graph(forward), budget_bytes=20).steps)
print(solve_lower_sets_dag(forward, budget_bytes=24, family="exact").steps)
"""


@pytest.mark.slow
def test_the_same_answer_whatever_the_hash_seed():
    answers = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "12345")
    }
    assert len(answers) == 1
