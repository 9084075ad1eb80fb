"""Commands about plans: make one, print one, check one."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from jaxckpt.cli.common import YES, argnums, command, number_or_text, print_plan, takes_checkpoints, takes_function
from jaxckpt.cli.loading import UsageError, function_and_args


def add(commands: Any) -> None:
    """Add `plan`, `show` and `check`."""
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
    plan.add_argument("--max-compiles", type=int, help="stop with the best plan that fits after so many compiles")
    plan.add_argument(
        "--least", action="store_true", help="where nothing fits take the plan with the least bytes, with a warning"
    )
    takes_checkpoints(plan)
    plan.add_argument("--profile", action="store_true", help="compile each distinct block on its own first")
    plan.add_argument("-o", "--output", type=Path, help="write the plan to this file")

    show = command(commands, "show", _show, "print a plan from a file")
    show.add_argument("plan", type=Path)

    check = command(commands, "check", _check, "say whether a plan from a file is for this function")
    check.add_argument("plan", type=Path)
    takes_function(check)


def _plan(options: argparse.Namespace) -> int:
    import jaxckpt
    from jaxckpt.compilation.files import check_writable

    if options.output and options.solver == "names":
        raise UsageError("--solver names makes no plan file: it prints a policy to paste, as jaxckpt names does")
    if options.output:
        check_writable(options.output)  # known before planning, which takes long
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
    print_plan(found, options.json)
    return YES


def _show(options: argparse.Namespace) -> int:
    from jaxckpt.result.plan import Plan

    print_plan(Plan.load(options.plan), options.json)
    return YES


def _check(options: argparse.Namespace) -> int:
    from jaxckpt.program.nnx import pure
    from jaxckpt.program.trace import trace
    from jaxckpt.result.plan import Plan

    found = Plan.load(options.plan)
    call = pure(*function_and_args(options), {})
    found.check(trace(call.fun, call.args, call.kwargs, keep_checkpoints=found.keeps_checkpoints).program)
    print(json.dumps({"matches": True}) if options.json else f"{options.plan} is a plan for {options.function}")
    return YES
