"""What a person reads of a plan: sizes with their labels, the tree of regions, what is saved, what is not counted."""

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ckptsolvers import Keep
from ckptsolvers.schedule import Node
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from jaxckpt.kinds.base import kind_named
from jaxckpt.model.option import Place
from jaxckpt.result._protocols import FrontierLike, Group, PlanLike, PointLike, StepLike
from jaxckpt.units import short_bytes, short_count, show_bytes

_WIDTH = 118
_MAX_ROWS = 24
_STOPPED = "The search stopped at max_compiles; with more of them there may be a cheaper plan."


def show_plan(plan: PlanLike, *, color: bool = False, width: int = _WIDTH) -> str:
    """Return the whole report as text.

    Args:
        plan: what to report.
        color: with terminal colours.
        width: columns.
    """
    parts = [Text(_headline(plan), style="bold"), _sizes(plan)]
    if plan.schedule is not None:
        parts += [_tree(plan), _saved(plan.saved)]
    return _rendered([*parts, *_notes(plan)], color, width)


def show_step(
    step: StepLike, *, more: Sequence[tuple[str, str, str]] = (), color: bool = False, width: int = _WIDTH
) -> str:
    """Return the report of a whole step as text: its own bytes, and the reports of its plans.

    Args:
        step: what to report.
        more: rows to begin the table with.
        color: with terminal colours.
        width: columns.
    """
    measured, unplanned = step.measurement, step.unplanned
    planned = sum(plan.schedule is not None for plan in step.plans)
    instead = "" if unplanned is None else f" instead of {short_bytes(unplanned.device_bytes)}"
    headline = (
        f"Step for {measured.target}: {short_bytes(measured.device_bytes)}{instead}, {planned} of {len(step.plans)} "
        f"function{'' if len(step.plans) == 1 else 's'} planned."
    )
    table = _table()
    for row in more:
        table.add_row(*row)
    table.add_row("budget", show_bytes(step.budget_bytes), "given")
    if unplanned is not None:
        table.add_row("unplanned step", show_bytes(unplanned.device_bytes), "measured")
    said = "measured, at most" if measured.is_at_most else "measured"
    table.add_row("step", show_bytes(measured.device_bytes), said)
    held = measured.argument_bytes + measured.output_bytes - measured.alias_bytes
    table.add_row("arguments and results", show_bytes(held), "measured, the same under every plan")
    _add_constants(table, step.constant_bytes)
    _add_compiles(table, step.num_compiles, step.calibration)
    notes = []
    if measured.device_bytes > step.budget_bytes:
        notes.append('Nothing fits the budget; these are the plans with the least bytes (on_infeasible="least").')
    if step.is_stopped:
        notes.append(_STOPPED)
    own = _rendered([Text(headline, style="bold"), table, *notes], color, width)
    return "\n".join([own, *(show_plan(plan, color=color, width=width) for plan in step.plans)])


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
    table = Table(box=None, pad_edge=False)
    has_host = any(point.host_bytes for point in frontier.points)
    host = ("on the host",) if has_host else ()
    for name in (f"peak, {label}", "of unplanned", *host, "step cost", "recomputed", ""):
        table.add_column(name, justify="left" if not name else "right")
    unplanned = next(p.peak_bytes for p in frontier.points if p.name == "unplanned")
    for point in frontier.points:
        table.add_row(
            show_bytes(point.peak_bytes),
            f"{point.peak_bytes / max(1, unplanned):.1%}",
            *((short_bytes(point.host_bytes),) if has_host else ()),
            f"{point.cost_ratio:.4f}",
            f"{point.recompute_flops / max(1, frontier.forward_flops):.2%}",
            _point_name(point),
            style=None if point.plan else "dim",
        )
    cost = "modelled" if frontier.cost == "time" else "counted"
    note = (
        f"Step cost is {cost}, as a fraction of the unplanned step's; recomputed FLOPs are counted, of the forward's. "
        f"Peaks are {label}."
    )
    if not frontier.is_measured:
        note += " verify=True compiles every point and measures it."
    return _rendered([Text(headline, style="bold"), table, note], color, width)


