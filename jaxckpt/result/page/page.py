"""Puts a page together: one file of HTML with everything in it."""

import base64
import functools
import hashlib
import itertools
from collections.abc import Sequence
from importlib import resources
from typing import Any

from jaxckpt import _compat
from jaxckpt._version import __version__
from jaxckpt.result._protocols import FrontierLike, PlanLike
from jaxckpt.result.page import charts, vega
from jaxckpt.result.page.content import Content, Reading
from jaxckpt.result.page.lines import LineRow, line_rows
from jaxckpt.result.page.peak import peak_rows
from jaxckpt.result.page.timeline import timelines
from jaxckpt.result.page.tree import Branch, branches, region_rows
from jaxckpt.result.page.verdict import budget_of, chip_bytes, cost_share, verdict
from jaxckpt.units import short_bytes, short_count, show_bytes

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
    return _environment().from_string(_asset("page.html")).render(
        **_head(content),
        **_memory(content),
        **_lines(content.reading),
        **_frontier(content),
        plans=[_plan(plan, content) for plan in content.plans],
        made=_made(content),
        command=content.command,
        data=_data(content),
        few=_FEW,
        css=_safe(_asset("page.css")),
        vega=_safe(drawing),
        js=_safe(own),
        hashes=_safe(" ".join(map(_hash, (drawing, own)))),
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
    return {"name": content.name, "target": target, "verdict": verdict(content), "is_sharded": ":" in target}


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
        "unit": _unit(most),
        "most": round(1.1 * most),
        "limits": _limits(content),
        "frontier": _frontier_data(content),
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


def _unit(size_bytes: int) -> dict[str, Any]:
    name = short_bytes(size_bytes).split()[1]
    return {"name": name, "size": 1024 ** ("B", "KiB", "MiB", "GiB", "TiB").index(name)}


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


def _points(content: Content) -> list[dict[str, Any]]:
    frontier = content.frontier
    if frontier is None:
        return []
    share = lambda flops: f"{flops / max(1, frontier.forward_flops):.1%} of the forward"  # noqa: E731
    rows = [
        {
            "name": "plan" if point.plan else point.name,
            "kind": "plan" if point.plan else "unplanned" if point.name == "unplanned" else "policy",
            "bytes": point.peak_bytes,
            "shown": short_bytes(point.peak_bytes),
            "cost": round(point.cost_ratio, 4),
            "recomputed": share(point.recompute_flops),
            "chosen": False,
            "dy": 0,
        }
        for point in frontier.points
    ]
    _spread([row for row in rows if row["kind"] != "plan"])
    plan = content.plans[0]
    chosen = {
        "name": "plan",
        "kind": "plan",
        "bytes": plan.peak_bytes,
        "shown": short_bytes(plan.peak_bytes),
        "cost": round(1 + (cost_share([plan]) or 0), 4),
        "recomputed": share(plan.recompute_flops),
        "chosen": True,
        "dy": 0,
    }
    return sorted([*rows, chosen], key=lambda row: (row["bytes"], -row["cost"], row["name"]))


def _spread(rows: list[dict[str, Any]]) -> None:
    """Keep the words beside points apart that are about as high, in pixels."""
    tall = max((row["cost"] for row in rows), default=1) - min((row["cost"] for row in rows), default=1)
    rows.sort(key=lambda row: -row["cost"])
    for above, below in itertools.pairwise(rows):
        if above["cost"] - below["cost"] < 0.09 * tall:
            below["dy"] = above["dy"] + 13


def _frontier(content: Content) -> dict[str, Any]:
    frontier = content.frontier
    if frontier is None:
        return {"points": [], "frontier_said": "", "frontier_alt": ""}
    label = _frontier_label(frontier)
    said = (
        f"Step {'time' if frontier.cost == 'time' else 'FLOPs'} against peak bytes on {frontier.target}, {label}; the "
        "ring is this plan, and triangles are policies written around the whole function."
    )
    points = _points(content)
    ends = [points[0], points[-1]]
    alt = f"{said} From {ends[0]['shown']} at {ends[0]['cost']} to {ends[1]['shown']} at {ends[1]['cost']}."
    return {"points": points, "frontier_said": said, "frontier_alt": alt}


def _frontier_label(frontier: FrontierLike) -> str:
    return "measured" if frontier.is_measured else "predicted"


def _frontier_data(content: Content) -> dict[str, Any] | None:
    points = _points(content)
    if not points:
        return None
    return {"points": points, "budget": budget_of(content), "unit": _unit(points[-1]["bytes"])}


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
        "facts": _facts(plan, is_part=content.step is not None),
    }


