"""What each source line takes: bytes at the peak without a plan and with it, time, and time that is recomputed."""

import linecache
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.extend.core as jex
from jax.extend.core import primitives as prims

from jaxckpt import _compat
from jaxckpt.compilation.buffers import CompiledMemory
from jaxckpt.model.time import Timer
from jaxckpt.program.flatten import flatten
from jaxckpt.program.ir import Equation
from jaxckpt.program.source import relative_file

# A line whose time is less than this share of all is no row of its own.
_LEAST_SHARE = 1e-3
_PLACE = re.compile(r"(?P<line>.+?:\d+)(?::\d+)?(?: \((?P<function>.*)\))?")
Costs = Mapping[str, int]
_ENTERED = (prims.scan_p, prims.while_p, prims.cond_p)


@dataclass(frozen=True, slots=True, kw_only=True)
class LineRow:
    """A source line.

    Attributes:
        source: `file:line`.
        text: of the line; empty where it is not shown or not known.
        unplanned_bytes: at the peak without a plan; None where that was not read.
        planned_bytes: at the peak of the plan; None where that was not read.
        cost: of the value and gradient under the plan, in the plan's unit; None where it is not known.
        recompute_cost: of that, what the plan adds.
    """

    source: str
    text: str
    unplanned_bytes: int | None
    planned_bytes: int | None
    cost: int | None
    recompute_cost: int | None


def line_rows(
    unplanned: CompiledMemory | None,
    planned: CompiledMemory | None,
    costs: tuple[Costs, Costs] | None,
    texts: Mapping[str, str],
) -> list[LineRow]:
    """The rows of all lines that take bytes at a peak or time, those with most bytes first."""
    before, after = (None if memory is None else _bytes(memory) for memory in (unplanned, planned))
    plain, with_plan = costs or ({}, {})
    least = _LEAST_SHARE * sum(with_plan.values())
    slow = {line for line, cost in with_plan.items() if cost >= least}
    lines = {line for found in (before, after, slow) if found for line in found if line}
    rows = [
        LineRow(
            source=line,
            text=texts.get(line, ""),
            unplanned_bytes=None if before is None else before.get(line, 0),
            planned_bytes=None if after is None else after.get(line, 0),
            cost=with_plan.get(line, 0) if costs else None,
            recompute_cost=with_plan.get(line, 0) - plain.get(line, 0) if costs else None,
        )
        for line in lines
    ]
    most = lambda row: max(row.unplanned_bytes or 0, row.planned_bytes or 0)  # noqa: E731
    return sorted(rows, key=lambda row: (-most(row), -(row.cost or 0), row.source))


def _bytes(memory: CompiledMemory) -> dict[str, int]:
    sizes: dict[str, int] = defaultdict(int)
    for buffer in memory.peak:
        if buffer.place == "device" and buffer.role in ("temporary", "result"):
            sizes[buffer.source] += buffer.size_bytes
    return sizes


def line_costs(jaxpr: Any, timer: Timer) -> dict[str, int]:
    """What each line of a differentiated program costs, in the unit of the timer.

    A loop's cost is shared out to the lines of its body, and so are branches'.

    Args:
        jaxpr: closed, as `jax.make_jaxpr` has it; dead code does not count.
        timer: as `model.time.timer` has it.

    Returns:
        `file:line` -> cost.
    """
    found: dict[str, int] = defaultdict(int)
    _add_costs(found, _compat.dce(jaxpr), timer)
    return dict(sorted(found.items()))


def _add_costs(found: dict[str, int], jaxpr: Any, timer: Timer) -> None:
    program = flatten(jaxpr, keep_checkpoints=False, is_differentiated=True)
    outputs = {x for x in program.outputs if isinstance(x, int)}
    costs = timer(program.equations, program.avals, outputs)
    for eqn, cost in zip(program.equations, costs, strict=True):
        inside = _inside(eqn, timer) if eqn.primitive in _ENTERED else {}
        total = sum(inside.values())
        if not total:
            found[short_line(eqn.source)] += cost
        for line, part in inside.items():
            found[line] += cost * part // max(1, total)


def _inside(eqn: Equation, timer: Timer) -> Costs:
    """What the lines of a loop's body and of branches cost when each runs once."""
    found: dict[str, int] = defaultdict(int)
    for body in jex.jaxprs_in_params(eqn.params):
        _add_costs(found, body, timer)
    return found


def short_line(source: str) -> str:
    """`file:line` of what may have a column and a function."""
    match = _PLACE.fullmatch(source)
    return match["line"] if match else source


def texts_of(lines: Iterable[str]) -> dict[str, str]:
    """`file:line` -> the text of the line, of modules that are loaded and whose files are there."""
    files = {relative_file(file): file for file in _files()}
    found = {}
    for line in lines:
        name, _, number = line.rpartition(":")
        if name in files and number.isdigit():
            found[line] = linecache.getline(files[name], int(number)).strip()
    return {line: text for line, text in found.items() if text}


def _files() -> Sequence[str]:
    files = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    return sorted(file for file in files if isinstance(file, str) and file.endswith(".py"))
