"""Lower sets on blocks and graphs, the knapsack, and the program that is restricted to regions."""

import itertools

import pytest
from ckptsolvers import InfeasibleError, InvalidProblemError, Recompute, chain, simulate
from ckptsolvers.brute import all_schedules, brute_force_frontier
from ckptsolvers.brute_dag import solve_brute_force_dag
from ckptsolvers.dag import Dag, Node, plain_steps, simulate_dag
from ckptsolvers.knapsack import solve_knapsack
from ckptsolvers.lower_sets import solve_lower_sets
from ckptsolvers.lower_sets_dag import all_lower_sets, closures, solve_lower_sets_dag
from ckptsolvers.regions_milp import solve_regions_milp
from ckptsolvers.training import training_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import dags, problems, skip_chains
from test_dag import with_loss


@settings(max_examples=60)
@given(problems(max_blocks=4, max_options=1))
def test_prefixes_are_the_best_of_depth_one(problem):
    flat = [simulate(problem, s) for s in all_schedules(problem) if s.depth <= 1]
    for budget in sorted({judged.peak_bytes for judged in flat}):
        optimum = min(judged.work for judged in flat if judged.peak_bytes <= budget)
        solution = solve_lower_sets(problem, budget_bytes=budget)
        assert solution.is_optimal and solution.judgement.work == optimum
        assert solution.judgement.peak_bytes <= budget and solution.schedule.depth <= 1


@settings(max_examples=40)
@given(problems(max_blocks=4))
def test_prefixes_fit_with_several_options(problem):
    for budget, optimum in brute_force_frontier(problem):
        try:
            solution = solve_lower_sets(problem, budget_bytes=budget)
        except InfeasibleError:
            continue
        assert solution.judgement.peak_bytes <= budget and solution.judgement.work >= optimum


def test_without_nesting_less_memory_is_out_of_reach():
    problem = chain([1] * 30, [1] * 30)
    with pytest.raises(InfeasibleError, match="lower_sets found no schedule"):
        solve_lower_sets(problem, budget_bytes=5)
    solution = solve_lower_sets(problem, budget_bytes=12)
    assert any(isinstance(node, Recompute) for node in solution.schedule.nodes)


@settings(max_examples=40)
@given(dags(max_nodes=5), st.sampled_from(["exact", "approximate"]), st.integers(0, 4))
def test_lower_sets_of_graphs_fit_and_are_never_better_than_brute_force(dag, family, less):
    forward = with_loss(without_once(dag))
    graph = training_graph(forward)
    budget = max(0, simulate_dag(graph, plain_steps(graph)).peak_bytes - less)
    try:
        solution = solve_lower_sets_dag(forward, budget_bytes=budget, family=family)
    except InfeasibleError:
        return
    assert simulate_dag(graph, solution.steps) == solution.judgement
    assert solution.judgement.peak_bytes <= budget
    best = solve_brute_force_dag(graph, budget_bytes=budget)
    assert solution.judgement.work >= best.judgement.work


def without_once(dag):
    return Dag(tuple(Node(size_bytes=n.size_bytes, time=n.time, reads=n.reads) for n in dag.nodes))


@given(dags(max_nodes=6))
def test_lower_sets_are_closed(dag):
    def closed(lower):
        return all(lower >> r & 1 for v, n in enumerate(dag.nodes) if lower >> v & 1 for r in n.reads)

    everything = set(range(2 ** len(dag.nodes)))
    assert set(all_lower_sets(dag)) == {lower for lower in everything if closed(lower)}
    assert set(closures(dag)) <= set(all_lower_sets(dag))


def test_the_exact_family_is_no_worse_with_residuals():
    reads = [(), *((i - 1,) if i % 3 else (i - 3, i - 1) for i in range(1, 13))]
    forward = Dag(tuple(Node(size_bytes=4, time=3, reads=r) for r in reads))
    graph = training_graph(forward)
    plain = simulate_dag(graph, plain_steps(graph))
    works = [
        solve_lower_sets_dag(forward, budget_bytes=plain.peak_bytes * 3 // 4, family=family).judgement.work
        for family in ("exact", "approximate")
    ]
    assert plain.work < works[0] <= works[1]


def test_too_many_lower_sets_are_refused():
    wide = Dag((*(Node(size_bytes=1, time=1) for _ in range(13)), Node(size_bytes=1, time=1, reads=tuple(range(13)))))
    with pytest.raises(InvalidProblemError, match="use family='approximate'"):
        solve_lower_sets_dag(wide, budget_bytes=10, family="exact")


@settings(max_examples=60)
@given(dags(max_nodes=6), st.data())
def test_the_knapsack_equals_trying_all_sets(dag, data):
    n = len(dag.nodes)
    required = data.draw(st.sets(st.integers(0, n - 1), min_size=1))
    budget = data.draw(st.integers(0, 8))
    best = None
    for saved in itertools.chain.from_iterable(itertools.combinations(range(n), k) for k in range(n + 1)):
        again = recomputed(dag, required, set(saved))
        if sum(dag.nodes[v].size_bytes for v in saved) <= budget and not any(dag.nodes[v].is_once for v in again):
            time = sum(dag.nodes[v].time for v in again)
            best = time if best is None else min(best, time)
    if best is None:
        with pytest.raises(InfeasibleError):
            solve_knapsack(dag, required=required, budget_bytes=budget)
        return
    found = solve_knapsack(dag, required=required, budget_bytes=budget)
    assert found.is_optimal and found.recompute_time == best and found.saved_bytes <= budget
    assert set(found.recomputed) == recomputed(dag, required, set(found.saved))


def recomputed(dag, required, saved):
    again = set()
    for v in range(len(dag.nodes) - 1, -1, -1):
        read_again = any(v in dag.nodes[w].reads for w in again)
        if v not in saved and (v in required or read_again):
            again.add(v)
    return again


@settings(max_examples=25)
@given(st.one_of(problems(max_blocks=3), skip_chains(max_blocks=4)))
def test_the_region_program_equals_brute_force(problem):
    frontier = brute_force_frontier(problem)
    for budget, optimum in frontier:
        solution = solve_regions_milp(problem, budget_bytes=budget)
        assert solution.is_optimal and solution.judgement.work == optimum
        assert solution.judgement.peak_bytes <= budget
    if frontier[0][0] > 0:
        with pytest.raises(InfeasibleError):
            solve_regions_milp(problem, budget_bytes=frontier[0][0] - 1)
