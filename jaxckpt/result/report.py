"""What a person reads of a plan: sizes with their labels, the tree of regions, what is saved, what is not counted."""

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ckptsolvers import Keep
from ckptsolvers.schedule import Node
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from jaxckpt.kinds.base import kind_named
from jaxckpt.result._protocols import FrontierLike, PlanLike, PointLike, StepLike
from jaxckpt.result.regions import runs, span
from jaxckpt.result.saved_table import saved_table
from jaxckpt.result.text_chart import text_chart
from jaxckpt.units import short_bytes, short_count, show_bytes

_WIDTH = 80
_STOPPED = "The search stopped at max_compiles; with more of them there may be a cheaper plan."


def show_plan(plan: PlanLike, *, color: bool = False, width: int = _WIDTH, all_rows: bool = False) -> str:
    """Return the whole report as text.

    Args:
        plan: what to report.
        color: with terminal colours.
        width: columns.
        all_rows: whether to show every row of what is saved, and not the ten largest.
    """
    parts = [Text(_headline(plan), style="bold"), _sizes(plan)]
    if plan.schedule is not None:
        parts += [_tree(plan), saved_table(plan.saved, width=width, is_sharded=plan.split > 1, all_rows=all_rows)]
    return _rendered([*parts, *_notes(plan)], color, width)


def show_step(
    step: StepLike,
    *,
    more: Sequence[tuple[str, str, str]] = (),
    color: bool = False,
    width: int = _WIDTH,
    all_rows: bool = False,
) -> str:
    """Return the report of a whole step as text: its own bytes, and the reports of its plans.

    Args:
        step: what to report.
        more: rows to begin the table with.
        color: with terminal colours.
        width: columns.
        all_rows: as in `show_plan`.
    """
    measured, unplanned = step.measurement, step.unplanned
    planned = sum(plan.schedule is not None for plan in step.plans)
    is_sharded = any(plan.split > 1 for plan in step.plans)
    each = " per device" if is_sharded else ""
    instead = "" if unplanned is None else f" instead of {short_bytes(unplanned.device_bytes)}"
    headline = (
        f"Step for {measured.target}: {short_bytes(measured.device_bytes)}{instead}{each}, {planned} of "
        f"{len(step.plans)} function{'' if len(step.plans) == 1 else 's'} planned."
    )
    rows = [*more, ("budget", show_bytes(step.budget_bytes), "given")]
    if unplanned is not None:
        rows.append(("unplanned step", show_bytes(unplanned.device_bytes), "measured"))
    rows.append(("step", show_bytes(measured.device_bytes), "measured, at most" if measured.is_at_most else "measured"))
    held = measured.argument_bytes + measured.output_bytes - measured.alias_bytes
    rows.append(("arguments and results", show_bytes(held), "measured, in all plans"))
    rows += [*_constants(step.constant_bytes), *_compiles(step.num_compiles, step.calibration)]
    table = _table(rows, is_sharded=is_sharded)
    notes = []
    if measured.device_bytes > step.budget_bytes:
        notes.append('Nothing fits the budget; these are the plans with the least bytes (on_infeasible="least").')
    if step.is_stopped:
        notes.append(_STOPPED)
    own = _rendered([Text(headline, style="bold"), table, *notes], color, width)
    return "\n".join([own, *(show_plan(plan, color=color, width=width, all_rows=all_rows) for plan in step.plans)])


