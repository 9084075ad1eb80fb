"""The memory of a compiled program: every buffer, when it is live, where it lies and what it is for.

These are records alone. `compilation.memory` reads them from what XLA itself assigned.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from jaxckpt.compilation.records import Signed, Size, check_record, record_of
from jaxckpt.errors import PlanFileError

SCHEMA = 1
FORMAT = "jaxckpt memory"
# What a band is called whose buffers have neither scope nor line, and those that are no buffers.
UNATTRIBUTED, GAPS, RESERVED = "unattributed", "gaps in the heap", "reserved"

Phase = Literal["forward", "backward", "recomputed", "optimizer", "other"]
Place = Literal["device", "vmem", "host", "other"]
Role = Literal["argument", "result", "constant", "temporary", "thread-local"]
By = Literal["scope", "source", "phase", "role", "opcode", "place"] | Callable[["Buffer"], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffer:
    """One buffer of a compiled program.

    Values that XLA keeps at one place, such as those that pass through a loop, are one buffer.

    Attributes:
        name: of the instruction that makes it.
        opcode: of that instruction.
        shape: such as `f32[8,512]`.
        size_bytes: as allocated.
        unpadded_bytes: what its elements take; 0 where the shape does not say.
        allocation: number of the allocation that it lies in.
        offset: in the heap, for what lies there; in its own allocation for the rest.
        in_heap: whether it lies in the heap.
        made_at: step at which it is made; 0 for what is there from the start.
        last_read: step of its last reader; `made_at` where there is none.
        held_until: last step at which its bytes are its own. Arguments and results are held to the end. One before
            `last_read` where that step writes its result over it.
        source: `file:line` of the user's code, the file relative to its project; empty where XLA does not say.
        scope: name stack of the operation without JAX's own transformations; empty where XLA does not say.
        phase: forward, backward, recomputed, optimizer or other.
        place: of memory: device, vmem (a TPU's on-chip memory), host, or other (such as semaphores).
        role: argument, result, constant, temporary or thread-local.
        shared_with: name of another buffer of the same allocation whose bytes it takes at another time: the result that
            is lent to it, or the argument that it is aliased with; empty where there is none.
    """

    name: str
    opcode: str
    shape: str
    size_bytes: int
    unpadded_bytes: int
    allocation: int
    offset: int
    in_heap: bool
    made_at: int
    last_read: int
    held_until: int
    source: str
    scope: str
    phase: Phase
    place: Place
    role: Role
    shared_with: str = ""

    @property
    def padding_bytes(self) -> int:
        """What it takes beyond its elements."""
        return max(0, self.size_bytes - self.unpadded_bytes) if self.unpadded_bytes else 0

    @property
    def is_attributed(self) -> bool:
        """Whether a scope or a line is known."""
        return bool(self.scope or self.source)

    def is_live(self, step: int) -> bool:
        """Whether its bytes are taken at a step."""
        return self.made_at <= step <= self.held_until


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Bytes of a program's allocations on one device, each allocation once.

    Attributes:
        argument_bytes: of arguments, results that are aliased with them included.
        result_bytes: of other results.
        constant_bytes: of constants.
        heap_bytes: of what is shared by temporaries.
        thread_local_bytes: of what belongs to single threads, such as the operands of a reduction.
        vmem_bytes: in a TPU's on-chip memory.
        host_bytes: in the host's memory.
        other_bytes: in other memories, such as semaphores.
        is_thread_local_counted: whether `thread_local_bytes` take room on the device, as on TPUs.
    """

    argument_bytes: int
    result_bytes: int
    constant_bytes: int
    heap_bytes: int
    thread_local_bytes: int
    vmem_bytes: int = 0
    host_bytes: int = 0
    other_bytes: int = 0
    is_thread_local_counted: bool = False

    @property
    def device_bytes(self) -> int:
        """Arguments, results, constants and heap, and what belongs to threads where it takes room there."""
        threads = self.thread_local_bytes if self.is_thread_local_counted else 0
        return self.argument_bytes + self.result_bytes + self.constant_bytes + self.heap_bytes + threads


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """Bytes of some buffers over the schedule.

    Attributes:
        label: what they have in common; `UNATTRIBUTED`, `GAPS` or `RESERVED` for the rest.
        kind: "live" for buffers, "gap" for the heap's gaps, "reserved" for allocations of results and arguments while
            nothing is in them.
        size_bytes: `[num_steps]`.
    """

    label: str
    kind: Literal["live", "gap", "reserved"]
    size_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledMemory:
    """Every buffer of a compiled program on one device, over its schedule.

    Attributes:
        target: for which chip, as reports name it.
        is_estimated: whether the buffers come from shapes alone, for want of XLA's assignment.
        buffers: in order of `made_at`.
        steps: `[num_steps]`, instruction names of the flattened schedule.
        phases: `[num_steps]`, the phase of each.
        live_bytes: `[num_steps]`, of the heap's buffers.
        gap_bytes: `[num_steps]`, of the heap where no buffer is; with `live_bytes` they are the heap.
        totals: bytes of the allocations.
        reported: XLA's own numbers, by JAX's names, such as `temp_size_in_bytes`.
    """

    target: str
    is_estimated: bool = False
    buffers: tuple[Buffer, ...]
    steps: tuple[str, ...]
    phases: tuple[Phase, ...]
    live_bytes: tuple[int, ...]
    gap_bytes: tuple[int, ...]
    totals: Totals
    reported: Mapping[str, int]

    @property
    def num_steps(self) -> int:
        """Instructions of the flattened schedule."""
        return len(self.steps)

    @property
    def heap_bytes(self) -> int:
        """Bytes that temporaries share."""
        return self.totals.heap_bytes

    @property
    def peak_step(self) -> int:
        """The first step with the most live bytes in the heap."""
        return max(range(self.num_steps), key=self.live_bytes.__getitem__, default=0)

    @property
    def peak(self) -> tuple[Buffer, ...]:
        """The buffers that are live at `peak_step`, largest first."""
        return self.at(self.peak_step)

    def at(self, step: int) -> tuple[Buffer, ...]:
        """Buffers that are live at a step, in every place of memory, largest first.

        Raises:
            IndexError: there is no such step.
        """
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} is none of this program's {self.num_steps:,}")
        live = [buffer for buffer in self.buffers if buffer.is_live(step)]
        return tuple(sorted(live, key=lambda buffer: (-buffer.size_bytes, buffer.made_at, buffer.name)))

    def bands(self, by: By = "scope") -> tuple[Band, ...]:
        """The device's memory over the schedule: what is stacked in a picture.

        Args:
            by: an attribute of buffers, or a function of a buffer that returns a label. By scope and by source
                arguments are one band and constants another, and where XLA does not give the one the other counts;
                buffers whose label is empty are unattributed.

        Returns:
            Bands whose bytes add up to `totals.device_bytes` at every step, the largest at the peak first, then
            `UNATTRIBUTED`, `RESERVED` and `GAPS`; none that is empty throughout.
        """
        label = by if callable(by) else lambda buffer: _label(buffer, by)
        changes: dict[str, list[int]] = defaultdict(lambda: [0] * (self.num_steps + 1))
        for buffer in self.on_device():
            found = changes[label(buffer) or UNATTRIBUTED]
            found[buffer.made_at] += buffer.size_bytes
            found[buffer.held_until + 1] -= buffer.size_bytes
        found = {key: tuple(itertools.accumulate(change[:-1])) for key, change in changes.items()}
        peak = self.peak_step
        order = sorted(found, key=lambda key: (key == UNATTRIBUTED, -found[key][peak], -max(found[key]), key))
        bands = [Band(label=key, kind="live", size_bytes=found[key]) for key in order if any(found[key])]
        return (*bands, *self._rest(bands))

    def on_device(self) -> Iterator[Buffer]:
        """Buffers that count in `totals.device_bytes`."""
        threads = self.totals.is_thread_local_counted
        return (b for b in self.buffers if b.place == "device" and (threads or b.role != "thread-local"))

    def _rest(self, bands: list[Band]) -> Iterator[Band]:
        live = [sum(column) for column in zip(*(band.size_bytes for band in bands), strict=True)] or [
            0
        ] * self.num_steps
        total = self.totals.device_bytes
        reserved = tuple(total - a - gap for a, gap in zip(live, self.gap_bytes, strict=True))
        if any(reserved):
            yield Band(label=RESERVED, kind="reserved", size_bytes=reserved)
        if any(self.gap_bytes):
            yield Band(label=GAPS, kind="gap", size_bytes=self.gap_bytes)

    def to_json(self) -> dict[str, Any]:
        """The record as plain data, with its format and the number of its schema."""
        data: dict[str, Any] = {"format": FORMAT, "schema": SCHEMA}
        for f in fields(self):
            data[f.name] = getattr(self, f.name)
        data["buffers"] = [asdict(buffer) for buffer in self.buffers]
        data["totals"] = asdict(self.totals)
        for name in ("steps", "phases", "live_bytes", "gap_bytes"):
            data[name] = list(data[name])
        data["reported"] = dict(self.reported)
        return data

    @classmethod
    def from_json(cls, data: Any, where: str = "this") -> "CompiledMemory":
        """Read what `to_json` made.

        Raises:
            PlanFileError: anything else, or another schema; with the path of every violation.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise PlanFileError(f"{where} is not a record of a compiled program's memory")
        if data.get("schema") != SCHEMA:
            raise PlanFileError(f"{where} has schema {data.get('schema')!r}, and this jaxckpt reads {SCHEMA}")
        values = {name: value for name, value in data.items() if name not in ("format", "schema")}
        check_record(_RECORD, values, where)
        buffers = tuple(Buffer(**buffer) for buffer in values.pop("buffers"))
        totals = Totals(**values.pop("totals"))
        values |= {name: tuple(values[name]) for name in ("steps", "phases", "live_bytes", "gap_bytes")}
        found = cls(buffers=buffers, totals=totals, **values)
        _check(found, where)
        return found


def _label(buffer: Buffer, by: str) -> str:
    if by not in ("scope", "source"):
        return getattr(buffer, by)
    if buffer.role in ("argument", "constant"):
        return f"{buffer.role}s"
    return (buffer.scope or buffer.source) if by == "scope" else (buffer.source or buffer.scope)


_RECORD = record_of(
    CompiledMemory,
    buffers=list[record_of(Buffer, phase=Phase, place=Place, role=Role)],
    phases=list[Phase],
    live_bytes=list[Size],
    gap_bytes=list[Size],
    totals=record_of(Totals),
    reported=dict[str, Signed],
)


def _check(found: CompiledMemory, where: str) -> None:
    num = found.num_steps
    if {len(found.phases), len(found.live_bytes), len(found.gap_bytes)} != {num}:
        raise PlanFileError(f"{where} is damaged: it has {num} steps, and not one phase and two sizes for each")
    for i, (live, gap) in enumerate(zip(found.live_bytes, found.gap_bytes, strict=True)):
        if live + gap != found.heap_bytes:
            raise PlanFileError(f"{where} is damaged: live bytes and gaps at step {i} are not the heap")
    for i, buffer in enumerate(found.buffers):
        if not (buffer.made_at <= buffer.held_until < num and buffer.made_at <= buffer.last_read < num):
            raise PlanFileError(f"{where} is damaged: buffers[{i}] is live outside the schedule")
