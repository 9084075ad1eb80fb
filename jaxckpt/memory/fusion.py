"""What a compiler materialises of a run of equations.

Elementwise, layout and broadcast results fuse into what reads them: they are no buffers, unless an operation that
needs a buffer reads them (a dot, a convolution, a gather, a loop), they must outlive the run, or they are costly and
read more than once. A fused result's readers read its operands instead, which live that much longer.

A compiler may copy an operand into another layout first, or make a buffer of what a reduction reads. Such a copy is
made of what the operand is fused from, as soon as that is there.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from jax.extend.core import primitives as prims

from jaxckpt.program import primitives
from jaxckpt.program.ir import Equation
from jaxckpt.targets.rules import FusionRules

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
class Run:
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


def moved_bytes(equations: Sequence[Equation], size: Callable[[int], int], *, kept: Collection[int]) -> list[int]:
    """Bytes that each equation reads and writes once what fuses is fused; 0 for what is fused away.

    Args:
        equations: in order.
        size: bytes of a value.
        kept: values that outlive the equations.

    Returns:
        `[num_equations]`.
    """
    found = resolve(equations, size, FusionRules(), kept)
    runs, buffers = found.runs, found.buffers
    made = {v for run in runs for v in run.makes}
    # What the equations do not make is read from memory like any buffer.
    outside = {v for run in runs for v in run.reads} - made
    roots = roots_of(runs, buffers, outside)
    moved = {}
    for run in runs:
        written = [v for v in run.makes if v in buffers]
        if written:
            read = frozenset().union(*(roots.get(v, frozenset()) for v in run.reads))
            moved[run.makes] = sum(map(size, written)) + sum(map(size, read))
    return [moved.get(eqn.outputs, 0) for eqn in equations]


@dataclass(frozen=True, slots=True)
class Resolved:
    """Equations as a compiler sees them."""

    runs: list[Run]
    buffers: set[int]
    same: dict[int, int]
    copies: dict[int, Copy]  # by the copy's number, which is negative as no value's is

    def find(self, values: Iterable[int]) -> set[int]:
        """The buffers that these values are."""
        return {self.same.get(v, v) for v in values}


def resolve(
    equations: Sequence[Equation],
    size: Callable[[int], int],
    rules: FusionRules,
    kept: Iterable[int],
    stacked: Iterable[int] = (),
) -> Resolved:
    """Find which values become buffers, and what reads and makes them.

    Args:
        equations: in order.
        size: bytes of a value.
        rules: what the compiler does of its own accord.
        kept: values that outlive the equations.
        stacked: values that are slices of what is held elsewhere: what is fused reads them there.
    """
    same = primitives.renamed(equations)
    runs = [Run((), (v,), True, True, False) for v in stacked]
    copying = _Copying()
    in_place = {scatter.outputs[0] for scatter in rules.scatters.values()}
    padded = _added_pads(equations, size)
    for eqn in equations:
        reads = tuple(dict.fromkeys(same.get(v, v) for v in eqn.reads))
        if eqn.outputs[0] in in_place or eqn.outputs[0] in same:
            continue
        if (scatter := rules.scatters.get(eqn.outputs[0])) is not None:
            base = [v for v in reads if v != scatter.outputs[0]]
            where = [same.get(v, v) for v in scatter.reads[1:]]
            reads = tuple(dict.fromkeys([*base, *where]))
            runs.append(Run(reads, eqn.outputs, False, False, False, base[0] if base else None))
            continue
        for v in {same.get(v, v) for v in rules.copies(eqn)}:
            copy = copying.number(Copy(v, eqn.outputs[0]))
            reads = tuple(copy if u == v else u for u in reads)
        runs.append(
            Run(
                reads,
                eqn.outputs,
                eqn.primitive in primitives.FUSIBLE or eqn.outputs[0] in padded,
                eqn.primitive in primitives.READS_FUSED
                or eqn.outputs[0] in padded
                or (rules.matmuls_fuse_operands and primitives.is_matmul(eqn)),
                eqn.primitive in primitives.EXPENSIVE and not rules.repeats_expensive,
                reads[0] if eqn.primitive in primitives.IN_PLACE and reads else None,
                rules.scratch_bytes(eqn),
                rules.kernel_holds is not None and eqn.primitive in primitives.FUSIBLE and rules.kernel_holds(eqn),
                eqn.primitive in primitives.BROADCASTS,
            )
        )
    runs = copying.inserted(runs)
    buffers = _materialised(runs, {same.get(v, v) for v in kept})
    if rules.kernel_holds is not None:
        runs = _with_operands_made(runs, buffers, size, copying)
    return Resolved(runs, buffers, same, copying.keys)


def _added_pads(equations: Sequence[Equation], size: Callable[[int], int]) -> set[int]:
    """Slices' cotangents, padded to what was sliced: where they are only added up, no compiler makes them."""
    num_readers = Counter(v for eqn in equations for v in eqn.reads)
    added = {v for eqn in equations if eqn.primitive is prims.add_jaxvals_p for v in eqn.reads if num_readers[v] == 1}
    return {
        eqn.outputs[0]
        for eqn in equations
        # Less is padded where a vector is split, as into queries, keys and values: there it makes no difference.
        if eqn.primitive is prims.pad_p
        and eqn.outputs[0] in added
        and all(_SMALL * size(v) <= size(eqn.outputs[0]) for v in eqn.reads)
    }


