"""Peak bytes of a run of equations: live ranges of what a compiler materialises.

Elementwise, layout and broadcast results fuse into what reads them: they are no buffers, unless an operation that
needs a buffer reads them (a dot, a convolution, a gather, a loop), they must outlive the run, or they are costly and
read more than once. A fused result's readers read its operands instead, which live that much longer.

A compiler may copy an operand into another layout first, or make a buffer of what a reduction reads. Such a copy is
made of what the operand is fused from, as soon as that is there.
"""

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from jaxckpt.program import primitives
from jaxckpt.program.ir import Equation

# An operand this many times smaller than the result is repeated; a smaller factor may be between two dtypes.
_SMALL = 8


class Copy(NamedTuple):
    """What a compiler makes of a value beside the value itself.

    Attributes:
        value: what it is made of.
        reader: the first result of the one equation that reads it in another layout; None where it is shared.
        size_bytes: of a value that is broadcast; None for as much as the value has.
    """

    value: int
    reader: int | None = None
    size_bytes: int | None = None

    def bytes(self, size: Callable[[int], int]) -> int:
        """What it takes."""
        return size(self.value) if self.size_bytes is None else self.size_bytes


@dataclass(frozen=True, slots=True)
class _Run:
    """An equation with every value that is another's buffer under a new shape replaced by that other."""

    reads: tuple[int, ...]
    makes: tuple[int, ...]
    is_fused: bool
    reads_fused: bool
    is_expensive: bool
    overwrites: int | None = None  # the operand whose buffer becomes the result's, if nothing else reads it
    scratch_bytes: int = 0
    is_held: bool = False  # a reduction's kernel may do it
    is_broadcast: bool = False


def _nothing(eqn: Equation) -> tuple[()]:
    del eqn
    return ()


def _no_bytes(eqn: Equation) -> int:
    del eqn
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """What a compiler does beyond what the program says.

    Attributes:
        copies: operands of an equation that it copies into another layout first.
        scratch_bytes: what it needs while an equation runs that a checkpoint separates from the forward; it may make
            that as soon as the program starts.
        index_bytes: what it holds instead from the forward to the backward where no checkpoint separates them.
        kernel_holds: where reductions are kernels of their own, the operations that these do for themselves, unless
            something else reads the result too; None where a reduction fuses like anything else.
        is_breadth_first: it runs what became ready first, and so makes copies long before they are read.
        matmuls_fuse_operands: whether it fuses what makes an operand of a product or a convolution into that.
        repeats_expensive: whether it makes a costly fused result again for each of its readers.
        scatters: by the result of an addition, the scatter into zeros whose result it adds; it scatters in place.
    """

    copies: Callable[[Equation], Collection[int]] = _nothing
    scratch_bytes: Callable[[Equation], int] = _no_bytes
    index_bytes: Callable[[Equation], int] = _no_bytes
    kernel_holds: Callable[[Equation], bool] | None = None
    is_breadth_first: bool = False
    matmuls_fuse_operands: bool = False
    repeats_expensive: bool = False
    scatters: Mapping[int, Equation] = field(default_factory=dict)


