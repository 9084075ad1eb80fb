"""Peak bytes of a run of equations: live ranges of what a compiler materialises.

Elementwise, layout and broadcast results fuse into what reads them: they are no buffers, unless an operation that
needs a buffer reads them (a dot, a convolution, a gather, a loop), they must outlive the run, or they are costly and
read more than once. A fused result's readers read its operands instead, which live that much longer.

A compiler may copy an operand into another layout first. The copy is a buffer of its own, made of what the operand is
fused from.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from jaxckpt import costs
from jaxckpt.trace import Equation


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
        reductions_fuse_broadcasts: whether it fuses a broadcast into a reduction that reads it.
        matmuls_fuse_operands: whether it fuses what makes an operand of a product or a convolution into that.
        repeats_expensive: whether it makes a costly fused result again for each of its readers.
    """

    copies: Callable[[Equation], Collection[int]] = _nothing
    scratch_bytes: Callable[[Equation], int] = _no_bytes
    index_bytes: Callable[[Equation], int] = _no_bytes
    reductions_fuse_broadcasts: bool = True
    matmuls_fuse_operands: bool = False
    repeats_expensive: bool = False


def peak_bytes(
    equations: Sequence[Equation],
    size: Callable[[int], int],
    *,
    kept: Collection[int] = (),
    held: Collection[int] = (),
    external: Collection[int] = (),
    habits: Habits = Habits(),
) -> int:
    """Most bytes alive at once while equations run in order.

    Args:
        equations: in order.
        size: bytes of a value.
        kept: values that must be there at the end.
        held: values that are there at the start and count until their last reader is done.
        external: results whose storage is counted elsewhere, such as outputs of the whole program.
        habits: what the compiler does of its own accord.

    Returns:
        The peak. Values that are read but neither made nor held are free.
    """
    same: dict[int, int] = {}
    copied: dict[int, int] = {}
    runs = _resolve(equations, same, habits, copied)
    at_end, at_start = _find(kept, same), _find(held, same)
    elsewhere = _find(external, same) - at_end
    buffers = _materialised(runs, at_end | elsewhere)
    roots = _roots(runs, buffers, at_start)

    last = dict.fromkeys(at_start, -1)
    for i, run in enumerate(runs):
        if not buffers.isdisjoint(run.makes):
            for v in run.reads:
                last.update(dict.fromkeys(roots.get(v, ()), i))
    for v in at_end | elsewhere:
        last.update(dict.fromkeys(roots.get(v, ()), len(runs)))
    ends: dict[int, list[int]] = {}
    for v, i in last.items():
        if v not in elsewhere:
            ends.setdefault(i, []).append(v)

    def total(values: Iterable[int]) -> int:
        return sum(size(copied.get(v, v)) for v in values)

    live = peak = total(at_start)
    live -= total(ends.get(-1, ()))
    for i, run in enumerate(runs):
        made = [v for v in run.makes if v in buffers and v not in elsewhere]
        grown, shrunk = total(made), total(ends.get(i, ()))
        # A fused loop writes over an operand that dies with it, a scatter over the array it changes.
        reused = shrunk if run.is_fused else total(v for v in ends.get(i, ()) if v == run.overwrites)
        peak = max(peak, live + grown - min(grown, reused) + run.scratch_bytes)
        live += grown - shrunk - total(v for v in made if v not in last)
    return peak


def moved_bytes(equations: Sequence[Equation], size: Callable[[int], int], *, kept: Collection[int]) -> list[int]:
    """Bytes that each equation reads and writes once what fuses is fused; 0 for what is fused away.

    Args:
        equations: in order.
        size: bytes of a value.
        kept: values that outlive the equations.

    Returns:
        `[num_equations]`.
    """
    same: dict[int, int] = {}
    runs = _resolve(equations, same)
    buffers = _materialised(runs, _find(kept, same))
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


def buffers_across(
    forward: Sequence[Equation],
    backward: Sequence[Equation],
    size: Callable[[int], int],
    *,
    kept: Collection[int],
    habits: Habits,
) -> set[int]:
    """The buffers that the forward makes and the backward reads, when one compiler sees both.

    Args:
        forward: in order.
        backward: in order.
        size: bytes of a value.
        kept: values that outlive both.
        habits: what the compiler does of its own accord.

    Returns:
        Values that the forward makes. One that is fused is made again from the buffers it is fused from.
    """
    same: dict[int, int] = {}
    runs = _resolve([*forward, *backward], same, replace(habits, copies=_nothing))
    made = {v for eqn in forward for v in eqn.outputs}
    buffers = _materialised(runs, _find(kept, same))
    if not habits.reductions_fuse_broadcasts:
        buffers |= _broadcasts_reduced(runs, buffers, size)
    roots = _roots(runs, buffers, ())
    late = _find((v for eqn in backward for v in eqn.reads), same)
    return {root for v in late for root in roots.get(v, ()) if root in made}


def _broadcasts_reduced(runs: Sequence[_Run], buffers: Collection[int], size: Callable[[int], int]) -> set[int]:
    """Fused values larger than all they are made of, that a reduction reads through fused operations."""
    maker = {v: run for run in runs for v in run.makes}
    stack = [v for run in runs if run.reads_fused and not run.is_fused for v in run.reads]
    seen: set[int] = set()
    while stack:
        v = stack.pop()
        if v in maker and v not in seen and v not in buffers:
            seen.add(v)
            stack.extend(maker[v].reads)
    return {v for v in seen if all(size(u) < size(v) for u in maker[v].reads)}


def _find(values: Iterable[int], same: dict[int, int]) -> set[int]:
    return {same.get(v, v) for v in values}


def _resolve(
    equations: Iterable[Equation],
    same: dict[int, int],
    habits: Habits = Habits(),
    copied: dict[int, int] | None = None,
) -> list[_Run]:
    runs: list[_Run] = []
    maker: dict[int, int] = {}
    after: dict[int, list[_Run]] = {}  # copies, behind the run whose result they are of
    for eqn in equations:
        reads = tuple(dict.fromkeys(same.get(v, v) for v in eqn.reads))
        for v in _find(habits.copies(eqn), same):
            assert copied is not None
            copy = -1 - len(copied)  # no value has a negative number
            copied[copy] = v
            place = maker.get(v, len(runs) - 1)
            # A copy of what is fused is fused from the same, once more.
            is_of_fused = v in maker and runs[place].is_fused
            after.setdefault(place, []).append(
                _Run(runs[place].reads if is_of_fused else (v,), (copy,), False, True, False)
            )
            reads = tuple(copy if u == v else u for u in reads)
        if eqn.primitive in costs.ALIAS and len(reads) == 1:
            same[eqn.outputs[0]] = reads[0]
            continue
        maker.update(dict.fromkeys(eqn.outputs, len(runs)))
        runs.append(
            _Run(
                reads,
                eqn.outputs,
                eqn.primitive in costs.FUSIBLE,
                eqn.primitive in costs.READS_FUSED or (habits.matmuls_fuse_operands and costs.is_matmul(eqn)),
                eqn.primitive in costs.EXPENSIVE and not habits.repeats_expensive,
                reads[0] if eqn.primitive in costs.IN_PLACE and reads else None,
                habits.scratch_bytes(eqn),
            )
        )
    return [*after.get(-1, ()), *(r for i, run in enumerate(runs) for r in (run, *after.get(i, ())))]


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
