"""Puts a page together: one file of HTML with everything in it."""

import base64
import functools
import hashlib
from collections.abc import Sequence
from importlib import resources
from typing import Any

from jaxckpt.result._protocols import PlanLike
from jaxckpt.result.page import charts, vega
from jaxckpt.result.page.content import Content, Reading
from jaxckpt.result.page.facts import facts, made
from jaxckpt.result.page.frontier import frontier_data, frontier_text, unit_of
from jaxckpt.result.page.lines import LineRow, line_rows
from jaxckpt.result.page.peak import peak_rows
from jaxckpt.result.page.timeline import timelines
from jaxckpt.result.page.tree import Branch, branches, region_rows
from jaxckpt.result.page.verdict import budget_of, chip_bytes, is_sharded, verdict
from jaxckpt.units import short_bytes

# Rows of a table before somebody asks for more, and at most.
_FEW, _MOST_ROWS = 12, 400
_BAR_PIXELS = 70
# A limit further above the highest stack than this would flatten what is drawn.
_FAR = 1.35
_NAMES = {"unplanned": "Without a plan", "planned": "Under the plan"}


def page_html(content: Content) -> str:
    """A page, the same text for the same content and versions.

    Raises:
        OptionError: what draws it is not installed.
    """
    vega.check_installed()
    drawing, own = vega.script(), _asset("page.js")
    return (
        _environment()
        .from_string(_asset("page.html"))
        .render(
            **_head(content),
            **_memory(content),
            **_lines(content.reading),
            **frontier_text(content),
            plans=[_plan(plan, content) for plan in content.plans],
            made=made(content),
            command=content.command,
            data=_data(content),
            few=_FEW,
            css=_safe(_asset("page.css")),
            vega=_safe(drawing),
            js=_safe(own),
            hashes=_safe(" ".join(map(_hash, (drawing, own)))),
        )
    )


def _environment() -> Any:
    import jinja2  # noqa: PLC0415 - in the extra `html`

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": True, "separators": (",", ":")}
    environment.filters["size"] = short_bytes
    environment.filters["path"] = _path
    environment.globals["tree"] = _tree
    return environment


def _safe(text: str) -> Any:
    """Text of our own that is put in as it is."""
    import markupsafe  # noqa: PLC0415 - jinja2's

    return markupsafe.Markup(text)


