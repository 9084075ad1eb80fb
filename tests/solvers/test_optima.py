"""Every solver of graphs against brute force, on any DAG and on U-shaped training graphs, at every distinct budget."""

import pytest
from ckptsolvers import ChainTable, InfeasibleError, simulate, solve_chain, solve_lower_sets
from ckptsolvers.brute import all_schedules, brute_force_frontier
from ckptsolvers.checkmate import relaxed_bound_work, solve_checkmate
from ckptsolvers.dag import Dag, Node, plain_steps, simulate_dag
from ckptsolvers.lower_sets_dag import solve_lower_sets_dag
from ckptsolvers.regions_milp import solve_regions_milp
from ckptsolvers.training import BlockGraph, training_graph
from graphs import optima, random_dag, training, u_blocks, u_shaped


def check_checkmate(dag):
    """It finds what brute force finds, where that finds something, and no bound is above it."""
    for budget, work in optima(dag, order="stages"):
        if work is None:
            with pytest.raises(InfeasibleError):
                solve_checkmate(dag, budget_bytes=budget)
            continue
        found = solve_checkmate(dag, budget_bytes=budget)
        assert found.is_optimal and found.judgement.work == found.bound_work == work, budget
        assert simulate_dag(dag, found.steps) == found.judgement and found.judgement.peak_bytes <= budget
        bound = relaxed_bound_work(dag, budget_bytes=budget)
        assert bound is not None and bound <= work, budget


@pytest.mark.parametrize("seed", range(40))
def test_checkmate_equals_brute_force_on_graphs(seed):
    check_checkmate(random_dag(seed, max_nodes=7))


@pytest.mark.parametrize("seed", range(6))
def test_checkmate_equals_brute_force_on_u_shaped_training_graphs(seed):
    check_checkmate(training(seed))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 500, 50))
def test_checkmate_equals_brute_force_on_500_graphs(first):
    for seed in range(first, first + 50):
        check_checkmate(random_dag(seed))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 50, 10))
def test_checkmate_equals_brute_force_on_50_u_shaped_training_graphs(first):
    for seed in range(first, first + 10):
        check_checkmate(training(seed, max_nodes=6))


def test_a_reader_that_runs_again_needs_what_it_reads_again():
    # Node 1, the only reader of node 0, runs again for node 4, after node 0's last first reading.
    sizes, reads = (1, 1, 4, 1, 1), ((), (0,), (), (2,), (1, 3))
    dag = Dag(tuple(Node(size_bytes=size, time=1, reads=r) for size, r in zip(sizes, reads, strict=True)))
    found = solve_checkmate(dag, budget_bytes=5)
    assert found.judgement.num_computes == (2, 2, 1, 1, 1) and found.is_optimal
    assert (relaxed_bound_work(dag, budget_bytes=5) or 0) <= found.judgement.work


def test_stages_of_several_nodes_are_computed_in_a_row():
    # Between nodes 2 and 3, node 0 may be computed again before node 3 is there; where they share a stage, it may not.
    nodes = (
        Node(size_bytes=2, time=1, transient_bytes=3),
        Node(size_bytes=4, time=1),
        Node(size_bytes=0, time=1, reads=(1,), is_once=True),
        Node(size_bytes=3, time=1, is_once=True),
        Node(size_bytes=0, time=1, reads=(0, 3)),
    )
    assert solve_checkmate(Dag(nodes), budget_bytes=5).judgement.work == 6
    with pytest.raises(InfeasibleError):
        solve_checkmate(Dag(nodes), budget_bytes=5, stages=(0, 1, 2, 2, 3))
    assert solve_checkmate(Dag(nodes), budget_bytes=8, stages=(0, 1, 2, 2, 3)).is_optimal
    for stages in ((0, 1), (1, 2, 3, 4, 5), (0, 1, 0, 1, 2), (0, 2, 3, 4, 5)):
        with pytest.raises(ValueError, match="must be a stage for each of 5 nodes"):
            solve_checkmate(Dag(nodes), budget_bytes=5, stages=stages)


@pytest.mark.parametrize("family", ["exact", "approximate"])
@pytest.mark.parametrize("seed", range(12))
def test_lower_sets_fit_and_never_beat_brute_force(seed, family):
    forward = u_shaped(seed, max_nodes=4) if seed % 2 else one_loss(random_dag(seed, max_nodes=4))
    for budget, work in optima(training_graph(forward)):
        try:
            found = solve_lower_sets_dag(forward, budget_bytes=budget, family=family)
        except InfeasibleError:
            continue
        assert work is not None and found.judgement.work >= work and found.judgement.peak_bytes <= budget
        assert found.bound_work is not None and found.bound_work <= work


def one_loss(dag):
    """The graph with every node free to run again, and a last node that reads what nobody else reads."""
    nodes = [Node(size_bytes=node.size_bytes, time=node.time, reads=node.reads) for node in dag.nodes]
    loose = tuple(i for i, readers in enumerate(dag.readers) if not readers)
    return Dag((*nodes, Node(size_bytes=1, time=1, reads=loose)))


@pytest.mark.parametrize("seed", range(6))
def test_nested_schedules_of_u_shaped_blocks(seed):
    problem = u_blocks(seed)
    flat = [simulate(problem, schedule) for schedule in all_schedules(problem) if schedule.depth <= 1]
    for budget, work in brute_force_frontier(problem):
        for solve in (solve_chain, solve_regions_milp):
            found = solve(problem, budget_bytes=budget)
            assert found.is_optimal and found.judgement.work == work and found.judgement.peak_bytes <= budget
        within = [judged.work for judged in flat if judged.peak_bytes <= budget]
        if within:
            found = solve_lower_sets(problem, budget_bytes=budget)
            assert found.is_optimal and found.judgement.work == min(within)
        graph = BlockGraph(problem)
        general = solve_checkmate(graph.dag, budget_bytes=budget, stages=graph.stages)
        assert general.judgement.work <= work


def test_below_the_least_peak_of_u_shaped_blocks_nothing_is_found():
    problem = u_blocks(1)
    least = brute_force_frontier(problem)[0][0]
    for solve in (solve_chain, solve_regions_milp, solve_lower_sets):
        with pytest.raises(InfeasibleError):
            solve(problem, budget_bytes=least - 1)
    table = ChainTable(problem, max_bytes=least, num_levels=least)
    assert table.steps() and simulate(problem, table.schedule(table.steps()[0])).peak_bytes == least


def test_nothing_is_computed_between_a_backward_and_its_cotangents():
    graph = BlockGraph(u_blocks(0))
    assert len(graph.stages) == len(graph.dag.nodes) and graph.stages[0] == 0
    for v in graph.cotangent.values():
        assert v == 0 or graph.stages[v] == graph.stages[v - 1]
    assert simulate_dag(graph.dag, plain_steps(graph.dag)).work == graph.dag.total_time
