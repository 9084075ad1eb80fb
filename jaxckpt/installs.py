"""Which compilers are installed, whether they are right for this JAX, and the one command that installs each."""

import functools
import re
import shlex
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from jaxckpt import _compat
from jaxckpt.chips import Target
from jaxckpt.errors import TargetError

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


def requirements(platform: str) -> list[str]:
    """What pip has to install for a platform's compiler, at this JAX's own version; nothing for the CPU's.

    Example:
        >>> requirements("cpu")
        []
    """
    if platform == "tpu":
        return [_libtpu()]
    if platform == "cuda":
        return [
            f"jax-cuda{_compat.CUDA_PLUGIN}-{part}=={version}"
            for part, version in (("plugin", _compat.JAXLIB_VERSION), ("pjrt", _compat.JAXLIB_VERSION))
        ]
    return []


def command(platform: str) -> list[str]:
    """The command line that installs a platform's compiler for this interpreter; empty where JAX brings it along.

    The compilers alone are needed, so their dependencies, CUDA's libraries for one, are left out.
    """
    wanted = requirements(platform)
    return wanted and [sys.executable, "-m", "pip", "install", "--no-deps", *wanted]


def shown_command(platform: str) -> str:
    """The same for a person to type."""
    wanted = requirements(platform)
    return shlex.join(["pip", "install", "--no-deps", *wanted]) if wanted else ""


def installed(platform: str) -> str | None:
    """The version of a platform's compiler that is installed, None if there is none."""
    if platform == "cpu":
        return _compat.JAXLIB_VERSION
    if platform == "tpu":
        return _version("libtpu") if find_spec("libtpu") else None
    return next(filter(None, (_version(f"jax-cuda{n}-plugin") for n in (13, 12))), None)


def unusable(target: Target) -> str:
    """Why a target's compiler cannot be used here, with what to do; empty where it can, as far as versions tell."""
    platform = target.platform
    problem = _problem(platform)
    return problem and f"the compiler for target={target.name!r} {problem} with: {shown_command(platform)}"


def _problem(platform: str) -> str:
    if installed(platform) is None:
        return "is not installed; install it"
    if platform != "cuda":
        return ""  # libtpu keeps to a stable interface, and says so itself where it does not
    flavours = [
        {name: v for part in ("plugin", "pjrt") if (v := _version(name := f"jax-cuda{n}-{part}"))} for n in (13, 12)
    ]
    right = {_compat.JAXLIB_VERSION}
    if any(len(parts) == 2 and set(parts.values()) == right for parts in flavours):
        return ""
    shown = ", ".join(f"{name} {version}" for parts in flavours for name, version in parts.items())
    if all(len(parts) < 2 for parts in flavours):
        return f"is half installed (there is only {shown}); install both"
    return f"does not match jaxlib {_compat.JAXLIB_VERSION} ({shown}); install the right one"


def describe(target: Target) -> dict[str, Any]:
    """A chip's facts and the state of its compiler, as plain data."""
    problem = unusable(target)
    return {
        **{name: getattr(target, name) for name in _FACTS},
        "compiler": installed(target.platform),
        "usable": not problem,
        "problem": problem,
        "install": shown_command(target.platform),
    }


def install(target: Target) -> int:
    """Run pip for a target's compiler and return its exit status.

    Raises:
        TargetError: this interpreter has no pip.
    """
    wanted = command(target.platform)
    if not wanted:
        return 0
    if not find_spec("pip"):
        raise TargetError(
            f"{sys.executable} has no pip; install {' '.join(requirements(target.platform))} as you "
            "installed jax, without dependencies"
        )
    return subprocess.run(wanted, check=False).returncode


@functools.cache
def _libtpu() -> str:
    """The libtpu that this JAX was released with, as its own metadata says."""
    for line in metadata.requires("jax") or ():
        if match := re.match(r"(libtpu\s*==\s*[\d.*]+)\s*;.*extra == .tpu.", line):
            return match[1]
    return "libtpu"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
