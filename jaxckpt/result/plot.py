"""The trade-off as a picture. Only this needs matplotlib."""

from pathlib import Path
from typing import Any

from jaxckpt.compilation.files import check_writable
from jaxckpt.errors import OptionError
from jaxckpt.result.frontier import Frontier

_MARKERS = "sD^vP*X"


def check_plot(path: Path) -> None:
    """Refuse a picture that could not be drawn or written, before the work that it is of.

    Raises:
        OptionError: matplotlib is not installed, or does not know the format.
        PlanFileError: the path is no regular file's, or its folder is not there.
        OSError: it cannot be written.
    """
    from_file = _figure()(figsize=(1, 1)).canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in from_file:
        raise OptionError(f"{path} cannot be drawn: matplotlib writes {', '.join(sorted(from_file))}")
    check_writable(path)


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra, which few have
    except ImportError as error:
        raise OptionError(
            f"drawing needs matplotlib, which is not installed: pip install 'jaxckpt[plot]' ({error})"
        ) from error
    return Figure


def draw_frontier(frontier: Frontier, path: Path) -> None:
    """Draw step cost over peak bytes into a file: the plans as a curve, hand-written policies as single points.

    Args:
        frontier: what to draw.
        path: its suffix says which format, such as `.png`, `.svg` or `.pdf`.

    Raises:
        OptionError: matplotlib is not installed, or does not know the format.
    """
    label = "measured" if frontier.is_measured else "predicted"
    figure = _figure()(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    plans = [point for point in frontier.points if point.plan is not None]
    axes.plot([p.peak_bytes / 2**30 for p in plans], [p.cost_ratio for p in plans], "o-", label="plans")
    policies = [point for point in frontier.points if point.plan is None]
    for point, marker in zip(policies, _MARKERS, strict=False):
        axes.plot(point.peak_bytes / 2**30, point.cost_ratio, marker, color="0.3", label=point.name)
    axes.set(xlabel=f"peak, GiB ({label})", ylabel=f"step cost ({frontier.cost}), unplanned = 1")
    axes.set_title(f"Value and gradient on {frontier.target}")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise OptionError(f"{path} cannot be drawn: {error}") from error
