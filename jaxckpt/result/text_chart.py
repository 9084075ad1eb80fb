"""A frontier as a small chart in text."""

from collections.abc import Sequence

from jaxckpt.result._protocols import PointLike
from jaxckpt.units import short_bytes

_WIDTH, _HEIGHT = 58, 11
_PLAN, _UNPLANNED = "*", "o"
_POLICIES = "abcdefgh"


def text_chart(points: Sequence[PointLike]) -> str:
    """Step cost from bottom to top over peak bytes from left to right; empty where all points are one.

    Args:
        points: of a frontier: plans are stars, the unplanned program is an o, policies are letters.
    """
    sizes, costs = [p.peak_bytes for p in points], [p.cost_ratio for p in points]
    if len(set(sizes)) < 2 or len(set(costs)) < 2:
        return ""
    grid = [[" "] * _WIDTH for _ in range(_HEIGHT)]
    letters = iter(_POLICIES)
    named = []
    # Plans are drawn last, over what they share a place with.
    for point in sorted(points, key=lambda p: p.plan is not None):
        mark = _PLAN if point.plan else _UNPLANNED if point.name == "unplanned" else next(letters, "?")
        if point.plan is None:
            named.append(f"{mark} {point.name}")
        x, y = _place(point.peak_bytes, sizes, _WIDTH), _place(point.cost_ratio, costs, _HEIGHT)
        grid[_HEIGHT - 1 - y][x] = mark
    top, bottom = f"{max(costs):.2f}", f"{min(costs):.2f}"
    margin = max(len(top), len(bottom))
    labels = [top, *[""] * (_HEIGHT - 2), bottom]
    rows = [f"{label:>{margin}} |{''.join(row)}".rstrip() for label, row in zip(labels, grid, strict=True)]
    ends = short_bytes(min(sizes)), short_bytes(max(sizes))
    axis = f"{'':{margin}} +{'-' * _WIDTH}"
    under = f"{'':{margin}}  {ends[0]}{ends[1]:>{_WIDTH - len(ends[0])}}"
    legend = ["step cost over peak bytes", f"{_PLAN} plan", *named]
    return "\n".join([*rows, axis, under, *_folded(legend, margin + 2)])


def _place(value: float, values: Sequence[float], num: int) -> int:
    low, high = min(values), max(values)
    return round((value - low) / (high - low) * (num - 1))


def _folded(words: Sequence[str], margin: int) -> list[str]:
    """The legend in rows that are no wider than the chart."""
    rows = [""]
    for word in words:
        if rows[-1] and len(rows[-1]) + 3 + len(word) > _WIDTH:
            rows.append("")
        rows[-1] += (" | " if rows[-1] else "") + word
    return [" " * margin + row for row in rows]
