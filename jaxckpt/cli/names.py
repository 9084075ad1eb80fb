"""The command that chooses which of a function's own names are saved."""

import argparse
import json
from typing import Any

from jaxckpt.cli.common import YES, argnums, command, number_or_text, takes_function, takes_limits
from jaxckpt.cli.loading import function_and_args


def add(commands: Any) -> None:
    """Add `names`."""
    names = command(
        commands, "names", _names, "choose which of a function's own names its own jax.checkpoint regions save"
    )
    takes_function(names)
    names.add_argument(
        "--budget",
        type=number_or_text,
        required=True,
        help='device bytes: "4GB", "4GiB", a number, or "60%%" of what it takes without its own checkpoints',
    )
    names.add_argument("--cost", choices=("time", "flops"), default="time", help="what is minimised")
    names.add_argument("--reserve", type=number_or_text, default=0, help="bytes to leave for what lives outside")
    names.add_argument("--only", nargs="+", metavar="NAME", help="the names to choose among; default: all")
    names.add_argument(
        "--donate-argnums", type=int, nargs="+", default=[], help="of a step, the arguments that it gives away"
    )
    names.add_argument("--no-verify", action="store_true", help="predict, do not compile")
    takes_limits(names)
    form = names.add_mutually_exclusive_group()
    form.add_argument("--code", action="store_true", help="print the policy as Python and nothing else")
    form.add_argument("--maxtext", action="store_true", help="print it as MaxText's configuration and nothing else")


def _names(options: argparse.Namespace) -> int:
    import jaxckpt

    fun, args = function_and_args(options)
    found = jaxckpt.names(
        fun,
        *args,
        budget=options.budget,
        cost=options.cost,
        target=options.target,
        reserve=options.reserve,
        verify=not options.no_verify,
        argnums=argnums(options),
        has_aux=options.has_aux,
        donate_argnums=tuple(options.donate_argnums),
        only=options.only,
        max_compiles=options.max_compiles,
        on_infeasible="least" if options.least else "raise",
    )
    if options.json:
        print(json.dumps(found.to_json(), indent=1))
    elif options.code:
        print(found.code)
    else:
        print(found.maxtext if options.maxtext else found)
    return YES
