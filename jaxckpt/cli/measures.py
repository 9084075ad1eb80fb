"""Commands that show what a function takes: measured as it is, and as a trade-off of bytes against cost."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from jaxckpt.cli.common import (
    YES,
    argnums,
    color,
    columns,
    command,
    takes_checkpoints,
    takes_function,
    takes_host_budget,
)
from jaxckpt.cli.loading import function_and_args


def add(commands: Any) -> None:
    """Add `measure` and `frontier`."""
    measure = command(commands, "measure", _measure, "compile value and gradient and print the device bytes")
    takes_function(measure)
    measure.add_argument("--forward", action="store_true", help="measure the function itself, not its gradient")

    curve = command(commands, "frontier", _frontier, "print the trade-off of peak bytes against step cost")
    takes_function(curve)
    curve.add_argument("--cost", choices=("time", "flops"), default="time", help="what a step's cost is counted in")
    curve.add_argument("--num-points", type=int, default=12, help="how many plans at most")
    curve.add_argument("--verify", action="store_true", help="compile every point and measure it")
    takes_checkpoints(curve)
    takes_host_budget(curve)
    curve.add_argument("--plot", type=Path, help="draw it into this file, such as frontier.png")


def _measure(options: argparse.Namespace) -> int:
    import dataclasses

    import jaxckpt

    fun, args = function_and_args(options)
    found = jaxckpt.measure(
        fun,
        *args,
        target=options.target,
        differentiate=False if options.forward else None,
        argnums=argnums(options),
        has_aux=options.has_aux,
    )
    if options.json:
        print(json.dumps(dataclasses.asdict(found), indent=1))
        return YES
    print(found)
    for part in ("argument", "output", "alias", "temp"):
        print(f"  {part:9}{getattr(found, part + '_bytes'):>18,} bytes")
    return YES


def _frontier(options: argparse.Namespace) -> int:
    import jaxckpt
    from jaxckpt.result.report import show_frontier

    if options.plot:
        from jaxckpt.result.plot import check_plot

        check_plot(options.plot)  # known before the work, which takes long
    fun, args = function_and_args(options)
    found = jaxckpt.frontier(
        fun,
        *args,
        cost=options.cost,
        target=options.target,
        num_points=options.num_points,
        host_budget=options.host_budget,
        verify=options.verify,
        argnums=argnums(options),
        has_aux=options.has_aux,
        keep_checkpoints=not options.inline_checkpoints,
    )
    if options.plot:
        from jaxckpt.result.plot import draw_frontier

        draw_frontier(found, options.plot)
        print(f"wrote {options.plot}", file=sys.stderr)
    print(
        json.dumps(found.to_json(), indent=1) if options.json else show_frontier(found, color=color(), width=columns())
    )
    return YES