def show_frontier(frontier: FrontierLike, *, color: bool = False, width: int = _WIDTH) -> str:
    """Return the frontier as a table.

    Args:
        frontier: what to report.
        color: with terminal colours.
        width: columns.
    """
    label = _label(frontier.is_measured)
    headline = (
        f"Peak bytes against step {'time' if frontier.cost == 'time' else 'FLOPs'} on {frontier.target}: "
        f"{len(frontier.plans)} of {frontier.num_candidates} plans, and policies written around the whole function."
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    has_host = any(point.host_bytes for point in frontier.points)
    is_sharded = any(plan.split > 1 for plan in frontier.plans)
    # Both beside each other would leave no room for what the points are.
    beside = "on the host" if has_host else "share"
    heads = ["per device" if is_sharded else "peak", beside, "step cost"]
    for name in (*heads, "recomputed", ""):
        table.add_column(name, justify="right" if name else "left", no_wrap=True, overflow="ellipsis")
    unplanned = next(p.peak_bytes for p in frontier.points if p.name == "unplanned")
    for point in frontier.points:
        table.add_row(
            short_bytes(point.peak_bytes),
            short_bytes(point.host_bytes) if has_host else f"{point.peak_bytes / max(1, unplanned):.1%}",
            f"{point.cost_ratio:.4f}",
            f"{point.recompute_flops / max(1, frontier.forward_flops):.2%}",
            _point_name(point),
            style=None if point.plan else "dim",
        )
    cost = "modelled" if frontier.cost == "time" else "counted"
    note = (
        f"Step cost is {cost}, as a fraction of the unplanned step's; recomputed FLOPs are counted, of the forward's. "
        f"Peaks are {label}{', per device' * is_sharded}{'' if has_host else ', and shares are of the unplanned peak'}."
    )
    if not frontier.is_measured:
        note += " verify=True compiles every point and measures it."
    chart = text_chart(frontier.points)
    drawn = [Text(f"\n{chart}\n")] if chart else []
    return _rendered([Text(headline, style="bold"), table, *drawn, note], color, width)


def _point_name(point: PointLike) -> str:
    if point.plan is None or point.plan.schedule is None:
        return point.name
    schedule = point.plan.schedule
    saved = short_bytes(sum(g.size_bytes for g in point.plan.saved))
    return f"{schedule.num_regions} regions, {schedule.depth} deep, {saved}"


def _rendered(parts: Iterable[Any], color: bool, width: int) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=color, no_color=not color, highlight=False)
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def show_targets(rows: Sequence[dict[str, Any]], *, color: bool = False, width: int = _WIDTH) -> str:
    """Return the table of chips as text, and how to install the compilers that are not there.

    Args:
        rows: as `installs.describe` makes them.
        color: with terminal colours.
        width: columns.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("target", "memory", "TB/s", "host GB/s", "TFLOP/s bf16", "f32", "compiler", "defined by"):
        table.add_column(name, justify="left" if name in ("target", "compiler", "defined by") else "right")
    for row in rows:
        rates = row["matmul_flops"]
        memory = "host's" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 2**30:.2f} GiB"
        table.add_row(
            row["name"],
            memory,
            f"{row['bandwidth'] / 1e12:.3g}",
            f"{row['host_bandwidth'] / 1e9:.3g}",
            f"{rates.get('bfloat16', rates['other']) / 1e12:.4g}",
            f"{rates['other'] / 1e12:.4g}",
            f"{row['platform']} {row['compiler']}" if row["usable"] else f"{row['platform']}, not here",
            row["origin"],
        )
    missing = {row["platform"]: row for row in reversed(rows) if not row["usable"]}
    # Commands to copy are not wrapped.
    after = [f"\n{platform}: {_after_colon(row)}" for platform, row in missing.items()]
    return "\n".join([_rendered([table], color, width), *after])


def _after_colon(row: dict[str, Any]) -> str:
    return f"{row['problem']}\n  or run: jaxckpt targets --install {row['name']}"


def _headline(plan: PlanLike) -> str:
    if plan.schedule is None and plan.max_cost is not None:
        return f"No plan on {plan.target} takes fewer bytes at that cost: no checkpoint is applied."
    if plan.schedule is None:
        return f"The program fits as it is on {plan.target}: no checkpoint is needed, and none is applied."
    share = plan.recompute_flops / max(1, plan.forward_flops)
    # Where both are predicted the table says so; a measured number beside a predicted one needs a word at once.
    guess = " (predicted)" if plan.measured_peak_bytes and not plan.is_unplanned_measured else ""
    each = " per device" if plan.split > 1 else ""
    return (
        f"Plan for {plan.target} by {plan.solver}: {short_bytes(plan.peak_bytes)} instead of "
        f"{short_bytes(plan.unplanned_peak_bytes)}{guess}{each}, {share:.1%} of the forward FLOPs recomputed."
    )


def _label(is_measured: bool) -> str:
    return "measured" if is_measured else "predicted"


Rows = list[tuple[str, str, str]]
_BYTES = re.compile(r"bytes\)|\d [KMGT]?i?B\b")


def _table(rows: Rows, *, is_sharded: bool) -> Table:
    """Numbers with what they are of and where they come from; of several devices, each says whether it is one's."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for no_wrap in (True, True, False):
        table.add_column(no_wrap=no_wrap)
    for name, number, said in rows:
        table.add_row(name, _of_devices(number) if is_sharded else number, said)
    return table


