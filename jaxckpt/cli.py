"""The command line: data to stdout, words to stderr; exit 0 yes, 1 a clear no, 2 a call that makes no sense."""

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import shlex
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

_YES, _NO, _USAGE = 0, 1, 2
# The names that `plan(solver=...)` takes, and under which their solutions go.
_METHODS = {"auto": "chain", "ilp": "regions_milp"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    if not hasattr(options, "run"):
        parser.print_help(sys.stderr)
        return _USAGE
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
        return _NO
    except errors.PlanMismatchError as error:
        print(f"jaxckpt: {error}", file=sys.stderr)
        if options.json:
            print(json.dumps({"matches": False, "why": str(error)}))
        return _NO
    except BrokenPipeError:
        # Whoever read the output has seen enough; what is still buffered must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _YES
    except (errors.JaxckptError, _UsageError, OSError) as error:
        print(f"jaxckpt: {error}", file=sys.stderr)
        return _USAGE


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


class _UsageError(Exception):
    """Something on the command line that cannot be used."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jaxckpt", description="Gradient checkpointing for JAX by memory budget.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    plan = _command(commands, "plan", _plan, "choose what to save within a budget, from shapes alone")
    _takes_function(plan)
    limit = plan.add_mutually_exclusive_group(required=True)
    limit.add_argument("--budget", type=_number_or_text, help='device bytes: "4GB", "4GiB", "80%%" or a number')
    limit.add_argument("--max-cost", type=float, help="instead, the most a step may cost: 1.1 is 10 %% more")
    plan.add_argument("--cost", choices=("time", "flops"), default="time", help="what is minimised")
    plan.add_argument(
        "--solver",
        default="auto",
        help="a solver's name; docs/guide.md lists them, and so does the error for one that is none",
    )
    plan.add_argument("--reserve", type=_number_or_text, default=0, help="bytes to leave for optimizer state")
    plan.add_argument("--no-verify", action="store_true", help="predict, do not compile")
    plan.add_argument("--max-compiles", type=int, help="stop with the best plan that fits after so many compiles")
    plan.add_argument(
        "--least", action="store_true", help="where nothing fits take the plan with the least bytes, with a warning"
    )
    _takes_checkpoints(plan)
    _takes_host_budget(plan)
    plan.add_argument("--profile", action="store_true", help="compile each distinct block on its own first")
    plan.add_argument("-o", "--output", type=Path, help="write the plan to this file")

    measure = _command(commands, "measure", _measure, "compile value and gradient and print the device bytes")
    _takes_function(measure)
    measure.add_argument("--forward", action="store_true", help="measure the function itself, not its gradient")

    curve = _command(commands, "frontier", _frontier, "print the trade-off of peak bytes against step cost")
    _takes_function(curve)
    curve.add_argument("--cost", choices=("time", "flops"), default="time", help="what a step's cost is counted in")
    curve.add_argument("--num-points", type=int, default=12, help="how many plans at most")
    curve.add_argument("--verify", action="store_true", help="compile every point and measure it")
    _takes_checkpoints(curve)
    _takes_host_budget(curve)
    curve.add_argument("--plot", type=Path, help="draw it into this file, such as frontier.png")

    show = _command(commands, "show", _show, "print a plan from a file")
    show.add_argument("plan", type=Path)

    check = _command(commands, "check", _check, "say whether a plan from a file is for this function")
    check.add_argument("plan", type=Path)
    _takes_function(check)

    cite = _command(commands, "cite", _cite, "print the BibTeX of the methods that a solver uses")
    cite.add_argument("solver", nargs="?", default="auto", help="a solver's name, as in --solver, or all")
    targets = _command(commands, "targets", _targets, "list the chips that can be planned for, and their compilers")
    targets.add_argument("--install", metavar="TARGET", help="install the compiler for this chip into this environment")
    targets.add_argument("--dry-run", action="store_true", help="with --install: print the command, do not run it")
    return parser


def _command(commands: Any, name: str, run: Callable[[Any], int], text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=run)
    return command


def _takes_function(command: argparse.ArgumentParser) -> None:
    command.add_argument("function", metavar="MODULE:FUNCTION", help="dotted module or path/file.py, and a name in it")
    command.add_argument("--args", metavar="MODULE:FUNCTION", help="returns the arguments; default: its example_args")
    command.add_argument("--target", help="chip to plan for, such as cpu; default: the backend that is here")
    command.add_argument("--argnums", type=int, nargs="+", default=[0], help="what is differentiated")
    command.add_argument("--has-aux", action="store_true", help="the function returns (value, aux)")


def _takes_checkpoints(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--inline-checkpoints", action="store_true", help="let the plan replace the function's own jax.checkpoint calls"
    )


def _takes_host_budget(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--host-budget", type=_number_or_text, help="bytes of the host's pinned memory that saved values may take"
    )


def _number_or_text(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def _plan(options: argparse.Namespace) -> int:
    import jaxckpt
    from jaxckpt.compilation.files import check_writable

    if options.output:
        check_writable(options.output)  # known before planning, which takes long
    fun, args = _function_and_args(options)
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
        argnums=_argnums(options),
        has_aux=options.has_aux,
        keep_checkpoints=not options.inline_checkpoints,
        profile=options.profile,
        max_compiles=options.max_compiles,
        on_infeasible="least" if options.least else "raise",
    )
    if options.output:
        found.save(options.output)
        print(f"wrote {options.output}", file=sys.stderr)
    _print_plan(found, options.json)
    return _YES


def _measure(options: argparse.Namespace) -> int:
    import dataclasses

    import jaxckpt

    fun, args = _function_and_args(options)
    found = jaxckpt.measure(
        fun,
        *args,
        target=options.target,
        differentiate=not options.forward,
        argnums=_argnums(options),
        has_aux=options.has_aux,
    )
    if options.json:
        print(json.dumps(dataclasses.asdict(found), indent=1))
        return _YES
    print(found)
    for part in ("argument", "output", "alias", "temp"):
        print(f"  {part:9}{getattr(found, part + '_bytes'):>18,} bytes")
    return _YES


def _frontier(options: argparse.Namespace) -> int:
    import jaxckpt
    from jaxckpt.result.report import show_frontier

    fun, args = _function_and_args(options)
    found = jaxckpt.frontier(
        fun,
        *args,
        cost=options.cost,
        target=options.target,
        num_points=options.num_points,
        host_budget=options.host_budget,
        verify=options.verify,
        argnums=_argnums(options),
        has_aux=options.has_aux,
        keep_checkpoints=not options.inline_checkpoints,
    )
    if options.plot:
        from jaxckpt.result.plot import draw_frontier

        draw_frontier(found, options.plot)
        print(f"wrote {options.plot}", file=sys.stderr)
    print(json.dumps(found.to_json(), indent=1) if options.json else show_frontier(found, color=_color()))
    return _YES


def _cite(options: argparse.Namespace) -> int:
    text = bibtex(options.solver)
    print(json.dumps({"solver": options.solver, "bibtex": text}, indent=1) if options.json else text)
    return _YES


def bibtex(solver: str = "auto") -> str:
    """Return the BibTeX of the methods that a solver uses, each entry once.

    Args:
        solver: as in `plan`, a name that `ckptsolvers` gives a solution, or "all".

    Raises:
        OptionError: a solver without a paper.

    Example:
        >>> bibtex("chen").splitlines()[0]
        '@article{chen2016training,'
    """
    from ckptsolvers.citations import CITATIONS

    from jaxckpt.errors import OptionError

    name = _METHODS.get(solver, solver)
    if name != "all" and name not in CITATIONS:
        known = sorted({*_METHODS, *(n for n in CITATIONS if " " not in n), "all"})
        raise OptionError(f"solver={solver!r} is not known; write one of {', '.join(known)}")
    texts = CITATIONS.values() if name == "all" else [CITATIONS[name]]
    entries = (entry for text in texts for entry in text.split("\n\n"))
    return "\n\n".join(dict.fromkeys(entries))


def _show(options: argparse.Namespace) -> int:
    from jaxckpt.result.plan import Plan

    _print_plan(Plan.load(options.plan), options.json)
    return _YES


def _check(options: argparse.Namespace) -> int:
    from jaxckpt.program.nnx import pure
    from jaxckpt.program.trace import trace
    from jaxckpt.result.plan import Plan

    found = Plan.load(options.plan)
    call = pure(*_function_and_args(options), {})
    found.check(trace(call.fun, call.args, call.kwargs, keep_checkpoints=found.keeps_checkpoints).program)
    print(json.dumps({"matches": True}) if options.json else f"{options.plan} is a plan for {options.function}")
    return _YES


def _targets(options: argparse.Namespace) -> int:
    from jaxckpt.result.report import show_targets
    from jaxckpt.targets import install
    from jaxckpt.targets.chip import find_chip, known_chips

    if options.dry_run and not options.install:
        raise _UsageError("--dry-run goes with --install TARGET")
    if options.install:
        return _install(find_chip(options.install), options)
    rows = [install.describe(chip) for chip in known_chips().values()]
    print(json.dumps(rows, indent=1) if options.json else show_targets(rows, color=_color()))
    return _YES


def _install(chip: Any, options: argparse.Namespace) -> int:
    from jaxckpt.targets import install

    wanted = install.command(chip)
    if options.json:
        print(json.dumps({"target": chip.name, "command": wanted}))
    elif options.dry_run:
        print(shlex.join(wanted))
    if not wanted:
        print(f"{chip.name} needs nothing that JAX does not bring along", file=sys.stderr)
    if options.dry_run or not wanted:
        return _YES
    if not install.unusable(chip):
        print(f"the compiler for {chip.name} is installed already", file=sys.stderr)
        return _YES
    print(shlex.join(wanted), file=sys.stderr)
    return _YES if install.install(chip) == 0 else _NO


def _color() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def _print_plan(found: Any, as_json: bool) -> None:
    from jaxckpt.result.report import show_plan

    if as_json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        print(show_plan(found, color=_color()))


def _infeasible(error: Any) -> dict[str, Any]:
    return {"feasible": False, **{name: value for name, value in vars(error).items() if not name.startswith("_")}}


def _argnums(options: argparse.Namespace) -> int | tuple[int, ...]:
    return options.argnums[0] if len(options.argnums) == 1 else tuple(options.argnums)


def _function_and_args(options: argparse.Namespace) -> tuple[Callable, tuple]:
    module, name = _load(options.function)
    fun = _attribute(module, name, options.function)
    if not callable(fun):
        raise _UsageError(f"{options.function} is {type(fun).__name__}, not a function")
    if options.args:
        args_module, args_name = _load(options.args)
        make = _attribute(args_module, args_name, options.args)
    else:
        make = getattr(module, "example_args", None)
        if make is None:
            raise _UsageError(
                f"{options.function.rpartition(':')[0]} has no example_args; give --args MODULE:FUNCTION, a function "
                "that returns the tuple of arguments as arrays or ShapeDtypeStructs"
            )
    args = make() if callable(make) else make
    return fun, args if isinstance(args, tuple) else (args,)


def _load(reference: str) -> tuple[Any, str]:
    module, separator, name = reference.rpartition(":")
    if not separator or not module or not name:
        raise _UsageError(f"{reference!r} is not MODULE:FUNCTION, such as examples.gpt2:loss or model.py:loss")
    if module.endswith(".py"):
        path = Path(module)
        if not path.exists():
            raise _UsageError(f"{module} does not exist")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, loaded)
        spec.loader.exec_module(loaded)
        return loaded, name
    sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(module), name
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name):
            raise _UsageError(f"there is no module {module!r} here: {error}") from error
        raise


def _attribute(module: Any, name: str, reference: str) -> Any:
    if not hasattr(module, name):
        raise _UsageError(f"{reference!r}: {module.__name__} has no {name!r}")
    return getattr(module, name)


if __name__ == "__main__":
    sys.exit(main())
