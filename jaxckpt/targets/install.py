"""Which compilers are installed, whether they are right for this JAX, and the one command that installs each."""

import shlex
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

from jaxckpt.errors import TargetError
from jaxckpt.targets.chip import Target

_FACTS = (
    "name",
    "platform",
    "memory_bytes",
    "bandwidth",
    "host_bandwidth",
    "matmul_flops",
    "vector_flops",
    "devices_per_chip",
    "origin",
)


def command(target: Target) -> list[str]:
    """The command line that installs a target's compiler for this interpreter; empty where JAX brings it along.

    The compilers alone are needed, for GPUs with CUDA's assembler, so their dependencies, CUDA's libraries for one, are
    left out.
    """
    wanted = target.platform_compiler.requirements(target)
    return wanted and [sys.executable, "-m", "pip", "install", "--no-deps", *wanted]


def shown_command(target: Target) -> str:
    """The same for a person to type."""
    wanted = target.platform_compiler.requirements(target)
    return shlex.join(["pip", "install", "--no-deps", *wanted]) if wanted else ""


def installed(target: Target) -> str | None:
    """The version of a target's compiler that is installed, None if there is none."""
    return target.platform_compiler.installed()


def unusable(target: Target) -> str:
    """Why a target's compiler cannot be used here, with what to do; empty where it can, as far as versions tell."""
    problem = target.platform_compiler.problem(target)
    return problem and f"the compiler for target={target.name!r} {problem} with: {shown_command(target)}"


def describe(target: Target) -> dict[str, Any]:
    """A chip's facts and the state of its compiler, as plain data."""
    problem = unusable(target)
    return {
        **{name: getattr(target, name) for name in _FACTS},
        "compiler": installed(target),
        "usable": not problem,
        "problem": problem,
        "install": shown_command(target),
    }


def install(target: Target) -> int:
    """Run pip for a target's compiler and return its exit status.

    Raises:
        TargetError: this interpreter has no pip.
    """
    wanted = command(target)
    if not wanted:
        return 0
    if not find_spec("pip"):
        raise TargetError(
            f"{sys.executable} has no pip; install {' '.join(target.platform_compiler.requirements(target))} as you "
            "installed jax, without dependencies"
        )
    return subprocess.run(wanted, check=False).returncode