def _of_devices(number: str) -> str:
    """A number with whose it is: bytes are of each device, FLOPs of all of them."""
    if "FLOP" in number:
        return number.replace("FLOP", "FLOP on all devices")
    last = [*_BYTES.finditer(number)][-1:]
    if not last:
        return number
    end = last[0].end() - number[: last[0].end()].endswith(")")
    return f"{number[:end]} per device{number[end:]}"


def _constants(size_bytes: int) -> Rows:
    return [("closed-over arrays", show_bytes(size_bytes), "constants")] if size_bytes else []


def _compiles(number: int, calibration: str | None) -> Rows:
    return [("compiles", f"{number}, calibrated by {calibration}" if calibration else str(number), "")]


def _sizes(plan: PlanLike) -> Table:
    rows: Rows = []
    if plan.budget_bytes is not None:
        rows.append(("budget", show_bytes(plan.budget_bytes), "given"))
    elif plan.max_cost is not None:
        rows.append(("max cost", f"{plan.max_cost:g} x unplanned", "given"))
    rows.append(("unplanned peak", show_bytes(plan.unplanned_peak_bytes), _label(plan.is_unplanned_measured)))
    if plan.written_peak_bytes is not None:
        rows.append(("as it is written", show_bytes(plan.written_peak_bytes), "measured"))
    if plan.measured_peak_bytes is not None:
        said = "measured, at most" if plan.is_at_most else "measured"
        said += ", its blocks profiled" if plan.is_profiled else ""
        rows.append(("planned peak", show_bytes(plan.measured_peak_bytes), said))
    else:
        said = "profiled" if plan.is_profiled else "predicted"
        rows.append(("planned peak", show_bytes(plan.predicted_peak_bytes), said))
    if plan.next_peak_bytes is not None:
        said = "measured, does not fit" if plan.max_cost is None else "measured"
        rows.append(("next cheaper plan", show_bytes(plan.next_peak_bytes), said))
    if plan.least_peak_bytes is not None:
        rows.append(("least feasible peak", show_bytes(plan.least_peak_bytes), "measured"))
    else:
        rows.append(("least feasible peak", f"about {short_bytes(plan.expected_least_bytes)}", "predicted"))
    if plan.host_bytes or plan.host_budget_bytes is not None:
        rows += _host(plan)
    rows.append(("forward", f"{short_count(plan.forward_flops)}FLOP", "counted"))
    share = plan.recompute_flops / max(1, plan.forward_flops)
    rows.append(("recomputation", f"{short_count(plan.recompute_flops)}FLOP, {share:.2%} of the forward", "counted"))
    if plan.cost == "time":
        step = plan.recompute_cost / max(1, plan.unplanned_cost)
        said = "modelled" if step >= 0 else "saved: less stacking"
        rows.append(("", f"{abs(step):.2%} of the unplanned step's time", said))
    rows += [*_constants(plan.constant_bytes), *_compiles(plan.num_compiles, plan.calibration)]
    return _table(rows, is_sharded=plan.split > 1)


