"""Read the command line, run a command, and make an exit status of what it raises."""

import argparse
import contextlib
import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from jaxckpt._version import __version__
from jaxckpt.cli import doctor, measures, names, plans, steps, targets
from jaxckpt.cli.common import NO, USAGE, YES
from jaxckpt.cli.loading import UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    options.typed = sys.argv[1:] if argv is None else argv
    if not hasattr(options, "run"):
        parser.print_help(sys.stderr)
        return USAGE
    if getattr(options, "target", None):
        # A named chip is compiled for without any device, and looking for one takes time and prints warnings.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # JAX takes a second to import, and --help does not need it.
    from jaxckpt import errors

    try:
        with _progress():
            return options.run(options)
    except errors.InfeasibleBudgetError as error:
        print(f"jaxckpt: {error}", file=sys.stderr)
        if options.json:
            print(json.dumps(_infeasible(error), indent=1))
        return NO
    except errors.PlanMismatchError as error:
        print(f"jaxckpt: {error}", file=sys.stderr)
        if options.json:
            print(json.dumps({"matches": False, "why": str(error)}))
        return NO
    except BrokenPipeError:
        # Whoever read the output has seen enough; what is still buffered must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return YES
    except (errors.JaxckptError, UsageError, OSError) as error:
        print(f"jaxckpt: {error}", file=sys.stderr)
        return USAGE


@contextlib.contextmanager
def _progress() -> Iterator[None]:
    """A line on the terminal while something compiles for more than a second; nowhere else."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    from jaxckpt.compilation.measure import show_progress

    console = Console(stderr=True)

    @contextlib.contextmanager
    def show(text: str) -> Iterator[None]:
        status = console.status(text)
        timer = threading.Timer(1.0, status.start)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()
            status.stop()

    with show_progress(show):
        yield


# In the order of `--help`.
_GROUPS = (plans, names, measures, doctor, steps, targets)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jaxckpt", description="Gradient checkpointing for JAX by memory budget.")
    parser.add_argument("--version", action="version", version=f"jaxckpt {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for group in _GROUPS:
        group.add(commands)
    return parser


def _infeasible(error: Any) -> dict[str, Any]:
    return {"feasible": False, **{name: value for name, value in vars(error).items() if not name.startswith("_")}}
