"""Graphs drawn by a seed: any DAG, and training graphs whose skips go from the way down to the way up."""

import random
from collections.abc import Iterator

from ckptsolvers import Block, InfeasibleError, Option, Problem, Value
from ckptsolvers.brute_dag import solve_brute_force_dag
from ckptsolvers.dag import Dag, Node, plain_steps, simulate_dag
from ckptsolvers.training import training_graph


def random_dag(seed: int, max_nodes: int = 9) -> Dag:
    """Up to `max_nodes` nodes, each of which reads up to three before it; some are of no size, some must run once."""
    rng = random.Random(f"dag {seed}")
    nodes = []
    for i in range(rng.randint(3, max_nodes)):
        reads = rng.sample(range(i), min(i, rng.choice((0, 1, 1, 2, 2, 3))))
        nodes.append(
            Node(
                size_bytes=rng.randint(0, 4),
                time=rng.randint(0, 4),
                reads=tuple(sorted(reads)),
                transient_bytes=rng.choice((0, 0, 1, 2)),
                is_once=rng.random() < 0.15,
            )
        )
    return Dag(tuple(nodes))


def u_shaped(seed: int, max_nodes: int = 5) -> Dag:
    """A forward graph in a line, with a skip from each node on the way down to its peer on the way up."""
    rng = random.Random(f"U {seed}")
    n = rng.randint(4, max_nodes)
    reads: list[set[int]] = [{i - 1} if i else set() for i in range(n)]
    for i in range(n // 2 - 1):
        reads[n - 2 - i].add(i)
    # The last node is the loss.
    nodes = (
        Node(size_bytes=rng.randint(1, 4) if i < n - 1 else 1, time=rng.randint(1, 4), reads=tuple(sorted(r)))
        for i, r in enumerate(reads)
    )
    return Dag(tuple(nodes))


def training(seed: int, max_nodes: int = 5) -> Dag:
    """The training graph of such a one, its backward dearer than its forward."""
    forward = u_shaped(seed, max_nodes)
    rng = random.Random(f"backward {seed}")
    return training_graph(forward, backward_times=[rng.randint(1, 8) for _ in forward.nodes[:-1]])


def optima(dag: Dag, **settings) -> Iterator[tuple[int, int | None]]:
    """Every budget at which brute force finds less work than below it, and the one below, each with that work.

    The last one is the largest budget into which nothing fits; its work is None.
    """
    budget = simulate_dag(dag, plain_steps(dag)).peak_bytes
    while budget >= 0:
        try:
            best = solve_brute_force_dag(dag, budget_bytes=budget, **settings).judgement
        except InfeasibleError:
            yield budget, None
            return
        yield budget, best.work
        budget = best.peak_bytes - 1


def u_blocks(seed: int, max_blocks: int = 6) -> Problem:
    """Such a graph as a block problem; a backward reads its block's inputs."""
    forward = u_shaped(seed, max_blocks)
    readers = forward.readers
    values = tuple(
        Value(size_bytes=node.size_bytes, made_by=k, read_by=readers[k] or (k + 1,), cotangent_bytes=node.size_bytes)
        for k, node in enumerate(forward.nodes)
    )
    blocks = []
    for node in forward.nodes:
        gradients = node.size_bytes + sum(forward.nodes[v].size_bytes for v in node.reads)
        keep = Option(
            name="inputs",
            saved_bytes=0,
            recompute_time=0,
            forward_times=(0, node.time),
            forward_peak_bytes=node.size_bytes,
            backward_peak_bytes=gradients,
        )
        blocks.append(Block(forward_times=(0, node.time), forward_peak_bytes=node.size_bytes, options=(keep,)))
    return Problem(blocks=tuple(blocks), values=values)