def _point_name(point: PointLike) -> str:
    if point.plan is None or point.plan.schedule is None:
        return point.name
    schedule = point.plan.schedule
    saved = short_bytes(sum(g.size_bytes for g in point.plan.saved))
    return f"plan: {schedule.num_regions} regions, {schedule.depth} deep, {saved} saved"


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
    table = Table(box=None, pad_edge=False)
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
            f"{row['platform']} {row['compiler']}" if row["usable"] else f"{row['platform']}, not usable here",
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
    return (
        f"Plan for {plan.target} by {plan.solver}: {short_bytes(plan.peak_bytes)} instead of "
        f"{short_bytes(plan.unplanned_peak_bytes)}{guess}, {share:.1%} of the forward FLOPs recomputed."
    )


def _label(is_measured: bool) -> str:
    return "measured" if is_measured else "predicted"


def _table() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    for _ in range(3):
        table.add_column()
    return table


def _add_constants(table: Table, size_bytes: int) -> None:
    if size_bytes:
        table.add_row("closed-over arrays", show_bytes(size_bytes), "constants of the program, no arguments")


def _add_compiles(table: Table, number: int, calibration: str | None) -> None:
    table.add_row("compiles", str(number), f"calibrated by {calibration}" if calibration else "")


def _sizes(plan: PlanLike) -> Table:
    table = _table()
    if plan.budget_bytes is not None:
        table.add_row("budget", show_bytes(plan.budget_bytes), "given")
    elif plan.max_cost is not None:
        table.add_row("max cost", f"{plan.max_cost:g} x unplanned", "given")
    table.add_row("unplanned peak", show_bytes(plan.unplanned_peak_bytes), _label(plan.is_unplanned_measured))
    if plan.written_peak_bytes is not None:
        table.add_row("as it is written", show_bytes(plan.written_peak_bytes), "measured, with its own checkpoints")
    if plan.measured_peak_bytes is not None:
        said = "measured, at most" if plan.is_at_most else "measured"
        said += ", its blocks profiled" if plan.is_profiled else ""
        table.add_row("planned peak", show_bytes(plan.measured_peak_bytes), said)
    else:
        said = "profiled" if plan.is_profiled else "predicted"
        table.add_row("planned peak", show_bytes(plan.predicted_peak_bytes), said)
    if plan.next_peak_bytes is not None:
        said = "measured, does not fit" if plan.max_cost is None else "measured"
        table.add_row("next cheaper plan", show_bytes(plan.next_peak_bytes), said)
    if plan.least_peak_bytes is not None:
        table.add_row("least feasible peak", show_bytes(plan.least_peak_bytes), "measured")
    else:
        table.add_row("least feasible peak", f"about {short_bytes(plan.expected_least_bytes)}", "predicted")
    if plan.host_bytes or plan.host_budget_bytes is not None:
        _add_host(table, plan)
    table.add_row("forward", f"{short_count(plan.forward_flops)}FLOP", "counted")
    share = plan.recompute_flops / max(1, plan.forward_flops)
    table.add_row("recomputation", f"{short_count(plan.recompute_flops)}FLOP, {share:.2%} of the forward", "counted")
    if plan.cost == "time":
        step = plan.recompute_cost / max(1, plan.unplanned_cost)
        said = "" if step >= 0 else " saved: loops stack less"
        table.add_row("", f"{abs(step):.2%} of the unplanned step's time{said}", "modelled")
    _add_constants(table, plan.constant_bytes)
    _add_compiles(table, plan.num_compiles, plan.calibration)
    return table


