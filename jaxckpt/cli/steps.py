"""Commands about whole steps: plan one within a budget, and find the largest batch."""

import argparse
import json
from typing import Any

from jaxckpt.cli.common import (
    YES,
    check_page,
    color,
    columns,
    command,
    number_or_text,
    takes_all,
    takes_checkpoints,
    takes_host_budget,
    takes_limits,
    takes_named,
    takes_page,
    write_page,
)
from jaxckpt.cli.loading import UsageError, function_and_args, function_and_maker


def add(commands: Any) -> None:
    """Add `fit` and `largest-batch`."""
    fit = command(commands, "fit", _fit, "plan a whole step within a budget, optimizer included")
    takes_named(fit, "MODULE:STEP")
    _takes_step(fit, 'device bytes of the compiled step: "4GB", "4GiB", "80%%" or a number')
    fit.add_argument("--solver", default="auto", help="as for plan")
    takes_limits(fit)
    takes_checkpoints(fit)
    takes_page(fit)

    largest = command(commands, "largest-batch", _largest_batch, "find the largest batch whose step fits a budget")
    takes_named(largest, "MODULE:STEP", "returns the arguments at a batch size; default: its example_args")
    _takes_step(largest, 'device bytes of the compiled step: "4GB", "4GiB" or a number')
    largest.add_argument(
        "--global-batch", type=int, help="what an update takes; says in how many accumulation steps, as few as fit"
    )


def _takes_step(command: argparse.ArgumentParser, budget: str) -> None:
    command.add_argument("--budget", type=number_or_text, required=True, help=budget)
    command.add_argument("--donate", type=int, nargs="+", default=[], metavar="ARGNUM", help="arguments to donate")
    command.add_argument("--cost", choices=("time", "flops"), default="time", help="what is minimised")
    takes_host_budget(command)
    takes_all(command)


def _fit(options: argparse.Namespace) -> int:
    import jaxckpt

    check_page(options)
    step, args = function_and_args(options)
    found = jaxckpt.fit(
        step,
        *args,
        budget=options.budget,
        cost=options.cost,
        solver=options.solver,
        target=options.target,
        donate_argnums=tuple(options.donate),
        host_budget=options.host_budget,
        keep_checkpoints=not options.inline_checkpoints,
        max_compiles=options.max_compiles,
        on_infeasible="least" if options.least else "raise",
    )
    _print(found, options)
    write_page(options, lambda: found.read(source=options.source), found.to_html)
    return YES


def _largest_batch(options: argparse.Namespace) -> int:
    import jaxckpt

    step, make = function_and_maker(options)

    def make_args(batch: int) -> Any:
        made = make(batch)
        return made if isinstance(made, tuple | dict) else (made,)

    try:
        make_args(1)
    except TypeError as error:
        raise UsageError(
            f"what makes the arguments cannot be called with a batch size ({error}); give --args MODULE:FUNCTION, a "
            "function that takes one"
        ) from error
    found = jaxckpt.largest_batch(
        step,
        make_args,
        budget=options.budget,
        cost=options.cost,
        target=options.target,
        donate_argnums=tuple(options.donate),
        host_budget=options.host_budget,
        global_batch=options.global_batch,
    )
    return _print(found, options)


def _print(found: Any, options: argparse.Namespace) -> int:
    if options.json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        print(found.report(color=color(), width=columns(), all_rows=options.all))
    return YES