def _host(plan: PlanLike) -> Rows:
    """What is on the host, and what of it crosses the link."""
    rows: Rows = []
    if plan.host_budget_bytes is not None:
        rows.append(("host budget", show_bytes(plan.host_budget_bytes), "given"))
    rows.append(("on the host", show_bytes(plan.host_bytes), _label(plan.measured_host_bytes is not None)))
    if not plan.link_bytes:
        return rows
    rows.append(("to and from it", f"{short_bytes(plan.link_bytes)} each way in a step", "predicted"))
    if plan.cost == "time":
        waits = f"{plan.idle_time / max(1, plan.unplanned_cost):.2%} of the unplanned step's time"
        rows.append(("waiting for the link", waits, "modelled"))
    return rows


def _tree(plan: PlanLike) -> Tree:
    assert plan.schedule is not None
    num_regions, depth = plan.schedule.num_regions, plan.schedule.depth
    tree = Tree(f"regions: {len(plan.blocks)} blocks, {num_regions} recomputed regions, {depth} deep")
    _grow(tree, plan.schedule.nodes, plan)
    return tree


def _grow(tree: Tree, nodes: Sequence[Node], plan: PlanLike) -> None:
    # Regions nest some twenty deep at most, so recursion is safe here.
    for run in runs(nodes):
        first, last = run[0], run[-1]
        if isinstance(first, Keep):
            branch = tree.add(_line(f"keep {span(first.start, last.stop, plan)}"))
            for node in run:
                save = plan.block_saves[node.start]
                for line in kind_named(save.kind).describe(save):
                    branch.add(_line(f"block {node.start}: {line}"))
        else:
            branch = tree.add(_line(f"recompute {span(first.start, first.stop, plan)}"))
            if any(not isinstance(child, Keep) for child in first.children):
                _grow(branch, first.children, plan)


def _line(text: str) -> Text:
    """A line that is cut where the terminal ends."""
    return Text(text, no_wrap=True, overflow="ellipsis")


def _notes(plan: PlanLike) -> Iterator[str]:
    is_part = plan.budget_bytes is None and plan.max_cost is None
    adam = 2 * plan.parameter_bytes
    spread = " on all devices together" if plan.split > 1 else ""
    if not is_part:
        yield (
            "The budget covers arguments, gradients and temporaries of the value and gradient. It does not cover what "
            f"lives outside: optimizer state (Adam: about {short_bytes(adam)}{spread}, twice the parameters), other "
            "models, data. Leave room for it with reserve=..., or let fit(...) plan the whole step."
        )
    if plan.unknown:
        yield f"Counted by their bytes, for want of a rule: {', '.join(plan.unknown)}."
    if plan.is_stopped:
        yield _STOPPED
    yield from _of_the_compiler(plan)
    if plan.measured_peak_bytes is None and is_part:
        yield "Sizes are predicted, of the value and gradient alone; where fit or jit chose it, the step was measured."
    elif plan.measured_peak_bytes is None:
        margin = "" if plan.max_cost is not None else " and a margin is left"
        yield f"Nothing was compiled: sizes are predicted{margin}. verify=True measures."


def _of_the_compiler(plan: PlanLike) -> Iterator[str]:
    """What the compiler did by itself."""
    if plan.num_recomputed is not None and plan.num_asked is not None and plan.num_recomputed < plan.num_asked:
        yield (
            f"The compiler undid a part of the recomputation: of {plan.num_asked} products to be made again its "
            f"program makes {plan.num_recomputed}. The measured bytes are those of its program."
        )
    if plan.num_worse_on_host:
        yield (
            f"{plan.num_worse_on_host} plans that send values to the host were compiled and dropped: the compiler "
            "builds them with more bytes on the device than plans that cost no more and send none."
        )
    if plan.num_rematerialized:
        yield (
            f"XLA's own rematerialization made {plan.num_rematerialized} instructions again, so that the program fits "
            "the chip; that takes time which is not in the cost, and that it compiles does not yet say that it fits."
        )
    if plan.flags:
        yield f"Compiled under flags that change what is recomputed: {', '.join(plan.flags)}."