def _add_host(table: Table, plan: PlanLike) -> None:
    """What is on the host, and what of it crosses the link."""
    if plan.host_budget_bytes is not None:
        table.add_row("host budget", show_bytes(plan.host_budget_bytes), "given")
    table.add_row("on the host", show_bytes(plan.host_bytes), _label(plan.measured_host_bytes is not None))
    if not plan.link_bytes:
        return
    table.add_row("to and from it", f"{short_bytes(plan.link_bytes)} each way in a step", "predicted")
    if plan.cost == "time":
        waits = f"waits {plan.idle_time / max(1, plan.unplanned_cost):.2%} of the unplanned step's time for the link"
        table.add_row("", waits, "modelled")


def _tree(plan: PlanLike) -> Tree:
    assert plan.schedule is not None
    num_regions, depth = plan.schedule.num_regions, plan.schedule.depth
    tree = Tree(f"regions: {len(plan.blocks)} blocks, {num_regions} recomputed regions, {depth} deep")
    _grow(tree, plan.schedule.nodes, plan)
    return tree


def _grow(tree: Tree, nodes: Sequence[Node], plan: PlanLike) -> None:
    # Regions nest some twenty deep at most, so recursion is safe here.
    for run in _runs(nodes):
        first, last = run[0], run[-1]
        if isinstance(first, Keep):
            branch = tree.add(f"keep {_span(first.start, last.stop, plan)}")
            for node in run:
                save = plan.block_saves[node.start]
                for line in kind_named(save.kind).describe(save):
                    branch.add(f"block {node.start}: {line}")
        else:
            branch = tree.add(f"recompute {_span(first.start, first.stop, plan)}")
            if any(not isinstance(child, Keep) for child in first.children):
                _grow(branch, first.children, plan)


def _runs(nodes: Sequence[Node]) -> Iterator[list[Node]]:
    """Kept blocks in a row belong on one line."""
    run: list[Node] = []
    for node in nodes:
        if run and not (isinstance(node, Keep) and isinstance(run[-1], Keep)):
            yield run
            run = []
        run.append(node)
    if run:
        yield run


def _span(start: int, stop: int, plan: PlanLike) -> str:
    blocks = f"block {start}" if stop == start + 1 else f"blocks {start}-{stop - 1}"
    first, last = plan.block_labels[start], plan.block_labels[stop - 1]
    return f"{blocks}  {first}" if first == last else f"{blocks}  {first} ... {last}"


def _saved(groups: Sequence[Group]) -> Table:
    total = sum(g.size_bytes for g in groups)
    title = f"saved from forward to backward: {short_bytes(total)}"
    if on_host := sum(g.size_bytes for g in groups if g.place == Place.HOST.value):
        title += f", {short_bytes(on_host)} of it on the host"
    table = Table(title=title, title_justify="left", box=None)
    for name in ("count", "bytes", "value", "of", "where", "scope", *(("at",) if on_host else ())):
        table.add_column(name, justify="right" if name in ("count", "bytes") else "left", overflow="fold")
    for group in groups[:_MAX_ROWS]:
        source = group.source.rsplit("/", 1)[-1]
        row = [str(group.count), short_bytes(group.size_bytes), group.shape_dtype, group.primitive, source, group.scope]
        table.add_row(*row, *((group.place,) if on_host else ()))
    if len(groups) > _MAX_ROWS:
        rest = groups[_MAX_ROWS:]
        table.add_row(str(sum(g.count for g in rest)), short_bytes(sum(g.size_bytes for g in rest)), "others")
    return table


def _notes(plan: PlanLike) -> Iterator[str]:
    is_part = plan.budget_bytes is None and plan.max_cost is None
    adam = 2 * plan.parameter_bytes
    if not is_part:
        yield (
            "The budget covers arguments, gradients and temporaries of the value and gradient. It does not cover what "
            f"lives outside: optimizer state (Adam: about {short_bytes(adam)}, twice the parameters), other models, "
            "data. Leave room for it with reserve=..., or let fit(...) plan the whole step."
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
