"""What several commands share: their options, exit statuses, and how results are printed."""

import argparse
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxckpt.cli.loading import UsageError

YES, NO, USAGE = 0, 1, 2
# Columns of a report where there is no terminal, and at most.
_WIDTH, _MOST_WIDTH = 80, 118


def command(commands: Any, name: str, run: Callable[[Any], int], text: str) -> argparse.ArgumentParser:
    """Add a command; what is given to its parser becomes the options of `run`."""
    made = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    made.add_argument("--json", action="store_true", help="print JSON")
    made.set_defaults(run=run)
    return made


def takes_named(
    command: argparse.ArgumentParser,
    metavar: str = "MODULE:FUNCTION",
    args: str = "returns the arguments; default: its example_args",
) -> None:
    """Let a command take a function and its arguments."""
    command.add_argument("function", metavar=metavar, help="dotted module or path/file.py, and a name in it")
    command.add_argument("--args", metavar="MODULE:FUNCTION", help=args)
    command.add_argument("--target", help="chip to plan for, such as cpu; default: the backend that is here")


def takes_function(command: argparse.ArgumentParser) -> None:
    """Let a command take a function that it differentiates, and its arguments."""
    takes_named(command)
    command.add_argument("--argnums", type=int, nargs="+", default=[0], help="what is differentiated")
    command.add_argument("--has-aux", action="store_true", help="the function returns (value, aux)")


def takes_limits(command: argparse.ArgumentParser) -> None:
    """Let a command say when a search ends, and what becomes of a budget that nothing fits into."""
    command.add_argument("--max-compiles", type=int, help="stop with the best plan that fits after so many compiles")
    command.add_argument(
        "--least", action="store_true", help="where nothing fits take the plan with the least bytes, with a warning"
    )


def takes_checkpoints(command: argparse.ArgumentParser) -> None:
    """Let a command say what becomes of the function's own checkpoints."""
    command.add_argument(
        "--inline-checkpoints", action="store_true", help="let the plan replace the function's own jax.checkpoint calls"
    )


def takes_host_budget(command: argparse.ArgumentParser) -> None:
    """Let a command send saved values to the host."""
    command.add_argument(
        "--host-budget", type=number_or_text, help="bytes of the host's pinned memory that saved values may take"
    )


def takes_page(command: argparse.ArgumentParser) -> None:
    """Let a command write a page about what it finds, and a trace."""
    command.add_argument(
        "--html", type=Path, metavar="FILE", help="write one offline page about it, such as report.html"
    )
    command.add_argument("--source", action="store_true", help="show the text of source lines on the page")
    command.add_argument("--trace", type=Path, metavar="FILE", help="write its memory over the schedule for Perfetto")


def check_page(options: argparse.Namespace) -> None:
    """Refuse a page or a trace that could not be written, before the work that it is about.

    Raises:
        UsageError: `--source` without a page.
        OptionError: what draws a page is not installed.
    """
    from jaxckpt.compilation.files import check_writable
    from jaxckpt.result.page import vega

    if options.source and not options.html:
        raise UsageError("--source is about the page that --html FILE writes")
    if options.html:
        vega.check_installed()
    for path in filter(None, (options.html, options.trace)):
        check_writable(path)


def write_page(options: argparse.Namespace, read: Callable[[], Any], page: Callable[..., str]) -> None:
    """Write the page and the trace that were asked for.

    Args:
        options: of the command.
        read: reads the compiled programs.
        page: makes a page; it takes `reading`, `name` and `command`.

    Raises:
        CompilerError: a trace was asked for, and the compiler refused the program.
    """
    from jaxckpt.compilation.files import write_text
    from jaxckpt.compilation.trace_events import trace_text
    from jaxckpt.errors import CompilerError

    if not (options.html or options.trace):
        return
    reading = read()
    if options.trace:
        shown = reading.planned or reading.unplanned
        if shown is None:
            raise CompilerError(f"there is no trace: {reading.why_not}")
        write_text(options.trace, trace_text(shown))
        print(f"wrote {options.trace}", file=sys.stderr)
    if options.html:
        write_text(options.html, page(reading=reading, name=options.function, command=_command(options)))
        print(f"wrote {options.html}", file=sys.stderr)


def _command(options: argparse.Namespace) -> str:
    """The command as it was typed, files below this folder relative to it."""
    here = os.getcwd() + os.sep
    return shlex.join(["jaxckpt", *(word.replace(here, "") for word in options.typed)])


def number_or_text(text: str) -> int | str:
    """Bytes or text, as budgets are written."""
    return int(text) if text.isdigit() else text


def argnums(options: argparse.Namespace) -> int | tuple[int, ...]:
    """What is differentiated, as `jax.grad` takes it."""
    return options.argnums[0] if len(options.argnums) == 1 else tuple(options.argnums)


def color() -> bool:
    """Whether standard output shows colours."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def columns() -> int:
    """How wide reports are: as the terminal, as far as that is of use, and 80 columns elsewhere."""
    if not sys.stdout.isatty():
        return _WIDTH
    return min(_MOST_WIDTH, shutil.get_terminal_size((_WIDTH, 24)).columns)


def takes_all(command: argparse.ArgumentParser) -> None:
    """Let a command show every row of what is saved."""
    command.add_argument("--all", action="store_true", help="show every row of what is saved, not the ten largest")


def print_plan(found: Any, options: argparse.Namespace) -> None:
    """Print a plan, as JSON where that is asked for."""
    from jaxckpt.result.report import show_plan

    if options.json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        print(show_plan(found, color=color(), width=columns(), all_rows=options.all))
