"""From XLA's buffer assignment to buffers: what lies where, from when to when, and what it is for."""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jaxckpt.compilation.buffers import Buffer, CompiledMemory, Place, Role, Totals
from jaxckpt.compilation.hlo import proto
from jaxckpt.compilation.hlo.module import Module
from jaxckpt.compilation.hlo.origins import Origin, Origins
from jaxckpt.compilation.hlo.pieces import Piece, check_apart, one_after_another
from jaxckpt.compilation.hlo.ranges import Range, last_reads, ranges, without_overlaps
from jaxckpt.compilation.hlo.shapes import show_shape, unpadded_bytes
from jaxckpt.compilation.hlo.values import Position, Values, indices_of, shape_at
from jaxckpt.errors import ProgramFormatError

# XLA's numbers of memories, as its compilers for TPU and GPU use them.
_PLACES: dict[int, Place] = {0: "device", 1: "vmem", 5: "host"}


def read_program(
    content: bytes, *, target: str, reported: Mapping[str, int], counts_thread_local: bool = False
) -> CompiledMemory:
    """Read the memory of a compiled program.

    Args:
        content: a serialized `HloProto` with a schedule and a buffer assignment.
        target: for which chip, for reports.
        reported: the compiler's own numbers.
        counts_thread_local: whether what belongs to one thread takes room on the device.

    Raises:
        ProgramFormatError: something in it is not as known, or does not add up.
    """
    program = proto.parse(content)
    try:
        return Reader(program).memory(target, reported, counts_thread_local)
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        if isinstance(error, ProgramFormatError):
            raise
        raise ProgramFormatError(f"XLA's description of the compiled program is not as known: {error!r}") from error


class Reader:
    """Reads a program with a buffer assignment."""

    def __init__(self, program: Any):
        self.module = module = Module(program.module)
        self._allocations = program.assignment.allocations
        if not self._allocations:
            raise ProgramFormatError("XLA's description of the compiled program has no buffer assignment")
        buffers = program.assignment.buffers
        defined = {(b.defined_at.instruction, tuple(b.defined_at.index)): b.id for b in buffers}
        self._places = {value: position for position, value in defined.items()}
        self.values = Values(module, defined)
        self.ranges = ranges(module, self.values)
        self._merged = self.values.merged()
        without_overlaps(self.ranges, self._merged)
        self._group = {value: number for number, values in enumerate(self._merged) for value in values}
        self._reads = last_reads(module, self.values)
        self._origins = Origins(module, self.values)
        root = module.root(module.entry)
        self._results = {self.values.at(root, index) for index in indices_of(root.shape)}

    def memory(self, target: str, reported: Mapping[str, int], counts_thread_local: bool) -> CompiledMemory:
        """The memory of the program; see `read_program`."""
        found: list[Buffer] = []
        base = 0
        for allocation in self._allocations:
            found += self._buffers(allocation, base if in_heap(allocation) else None)
            base += allocation.size if in_heap(allocation) else 0
        num_steps = len(self.module.order)
        live = live_bytes((b for b in found if b.in_heap), num_steps)
        return CompiledMemory(
            target=target,
            buffers=tuple(sorted(found, key=lambda b: (b.made_at, b.allocation, b.offset, b.name))),
            steps=tuple(instruction.name for instruction in self.module.order),
            phases=tuple(self._origins.phases()),
            live_bytes=live,
            gap_bytes=tuple(base - size for size in live),
            totals=_totals(self._allocations, counts_thread_local),
            reported=dict(reported),
        )

    def _buffers(self, allocation: Any, base: int | None) -> list[Buffer]:
        """The buffers of an allocation, without those that never take room."""
        pieces = self._pieces(allocation)
        # Elsewhere than on the device XLA assigns with finer ranges than those of its schedule.
        pieces = one_after_another(pieces, strict=allocation.color == 0)
        for piece in pieces:
            if piece.offset + piece.size > allocation.size:
                raise ProgramFormatError(f"a buffer reaches beyond its allocation {allocation.index}")
        check_apart(pieces, allocation.index)
        found = [self._buffer(piece, allocation, base) for piece in pieces]
        owner = next((b.name for b in found if b.role in ("result", "argument")), "")
        if base is not None or not owner:
            return found
        return [b if b.name == owner else replace(b, shared_with=owner) for b in _with_owner(found, owner)]

    def _pieces(self, allocation: Any) -> list[Piece]:
        places: dict[tuple[int, int], list[int]] = defaultdict(list)
        for each in allocation.assigned:
            places[each.offset, each.size].append(each.buffer)
        num_steps = len(self.module.order)
        found = []
        for (offset, size), values in places.items():
            live = {v: self._held(v, allocation, num_steps) for v in values}
            for group in self._runs(sorted(values, key=lambda v: (live[v], v)), live):
                start, end = min(live[v][0] for v in group), max(live[v][1] for v in group)
                found.append(Piece(values=tuple(group), offset=offset, size=size, start=start, end=end))
        return found

    def _held(self, value: int, allocation: Any, num_steps: int) -> Range:
        """First and last step at which a value takes its room."""
        if allocation.is_constant or allocation.is_thread_local or value not in self.ranges:
            return 0, num_steps - 1
        start, end = self.ranges[value]
        return min(start, num_steps - 1), min(end, num_steps - 1)

    def _runs(self, values: Sequence[int], live: Mapping[int, Range]) -> Iterator[list[int]]:
        """Values at one place, divided where one does not take over from another as what is merged does."""
        run: list[int] = []
        for value in values:
            if run and not self._continues(run, value, live):
                yield run
                run = []
            run.append(value)
        if run:
            yield run

    def _continues(self, run: Sequence[int], value: int, live: Mapping[int, Range]) -> bool:
        group = self._group.get(value)
        is_merged = group is not None and any(self._group.get(v) == group for v in run)
        return is_merged and live[value][0] <= max(live[v][1] for v in run) + 1

    def _buffer(self, piece: Piece, allocation: Any, base: int | None) -> Buffer:
        (number, index), origin = self._named(piece.values)
        instruction = self.module.instructions[number]
        shape = shape_at(instruction.shape, index)
        last = max((self._reads.get(v, 0) for v in piece.values), default=0)
        return Buffer(
            name=instruction.name + "".join(f"#{i}" for i in index),
            opcode=instruction.opcode,
            shape=show_shape(shape),
            size_bytes=piece.size,
            unpadded_bytes=min(unpadded_bytes(shape), piece.size),
            allocation=allocation.index,
            offset=piece.offset + (base or 0),
            in_heap=base is not None,
            made_at=piece.start,
            last_read=max(piece.start, last),
            held_until=piece.end,
            source=origin.source,
            scope=origin.scope,
            phase=origin.phase,
            place=_PLACES.get(allocation.color, "other"),
            role=self._role(piece, allocation),
        )

    def _named(self, values: Iterable[int]) -> tuple[Position, Origin]:
        """The position after which a buffer is named, its first real maker's, and the origin of what it holds.

        What XLA adds, such as zeros for the branch that does not make a value, is there for what reads it.
        """
        places = [self._places[value] for value in values]
        instructions = self.module.instructions
        real = [p for p in places if self._origins.is_real(instructions[p[0]])]
        named = next(iter(real), places[0])
        every = (self._origins.of(instructions[number], index) for number, index in (named, *places))
        found = itertools.chain(every, map(self._origins.reading, values), self._relatives(values))
        return named, next((origin for origin in found if origin.scope or origin.source), Origin())

    def _relatives(self, values: Iterable[int]) -> Iterator[Origin]:
        """Origins of what lies at the same place at other times, such as the result of the other branch."""
        for value in values:
            for relative in self._merged[self._group[value]] if value in self._group else ():
                number, index = self._places[relative]
                yield self._origins.of(self.module.instructions[number], index)

    def _role(self, piece: Piece, allocation: Any) -> Role:
        if allocation.is_thread_local:
            return "thread-local"
        if allocation.is_constant:
            return "constant"
        if not self._results.isdisjoint(piece.values) and allocation.is_result:
            return "result"
        makers = (self.module.instructions[self._places[v][0]] for v in piece.values)
        entry = self.module.entry
        if allocation.is_parameter and any(i.opcode == "parameter" and i.computation == entry for i in makers):
            return "argument"
        return "temporary"