@functools.cache
def _asset(name: str) -> str:
    return (resources.files("jaxckpt.result.page") / "assets" / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """A script as a content security policy names it: no other one on the page may run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _head(content: Content) -> dict[str, Any]:
    target = content.plans[0].target if content.step is None else content.step.measurement.target
    return {"name": content.name, "target": target, "verdict": verdict(content), "is_sharded": is_sharded(content)}


def _programs(reading: Reading) -> dict[str, Any]:
    found = {"unplanned": reading.unplanned, "planned": reading.planned}
    return {name: memory for name, memory in found.items() if memory is not None}


def _memory(content: Content) -> dict[str, Any]:
    reading = content.reading
    programs = _programs(reading)
    shown = reading.planned or reading.unplanned
    peak = [] if shown is None else peak_rows(shown)[:_MOST_ROWS]
    said = ""
    if shown is not None:
        which = _NAMES["planned" if reading.planned else "unplanned"].lower()
        said = f"At step {shown.peak_step:,} of {shown.num_steps:,}, {which}: the most live bytes of the schedule."
    return {
        "programs": [(name, _NAMES[name]) for name in programs],
        "is_estimated": any(memory.is_estimated for memory in programs.values()),
        "why_not": reading.why_not,
        "beyond": _beyond(content),
        "peak": peak,
        "peak_said": said,
        "peak_heads": [
            *(("bytes", True), ("shape", False), ("where", False), ("phase", False), ("padding", True)),
            *(("made", True), ("last read", True), ("why it is alive, and what could be done", False)),
        ],
    }


def _data(content: Content) -> dict[str, Any]:
    """What the page's own script reads."""
    programs = _programs(content.reading)
    most = _most(content)
    found = timelines(programs) if programs else {"programs": {}, "by": {}, "phases": {}}
    return found | {
        "specs": charts.specs(),
        "unit": unit_of(most),
        "most": round(1.1 * most),
        "limits": _limits(content),
        "frontier": frontier_data(content),
        "regions": [region_rows(plan) for plan in content.plans],
    }


def _stacked(content: Content) -> int:
    return max((memory.totals.device_bytes for memory in _programs(content.reading).values()), default=1)


def _most(content: Content) -> int:
    """The highest thing that is drawn."""
    return max([_stacked(content), *(limit["bytes"] for limit in _limits(content))])


def _limits(content: Content) -> list[dict[str, Any]]:
    """Budget and chip, where they are not far above all that is stacked."""
    stacked = _stacked(content)
    given = [("budget", budget_of(content), [6, 4], "left"), ("chip", chip_bytes(content), [1, 0], "right")]
    return [
        {"label": f"{name} {short_bytes(size)}", "bytes": size, "dash": dash, "side": side}
        for name, size, dash, side in given
        if size is not None and size <= _FAR * stacked
    ]


def _beyond(content: Content) -> str:
    """The limits that are not drawn, in words."""
    drawn = {limit["bytes"] for limit in _limits(content)}
    given = [("budget", budget_of(content)), ("chip's memory", chip_bytes(content))]
    said = [f"the {name} is {short_bytes(size)}" for name, size in given if size is not None and size not in drawn]
    return f"Above this scale: {' and '.join(said)}." if said else ""


def _lines(reading: Reading) -> dict[str, Any]:
    rows = line_rows(reading.unplanned, reading.planned, reading.costs, reading.texts or {})[:_MOST_ROWS]
    heads = [("line", False)]
    heads += [("without a plan", True)] if reading.unplanned else []
    heads += [("under the plan", True)] if reading.planned else []
    heads += [("time", True), ("recomputed", True)] if reading.costs else []
    total = max(1, sum(reading.costs[0].values())) if reading.costs else 1
    return {
        "lines": rows if len(heads) > 1 else [],
        "line_heads": heads,
        "has_costs": reading.costs is not None,
        "has_texts": bool(reading.texts),
        "most_bytes": max((max(r.unplanned_bytes or 0, r.planned_bytes or 0) for r in rows), default=0),
        "most_cost": max((_recomputed(r) for r in rows), default=0),
        "share": lambda cost: f"{cost / total:.2%}",
        "bar": lambda part, most: round(_BAR_PIXELS * max(0, part) / max(1, most)),
    }


def _recomputed(row: LineRow) -> int:
    return max(0, row.recompute_cost or 0)


def _plan(plan: PlanLike, content: Content) -> dict[str, Any]:
    """What a page says of one plan."""
    regions = region_rows(plan)
    said = "No checkpoint is applied: the program runs as it is."
    if plan.schedule is not None:
        schedule = plan.schedule
        said = f"{len(plan.blocks)} blocks, {schedule.num_regions} recomputed regions, {schedule.depth} deep."
    return {
        "said": said,
        "regions": regions,
        "tree": branches(plan),
        "saved": plan.saved,
        "saved_bytes": sum(group.size_bytes for group in plan.saved),
        "facts": facts(plan, is_part=content.step is not None),
    }


def _path(text: str) -> Any:
    """A path that is broken behind its slashes, if anywhere."""
    import markupsafe  # noqa: PLC0415 - jinja2's

    return markupsafe.Markup("/<wbr>").join(text.split("/"))


def _tree(nodes: Sequence[Branch]) -> Any:
    import markupsafe  # noqa: PLC0415 - jinja2's

    template = markupsafe.Markup('<li><span class="{}">{}</span>{}</li>')
    items = [template.format(n.kind, n.text, _tree(n.inside) if n.inside else "") for n in nodes]
    return markupsafe.Markup('<ul class="tree">{}</ul>').format(markupsafe.Markup("").join(items))
