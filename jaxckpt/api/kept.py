"""Plans kept on disk: the next process finds what was planned for the same program, request and versions."""

import hashlib
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from jaxckpt import _compat
from jaxckpt._version import __version__
from jaxckpt.compilation import cache
from jaxckpt.compilation.files import keep_text
from jaxckpt.compilation.objective import Objective
from jaxckpt.errors import JaxckptWarning, PlanFileError, PlanMismatchError
from jaxckpt.kinds.base import registered
from jaxckpt.program.ir import Program
from jaxckpt.result.plan import SCHEMA, Plan
from jaxckpt.search.request import Request
from jaxckpt.targets.chip import device_label, find_target
from jaxckpt.units import show_bytes

_LOG = logging.getLogger("jaxckpt")
_T = TypeVar("_T")


class _HasText(Protocol):
    def to_text(self) -> str: ...


def kept_or_made(
    program: Program, goal: Objective, request: Request, cache_dir: str | None, make: Callable[[], Plan]
) -> Plan:
    """The plan that is kept for this program and request, or one that is made now, and kept.

    Args:
        program: what is planned.
        goal: what of it is differentiated.
        request: how it is planned. Under a solver of the user's nothing is kept.
        cache_dir: where plans are kept; None is the user's cache directory.
        make: makes a plan.
    """
    is_kept = isinstance(request.solver, str) and not program.description.opaque
    path = cache.folder(cache_dir) / f"{plan_key(program, goal, request)}.json" if is_kept else None
    found = read_kept(path, Plan.load_kept, lambda plan: plan.check(program))
    if found is None:
        found = make()
        if found.measured_peak_bytes is not None or not request.verify:
            write_kept(path, found)  # a prediction for want of a compiler is made again once there is one
    elif found.budget_bytes is not None and found.peak_bytes > found.budget_bytes:
        warn_infeasible(found.budget_bytes, found.peak_bytes)
    return found


def plan_key(program: Program, goal: Objective, request: Request) -> str:
    """A name under which a plan is kept."""
    program_key = program.fingerprint(), program.keeps_checkpoints, len(program.closed_over)
    # A fingerprint is of shapes; bytes are of each device's part of them.
    return kept_key((*program_key, tuple(map(str, program.shardings)), goal, request), request.target)


def kept_key(parts: tuple[Any, ...], target: str | None) -> str:
    """A name under which plans are kept: of what they are for, the versions, the target and its compiler."""
    versions = (SCHEMA, __version__, _compat.JAX_VERSION, _compat.JAXLIB_VERSION)
    chip = find_target(target)
    place = (
        _compat.axis_sizes(),
        device_label(None),
        os.environ.get("XLA_FLAGS", ""),
        chip,
        chip.compiler,
        registered(),
    )
    return hashlib.sha256(repr((*parts, versions, place)).encode()).hexdigest()[:32]


def read_kept(path: Path | None, load: Callable[[Path, Path], _T], check: Callable[[_T], None]) -> _T | None:
    """What is kept at a path, if it can be used; what cannot is said in the log.

    Args:
        path: None where nothing is kept.
        load: reads a file of a folder.
        check: raises `PlanMismatchError` where what was read is for something else.
    """
    if path is None:
        return None
    try:
        found = load(path, path.parent)
        check(found)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (PlanFileError, OSError, PlanMismatchError) as error:
        _LOG.warning("kept plans at %s cannot be used and are made again: %s", path, error)
        return None
    return found


def write_kept(path: Path | None, found: _HasText) -> None:
    """Keep plans; what cannot be written is said in the log."""
    if path is None:
        return
    try:
        keep_text(path, found.to_text())
    except OSError as error:
        _LOG.warning("plans could not be kept at %s: %s", path, error)


def warn_infeasible(budget_bytes: int, peak_bytes: int) -> None:
    """Say that the least plan is used although it is over the budget."""
    warnings.warn(
        f'nothing fits budget={show_bytes(budget_bytes)}: as on_infeasible="least" asks for, the plan with the least '
        f"bytes is used, which takes {show_bytes(peak_bytes)}",
        JaxckptWarning,
        stacklevel=3,
    )
