"""The chain recurrence against brute force and revolve."""

import itertools

import numpy as np
import pytest
from ckptsolvers import ChainTable, InfeasibleError, chain, simulate
from ckptsolvers.brute import all_schedules, brute_force_frontier
from hypothesis import given, settings
from strategies import chains, problems


def table_frontier(problem):
    largest = max(peak for peak, _ in brute_force_frontier(problem)) + 1
    table = ChainTable(problem, max_bytes=largest, num_levels=largest)
    return [(level * table.unit_bytes, int(table.times()[level])) for level in table.steps()], table


@settings(max_examples=150)
@given(problems(max_blocks=4))
def test_the_recurrence_equals_brute_force(problem):
    frontier, table = table_frontier(problem)
    assert frontier == brute_force_frontier(problem)
    for peak, work in frontier:
        judged = simulate(problem, table.schedule(table.level(peak)))
        assert (judged.peak_bytes, judged.work) == (peak, work)


@settings(max_examples=25)
@given(chains(max_blocks=6, max_options=1))
def test_the_recurrence_equals_brute_force_on_longer_chains(problem):
    frontier, _ = table_frontier(problem)
    assert frontier == brute_force_frontier(problem)


@settings(max_examples=60)
@given(problems(max_blocks=3))
def test_a_recomputed_last_node_never_helps(problem):
    assert brute_force_frontier(problem) == brute_force_frontier(problem, last_regions=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("n", [8, 9])
def test_the_recurrence_equals_brute_force_on_nine_blocks(n, seed):
    rng = np.random.default_rng(seed)
    problem = chain(*rng.integers(1, 5, (2, n)).tolist(), cotangent_bytes=rng.integers(0, 3, n).tolist())
    frontier, _ = table_frontier(problem)
    assert frontier == brute_force_frontier(problem)


def every_chain(first_size):
    """Yield brute force's peaks per size vector and work per cost vector, for all chains of 4 with 1..3."""
    unit = chain([1] * 4, [1] * 4)
    trees = list(all_schedules(unit))
    units = np.eye(4, dtype=int).tolist()
    work = np.array([[simulate(chain(cost, [1] * 4), tree).work for cost in units] for tree in trees])
    costs = np.array(list(itertools.product((1, 2, 3), repeat=4)))
    for sizes in itertools.product((1, 2, 3), repeat=3):
        sizes = [first_size, *sizes]
        peaks = np.array([simulate(chain([1] * 4, sizes), tree).peak_bytes for tree in trees])
        yield sizes, peaks, costs, work @ costs.T


@pytest.mark.parametrize("first_size", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_every_chain_of_four_stages_at_every_budget(first_size):
    for sizes, peaks, costs, work in every_chain(first_size):
        largest = int(peaks.max())
        least = np.full((largest + 1, len(costs)), 2**60)
        for budget in range(largest + 1):
            if (peaks <= budget).any():
                least[budget] = work[peaks <= budget].min(0)
        for i, cost in enumerate(costs.tolist()):
            table = ChainTable(chain(cost, sizes), max_bytes=largest, num_levels=largest)
            assert [table.times()[table.level(b)] for b in range(largest + 1)] == least[:, i].tolist(), (sizes, cost)


def test_an_infeasible_level_says_the_least():
    problem = chain([1] * 4, [5] * 4)
    table = ChainTable(problem, max_bytes=40, num_levels=40)
    with pytest.raises(InfeasibleError, match="the least peak it reached is 10 bytes") as error:
        table.schedule(table.level(9))
    assert (error.value.budget_bytes, error.value.least_bytes) == (5, 10)
