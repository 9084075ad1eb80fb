"""Compilers of chips that are not here: a topology stands for the chip, and no driver or device is needed."""

import functools
from typing import Any

from jaxckpt.errors import CompilerError, TargetError
from jaxckpt.targets import install
from jaxckpt.targets.chip import Target
from jaxckpt.targets.compiler import Compiler


def devices_for(target: Target, topology: str | None) -> tuple[Any, ...]:
    """Return the devices of a target to put arguments on, real or described.

    Args:
        target: the chip.
        topology: what follows the colon of a target's name: for a TPU its layout, such as "2x4", for others how many;
            None is one device.

    Raises:
        TargetError: its compiler is not installed or of another version, with the command that installs the right one,
            or it has no such topology.
    """
    return _devices(target, target.compiler, topology)


@functools.lru_cache(maxsize=32)
def _devices(target: Target, compiler: Compiler, topology: str | None) -> tuple[Any, ...]:
    if problem := install.unusable(target):
        raise CompilerError(problem)
    try:
        return compiler.devices(target, topology)
    except TargetError:
        raise
    except Exception as error:  # every backend raises its own kind
        raise _explained(target, topology, error) from error


def _explained(target: Target, topology: str | None, error: Exception) -> TargetError:
    said = (str(error).splitlines() or [type(error).__name__])[0][:200]
    if "opology" in said and topology and target.platform_compiler.has_layouts:
        return TargetError(
            f"target={target.name!r} has no topology {topology!r} ({said}). Layouts that exist are "
            f"{' and '.join(target.layouts)}, for example"
        )
    command = install.shown_command(target)
    advice = f". If it is broken, install it again with: {command}" if command else ""
    return CompilerError(f"the compiler for target={target.name!r} cannot be used here ({said}){advice}")
