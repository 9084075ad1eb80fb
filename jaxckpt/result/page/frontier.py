"""The frontier on a page: its points with the plan among them, and what is said of it."""

import itertools
from typing import Any

from jaxckpt.result._protocols import FrontierLike
from jaxckpt.result.page.content import Content
from jaxckpt.result.page.verdict import budget_of, cost_share
from jaxckpt.units import short_bytes


def unit_of(size_bytes: int) -> dict[str, Any]:
    """The unit that a chart of such sizes is drawn in."""
    name = short_bytes(size_bytes).split()[1]
    return {"name": name, "size": 1024 ** ("B", "KiB", "MiB", "GiB", "TiB").index(name)}


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


def frontier_text(content: Content) -> dict[str, Any]:
    """What the page says of a frontier, in words and as rows of a table."""
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


def frontier_data(content: Content) -> dict[str, Any] | None:
    """What the chart is drawn from; None without a frontier."""
    points = _points(content)
    if not points:
        return None
    return {"points": points, "budget": budget_of(content), "unit": unit_of(points[-1]["bytes"])}