def _facts(plan: PlanLike, *, is_part: bool) -> list[tuple[str, str]]:
    """The certificate: what was asked, what was found, and where each number comes from."""
    facts = []
    if plan.budget_bytes is not None:
        facts.append(("budget", f"{show_bytes(plan.budget_bytes)}, given"))
    if plan.max_cost is not None:
        facts.append(("max cost", f"{plan.max_cost:g} x unplanned, given"))
    label = "measured" if plan.is_unplanned_measured else "predicted"
    facts.append(("without a plan", f"{show_bytes(plan.unplanned_peak_bytes)}, {label}"))
    if plan.measured_peak_bytes is not None:
        facts.append(("peak", f"{show_bytes(plan.measured_peak_bytes)}, measured{', at most' * plan.is_at_most}"))
    facts.append(("model's peak", f"{show_bytes(plan.predicted_peak_bytes)}, predicted"))
    if plan.next_peak_bytes is not None:
        facts.append(("next cheaper plan", f"{show_bytes(plan.next_peak_bytes)}, measured"))
    if not is_part:
        least = plan.least_peak_bytes
        said = f"about {short_bytes(plan.expected_least_bytes)}, predicted"
        facts.append(("least feasible peak", said if least is None else f"{show_bytes(least)}, measured"))
    if plan.host_bytes:
        facts.append(("on the host", show_bytes(plan.host_bytes)))
    share = plan.recompute_flops / max(1, plan.forward_flops)
    facts.append(("recomputation", f"{short_count(plan.recompute_flops)}FLOP, {share:.2%} of the forward, counted"))
    if plan.num_asked is not None:
        made = f"{plan.num_recomputed} of {plan.num_asked} products and convolutions that it asks for"
        facts.append(("made again by the compiler", f"{made}, counted in the compiled program"))
    facts.append(("solver", plan.solver))
    facts.append(("compiles", str(plan.num_compiles)))
    facts.append(("program", plan.fingerprint))
    facts.append(("schedule", plan.schedule_digest))
    return facts


def _made(content: Content) -> list[tuple[str, str]]:
    plan = content.plans[0]
    versions = {"jaxckpt": __version__, "jax": plan.jax_version, **vega.versions()}
    if plan.jax_version != _compat.JAX_VERSION:
        versions["jax of the timelines"] = _compat.JAX_VERSION
    found = [(name, version) for name, version in versions.items()]
    if plan.calibration:
        found.append(("calibration", plan.calibration))
    if plan.flags:
        found.append(("compiler flags", ", ".join(plan.flags)))
    return found


def _path(text: str) -> Any:
    """A path that is broken behind its slashes, if anywhere."""
    import markupsafe  # noqa: PLC0415 - jinja2's

    return markupsafe.Markup("/<wbr>").join(text.split("/"))


def _tree(nodes: Sequence[Branch]) -> Any:
    import markupsafe  # noqa: PLC0415 - jinja2's

    template = markupsafe.Markup('<li><span class="{}">{}</span>{}</li>')
    items = [template.format(n.kind, n.text, _tree(n.inside) if n.inside else "") for n in nodes]
    return markupsafe.Markup('<ul class="tree">{}</ul>').format(markupsafe.Markup("").join(items))
