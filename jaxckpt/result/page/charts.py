"""The charts of a page as Vega-Lite: what is drawn from which data set.

The page's script fills in the data, the theme, and every string that begins with a dollar sign.
"""

from typing import Any

Spec = dict[str, Any]
_SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
_QUANTITY = "quantitative"


def specs() -> dict[str, Spec]:
    """Every chart that a page may have, by name."""
    return {"timeline": timeline(), "heap": heap(), "frontier": frontier(), "regions": regions()}


def timeline() -> Spec:
    """Bytes over the schedule, stacked by band, with phases, limits and the peak."""
    x = _axis("x", "step of the schedule", offset=12, domain=[0, "$steps"], format=",d")
    y = _axis("y0", "$unit", domain=[0, "$most"])
    lit = {"condition": {"test": "lit == '' || datum.band == lit", "value": 1}, "value": 0.18}
    bands = {
        "data": {"name": "bands"},
        "transform": [
            {"flatten": ["x", "v"]},
            {"stack": "v", "groupby": ["x"], "sort": [{"field": "place"}], "as": ["y0", "y1"]},
        ],
        "mark": {"type": "area", "interpolate": "step-after"},
        "encoding": {
            "x": x,
            "y": y,
            "y2": {"field": "y1"},
            "color": _color(),
            "detail": {"field": "band"},
            "opacity": lit,
        },
    }
    return _chart(
        [_phases(0.1, {"value": 0}, {"value": "height"}), bands, _phases(1, _below(3), _below(9)), *_limits()],
        height=250,
        lights=True,
    )


def _phases(opacity: float, top: Any, bottom: Any) -> Spec:
    return {
        "data": {"name": "phases"},
        "mark": {"type": "rect", "opacity": opacity, "aria": False},
        "encoding": {"x": {"field": "x", "type": _QUANTITY}, "x2": {"field": "x2"}, "y": top, "y2": bottom}
        | {"color": _color()},
    }


def _below(pixels: int) -> Spec:
    return {"value": {"expr": f"height + {pixels}"}}


def _limits() -> list[Spec]:
    """Budget and chip as lines across, and the peak as a point, each with its words."""
    y = {"field": "y", "type": _QUANTITY}
    dashes = {"field": "dash", "type": "nominal", "scale": None, "legend": None}
    found: list[Spec] = [
        {
            "data": {"name": "limits"},
            "mark": {"type": "rule", "strokeWidth": 1.6},
            "encoding": {"y": y, "strokeDash": dashes},
        },
        {
            "data": {"name": "peak"},
            "mark": {"type": "point", "opacity": 1, "shape": "diamond", "size": 90, "filled": True},
            "encoding": {"x": {"field": "x", "type": _QUANTITY}, "y": y},
        },
    ]
    for align, x, dx in (("left", 0, 4), ("right", "width", -4)):
        found += _words("limits", align, dx, {"y": y, "x": {"value": x}})
    for align, dx in (("left", 6), ("right", -6)):
        found += _words("peak", align, dx, {"y": y, "x": {"field": "x", "type": _QUANTITY}}, fontWeight="bold")
    return found


def _words(data: str, align: str, dx: int, place: Spec, **mark: Any) -> list[Spec]:
    """Words on one side of a place, on a ground of their own: colours and lines behind them do not disturb."""
    chosen = {"data": {"name": data}, "transform": [{"filter": f"datum.side == '{align}'"}]}
    text = {"type": "text", "baseline": "bottom", "dy": -3, "align": align, "dx": dx, **mark}
    ground = {"stroke": "$card", "strokeWidth": 3.5, "strokeJoin": "round", "aria": False}
    encoding = place | {"text": {"field": "label"}}
    return [{**chosen, "mark": {**text, **more}, "encoding": encoding} for more in (ground, {})]


def heap() -> Spec:
    """Each buffer of the heap at its address, from the step that makes it to the last that needs it."""
    layer = {
        "data": {"name": "buffers"},
        "mark": {"type": "rect", "style": "buffer", "strokeWidth": 0.4},
        "encoding": {
            "x": _axis("x", "step of the schedule", domain=[0, "$steps"], format=",d"),
            "x2": {"field": "x2"},
            "y": _axis("y", "$address", domain=[0, "$most"]),
            "y2": {"field": "y2"},
            "color": _color(),
            "opacity": {"condition": {"test": "lit == '' || datum.band == lit", "value": 1}, "value": 0.15},
            # What it says is up to the page's script, which is only asked about marks that have something to say.
            "tooltip": {"field": "band"},
        },
    }
    return _chart([layer], height=300, lights=True)


