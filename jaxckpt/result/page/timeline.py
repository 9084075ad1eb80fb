"""A program's memory over its schedule as the plain data that a page draws and asks when somebody points at it."""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from jaxckpt.compilation.buffers import UNATTRIBUTED, Band, Buffer, CompiledMemory
from jaxckpt.result.page.grouping import Label, groupings, once, ordered
from jaxckpt.result.page.palette import PHASES, colors

# Steps are drawn in so many columns, and a column shows the step of its own with the most bytes.
_MOST_COLUMNS = 360
# Buffers that can be pointed at; the smallest of those that are left out are in their bands all the same.
_MOST_BUFFERS = 3000
_PHASES = tuple(PHASES)


def timelines(programs: dict[str, CompiledMemory]) -> dict[str, Any]:
    """The data of all timelines of a page.

    Args:
        programs: memory by name, such as "unplanned".

    Returns:
        Bands under common labels and colours, columns, phases and buffers of each.
    """
    groups = groupings(list(programs.values()))
    bands = {
        name: {by: {band.label: band for band in memory.bands(label)} for by, label in groups.items()}
        for name, memory in programs.items()
    }
    common = {by: _labels([(m.peak_step, bands[name][by]) for name, m in programs.items()]) for by in groups}
    return {
        "by": {by: {"labels": labels, "colors": colors(labels)} for by, labels in common.items()},
        "phases": {"labels": list(_PHASES), "colors": list(PHASES.values())},
        "programs": {name: _program(memory, groups, common, bands[name]) for name, memory in programs.items()},
    }


def columns(memory: CompiledMemory, most: int = _MOST_COLUMNS) -> list[tuple[int, int]]:
    """`(first step, shown step)` of each column of steps."""
    num = memory.num_steps
    edges = sorted({i * num // most for i in range(most)} | {0, num}) if num > most else list(range(num + 1))
    live = memory.live_bytes
    return [(a, max(range(a, b), key=live.__getitem__)) for a, b in itertools.pairwise(edges)]


def _labels(programs: Sequence[tuple[int, dict[str, Band]]]) -> list[str]:
    """The labels of all programs in the order in which they are stacked, given the peak of each."""
    sizes: dict[str, int] = defaultdict(int)
    for peak, bands in programs:
        for name, band in bands.items():
            sizes[name] += band.size_bytes[peak]
    return ordered(sizes, sizes.__getitem__)


def _program(
    memory: CompiledMemory, groups: dict[str, Label], common: dict[str, list[str]], bands: dict[str, dict[str, Band]]
) -> dict[str, Any]:
    drawn, peak = columns(memory), memory.peak_step
    shown = [step for _, step in drawn]
    live = [
        sum(sizes) for sizes in zip(*(b.size_bytes for b in bands["phase"].values() if b.kind == "live"), strict=True)
    ]
    return {
        "steps": memory.num_steps,
        "x": [first for first, _ in drawn],
        "at": shown,
        "names": [memory.steps[step] for step in shown],
        "phases": _phases(memory),
        "peak": peak,
        "live": [live[step] for step in shown],
        "peakLive": live[peak],
        "total": memory.totals.device_bytes,
        "heap": memory.heap_bytes,
        "bands": {by: _at(bands[by], common[by], shown) for by in groups},
        "peakBands": {by: [row[0] for row in _at(bands[by], common[by], [peak])] for by in groups},
        "buffers": _buffers(memory, groups, common),
    }


def _at(bands: dict[str, Band], labels: list[str], steps: Sequence[int]) -> list[list[int]]:
    """`[num_labels, num_steps]` bytes at some steps."""
    return [[bands[name].size_bytes[step] if name in bands else 0 for step in steps] for name in labels]


def _phases(memory: CompiledMemory) -> list[list[int]]:
    """`[start, stop, phase]` of steps in a row of one phase, in as many runs as there are columns at most."""
    drawn = [first for first, _ in columns(memory)]
    runs: list[list[int]] = []
    for start, stop in itertools.pairwise([*drawn, memory.num_steps]):
        within = memory.phases[start:stop]
        phase = _PHASES.index(max(sorted(set(within)), key=within.count))
        if runs and runs[-1][2] == phase:
            runs[-1][1] = stop
        else:
            runs.append([start, stop, phase])
    return runs


def _buffers(memory: CompiledMemory, groups: dict[str, Label], common: dict[str, list[str]]) -> dict[str, Any]:
    """The largest buffers in columns, with text given once in tables."""
    live = [b for b in memory.on_device() if b.size_bytes]
    chosen = sorted(live, key=lambda b: (-b.size_bytes, b.made_at, b.name))[:_MOST_BUFFERS]
    chosen.sort(key=lambda b: (b.made_at, -b.size_bytes, b.name))
    again = made_again(memory)
    texts = {name: _table(get(b) for b in chosen) for name, get in _TEXTS.items()}
    positions = {by: {label: i for i, label in enumerate(labels)} for by, labels in common.items()}
    bands = {by: [positions[by][label(b) or UNATTRIBUTED] for b in chosen] for by, label in groups.items()}
    return {
        "numLeftOut": len(live) - len(chosen),
        "name": [b.name for b in chosen],
        "size": [b.size_bytes for b in chosen],
        "padding": [b.padding_bytes for b in chosen],
        "made": [b.made_at for b in chosen],
        "read": [b.last_read for b in chosen],
        "held": [b.held_until for b in chosen],
        "offset": [b.offset if b.in_heap else -1 for b in chosen],
        "phase": [_PHASES.index(b.phase) for b in chosen],
        "again": [again.get(value_key(b), 0) if b.phase != "recomputed" else 0 for b in chosen],
        "texts": {name: list(table) for name, table in texts.items()},
        **{name: [table[_TEXTS[name](b)] for b in chosen] for name, table in texts.items()},
        "bands": bands,
    }


def made_again(memory: CompiledMemory) -> dict[tuple[str, str, str], list[int]]:
    """What recomputation makes: scope, line and shape -> how often, the first step and the last."""
    found: dict[tuple[str, str, str], list[int]] = {}
    for buffer in memory.buffers:
        if buffer.phase == "recomputed" and buffer.is_attributed:
            count, first, last = found.get(value_key(buffer), [0, buffer.made_at, 0])
            found[value_key(buffer)] = [count + 1, min(first, buffer.made_at), max(last, buffer.made_at)]
    return found


_TEXTS = {
    "shape": lambda b: b.shape,
    "source": lambda b: b.source,
    "scope": lambda b: once(b.scope),
    "role": lambda b: b.role,
}


def value_key(buffer: Buffer) -> tuple[str, str, str]:
    """What a value and the same value made again have in common."""
    return once(buffer.scope), buffer.source, buffer.shape


def _table(texts: Any) -> dict[str, int]:
    return {text: i for i, text in enumerate(sorted(set(texts)))}
