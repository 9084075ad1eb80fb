"""The chain recurrence against brute force and revolve."""

import itertools
import time
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from ckptsolvers import Block, ChainTable, InfeasibleError, Option, Problem, Value, chain, simulate, solve_chain
from ckptsolvers.brute import all_schedules, brute_force_frontier
from ckptsolvers.chain import default_num_levels
from ckptsolvers.intervals import Intervals
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import chains, problems


def table_frontier(problem):
    largest = max(peak for peak, _ in brute_force_frontier(problem)) + 1
    table = ChainTable(problem, max_bytes=largest, num_levels=largest)
    return [(level * table.unit_bytes, int(table.times()[level])) for level in table.steps()], table


@settings(max_examples=60)
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


def dropping(num_blocks):
    """Equal blocks that may be kept without reading what the block before them made."""
    block = Block(
        forward_times=(0, 3),
        forward_peak_bytes=10,
        options=tuple(
            Option(
                name=name,
                saved_bytes=saved,
                recompute_time=again,
                forward_times=(0, 3),
                forward_peak_bytes=10 + saved,
                backward_peak_bytes=20,
                unread_inputs=unread,
            )
            for name, saved, again, unread in (("all", 8, 0, (0,)), ("inputs", 0, 2, ()))
        ),
    )
    first = replace(block, options=tuple(replace(option, unread_inputs=()) for option in block.options))
    values = (Value(size_bytes=10, made_by=k, read_by=(k + 1,), cotangent_bytes=10) for k in range(num_blocks))
    return Problem(blocks=(first, *[block] * (num_blocks - 1)), values=tuple(values))


def test_what_is_dropped_is_found_without_recursion():
    small = dropping(4)
    frontier, _ = table_frontier(small)
    assert frontier == brute_force_frontier(small)
    table = ChainTable(dropping(600), max_bytes=6_000, num_levels=150)
    for level in table.steps()[len(table.steps()) // 2 :: 20]:
        judged = simulate(table.problem, table.schedule(level))
        assert judged.work == table.times()[level] and judged.peak_bytes <= level * table.unit_bytes


@pytest.mark.parametrize("num_blocks", [10, 100, 300, 1000])
def test_what_a_block_makes_is_never_less_than_a_level(num_blocks):
    assert default_num_levels(num_blocks) >= 2 * num_blocks


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


@pytest.mark.parametrize("first_size", [1, *(pytest.param(size, marks=pytest.mark.slow) for size in (2, 3))])
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


@st.composite
def stacks(draw):
    """A few repetitions of the same blocks, with a residual that skips, between a first and a last block."""
    period, repeats = draw(st.integers(1, 3)), draw(st.integers(2, 4))
    n = period * repeats + 2
    parts = draw(st.lists(st.tuples(*[st.integers(1, 4)] * 3), min_size=period, max_size=period))
    skip, outer = draw(st.integers(1, 4)), draw(st.booleans())
    values, blocks = [], []
    for k in range(n):
        time, size, saved = parts[(k - 1) % period] if 0 < k < n - 1 else (1, 2, 1)
        readers = {k + 1, min(k + skip, n)} | ({n - 1} if outer and k == 0 and n > 2 else set())
        values.append(Value(size_bytes=size, made_by=k, read_by=tuple(sorted(readers)), cotangent_bytes=size))
        choices = [("all", saved, 0), ("none", 0, time)]
        options = tuple(
            Option(
                name=name,
                saved_bytes=held,
                recompute_time=again,
                forward_times=(time if held else 0, time),
                forward_peak_bytes=size + held,
                backward_peak_bytes=2 * size + held,
            )
            for name, held, again in choices
        )
        blocks.append(Block(forward_times=(0, time), forward_peak_bytes=size, options=options))
    return Problem(blocks=tuple(blocks), values=tuple(values))


@settings(max_examples=60)
@given(stacks())
def test_sharing_changes_nothing(problem):
    shared = ChainTable(problem, max_bytes=60, num_levels=60)
    with mock.patch.object(Intervals, "twins", lambda self: [(0, 0)] * (problem.num_blocks + 1)):
        alone = ChainTable(problem, max_bytes=60, num_levels=60)
    assert (shared.times() == alone.times()).all()
    for level in shared.steps():
        judged = simulate(problem, shared.schedule(level))
        assert judged.work == shared.times()[level]
        assert judged.peak_bytes <= level * shared.unit_bytes


def test_a_long_stack_has_a_row_per_start_and_length_only():
    problem = chain([1, 2, 3] * 40, [3, 1, 2] * 40)
    table = ChainTable(problem, max_bytes=30, num_levels=30)
    assert len(table._table) <= 6 * problem.num_blocks


@settings(max_examples=60)
@given(problems(max_blocks=4), st.integers(1, 9))
def test_rounding_brackets_the_optimum(problem, num_levels):
    frontier = brute_force_frontier(problem)
    budget = frontier[len(frontier) // 2][0]
    optimum = min(work for peak, work in frontier if peak <= budget)
    lower, upper = (
        ChainTable(problem, max_bytes=budget, num_levels=num_levels, rounding=rounding) for rounding in ("down", "up")
    )
    assert lower.times()[-1] <= optimum <= upper.times()[-1]
    for level in upper.steps():
        assert simulate(problem, upper.schedule(level)).peak_bytes <= level * upper.unit_bytes
    try:
        solution = solve_chain(problem, budget_bytes=budget, num_levels=num_levels)
    except InfeasibleError:
        return
    assert solution.judgement.peak_bytes <= budget
    assert solution.bound_work is not None and solution.gap is not None and solution.gap >= 0
    assert solution.bound_work <= optimum <= solution.judgement.work <= upper.times()[-1]


def test_bytes_beyond_32_bits_and_indivisible():
    rng = np.random.default_rng(3)
    n = 20
    problem = chain(
        rng.integers(10**12, 10**13, n).tolist(),
        rng.integers(10**9, 10**11, n).tolist(),
        cotangent_bytes=rng.integers(10**9, 10**11, n).tolist(),
    )
    budget = sum(value.size_bytes for value in problem.values) // 2
    coarse, fine = (solve_chain(problem, budget_bytes=budget, num_levels=levels) for levels in (100, 2000))
    assert coarse.judgement.peak_bytes <= budget and fine.judgement.peak_bytes <= budget
    assert coarse.bound_work is not None and coarse.bound_work <= fine.judgement.work <= coarse.judgement.work


@pytest.mark.slow
def test_speed_of_a_heterogeneous_chain():
    rng = np.random.default_rng(0)
    n = 100
    options = [
        [(int(a), 0), (0, int(b)), (int(a) // 2, int(b) // 2), (int(a) // 4, int(b))]
        for a, b in rng.integers(1, 99, (n, 2))
    ]
    problem = chain(*rng.integers(1, 99, (2, n)).tolist(), options=options)
    started = time.process_time()
    ChainTable(problem, max_bytes=2507, num_levels=500)
    assert time.process_time() - started < 2


@pytest.mark.slow
def test_speed_of_a_long_stack():
    problem = chain([1, 2, 3, 4, 5, 6] * 126, [70_001, 20_011, 30_003, 50_021, 40_009, 60_013] * 126)
    started = time.process_time()
    ChainTable(problem, max_bytes=4_000_000, num_levels=500)
    assert time.process_time() - started < 10