def frontier() -> Spec:
    """Step cost over peak bytes: plans as a curve, hand-written policies as points, the chosen plan ringed."""
    x = _axis("peak", "$peak", domain=None) | {"scale": {"zero": False, "nice": True, "padding": 14}}
    y = _axis("cost", "step cost, unplanned = 1", domain=None, format=".2f") | {
        "scale": {"zero": False, "nice": True, "padding": 14}
    }
    tips = [{"field": name, "title": title} for name, title in _FRONTIER_TIPS.items()]
    points = {"x": x, "y": y, "tooltip": tips}
    shapes = {"domain": ["plan", "policy", "unplanned"], "range": ["circle", "triangle-up", "square"]}
    colors = {"domain": ["plan", "policy", "unplanned"], "range": ["$accent", "#D55E00", "#7a8594"]}
    return _chart(
        [
            {
                "data": {"name": "limits"},
                "mark": {"type": "rule", "strokeDash": [6, 4]},
                "encoding": {"x": {"field": "x", "type": _QUANTITY}},
            },
            {
                "data": {"name": "points"},
                "transform": [{"filter": "datum.kind == 'plan'"}],
                "mark": {"type": "line", "interpolate": "linear", "color": "$accent", "opacity": 0.7},
                "encoding": {"x": x, "y": y},
            },
            {
                "data": {"name": "points"},
                "mark": {"type": "point", "filled": True, "size": 70, "opacity": 1},
                "encoding": points
                | {
                    "shape": {"field": "kind", "type": "nominal", "scale": shapes, "legend": None},
                    "color": {"field": "kind", "type": "nominal", "scale": colors, "legend": None},
                },
            },
            {
                "data": {"name": "points"},
                "transform": [{"filter": "datum.kind != 'plan'"}],
                "mark": {"type": "text", "align": "right", "dx": -9, "dy": {"expr": "datum.dy"}, "baseline": "middle"},
                "encoding": {"x": x, "y": y, "text": {"field": "name"}},
            },
            {
                "data": {"name": "chosen"},
                "mark": {"type": "point", "opacity": 1, "size": 260, "strokeWidth": 2.2, "filled": False},
                "encoding": {"x": x, "y": y},
            },
            {
                "data": {"name": "chosen"},
                "mark": {"type": "text", "align": "left", "fontWeight": "bold", "dx": 14, "dy": -12},
                "encoding": {"x": x, "y": y, "text": {"value": "this plan"}},
            },
        ],
        height=280,
    )


_FRONTIER_TIPS = {"name": "what", "shown": "peak", "cost": "step cost", "recomputed": "recomputed"}


def regions() -> Spec:
    """The tree of regions: blocks from left to right, regions inside regions from top to bottom."""
    layer = {
        "data": {"name": "regions"},
        "mark": {"type": "rect", "style": "buffer", "strokeWidth": 1, "cornerRadius": 2},
        "encoding": {
            "x": _axis("start", "block", domain=[0, "$blocks"], format=",d", grid=False),
            "x2": {"field": "stop"},
            "y": {
                "field": "depth",
                "type": _QUANTITY,
                "scale": {"reverse": True, "domain": [0, "$depth"], "nice": False},
                "axis": None,
            },
            "y2": {"field": "bottom"},
            "color": _color(),
            "tooltip": [{"field": name} for name in ("kind", "blocks", "what", "saves")],
        },
    }
    return _chart([layer], height="$tall")


def _chart(layers: list[Spec], *, height: int | str, lights: bool = False) -> Spec:
    return {
        "$schema": _SCHEMA,
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "params": [{"name": "lit", "value": ""}] if lights else [],
        "layer": layers,
    }


def _axis(field: str, title: Any, *, domain: Any, offset: int = 0, grid: bool = True, **axis: Any) -> Spec:
    scale = {"nice": False, **({"domain": domain} if domain else {})}
    return {
        "field": field,
        "type": _QUANTITY,
        "scale": scale,
        "axis": {"title": title, "offset": offset, "grid": grid, "tickCount": 6, **axis},
    }


def _color() -> Spec:
    """Colours as the data's own column has them."""
    return {"field": "color", "type": "nominal", "scale": None, "legend": None}
