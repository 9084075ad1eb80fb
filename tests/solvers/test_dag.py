"""The graph problem: its judge, the oracle, Checkmate's program, and how nested schedules appear on a graph."""

from typing import Any, cast

import networkx as nx
import numpy as np
import pytest
from ckptsolvers import InfeasibleError, InvalidProblemError, InvalidScheduleError, chain, simulate
from ckptsolvers.brute import all_schedules
from ckptsolvers.brute_dag import solve_brute_force_dag
from ckptsolvers.checkmate import _Program, relaxed_bound_work, solve_checkmate
from ckptsolvers.dag import Dag, DagStep, Node, from_networkx, plain_steps, simulate_dag
from ckptsolvers.revolve import num_forwards
from ckptsolvers.training import BlockGraph, training_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import dags, skip_chains


def linear(n):
    nodes = (Node(size_bytes=1, time=1, reads=(i - 1,) if i else ()) for i in range(n + 1))
    return training_graph(Dag(tuple(nodes)))


def test_a_linear_training_graph_reads_as_published():
    n = 4
    graph = linear(n)
    assert len(graph.nodes) == 2 * n + 1
    for j, node in enumerate(graph.nodes[1:], 1):
        assert set(node.reads) == ({j - 1} if j <= n else {j - 1, 2 * n - j})


@pytest.mark.parametrize("n", [2, 5, pytest.param(9, marks=pytest.mark.slow)])
@pytest.mark.parametrize("num_states", [1, 2, 3])
def test_the_program_finds_revolves_optimum_on_a_line(n, num_states):
    solution = solve_checkmate(linear(n), budget_bytes=num_states + 2)
    assert solution.is_optimal
    assert solution.judgement.work == num_forwards(n + 1, num_states, turns=True)


@settings(max_examples=60)
@given(dags(max_nodes=7), st.integers(0, 3))
def test_the_program_equals_brute_force(dag, less):
    budget = simulate_dag(dag, plain_steps(dag)).peak_bytes - less
    if budget < 0:
        return
    try:
        expected = solve_brute_force_dag(dag, budget_bytes=budget, order="stages")
    except InfeasibleError:
        with pytest.raises(InfeasibleError):
            solve_checkmate(dag, budget_bytes=budget)
        return
    found = solve_checkmate(dag, budget_bytes=budget)
    assert found.is_optimal and found.judgement.work == expected.judgement.work
    assert found.judgement.peak_bytes <= budget
    bound = relaxed_bound_work(dag, budget_bytes=budget)
    assert bound is not None and bound <= found.judgement.work
    general = solve_brute_force_dag(dag, budget_bytes=budget, order="any")
    assert general.judgement.work <= found.judgement.work


@settings(max_examples=30)
@given(dags(max_nodes=4), st.integers(0, 4))
def test_the_program_equals_brute_force_on_training_graphs(forward, less):
    dag = training_graph(with_loss(forward))
    budget = max(0, simulate_dag(dag, plain_steps(dag)).peak_bytes - less)
    try:
        expected = solve_brute_force_dag(dag, budget_bytes=budget, order="stages").judgement.work
    except InfeasibleError:
        expected = None
    try:
        found = solve_checkmate(dag, budget_bytes=budget).judgement.work
    except InfeasibleError:
        found = None
    assert found == expected


def with_loss(dag):
    """Let the last node read every node that nobody else reads."""
    loose = [i for i, readers in enumerate(dag.readers) if not readers]
    if loose == [len(dag.nodes) - 1]:
        return dag
    return Dag((*dag.nodes, Node(size_bytes=1, time=1, reads=tuple(loose))))


@settings(max_examples=60)
@given(skip_chains(max_blocks=4), st.randoms(use_true_random=False))
def test_a_nested_schedule_is_a_general_one(problem, random):
    graph = BlockGraph(problem)
    schedule = random.choice(list(all_schedules(problem)))
    nested, general = simulate(problem, schedule), simulate_dag(graph.dag, graph.steps(schedule))
    assert general.work == nested.work
    assert general.peak_bytes <= nested.peak_bytes


def test_out_of_time_a_judged_schedule_and_its_gap_come_back():
    dag = linear(40)
    solution = solve_checkmate(dag, budget_bytes=20, time_limit_s=0.1)
    assert solution.judgement.peak_bytes <= 20
    assert solution.bound_work is not None and solution.gap is not None and 0 <= solution.gap < 1


def test_rounding_keeps_what_the_relaxation_holds():
    dag = linear(3)
    program = _Program(dag, 100)
    held = np.zeros((program.num_stages, len(dag.nodes)))
    assert simulate_dag(dag, program.round(held == 0)).work == dag.total_time
    assert simulate_dag(dag, program.round(held > 0)).work > dag.total_time


@pytest.mark.parametrize(
    ("steps", "why"),
    [
        ([("compute", 1)], "reads"),
        ([("compute", 0), ("drop", 0), ("compute", 1)], "reads"),
        ([("drop", 0)], "was not held"),
        ([("compute", 0)], "computed 0 times"),
        ([("compute", 0), ("compute", 0), ("compute", 1)], "computed 2 times"),
    ],
)
def test_broken_steps_are_refused(steps, why):
    dag = Dag((Node(size_bytes=1, time=1, is_once=True), Node(size_bytes=1, time=1, reads=(0,))))
    with pytest.raises(InvalidScheduleError, match=why):
        simulate_dag(dag, [DagStep(*step) for step in steps])


def test_bad_graphs_are_refused():
    with pytest.raises(InvalidProblemError, match="at least one node"):
        Dag(())
    with pytest.raises(InvalidProblemError, match="must be distinct nodes before it"):
        Dag((Node(size_bytes=1, time=1, reads=(0,)),))
    with pytest.raises(InvalidProblemError, match="negative"):
        Dag((Node(size_bytes=-1, time=1),))
    not_a_number: Any = Node(size_bytes=cast(Any, float("nan")), time=1)
    with pytest.raises(InvalidProblemError, match="Python integers"):
        Dag((not_a_number,))
    with pytest.raises(InvalidProblemError, match="overflow"):
        Dag(tuple(Node(size_bytes=2**59, time=1) for _ in range(4)))
    with pytest.raises(InvalidProblemError, match="one option"):
        BlockGraph(chain([1], [1], options=[[(1, 0), (0, 1)]]))
    with pytest.raises(InvalidProblemError, match="read by nobody"):
        training_graph(Dag((Node(size_bytes=1, time=1), Node(size_bytes=1, time=1))))


def test_graphs_come_from_networkx():
    graph = nx.DiGraph()
    graph.add_node("loss", size_bytes=1, time=2)
    graph.add_node("x", size_bytes=3, time=4)
    graph.add_edge("x", "loss")
    dag, order = from_networkx(graph)
    assert order == ["x", "loss"]
    assert dag.nodes[1].reads == (0,)
    graph.add_edge("loss", "x")
    with pytest.raises(InvalidProblemError, match="cycle through"):
        from_networkx(graph)


@pytest.mark.slow
def test_a_graph_the_size_of_vgg19_is_proven_at_80_percent():
    nodes = [Node(size_bytes=64 >> (i // 6), time=9 + i % 5, reads=(i - 1,) if i else ()) for i in range(26)]
    dag = training_graph(Dag(tuple(nodes)))
    assert len(dag.nodes) == 51
    budget = simulate_dag(dag, plain_steps(dag)).peak_bytes * 4 // 5
    solution = solve_checkmate(dag, budget_bytes=budget)
    assert solution.is_optimal and solution.solve_s < 60
