"""The program as a graph: nodes are equations, edges the values between them."""

from collections.abc import Collection

import networkx as nx

from jaxckpt.program import primitives
from jaxckpt.program.flops import equation_cost
from jaxckpt.program.ir import Program, is_differentiable, size_bytes


def build_graph(program: Program) -> nx.DiGraph:
    """Build the graph that blocks, costs and live ranges are computed from.

    Args:
        program: a flat program.

    Returns:
        A graph. A node is an equation's position, with `eqn`, `primitive`, `source`, `flops`, `moved_bytes`,
        `made_bytes` and `unknown`. An edge carries `values` and their `size_bytes`. `graph["maker"]` maps a value to
        its equation, `graph["readers"]` to the equations that read it, in order.
    """
    maker = {v: i for i, eqn in enumerate(program.equations) for v in eqn.outputs}
    readers: dict[int, list[int]] = {v: [] for v in (*program.inputs, *maker)}
    graph = nx.DiGraph(maker=maker, readers=readers)
    for i, eqn in enumerate(program.equations):
        cost = equation_cost(eqn, program.avals)
        graph.add_node(
            i,
            eqn=eqn,
            primitive=eqn.primitive.name,
            flops=cost.flops,
            moved_bytes=cost.moved_bytes,
            made_bytes=sum(size_bytes(program.avals[v]) for v in eqn.outputs),
            unknown=cost.unknown,
        )
        for v in eqn.reads:
            readers[v].append(i)
            if v in maker:
                edge = graph.get_edge_data(maker[v], i, {"values": (), "size_bytes": 0})
                graph.add_edge(
                    maker[v],
                    i,
                    values=(*edge["values"], v),
                    size_bytes=edge["size_bytes"] + size_bytes(program.avals[v]),
                )
    return graph


def active_values(program: Program, inputs: Collection[int], outputs: Collection[int]) -> set[int]:
    """The values on a path from differentiated inputs to differentiated outputs, along which tangents flow."""
    needed = set(outputs)
    for eqn in reversed(program.equations):
        if eqn.primitive not in primitives.STOPS and not needed.isdisjoint(eqn.outputs):
            needed.update(eqn.reads)
    return reached_values(program, inputs) & needed


def reached_values(program: Program, inputs: Collection[int]) -> set[int]:
    """The values that tangents of these inputs reach."""
    reached = set(inputs)
    for eqn in program.equations:
        if eqn.primitive not in primitives.STOPS and not reached.isdisjoint(eqn.reads):
            reached.update(v for v in eqn.outputs if is_differentiable(program.avals[v]))
    return reached
