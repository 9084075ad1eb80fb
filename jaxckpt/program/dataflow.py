"""The program as a graph: nodes are equations, edges the values between them."""

import functools
from collections.abc import Collection
from typing import Any

import networkx as nx
from jax.extend.core import primitives as prims

from jaxckpt import _compat
from jaxckpt.program import primitives
from jaxckpt.program.flatten import flatten
from jaxckpt.program.flops import equation_cost
from jaxckpt.program.ir import Equation, Program, is_differentiable, size_bytes


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
        paths = _tangent_paths(eqn)
        if paths is None:
            needed.update(eqn.reads if not needed.isdisjoint(eqn.outputs) else ())
        else:
            sources = (eqn.inputs[i] for v, path in zip(eqn.outputs, paths, strict=True) if v in needed for i in path)
            needed.update([x for x in sources if isinstance(x, int)])
    return reached_values(program, inputs) & needed


def reached_values(program: Program, inputs: Collection[int]) -> set[int]:
    """The values that tangents of these inputs reach."""
    reached = set(inputs)
    for eqn in program.equations:
        paths = _tangent_paths(eqn)
        if paths is None:
            made = eqn.outputs if not reached.isdisjoint(eqn.reads) else ()
        else:
            pairs = zip(eqn.outputs, paths, strict=True)
            made = [v for v, path in pairs if any(eqn.inputs[i] in reached for i in path)]
        reached.update(v for v in made if is_differentiable(program.avals[v]))
    return reached


# For each result of an equation, the positions of the operands from which tangents flow into it.
Paths = tuple[frozenset[int], ...]


def dependent_values(program: Program, inputs: Collection[int]) -> set[int]:
    """The values that some of these ones have a say in, themselves among them."""
    found = set(inputs)
    for eqn in program.equations:
        if not found.isdisjoint(eqn.reads):
            found.update(eqn.outputs)
    return found


def _tangent_paths(eqn: Equation) -> Paths | None:
    """From which operands tangents flow into which results; None where they flow from all into all.

    What is inside a loop, a conditional or a checkpoint decides: an auxiliary result, or one behind a `stop_gradient`,
    is reached by fewer than all. A rule of its own, as `custom_jvp` has, may send tangents anywhere.
    """
    if eqn.primitive in primitives.STOPS:
        return (frozenset(),) * len(eqn.outputs)
    if eqn.primitive is prims.scan_p:
        num_consts, num_carry = _compat.scan_layout(eqn.params)
        return _loop_paths(eqn.params["jaxpr"].jaxpr, num_consts, num_carry)
    if eqn.primitive is prims.cond_p:
        branches = [_paths(jaxpr.jaxpr) for jaxpr in eqn.params["branches"]]
        # The first operand is the number of the branch.
        return tuple(frozenset(i + 1 for path in paths for i in path) for paths in zip(*branches, strict=True))
    if eqn.primitive is prims.remat_p:
        return _paths(getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"]))
    return None


@functools.lru_cache(maxsize=256)
def _paths(jaxpr: Any) -> Paths:
    """From which inputs of a jaxpr tangents flow into which outputs."""
    program = flatten(jaxpr)
    first = len(program.inputs) - len(jaxpr.invars)  # constants of its own come before
    sources: dict[int, frozenset[int]] = {
        v: frozenset((i - first,))
        for i, v in enumerate(program.inputs)
        if i >= first and is_differentiable(program.avals[v])
    }
    nothing: frozenset[int] = frozenset()
    for eqn in program.equations:
        paths = _tangent_paths(eqn)
        every = nothing.union(*(sources.get(v, nothing) for v in eqn.reads)) if paths is None else nothing
        for j, v in enumerate(eqn.outputs):
            if not is_differentiable(program.avals[v]):
                continue
            read = (eqn.inputs[i] for i in paths[j]) if paths is not None else ()
            sources[v] = every.union(*(sources.get(x, nothing) for x in read if isinstance(x, int)))
    return tuple(sources.get(x, nothing) if isinstance(x, int) else nothing for x in program.outputs)


@functools.lru_cache(maxsize=256)
def _loop_paths(jaxpr: Any, num_consts: int, num_carry: int) -> Paths:
    """The same of a loop, whose carry goes round."""
    paths = list(_paths(jaxpr))
    carry = range(num_consts, num_consts + num_carry)
    while True:
        # What reaches a carry reaches, one iteration later, whatever reads that carry.
        longer = [path.union(*(paths[i - num_consts] for i in path.intersection(carry))) for path in paths]
        if longer == paths:
            return tuple(paths)
        paths = longer
