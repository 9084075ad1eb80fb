"""Commands about plans: make one, print one, check one, compare two."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from jaxckpt.cli.common import (
    NO,
    YES,
    argnums,
    check_page,
    command,
    number_or_text,
    print_plan,
    takes_all,
    takes_checkpoints,
    takes_function,
    takes_host_budget,
    takes_limits,
    takes_page,
    write_page,
)
from jaxckpt.cli.loading import UsageError, function_and_args


def add(commands: Any) -> None:
    """Add `plan`, `show`, `check` and `diff`."""
    plan = command(commands, "plan", _plan, "choose what to save within a budget, from shapes alone")
    takes_function(plan)
    limit = plan.add_mutually_exclusive_group(required=True)
    limit.add_argument("--budget", type=number_or_text, help='device bytes: "4GB", "4GiB", "80%%" or a number')
    limit.add_argument("--max-cost", type=float, help="instead, the most a step may cost: 1.1 is 10 %% more")
    plan.add_argument("--cost", choices=("time", "flops"), default="time", help="what is minimised")
    plan.add_argument(
        "--solver",
        default="auto",
        help="a solver's name; docs/guide.md lists them, and so does the error for one that is none",
    )
    plan.add_argument("--reserve", type=number_or_text, default=0, help="bytes to leave for optimizer state")
    plan.add_argument("--no-verify", action="store_true", help="predict, do not compile")
    takes_limits(plan)
    takes_checkpoints(plan)
    takes_host_budget(plan)
    plan.add_argument("--profile", action="store_true", help="compile each distinct block on its own first")
    plan.add_argument("-o", "--output", type=Path, help="write the plan to this file")
    takes_page(plan)
    takes_all(plan)

    show = command(commands, "show", _show, "print a plan from a file")
    show.add_argument("plan", type=Path)
    takes_all(show)

    check = command(commands, "check", _check, "say whether a plan from a file is for this function")
    check.add_argument("plan", type=Path)
    takes_function(check)
    check.add_argument("--measure", action="store_true", help="compile the plan again: do its bytes still fit")
    check.add_argument("--values", action="store_true", help="run with the plan and without, and compare")
    check.add_argument("--seed", type=int, default=0, help="of the arrays that --values puts in the places of specs")

    diff = command(commands, "diff", _diff, "print what moved between two plans from files")
    diff.add_argument("old", type=Path)
    diff.add_argument("new", type=Path)


def _plan(options: argparse.Namespace) -> int:
    import jaxckpt
    from jaxckpt.compilation.files import check_writable

    if options.solver == "names" and (options.output or options.html or options.trace):
        raise UsageError("--solver names makes no plan file, page or trace: it prints a policy to paste")
    if options.output:
        check_writable(options.output)  # known before planning, which takes long
    check_page(options)
    fun, args = function_and_args(options)
    found = jaxckpt.plan(
        fun,
        *args,
        budget=options.budget,
        max_cost=options.max_cost,
        cost=options.cost,
        solver=options.solver,
        target=options.target,
        reserve=options.reserve,
        host_budget=options.host_budget,
        verify=not options.no_verify,
        argnums=argnums(options),
        has_aux=options.has_aux,
        keep_checkpoints=not options.inline_checkpoints,
        profile=options.profile,
        max_compiles=options.max_compiles,
        on_infeasible="least" if options.least else "raise",
    )
    if isinstance(found, jaxckpt.Names):
        print(json.dumps(found.to_json(), indent=1) if options.json else found)
        return YES
    if options.output:
        found.save(options.output)
        print(f"wrote {options.output}", file=sys.stderr)
    print_plan(found, options)
    _write_page(found, fun, args, options)
    return YES


def _write_page(plan: Any, fun: Any, args: Any, options: argparse.Namespace) -> None:
    """The page about a plan, with what other budgets would cost."""
    import jaxckpt
    from jaxckpt.result.page.reading import read_plan

    same = {"argnums": argnums(options), "has_aux": options.has_aux}

    def page(**given: Any) -> str:
        frontier = jaxckpt.frontier(
            fun,
            *args,
            cost=options.cost,
            target=options.target,
            host_budget=options.host_budget,
            keep_checkpoints=not options.inline_checkpoints,
            **same,
        )
        return plan.to_html(frontier=frontier, **given)

    write_page(options, lambda: read_plan(plan, fun, args, {}, source=options.source, **same), page)


def _show(options: argparse.Namespace) -> int:
    from jaxckpt.result.plan import Plan

    print_plan(Plan.load(options.plan), options)
    return YES


def _check(options: argparse.Namespace) -> int:
    from jaxckpt.result.plan import Plan
    from jaxckpt.targets.sharding import trace_placed

    plan = Plan.load(options.plan)
    fun, args = function_and_args(options)
    plan.check(trace_placed(fun, args, keep_checkpoints=plan.keeps_checkpoints).program)
    answer: dict[str, Any] = {"matches": True}
    lines = [f"{options.plan} is a plan for {options.function}"]
    is_right = True
    if options.measure:
        measured, fits, said = _measured(plan, fun, args, options)
        answer |= {"fits": fits, "measured_peak_bytes": measured.device_bytes, "host_bytes": measured.host_bytes}
        lines.append(said)
        is_right &= fits
    if options.values:
        found = _compared(plan, fun, args, options)
        answer["values"] = found.to_json()
        lines.append(str(found))
        is_right &= found.is_close
    print(json.dumps(answer, indent=1) if options.json else "\n".join(lines))
    return YES if is_right else NO


def _measured(plan: Any, fun: Any, args: Any, options: argparse.Namespace) -> tuple[Any, bool, str]:
    """The plan as it is compiled and measured now, whether they still fit, and that as a sentence."""
    import jaxckpt
    from jaxckpt.api.host import offload_options
    from jaxckpt.targets.chip import device_label
    from jaxckpt.units import show_bytes

    if (here := device_label(options.target)) != plan.target:
        raise UsageError(f"the plan is for {plan.target}, and this would measure for {here}; give --target")
    found = jaxckpt.measure(
        plan.apply(fun),
        *args,
        target=options.target,
        differentiate=True,
        argnums=argnums(options),
        has_aux=options.has_aux,
        # `measure` adds those of the target.
        compiler_options=offload_options(plan.target) if plan.is_on_host else {},
    )
    # A plan within a cost has no budget: what it took is what it is held to.
    most = plan.peak_bytes if plan.budget_bytes is None else plan.budget_bytes
    what = "the budget" if plan.budget_bytes is not None else "what the plan says"
    host = plan.host_budget_bytes
    fits = found.device_bytes <= most and (host is None or found.host_bytes <= host)
    verdict = "fits" if fits else "no longer fits"
    if host is not None:
        what += f", {show_bytes(most)}, and {show_bytes(host)} of the host"
    else:
        what += f", {show_bytes(most)}"
    return found, fits, f"{verdict} {what}: {found}"


def _compared(plan: Any, fun: Any, args: Any, options: argparse.Namespace) -> Any:
    """The plan's values beside those without, on arrays that are made of specs."""
    from jaxckpt.result.comparison import arrays_like

    arrays = arrays_like(args, options.seed)
    return plan.compare(fun, *arrays, argnums=argnums(options), has_aux=options.has_aux)


def _diff(options: argparse.Namespace) -> int:
    from jaxckpt.result.plan import Plan
    from jaxckpt.result.plan_diff import diff

    found = diff(Plan.load(options.old), Plan.load(options.new))
    print(json.dumps(found.to_json(), indent=1) if options.json else found)
    return YES
