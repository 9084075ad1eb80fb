"""Where to cut: the order of the equations, what is sunk into its readers, and the borders of blocks.

A cut is worth having where little is alive, and between any two costly equations one cut is enough: after the first of
them where bytes are equal, so that dropping a block's last output drops the costly equation with it.
"""

import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import networkx as nx

from jaxckpt.program import primitives
from jaxckpt.program.ir import Equation, Program, size_bytes

# What is sunk is made again by every block that reads it, so it must cost next to nothing.
_SINKABLE = primitives.CHEAP | primitives.LAYOUT
# So much of a program's work is what its costly equations do.
_MOST_WORK = 0.75
# So many equations without a costly one are a program of their own, however little of the work they do.
_LONG = 200
# A cut at which this many times more is alive than at both its neighbours is not worth a place in the table.
_HIGH_CUT = 6
# What repeats has so few blocks, and repeats so often.
# For a v5e, GPT-2 small's plans of the bytes of "queries, keys and values" recompute 11.8 % with such blocks and 13.4 %
# without. Elsewhere nothing is won: with them the predicted frontiers of GPT-2, Llama, ViT, the encoder-decoder and the
# experts lie within 0.15 % of the step.
_MAX_PERIOD, _MIN_REPEATS = 8, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A block as a run of equations.

    Attributes:
        positions: where its equations stand in the program, copies of the sunk ones it reads among them.
        equations: in order.
        inputs: values read from outside, arguments among them, in order of first reading.
        outputs: values that later blocks or the program's end read, in order of their first reader.
    """

    positions: tuple[int, ...]
    equations: tuple[Equation, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def cut_program(
    program: Program,
    graph: nx.DiGraph,
    active: set[int],
    *,
    max_blocks: int = 130,
    is_coarse: bool = False,
    is_alone: Callable[[Equation, bool], bool],
    is_apart: Callable[[Equation], bool] = lambda eqn: False,
    is_head: Callable[[Equation], bool] = lambda eqn: False,
) -> tuple[Span, ...]:
    """Cut a program into blocks.

    Fine cuts let a schedule drop and keep every costly operation on its own. Coarse ones stand where little is alive
    only, so that what a block makes for itself is not held for others: a save set picks from all of it.

    Args:
        program: a flat program.
        graph: its graph, from `build_graph`.
        active: values that tangents flow through, from `active_values`.
        max_blocks: how many blocks at most; the solver's time grows with the cube of it.
        is_coarse: cut at the lowest quarter of the places only.
        is_alone: whether an equation, which tangents flow through or not, is the last one of a block of its own: loops
            and conditionals, which have options of their own, and effects, which run once.
        is_apart: whether an equation that tangents flow through must be a block of its own: what the compiler treats
            worse inside regions.
        is_head: whether a costly equation stays outside of regions.

    Returns:
        The blocks in order.
    """
    sunk = _sunk(program, graph)
    order = _order(program, graph, active, sunk)
    if not order:
        return ()
    alive = _alive_bytes(program, graph, order)
    around = _around_alone(program, order, active, is_alone, is_apart)
    heavy = _heavy(program, graph, order, active, max_blocks)
    borders = _borders(heavy, alive)
    loss = _before_loss(heavy, borders, alive)
    if heavy and not is_coarse:
        # What is behind the last costly equation is no mere loss where there are products in it.
        head = any(primitives.is_matmul(program.equations[i]) for i in order[heavy[-1] + 1 :])
        loss |= {heavy[-1] + 1} if head else set()
    if is_coarse and borders:
        # On a Llama of 8 layers with 694 MiB to spend the fine cut recomputes 2.9 % and the coarse one 0.13 %; at half
        # of that the fine one is the better of the two.
        level = sorted(alive[b - 1] for b in borders)[(len(borders) - 1) // 4]
        borders = [b for b in borders if alive[b - 1] <= level]
    borders = _thin(borders, alive, max_blocks - len(loss))
    borders = sorted({*borders, *around, *loss, *_before_heads(program, order, heavy, alive, is_head)})
    starts, stops = [0, *borders], [*borders, len(order)]
    runs = [order[a:b] for a, b in zip(starts, stops, strict=True)]
    return spans_at(program, [_with_sunk(graph, run, sunk) for run in runs])


def merged_spans(program: Program, spans: Sequence[Span], classes: Sequence[Hashable]) -> tuple[Span, ...]:
    """Merge the blocks of each repetition of what repeats, such as the halves of a network's layers.

    A save set is of one block, so one of a whole layer takes a block that is the whole layer.

    Args:
        program: the flat program.
        spans: `[n]`, its blocks.
        classes: `[n]`, equal for equal blocks; None for those that must stay as they are.

    Returns:
        Fewer blocks; the same ones where nothing is repeated often enough.
    """
    runs = [(stop - start, p, stop) for p in range(1, _MAX_PERIOD + 1) for start, stop in _periodic(classes, p)]
    if not runs:
        return tuple(spans)
    num, period, stop = max(runs, key=lambda run: (run[0], -run[1], run[2]))
    # What comes first is often made together with something else, so the last repetition is whole.
    first = stop - num // period * period
    groups = [[k] for k in range(first)]
    groups += [list(range(k, k + period)) for k in range(first, stop, period)]
    groups += [[k] for k in range(stop, len(spans))]
    # A sunk equation stands in every block that reads it.
    return spans_at(program, [list(dict.fromkeys(i for k in group for i in spans[k].positions)) for group in groups])


def _periodic(classes: Sequence[Hashable], period: int) -> Iterator[tuple[int, int]]:
    """Runs of blocks that repeat with a period, where they do so often enough: their starts and stops."""
    start = None
    for k in range(len(classes) + 1):
        is_same = k + period < len(classes) and classes[k] is not None and classes[k] == classes[k + period]
        if is_same and start is None:
            start = k
        if not is_same and start is not None:
            if k + period - start >= _MIN_REPEATS * period:
                yield start, k + period
            start = None


def _sunk(program: Program, graph: nx.DiGraph) -> set[int]:
    """Equations that are cheap to repeat anywhere: they read only arguments, constants and each other."""
    maker = graph.graph["maker"]
    results = {x for x in program.outputs if isinstance(x, int)}
    sunk: set[int] = set()
    for i, eqn in enumerate(program.equations):
        cheap = eqn.primitive in _SINKABLE and not eqn.has_effects and results.isdisjoint(eqn.outputs)
        if cheap and all(v not in maker or maker[v] in sunk for v in eqn.reads):
            sunk.add(i)
    return sunk


def _order(program: Program, graph: nx.DiGraph, active: set[int], sunk: set[int]) -> list[int]:
    """The program's own order, but what no tangent flows into waits until right before its first reader.

    Dropout masks, positions and the like would otherwise live from wherever the program happens to make them.
    """
    maker, readers = graph.graph["maker"], graph.graph["readers"]
    late: set[int] = set()
    for i, eqn in enumerate(program.equations):
        from_inactive = all(v not in active if v not in maker else maker[v] in late for v in eqn.reads)
        if from_inactive and active.isdisjoint(eqn.outputs) and not eqn.has_effects:
            late.add(i)
    place: dict[int, tuple[int, ...]] = {}
    for i in reversed(range(len(program.equations))):
        first = min((place[r] for v in program.equations[i].outputs for r in readers[v]), default=None)
        place[i] = (*first[:-2], -1, i, 0, 0) if i in late and first is not None else (i, 0, 0)
    return sorted((i for i in place if i not in sunk), key=place.__getitem__)


def _alive_bytes(program: Program, graph: nx.DiGraph, order: Sequence[int]) -> list[int]:
    """Bytes alive after each equation of the order, arguments and what is sunk left out."""
    position = {i: p for p, i in enumerate(order)}
    readers = graph.graph["readers"]
    results = {x for x in program.outputs if isinstance(x, int)}
    change = [0] * (len(order) + 1)
    for p, i in enumerate(order):
        for v in program.equations[i].outputs:
            # A sunk equation reads no value of the order, so every reader has a place in it.
            last = max((position[r] for r in readers[v]), default=p)
            if v not in results and last > p:
                size = size_bytes(program.avals[v])
                change[p] += size
                change[last] -= size
    alive, total = [], 0
    for p in range(len(order)):
        total += change[p]
        alive.append(total)
    return alive


def _around_alone(
    program: Program,
    order: Sequence[int],
    active: set[int],
    is_alone: Callable[[Equation, bool], bool],
    is_apart: Callable[[Equation], bool],
) -> set[int]:
    """Cuts before and after each equation that is a block of its own."""

    def is_one(i: int) -> bool:
        eqn = program.equations[i]
        is_active = not active.isdisjoint(eqn.outputs)
        return is_alone(eqn, is_active) or (is_active and is_apart(eqn))

    alone = [p for p, i in enumerate(order) if is_one(i)]
    return {b for p in alone for b in (p, p + 1) if 0 < b < len(order)}


def _heavy(program: Program, graph: nx.DiGraph, order: Sequence[int], active: set[int], max_blocks: int) -> list[int]:
    """Where the costly equations stand in the order; elementwise ones that no tangent flows through are not.

    Those that are some share of all work are, and in programs of so many equations that few are, those that do most of
    it. What lies between two of them is looked at by itself where it is long.
    """

    def is_light(i: int) -> bool:
        eqn = program.equations[i]
        return eqn.primitive in primitives.FUSIBLE and active.isdisjoint(eqn.outputs)

    weights = [0 if is_light(i) else graph.nodes[i]["flops"] for i in order]
    total = sum(graph.nodes[i]["flops"] for i in order)
    found: list[int] = []
    runs = [(0, len(order), total / (4 * max_blocks))]
    while runs:
        start, stop, most = runs.pop()
        least = min(most, _least_of_most_work(weights[start:stop]))
        heavy = [p for p in range(start, stop) if weights[p] and weights[p] >= least]
        if heavy:
            found += heavy
            runs += [(a + 1, b, math.inf) for a, b in itertools.pairwise([start - 1, *heavy, stop]) if b - a > _LONG]
    return sorted(found)


def _least_of_most_work(weights: Sequence[int]) -> int:
    """The least weight among the heaviest ones that add up to most of all: the same in n layers and in 4 n."""
    done, total = 0, sum(weights)
    for weight in sorted(weights, reverse=True):
        done += weight
        if done >= _MOST_WORK * total:
            return weight
    return 0


def _borders(heavy: Sequence[int], alive: Sequence[int]) -> list[int]:
    """One cut between each two costly equations, where least is alive; positions in the order where blocks start.

    Where that is so in several places: right behind the costly one, or else behind the last, since what is made there
    of one value of the same size, as by a relu behind a residual sum, would be held beside that value.
    """
    borders = []
    for a, b in itertools.pairwise(heavy):
        least = min(alive[a:b])
        borders.append(1 + (a if alive[a] == least else max(p for p in range(a, b) if alive[p] == least)))
    return borders


def _before_loss(heavy: Sequence[int], borders: Sequence[int], alive: Sequence[int]) -> set[int]:
    """A cut behind the last costly equation where its result is larger than what most cuts hold, as logits are.

    All of the loss's backward would else be alive together with what that equation's backward needs.
    """
    if not borders:
        return set()
    # With logits of 32 MiB on CPU the loss takes 96 MiB with this cut and 130 without.
    usual = sorted(alive[b - 1] for b in borders)[len(borders) // 2]
    return {heavy[-1] + 1} if alive[heavy[-1]] > usual else set()


def _before_heads(
    program: Program, order: Sequence[int], heavy: Sequence[int], alive: Sequence[int], is_head: Callable
) -> set[int]:
    """The first of the cuts where least is alive before each head, so that a region ends there.

    What it ends with is not made again for the head's sake then, as the last product of a transformer's last layer
    would be for the norm behind it.
    """
    pairs = ((a, b) for a, b in itertools.pairwise(heavy) if is_head(program.equations[order[b]]))
    return {1 + min(range(a, b), key=alive.__getitem__) for a, b in pairs}


def _thin(borders: list[int], alive: Sequence[int], max_blocks: int) -> list[int]:
    """Drop cuts that stand high above both neighbours, then the highest ones while there are too many."""
    kept = list(borders)
    for border in sorted(borders, key=lambda b: (-alive[b - 1], b)):
        p = kept.index(border)
        around = [alive[kept[q] - 1] for q in (p - 1, p + 1) if 0 <= q < len(kept)]
        if around and alive[border - 1] > _HIGH_CUT * max(around):
            kept.remove(border)
    while len(kept) >= max_blocks:
        # Every second of the highest ones, so that equal cuts thin out evenly.
        level = max(alive[b - 1] for b in kept)
        highest = [b for b in kept if alive[b - 1] == level]
        drop = set(highest[::2][: len(kept) - max_blocks + 1])
        kept = [b for b in kept if b not in drop]
    return kept


def spans_at(program: Program, blocks: Sequence[Sequence[int]]) -> tuple[Span, ...]:
    """Make blocks of the equations at these positions; an equation in several blocks is sunk into each.

    Args:
        program: the flat program.
        blocks: `[n]`, positions of each block's equations.

    Returns:
        The blocks.
    """
    results = {x for x in program.outputs if isinstance(x, int)}
    equations = [tuple(program.equations[i] for i in block) for block in blocks]
    inputs = []
    for block in equations:
        made = {v for eqn in block for v in eqn.outputs}
        inputs.append(tuple(dict.fromkeys(v for eqn in block for v in eqn.reads if v not in made)))
    first_reader: dict[int, int] = dict.fromkeys(results, len(blocks))
    for k in reversed(range(len(blocks))):
        first_reader.update(dict.fromkeys(inputs[k], k))
    spans = []
    for positions, block, reads in zip(blocks, equations, inputs, strict=True):
        outputs = [v for eqn in block for v in eqn.outputs if v in first_reader]
        outputs.sort(key=first_reader.__getitem__)
        spans.append(Span(positions=tuple(positions), equations=block, inputs=reads, outputs=tuple(outputs)))
    return tuple(spans)


def _with_sunk(graph: nx.DiGraph, run: Sequence[int], sunk: set[int]) -> list[int]:
    """The run's equations, each after the sunk ones it needs; a sunk one appears once."""
    placed: dict[int, None] = {}
    for i in run:
        needed = [i]
        for j in needed:
            needed.extend(p for p in graph.predecessors(j) if p in sunk and p not in placed)
        # Sunk equations are numbered in the program's order, which is topological.
        placed.update(dict.fromkeys(sorted(set(needed) - {i})))
        placed[i] = None
    return list(placed)