@dataclass(frozen=True, slots=True)
class _Copying:
    """Copies by number."""

    numbers: dict[Copy, int] = field(default_factory=dict)
    keys: dict[int, Copy] = field(default_factory=dict)

    def number(self, copy: Copy) -> int:
        number = self.numbers.setdefault(copy, -1 - len(self.numbers))
        self.keys[number] = copy
        return number

    def inserted(self, runs: Sequence[Run]) -> list[Run]:
        """The runs, each followed by the copies of its results that no run makes yet."""
        made = {v for run in runs for v in run.makes}
        of: dict[int, list[int]] = {}
        for copy in sorted(set(self.keys) - made, reverse=True):
            of.setdefault(self.keys[copy].value, []).append(copy)
        found = [Run((v,), (copy,), False, True, False) for v in of if v not in made for copy in of[v]]
        for run in runs:
            found.append(run)
            for v in run.makes:
                # A copy of what is fused is fused from the same, once more.
                reads = run.reads if run.is_fused else (v,)
                found += [Run(reads, (copy,), False, True, False) for copy in of.get(v, ())]
        return found


def _with_operands_made(
    runs: Sequence[Run], buffers: set[int], size: Callable[[int], int], copying: _Copying
) -> list[Run]:
    """Let reductions read buffers only, through what their kernels do themselves; adds to the buffers.

    What is made from one large operand is made for the reductions alone, and made again wherever else it is read. So is
    a value that two operations broadcast to the same size.
    """
    maker = {v: run for run in runs for v in run.makes}
    num_readers = Counter(v for run in runs for v in run.reads)
    num_broadcasts = Counter(copy for run in runs for copy in _broadcast(run, size))

    def is_made_from_one(run: Run) -> bool:
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


def _broadcast(run: Run, size: Callable[[int], int]) -> list[Copy]:
    """The operands that an elementwise operation repeats to its result's size."""
    if not run.is_held or run.is_broadcast:
        return []
    result = size(run.makes[0])
    return [Copy(v, None, result) for v in run.reads if v >= 0 and size(v) * _SMALL < result]


def _materialised(runs: Sequence[Run], kept: Collection[int]) -> set[int]:
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


def roots_of(runs: Sequence[Run], buffers: Collection[int], held: Iterable[int]) -> dict[int, frozenset[int]]:
    """For each value, the buffers that reading it reads: itself, or what it is fused from."""
    roots = {v: frozenset((v,)) for v in held}
    for run in runs:
        read = frozenset().union(*(roots.get(v, frozenset()) for v in run.reads))
        for v in run.makes:
            roots[v] = frozenset((v,)) if v in buffers else read
    return roots
