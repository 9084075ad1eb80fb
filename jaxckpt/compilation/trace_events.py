"""A compiled program's memory as a trace that Perfetto and chrome://tracing show.

A trace has times, and a schedule has steps: each step is shown as a microsecond, which is no time that anything takes.
"""

import bisect
import json
from collections.abc import Iterator
from typing import Any

from jaxckpt.compilation.buffers import Buffer, By, CompiledMemory

# Numbers of the rows of a trace: counters, then phases, then buffers by place, packed so that none overlap in a row.
_COUNTERS, _PHASES, _FIRST_ROW = 0, 1, 2
_PROCESS = 1


def to_trace(memory: CompiledMemory, *, by: By = "scope", most_rows: int = 200) -> dict[str, Any]:
    """The memory as trace events: bytes by band as counters, phases, and each buffer as a slice over its steps.

    Args:
        memory: of a compiled program.
        by: what bands are made of, as in `CompiledMemory.bands`.
        most_rows: rows of buffers; the smallest of those that find no room are left out, and counted in `otherData`.

    Returns:
        Plain data, as JSON has it.

    Example:
        >>> from jaxckpt import read_memory
        >>> import jax, jax.numpy as jnp
        >>> x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
        >>> sorted(to_trace(read_memory(lambda x: jnp.sum(x @ x), x)))
        ['displayTimeUnit', 'otherData', 'traceEvents']
    """
    rows, num_left_out = _rows(memory, most_rows)
    events = [
        _meta("process_name", 0, name=f"memory of the compiled program, {memory.target}"),
        _meta("thread_name", _PHASES, name="phase"),
        *(_meta("thread_name", _FIRST_ROW + i, name="buffers") for i in range(len(rows))),
        *_counters(memory, by),
        *_phases(memory),
        *(_slice(buffer, _FIRST_ROW + i) for i, row in enumerate(rows) for buffer in row),
    ]
    said = {
        "target": memory.target,
        "a microsecond is": "a step of the schedule, not a time",
        "buffers left out": num_left_out,
        "estimated": memory.is_estimated,
    }
    return {"traceEvents": events, "displayTimeUnit": "ns", "otherData": said}


def trace_text(memory: CompiledMemory, *, by: By = "scope") -> str:
    """`to_trace` as the text of a file."""
    return json.dumps(to_trace(memory, by=by), sort_keys=True) + "\n"


def _meta(kind: str, thread: int, **args: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": _PROCESS, "tid": thread, "args": args}


def _counters(memory: CompiledMemory, by: By) -> Iterator[dict[str, Any]]:
    """Of each band one counter, with an event wherever its bytes change."""
    for band in memory.bands(by):
        before = None
        for step, size in enumerate(band.size_bytes):
            if size != before:
                yield {
                    "ph": "C",
                    "name": f"{band.kind}: {band.label}",
                    "pid": _PROCESS,
                    "tid": _COUNTERS,
                    "ts": step,
                    "args": {"bytes": size},
                }
            before = size


def _phases(memory: CompiledMemory) -> Iterator[dict[str, Any]]:
    start = 0
    for step in range(1, memory.num_steps + 1):
        if step == memory.num_steps or memory.phases[step] != memory.phases[start]:
            event = {"ph": "X", "name": memory.phases[start], "cat": "phase", "pid": _PROCESS, "tid": _PHASES}
            yield {**event, "ts": start, "dur": step - start}
            start = step


def _slice(buffer: Buffer, row: int) -> dict[str, Any]:
    args = {
        "shape": buffer.shape,
        "bytes": buffer.size_bytes,
        "padding": buffer.padding_bytes,
        "offset": buffer.offset,
        "opcode": buffer.opcode,
        "phase": buffer.phase,
        "place": buffer.place,
        "role": buffer.role,
        "scope": buffer.scope,
        "source": buffer.source,
        "last read": buffer.last_read,
        "shared with": buffer.shared_with,
    }
    return {
        "ph": "X",
        "name": buffer.name,
        "cat": buffer.role,
        "pid": _PROCESS,
        "tid": row,
        "ts": buffer.made_at,
        "dur": buffer.held_until - buffer.made_at + 1,
        "args": args,
    }


def _rows(memory: CompiledMemory, most: int) -> tuple[list[list[Buffer]], int]:
    """Buffers in rows in which none overlap, the largest in the first ones; how many found no room."""
    rows: list[list[Buffer]] = []
    num_left_out = 0
    for buffer in sorted(memory.buffers, key=lambda b: (-b.size_bytes, b.made_at, b.name)):
        row = next((row for row in rows if _has_room(row, buffer)), None)
        if row is None and len(rows) < most:
            rows.append(row := [])
        if row is None:
            num_left_out += 1
        else:
            bisect.insort(row, buffer, key=_start)
    return rows, num_left_out


def _has_room(row: list[Buffer], buffer: Buffer) -> bool:
    at = bisect.bisect_left(row, buffer.made_at, key=_start)
    is_after = at == 0 or row[at - 1].held_until < buffer.made_at
    return is_after and (at == len(row) or buffer.held_until < row[at].made_at)


def _start(buffer: Buffer) -> int:
    return buffer.made_at
