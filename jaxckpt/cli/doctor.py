"""The command that says what ails a function with checkpoints of its own."""

import argparse
import json
from typing import Any

from jaxckpt.cli.common import NO, YES, argnums, color, command, takes_function
from jaxckpt.cli.loading import function_and_args


def add(commands: Any) -> None:
    """Add `doctor`."""
    doctor = command(
        commands, "doctor", _doctor, "say which of a function's own jax.checkpoint calls do nothing, and what to do"
    )
    takes_function(doctor)
    doctor.add_argument(
        "--donate-argnums", type=int, nargs="+", default=[], help="of a step, the arguments that it gives away"
    )
    doctor.add_argument("--no-plan", action="store_true", help="do not say what a plan would take")
    doctor.add_argument(
        "--max-compiles", type=int, default=12, help="compile no more programs than these, and predict the rest"
    )


def _doctor(options: argparse.Namespace) -> int:
    import jaxckpt

    fun, args = function_and_args(options)
    found = jaxckpt.doctor(
        fun,
        *args,
        target=options.target,
        argnums=argnums(options),
        has_aux=options.has_aux,
        donate_argnums=tuple(options.donate_argnums),
        plan=not options.no_plan,
        max_compiles=options.max_compiles,
    )
    print(json.dumps(found.to_json(), indent=1) if options.json else found.report(color=color()))
    return YES if found.is_healthy else NO