def peak_bytes(
    equations: Sequence[Equation],
    size: Callable[[int], int],
    *,
    kept: Collection[int] = (),
    held: Collection[int] = (),
    stacked: Collection[int] = (),
    copies: Collection[Copy] = (),
    external: Collection[int] = (),
    habits: Habits = Habits(),
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
        habits: what the compiler does of its own accord.

    Returns:
        The peak. Values that are read but neither made nor held are free.
    """
    found = _resolve(equations, size, habits, [*kept, *external], stacked)
    given = set(copies)
    there = {number for number, copy in found.copies.items() if copy in given}
    runs = found.runs
    if there:
        runs = _live([run for run in runs if there.isdisjoint(run.makes)], found.find([*kept, *external]))
    return _peak(
        runs,
        found,
        size,
        at_end=found.find(kept),
        at_start=found.find(held) | there,
        elsewhere=found.find(external) - found.find(kept),
        is_breadth_first=habits.is_breadth_first,
    )


def _live(runs: Sequence[_Run], results: set[int]) -> list[_Run]:
    """The runs that lead to the results: what is there as a copy need not be made."""
    needed, live = set(results), []
    for run in reversed(runs):
        if not needed.isdisjoint(run.makes):
            needed.update(run.reads)
            live.append(run)
    return live[::-1]


def _peak(
    runs: Sequence[_Run],
    found: "_Resolved",
    size: Callable[[int], int],
    *,
    at_end: Collection[int],
    at_start: Collection[int],
    elsewhere: Collection[int],
    is_breadth_first: bool,
) -> int:
    buffers = found.buffers
    roots = _roots(runs, buffers, at_start)
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


def moved_bytes(equations: Sequence[Equation], size: Callable[[int], int], *, kept: Collection[int]) -> list[int]:
    """Bytes that each equation reads and writes once what fuses is fused; 0 for what is fused away.

    Args:
        equations: in order.
        size: bytes of a value.
        kept: values that outlive the equations.

    Returns:
        `[num_equations]`.
    """
    found = _resolve(equations, size, Habits(), kept)
    runs, buffers = found.runs, found.buffers
    made = {v for run in runs for v in run.makes}
    # What the equations do not make is read from memory like any buffer.
    outside = {v for run in runs for v in run.reads} - made
    roots = _roots(runs, buffers, outside)
    moved = {}
    for run in runs:
        written = [v for v in run.makes if v in buffers]
        if written:
            read = frozenset().union(*(roots.get(v, frozenset()) for v in run.reads))
            moved[run.makes] = sum(map(size, written)) + sum(map(size, read))
    return [moved.get(eqn.outputs, 0) for eqn in equations]


@dataclass(frozen=True, slots=True, kw_only=True)
class Across:
    """What is held from a forward to a backward that one compiler sees together.

    Attributes:
        values: that the forward makes, as buffers.
        copies: of such values and of what was there before.
        read: values from before that the backward reads, by itself or through what is fused.
        forward_peak_bytes: most bytes alive while the forward runs, results included.
    """

    values: frozenset[int]
    copies: frozenset[Copy]
    read: frozenset[int]
    forward_peak_bytes: int


def held_across(
    forward: Sequence[Equation],
    backward: Sequence[Equation],
    size: Callable[[int], int],
    *,
    results: Collection[int],
    cotangents: Collection[int],
    kept: Collection[int],
    external: Collection[int] = (),
    habits: Habits,
) -> Across:
    """Find what is held from a forward to a backward without a checkpoint between them.

    Args:
        forward: in order.
        backward: in order.
        size: bytes of a value.
        results: of the forward, which are there after it in any case.
        cotangents: what is there for the backward only.
        kept: further values that outlive both.
        external: results whose storage is counted elsewhere.
        habits: what the compiler does of its own accord.

    Returns:
        What is held. What is fused is made again from the buffers it is fused from.
    """
    found = _resolve([*forward, *backward], size, habits, [*results, *kept, *external])
    late = {v for eqn in backward for v in eqn.outputs} | set(cotangents)
    # A copy of what needs nothing of the backward is made as soon as that is there.
    is_copy = lambda run: run.makes[0] < 0  # noqa: E731
    first = [r for r in found.runs if late.isdisjoint(r.makes) and not (is_copy(r) and late.intersection(r.reads))]
    before = {v for run in found.runs for v in run.reads} - {v for run in found.runs for v in run.makes}
    roots = _roots(found.runs, found.buffers, before)
    early = {v for run in first for v in run.makes}
    read = {root for run in found.runs if early.isdisjoint(run.makes) for v in run.reads for root in roots.get(v, ())}
    across = read & early
    return Across(
        values=frozenset(v for v in across if v >= 0),
        copies=frozenset(found.copies[v] for v in across if v < 0),
        read=frozenset(read & before),
        forward_peak_bytes=_peak(
            first,
            found,
            size,
            at_end=across | found.find(results) - found.find(external),
            at_start=(),
            elsewhere=found.find(external),
            is_breadth_first=habits.is_breadth_first,
        ),
    )


@dataclass(frozen=True, slots=True)
class _Resolved:
    """Equations as a compiler sees them."""

    runs: list[_Run]
    buffers: set[int]
    same: dict[int, int]
    copies: dict[int, Copy]  # by the copy's number, which is negative as no value's is

    def find(self, values: Iterable[int]) -> set[int]:
        return {self.same.get(v, v) for v in values}


def _resolve(
    equations: Sequence[Equation],
    size: Callable[[int], int],
    habits: Habits,
    kept: Iterable[int],
    stacked: Iterable[int] = (),
) -> _Resolved:
    same = primitives.renamed(equations)
    runs = [_Run((), (v,), True, True, False) for v in stacked]
    copying = _Copying()
    in_place = {scatter.outputs[0] for scatter in habits.scatters.values()}
    for eqn in equations:
        reads = tuple(dict.fromkeys(same.get(v, v) for v in eqn.reads))
        if eqn.outputs[0] in in_place or eqn.outputs[0] in same:
            continue
        if (scatter := habits.scatters.get(eqn.outputs[0])) is not None:
            base = [v for v in reads if v != scatter.outputs[0]]
            where = [same.get(v, v) for v in scatter.reads[1:]]
            reads = tuple(dict.fromkeys([*base, *where]))
            runs.append(_Run(reads, eqn.outputs, False, False, False, base[0] if base else None))
            continue
        for v in {same.get(v, v) for v in habits.copies(eqn)}:
            copy = copying.number(Copy(v, eqn.outputs[0]))
            reads = tuple(copy if u == v else u for u in reads)
        runs.append(
            _Run(
                reads,
                eqn.outputs,
                eqn.primitive in primitives.FUSIBLE,
                eqn.primitive in primitives.READS_FUSED or (habits.matmuls_fuse_operands and primitives.is_matmul(eqn)),
                eqn.primitive in primitives.EXPENSIVE and not habits.repeats_expensive,
                reads[0] if eqn.primitive in primitives.IN_PLACE and reads else None,
                habits.scratch_bytes(eqn),
                habits.kernel_holds is not None and eqn.primitive in primitives.FUSIBLE and habits.kernel_holds(eqn),
                eqn.primitive in primitives.BROADCASTS,
            )
        )
    runs = copying.inserted(runs)
    buffers = _materialised(runs, {same.get(v, v) for v in kept})
    if habits.kernel_holds is not None:
        runs = _with_operands_made(runs, buffers, size, copying)
    return _Resolved(runs, buffers, same, copying.keys)


@dataclass(frozen=True, slots=True)
class _Copying:
    """Copies by number."""

    numbers: dict[Copy, int] = field(default_factory=dict)
    keys: dict[int, Copy] = field(default_factory=dict)

    def number(self, copy: Copy) -> int:
        number = self.numbers.setdefault(copy, -1 - len(self.numbers))
        self.keys[number] = copy
        return number

    def inserted(self, runs: Sequence[_Run]) -> list[_Run]:
        """The runs, each followed by the copies of its results that no run makes yet."""
        made = {v for run in runs for v in run.makes}
        of: dict[int, list[int]] = {}
        for copy in sorted(set(self.keys) - made, reverse=True):
            of.setdefault(self.keys[copy].value, []).append(copy)
        found = [_Run((v,), (copy,), False, True, False) for v in of if v not in made for copy in of[v]]
        for run in runs:
            found.append(run)
            for v in run.makes:
                # A copy of what is fused is fused from the same, once more.
                reads = run.reads if run.is_fused else (v,)
                found += [_Run(reads, (copy,), False, True, False) for copy in of.get(v, ())]
        return found


def _with_operands_made(
    runs: Sequence[_Run], buffers: set[int], size: Callable[[int], int], copying: _Copying
) -> list[_Run]:
    """Let reductions read buffers only, through what their kernels do themselves; adds to the buffers.

    What is made from one large operand is made for the reductions alone, and made again wherever else it is read. So is
    a value that two operations broadcast to the same size.
    """
    maker = {v: run for run in runs for v in run.makes}
    num_readers = Counter(v for run in runs for v in run.reads)
    num_broadcasts = Counter(copy for run in runs for copy in _broadcast(run, size))

    def is_made_from_one(run: _Run) -> bool:
        large = [u for u in run.reads if _SMALL * size(u) >= size(run.makes[0])]
        return sum(u not in maker or not maker[u].is_broadcast for u in large) <= 1

    def copied(copy: Copy) -> int:
        number = copying.number(copy)
        buffers.add(number)
        return number

    def operands(v: int) -> Iterable[int]:
        run = maker.get(v)
        if run is None or v in buffers or v < 0:
            yield v
        elif num_readers[v] == 1 and run.is_held:
            shared = {copy.value: copy for copy in _broadcast(run, size) if num_broadcasts[copy] > 1}
            for u in run.reads:
                if u in shared:
                    yield copied(shared[u])
                else:
                    yield from operands(u)
        elif is_made_from_one(run):
            yield copied(Copy(v))
        else:
            buffers.add(v)
            yield v

    found = [
        replace(run, reads=tuple(dict.fromkeys(u for v in run.reads for u in operands(v))))
        if run.reads_fused and not run.is_fused and run.makes[0] >= 0
        else run
        for run in runs
    ]
    return copying.inserted(found)


def _broadcast(run: _Run, size: Callable[[int], int]) -> list[Copy]:
    """The operands that an elementwise operation repeats to its result's size."""
    if not run.is_held or run.is_broadcast:
        return []
    result = size(run.makes[0])
    return [Copy(v, None, result) for v in run.reads if v >= 0 and size(v) * _SMALL < result]


def _breadth_first(runs: Sequence[_Run], buffers: set[int], roots: dict[int, frozenset[int]]) -> list[_Run]:
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


def _materialised(runs: Sequence[_Run], kept: Collection[int]) -> set[int]:
    """The values that become buffers."""
    made = {v for run in runs for v in run.makes}
    num_readers = Counter(v for run in runs for v in run.reads)
    buffers = made.intersection(kept)
    for run in runs:
        if not run.is_fused:
            buffers.update(run.makes)
        if not run.reads_fused:
            buffers.update(made.intersection(run.reads))
        if run.is_expensive:
            buffers.update(v for v in run.makes if num_readers[v] > 1)
    return buffers


def _roots(runs: Sequence[_Run], buffers: Collection[int], held: Iterable[int]) -> dict[int, frozenset[int]]:
    """For each value, the buffers that reading it reads: itself, or what it is fused from."""
    roots = {v: frozenset((v,)) for v in held}
    for run in runs:
        read = frozenset().union(*(roots.get(v, frozenset()) for v in run.reads))
        for v in run.makes:
            roots[v] = frozenset((v,)) if v in buffers else read
    return roots
