"""Most bytes alive at once while equations run: live intervals of the buffers, and the heap that holds them."""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence

from jaxckpt.memory.fusion import Copy, Resolved, Run, resolve, roots_of
from jaxckpt.program.ir import Equation
from jaxckpt.targets.rules import PLAIN, FusionRules


def peak_bytes(
    equations: Sequence[Equation],
    size: Callable[[int], int],
    *,
    kept: Collection[int] = (),
    held: Collection[int] = (),
    stacked: Collection[int] = (),
    copies: Collection[Copy] = (),
    external: Collection[int] = (),
    rules: FusionRules = PLAIN,
) -> int:
    """Most bytes alive at once while equations run in order.

    Args:
        equations: in order.
        size: bytes of a value.
        kept: values that must be there at the end.
        held: values that are there at the start and count until their last reader is done.
        stacked: values that are slices of what is held elsewhere: what is fused reads them there.
        copies: copies that are there at the start too.
        external: results whose storage is counted elsewhere, such as outputs of the whole program.
        rules: what the compiler does of its own accord.

    Returns:
        The peak. Values that are read but neither made nor held are free.
    """
    found = resolve(equations, size, rules, [*kept, *external], stacked)
    given = set(copies)
    there = {number for number, copy in found.copies.items() if copy in given}
    runs = found.runs
    if there:
        runs = _live([run for run in runs if there.isdisjoint(run.makes)], found.find([*kept, *external]))
    return peak_of_runs(
        runs,
        found,
        size,
        at_end=found.find(kept),
        at_start=found.find(held) | there,
        elsewhere=found.find(external) - found.find(kept),
        is_breadth_first=rules.is_breadth_first,
    )


def _live(runs: Sequence[Run], results: set[int]) -> list[Run]:
    """The runs that lead to the results: what is there as a copy need not be made."""
    needed, live = set(results), []
    for run in reversed(runs):
        if not needed.isdisjoint(run.makes):
            needed.update(run.reads)
            live.append(run)
    return live[::-1]


def peak_of_runs(
    runs: Sequence[Run],
    found: Resolved,
    size: Callable[[int], int],
    *,
    at_end: Collection[int],
    at_start: Collection[int],
    elsewhere: Collection[int],
    is_breadth_first: bool,
) -> int:
    """Most bytes alive at once while runs are run in order, or, breadth first, as they become ready.

    Args:
        runs: of equations whose fusion is resolved.
        found: which values are buffers and copies.
        size: bytes of a value.
        at_end: buffers that must be there at the end.
        at_start: buffers that are there at the start.
        elsewhere: buffers whose storage is counted elsewhere.
        is_breadth_first: whether the compiler runs what became ready first.
    """
    buffers = found.buffers
    roots = roots_of(runs, buffers, at_start)
    if is_breadth_first:
        runs = _breadth_first(runs, buffers, roots)

    last = dict.fromkeys(at_start, -1)
    for i, run in enumerate(runs):
        if not buffers.isdisjoint(run.makes):
            for v in run.reads:
                last.update(dict.fromkeys(roots.get(v, ()), i))
    for v in {*at_end, *elsewhere}:
        last.update(dict.fromkeys(roots.get(v, ()), len(runs)))
    ends: dict[int, list[int]] = {}
    for v, i in last.items():
        if v not in elsewhere:
            ends.setdefault(i, []).append(v)

    def bytes_of(v: int) -> int:
        return found.copies[v].bytes(size) if v in found.copies else size(v)

    def total(values: Iterable[int]) -> int:
        return sum(map(bytes_of, values))

    # Of every buffer its bytes, and the steps it lives from and to; a step makes at odd what it has room for at even.
    spans = [(bytes_of(v), -1, 2 * last[v]) for v in at_start if v not in elsewhere]
    live = peak = total(at_start)
    live -= total(ends.get(-1, ()))
    for i, run in enumerate(runs):
        made = [v for v in run.makes if v in buffers and v not in elsewhere]
        grown, shrunk = total(made), total(ends.get(i, ()))
        # A fused loop writes over an operand that dies with it, a scatter over the array it changes.
        room = reused = shrunk if run.is_fused else total(v for v in ends.get(i, ()) if v == run.overwrites)
        peak = max(peak, live + grown - min(grown, reused) + run.scratch_bytes)
        live += grown - shrunk - total(v for v in made if v not in last)
        for v in made:
            fits = bytes_of(v) <= room
            room -= bytes_of(v) if fits else 0
            spans.append((bytes_of(v), 2 * i + fits, max(2 * i + fits, 2 * last.get(v, i))))
    return max(peak, _packed_bytes(spans)) if is_breadth_first else peak


def _packed_bytes(spans: Collection[tuple[int, int, int]]) -> int:
    """Bytes of a heap where the largest buffers are placed first, each in the tightest gap, or else on top.

    Args:
        spans: `[num_buffers]`, each one's bytes, and the first and the last step at which it is there.
    """
    placed: list[tuple[int, int, int, int]] = []  # offset, stop, first, last
    top = 0
    for size, first, last in sorted(spans, key=lambda span: -span[0]):
        if not size:
            continue
        best, at, end = None, 0, 0
        for offset, stop, *_ in sorted(p for p in placed if p[2] <= last and first <= p[3]):
            if offset - end >= size and (best is None or offset - end < best):
                best, at = offset - end, end
            end = max(end, stop)
        if best is None:
            at = end
        placed.append((at, at + size, first, last))
        top = max(top, at + size)
    return top


def _breadth_first(runs: Sequence[Run], buffers: set[int], roots: dict[int, frozenset[int]]) -> list[Run]:
    """The runs that make buffers, in the order in which they become ready."""
    nodes = [run for run in runs if not buffers.isdisjoint(run.makes)]
    maker = {v: i for i, run in enumerate(nodes) for v in run.makes}
    needs = [{maker[u] for v in run.reads for u in roots.get(v, ()) if u in maker} for run in nodes]
    readers: list[list[int]] = [[] for _ in nodes]
    for i, before in enumerate(needs):
        for j in before:
            readers[j].append(i)
    missing = [len(before) for before in needs]
    ready = deque(i for i, number in enumerate(missing) if not number)
    order = []
    while ready:
        i = ready.popleft()
        order.append(nodes[i])
        for j in readers[i]:
            missing[j] -= 1
            if not missing[j]:
                ready.append(j)
    return order
