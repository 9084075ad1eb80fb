"""The buffers at a program's peak: why each is alive, and what could be done about it."""

from collections import defaultdict
from dataclasses import dataclass

from jaxckpt.compilation.buffers import Buffer, CompiledMemory
from jaxckpt.result.page.grouping import Layers
from jaxckpt.result.page.timeline import made_again, value_key

# Padding of less is not worth a word.
_MUCH_PADDING = 0.1
# A buffer of so much of the peak that lives for so few steps is one operation's own.
_LARGE, _SHORT = 0.1, 12
_AFTER = ("backward", "recomputed", "optimizer")


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakRow:
    """Buffers of one kind at the peak: of one shape, line and phase, for one reason, whatever the layer.

    Attributes:
        count: how many.
        size_bytes: of all of them.
        padding_bytes: of that, beyond their elements.
        shape: of each.
        scope: with a star for numbers.
        source: `file:line`.
        phase: in which they are made; of arguments, results and constants what they are.
        made_at: the first step at which one is made.
        last_read: the last step at which one is read.
        why: they are alive.
        advice: what could be done.
    """

    count: int
    size_bytes: int
    padding_bytes: int
    shape: str
    scope: str
    source: str
    phase: str
    made_at: int
    last_read: int
    why: str
    advice: str


def peak_rows(memory: CompiledMemory) -> list[PeakRow]:
    """What stands at the peak on the device, largest first."""
    again, layers = made_again(memory), Layers(b.scope for b in memory.buffers)
    live = sum(b.size_bytes for b in memory.peak if b.place == "device")
    groups: dict[tuple, list[Buffer]] = defaultdict(list)
    counted = set(map(id, memory.on_device()))
    for buffer in memory.peak:
        if id(buffer) in counted and buffer.size_bytes:
            is_again = value_key(buffer) in again and buffer.phase == "forward"
            why, advice = _why(buffer, memory), _advice(buffer, memory, live, is_again)
            phase = buffer.phase if buffer.role in ("temporary", "thread-local") else buffer.role
            groups[layers.any(buffer.scope), buffer.source, buffer.shape, phase, why, advice].append(buffer)
    rows = [_row(key, members) for key, members in groups.items()]
    return sorted(rows, key=lambda row: (-row.size_bytes, row.source, row.shape, row.scope, row.made_at))


def _row(key: tuple, members: list[Buffer]) -> PeakRow:
    scope, source, shape, phase, why, advice = key
    return PeakRow(
        count=len(members),
        size_bytes=sum(b.size_bytes for b in members),
        padding_bytes=sum(b.padding_bytes for b in members),
        shape=shape,
        scope=scope,
        source=source,
        phase=phase,
        made_at=min(b.made_at for b in members),
        last_read=max(b.last_read for b in members),
        why=why,
        advice=advice,
    )


def _why(buffer: Buffer, memory: CompiledMemory) -> str:
    """Why a buffer is alive."""
    if buffer.role == "argument":
        return "an argument, there from start to end"
    if buffer.role == "constant":
        return "a constant of the program"
    if buffer.role == "result":
        return "a result, held to the end"
    reader = memory.phases[buffer.last_read]
    if _is_saved(buffer, memory):
        return "saved by the forward pass for the backward"
    if buffer.phase == "recomputed":
        return "recomputed for the backward pass of its region"
    if buffer.phase == "backward":
        return "a gradient on its way to the next operation" if reader == "backward" else "a gradient that waits"
    if buffer.phase == "optimizer":
        return "the optimizer's"
    return "between two operations"


def _is_saved(buffer: Buffer, memory: CompiledMemory) -> bool:
    """Whether it is of the forward pass and outlives its end, whoever reads it then."""
    if buffer.phase not in ("forward", "other"):
        return False
    return any(phase in _AFTER for phase in memory.phases[buffer.made_at : buffer.last_read + 1])


def _advice(buffer: Buffer, memory: CompiledMemory, live: int, is_made_again: bool) -> str:
    """What could be done so that it takes less."""
    if buffer.padding_bytes > _MUCH_PADDING * buffer.size_bytes:
        share = buffer.padding_bytes / buffer.size_bytes
        return f"{share:.0%} of it is padding: make the last two dimensions multiples of the chip's tiles"
    if buffer.role == "argument":
        if buffer.shared_with:
            return "donated: a result takes its place"
        return "no plan changes it: donate it, cut it over more devices, or keep it in a smaller dtype"
    if buffer.role == "constant":
        return "pass it as an argument, so that it can be donated or sharded"
    if buffer.role == "result":
        return "no plan changes it: donate an argument of its shape, and it takes that one's place"
    if buffer.held_until - buffer.made_at <= _SHORT and buffer.size_bytes > _LARGE * live:
        return "one operation's own, which no plan divides: compute it in parts, such as chunks of the batch"
    if is_made_again:
        return "a part of its kind is recomputed already; a lower budget recomputes more"
    if _is_saved(buffer, memory):
        return "a lower budget recomputes it; a host budget sends it to the host"
    if buffer.phase == "recomputed":
        return "a lower budget cuts its region into smaller ones"
    if buffer.phase == "backward":
        return "smaller batches, or accumulation over several"
    return "smaller batches"
