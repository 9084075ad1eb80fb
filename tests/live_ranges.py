"""XLA's own account of a compiled program's memory, in text: what readings of its assignment are compared with."""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jaxckpt.compilation.buffers import CompiledMemory
from jaxckpt.compilation.hlo import proto
from jaxckpt.compilation.hlo.assignment import Reader, in_heap, live_bytes, read_program
from jaxckpt.compilation.measure import Measurement, lowered_for
from jaxckpt.targets.chip import find_target

_STEP = re.compile(r"^    (\d+):(.*)$", re.MULTILINE)
_RANGE = re.compile(r"^    (\S+?)\{([\d,]*)\}:(-?\d+)-(-?\d+)$", re.MULTILINE)
_ALLOC, _FREE = 0, 1
Ranges = dict[tuple[str, tuple[int, ...]], tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Told:
    """A program compiled once, as it is read here and as XLA tells it.

    Attributes:
        memory: as it is read.
        content: the serialized description.
        measured: by the same compile.
        counts_constants: whether the compiler's number of bytes has constants in it.
        order: instruction names of XLA's flattened schedule.
        ranges: live ranges by instruction and place in its shape, XLA's.
        read_order: the schedule that is read.
        read_ranges: the ranges that are read.
    """

    memory: CompiledMemory
    content: bytes
    measured: Measurement
    counts_constants: bool
    order: list[str]
    ranges: Ranges
    read_order: list[str]
    read_ranges: Ranges

    def check(self, most_unattributed: float = 0.05) -> None:
        """Everything that a reading promises."""
        assert self.read_order == self.order
        assert self.read_ranges == self.ranges
        check_sums(self.memory)
        for allocation, peak in heap_peaks(self.content).items():
            assert peak == peak_of_arrays(self.memory, allocation)
        totals = self.memory.totals
        constants = 0 if self.counts_constants else totals.constant_bytes
        # A compiler that knows but one memory counts there what waits on the host.
        predicted = self.measured.host_bytes if self.measured.is_host_predicted else 0
        assert totals.device_bytes - constants == self.measured.device_bytes + predicted
        assert totals.argument_bytes == self.measured.argument_bytes
        assert totals.result_bytes == self.measured.output_bytes - self.measured.alias_bytes
        assert totals.host_bytes == self.measured.host_bytes - predicted
        for by in ("scope", "source"):
            rest = [b for b in self.memory.bands(by) if b.label == "unattributed"]
            at_peak = sum(band.size_bytes[self.memory.peak_step] for band in rest)
            assert at_peak <= most_unattributed * totals.device_bytes, [b for b in self.memory.peak if not b.source]


def check_sums(memory: CompiledMemory) -> None:
    """Live bytes and gaps are the heap at every step, and so are what its buffers take and what they leave."""
    assert memory.num_steps == len(memory.steps) == len(memory.phases) == len(memory.live_bytes)
    for by in ("scope", "source", "phase", "role"):
        columns = zip(*(band.size_bytes for band in memory.bands(by)), strict=True)
        assert {sum(column) for column in columns} == {memory.totals.device_bytes}
    ends = sorted({0, memory.peak_step, memory.num_steps - 1} | set(range(0, memory.num_steps, 17)))
    for step in ends:
        taken = sorted((b.offset, b.offset + b.size_bytes) for b in memory.at(step) if b.in_heap)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(taken))
        holes, reached = 0, 0
        for start, stop in taken:
            holes, reached = holes + start - reached, stop
        assert holes + memory.heap_bytes - reached == memory.gap_bytes[step]
        assert memory.live_bytes[step] + memory.gap_bytes[step] == memory.heap_bytes


def heap_peaks(content: bytes) -> dict[int, int]:
    """Of each part of the heap the most bytes of arrays, by the trace of XLA's own simulation; tables are not in it."""
    assignment = proto.parse(content).assignment
    sizes = {buffer.id: buffer.size for buffer in assignment.buffers}
    heap = {allocation.index for allocation in assignment.allocations if in_heap(allocation)}
    return {t.allocation: _trace_peak(t.events, sizes) for t in assignment.traces if t.allocation in heap}


def _trace_peak(events: Any, sizes: Mapping[int, int]) -> int:
    """The most bytes of a trace; what shares its place with another counts as long as one of them is there."""
    owner: dict[int, int] = {}
    num: dict[int, int] = {}
    now = most = 0
    for event in events:
        if event.kind == _FREE:
            held = owner[event.buffer]
            num[held] -= 1
            now -= sizes[held] if num[held] == 0 else 0
            continue
        held = event.buffer if event.kind == _ALLOC else owner[event.shares_with]
        owner[event.buffer] = held
        now += sizes[held] if num.get(held, 0) == 0 else 0
        num[held] = num.get(held, 0) + 1
        most = max(most, now)
    return most


def peak_of_arrays(memory: CompiledMemory, allocation: int | None = None) -> int:
    """The most bytes of arrays that are live in the heap, or in a part of it, without tables of addresses."""
    parts = [b for b in memory.buffers if b.in_heap and allocation in (None, b.allocation)]
    return max(live_bytes((b for b in parts if not b.shape.startswith("(")), memory.num_steps))


def told(
    folder: Path,
    fun: Callable,
    specs: Sequence[Any],
    target: str | None = None,
    donate_argnums: Sequence[int] = (),
    jit_options: Mapping[str, Any] = MappingProxyType({}),
) -> Told:
    """Compile a function and read it both ways.

    Args:
        folder: an empty one, for what the compiler writes.
        fun: as for `compiled_bytes`, like what follows.
        specs: its arguments.
        target: a chip's name.
        donate_argnums: as in `jax.jit`.
        jit_options: likewise.
    """
    dump = {"xla_dump_to": str(folder), "xla_dump_hlo_as_proto": True, "xla_dump_hlo_as_text": True}
    measured = lowered_for(fun, specs, target, donate_argnums, (), jit_options, dump)()
    (final,) = folder.glob("*after_optimizations.hlo.pb")
    (ranges,) = folder.glob("*after_optimizations-live-range.txt")
    content, text = final.read_bytes(), ranges.read_text()
    compiler = find_target(target).compiler
    program = proto.parse(content)
    reader = Reader(program)
    is_total = compiler.counts_thread_local and not measured.is_at_most
    return Told(
        memory=read_program(
            content, target=measured.target, reported={}, counts_thread_local=compiler.counts_thread_local
        ),
        content=content,
        measured=measured,
        counts_constants=is_total,
        order=[name for _, name in _STEP.findall(text.split("BufferLiveRange:")[0])],
        ranges=_ranges(text),
        read_order=[instruction.name for instruction in reader.module.order],
        read_ranges={
            (reader.module.instructions[number].name, index): reader.ranges[value]
            for (number, index), value in reader.values.defined.items()
            if value in reader.ranges
        },
    )


def _ranges(text: str) -> Ranges:
    body = text.split("BufferLiveRange:")[1].split("Live ranges at")[0]
    numbers = lambda index: tuple(int(x) for x in index.split(",") if x)  # noqa: E731
    return {(name, numbers(index)): (int(a), int(b)) for name, index, a, b in _RANGE.findall(body)}
