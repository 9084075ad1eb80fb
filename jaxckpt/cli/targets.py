"""Commands about what can be planned with: targets and their compilers, solvers and their papers."""

import argparse
import json
import shlex
import sys
from typing import Any

from jaxckpt.cli.common import NO, YES, color, command
from jaxckpt.cli.loading import UsageError

# The names that `plan(solver=...)` takes, and under which their solutions go.
_METHODS = {"auto": "chain", "ilp": "regions_milp"}


def add(commands: Any) -> None:
    """Add `cite` and `targets`."""
    cite = command(commands, "cite", _cite, "print the BibTeX of the methods that a solver uses")
    cite.add_argument("solver", nargs="?", default="auto", help="a solver's name, as in --solver, or all")
    targets = command(commands, "targets", _targets, "list the chips that can be planned for, and their compilers")
    targets.add_argument("--install", metavar="TARGET", help="install the compiler for this chip into this environment")
    targets.add_argument("--dry-run", action="store_true", help="with --install: print the command, do not run it")


def _cite(options: argparse.Namespace) -> int:
    text = bibtex(options.solver)
    print(json.dumps({"solver": options.solver, "bibtex": text}, indent=1) if options.json else text)
    return YES


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


def _targets(options: argparse.Namespace) -> int:
    from jaxckpt.result.report import show_targets
    from jaxckpt.targets import install
    from jaxckpt.targets.chip import find_chip, known_chips

    if options.dry_run and not options.install:
        raise UsageError("--dry-run goes with --install TARGET")
    if options.install:
        return _install(find_chip(options.install), options)
    rows = [install.describe(chip) for chip in known_chips().values()]
    print(json.dumps(rows, indent=1) if options.json else show_targets(rows, color=color()))
    return YES


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
        return YES
    if not install.unusable(chip):
        print(f"the compiler for {chip.name} is installed already", file=sys.stderr)
        return YES
    print(shlex.join(wanted), file=sys.stderr)
    return YES if install.install(chip) == 0 else NO