def in_heap(allocation: Any) -> bool:
    """Whether an allocation is part of the heap that temporaries share."""
    kept = allocation.is_parameter or allocation.is_result or allocation.is_constant or allocation.is_thread_local
    return not kept and allocation.color == 0


def live_bytes(buffers: Iterable[Buffer], num_steps: int) -> tuple[int, ...]:
    """Bytes that are taken at each step, `[num_steps]`."""
    changes = [0] * (num_steps + 1)
    for buffer in buffers:
        changes[buffer.made_at] += buffer.size_bytes
        changes[buffer.held_until + 1] -= buffer.size_bytes
    return tuple(itertools.accumulate(changes[:-1]))


def _with_owner(found: list[Buffer], owner: str) -> list[Buffer]:
    """Buffers of an allocation, of which the owner says with what it shares it, where that is one."""
    others = [b.name for b in found if b.name != owner]
    return [replace(b, shared_with=others[0]) if b.name == owner and others else b for b in found]


def _totals(allocations: Iterable[Any], counts_thread_local: bool) -> Totals:
    sizes: dict[str, int] = defaultdict(int)
    for each in allocations:
        sizes[_kind(each)] += each.size
    return Totals(**{f"{name}_bytes": sizes[name] for name in _KINDS}, is_thread_local_counted=counts_thread_local)


_KINDS = ("argument", "result", "constant", "heap", "thread_local", "vmem", "host", "other")


def _kind(allocation: Any) -> str:
    if allocation.color:
        return _PLACES.get(allocation.color, "other")
    if allocation.is_thread_local:
        return "thread_local"
    if allocation.is_parameter:
        return "argument"
    if allocation.is_constant:
        return "constant"
    return "result" if allocation.is_result else "heap"
