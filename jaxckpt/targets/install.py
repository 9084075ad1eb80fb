"""Which compilers are installed, whether they are right for this JAX, and the one command that installs each."""

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jaxckpt import _compat
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
# Where XLA finds ptxas and libdevice, by CUDA's version; a CUDA toolkit on the machine has them too.
_ASSEMBLERS = {12: ("nvidia-cuda-nvcc-cu12",), 13: ("nvidia-cuda-nvcc>=13", "nvidia-nvvm>=13")}


def requirements(target: Target) -> list[str]:
    """What pip has to install to compile for a target, at this JAX's own version; nothing for the CPU."""
    if target.tpu is not None:
        return [_libtpu()]
    if target.gpu is not None:
        number = min(_compat.CUDA_PLUGIN, max(_numbers(target)))
        plugins = [f"jax-cuda{number}-{part}=={_compat.JAXLIB_VERSION}" for part in ("plugin", "pjrt")]
        return [*plugins, *_ASSEMBLERS[number]]
    return []


def command(target: Target) -> list[str]:
    """The command line that installs a target's compiler for this interpreter; empty where JAX brings it along.

    The compilers alone are needed, for GPUs with CUDA's assembler, so their dependencies, CUDA's libraries for one, are
    left out.
    """
    wanted = requirements(target)
    return wanted and [sys.executable, "-m", "pip", "install", "--no-deps", *wanted]


def shown_command(target: Target) -> str:
    """The same for a person to type."""
    wanted = requirements(target)
    return shlex.join(["pip", "install", "--no-deps", *wanted]) if wanted else ""


def installed(target: Target) -> str | None:
    """The version of a target's compiler that is installed, None if there is none."""
    if target.tpu is not None:
        return _version("libtpu") if find_spec("libtpu") else None
    if target.gpu is not None:
        return next(filter(None, (_version(f"jax-cuda{n}-plugin") for n in (13, 12))), None)
    return _compat.JAXLIB_VERSION


def unusable(target: Target) -> str:
    """Why a target's compiler cannot be used here, with what to do; empty where it can, as far as versions tell."""
    problem = _problem(target)
    return problem and f"the compiler for target={target.name!r} {problem} with: {shown_command(target)}"


def _problem(target: Target) -> str:
    if installed(target) is None:
        return "is not installed; install it"
    if target.gpu is None:
        return ""  # libtpu keeps to a stable interface, and says so itself where it does not
    parts = {
        n: {name: v for part in ("plugin", "pjrt") if (v := _version(name := f"jax-cuda{n}-{part}"))} for n in (13, 12)
    }
    right = [n for n, found in parts.items() if len(found) == 2 and set(found.values()) == {_compat.JAXLIB_VERSION}]
    if set(right) & set(_numbers(target)):
        return "" if _has_assembler() else "lacks CUDA's assembler (ptxas and libdevice); install it"
    if right:
        return (
            f"is that of CUDA 12: capability {target.gpu.capability} is gone from CUDA {right[0]}; install it, in an "
            "environment of its own,"
        )
    shown = ", ".join(f"{name} {version}" for found in parts.values() for name, version in found.items())
    if all(len(found) < 2 for found in parts.values()):
        return f"is half installed (there is only {shown}); install both"
    return f"does not match jaxlib {_compat.JAXLIB_VERSION} ({shown}); install the right one"


def _has_assembler() -> bool:
    """Whether ptxas is somewhere that XLA looks for it: in a wheel, on the path, in a toolkit."""
    wheels = ("nvidia-cuda-nvcc", "nvidia-cuda-nvcc-cu12")
    named = "CUDA_ROOT" in os.environ or "xla_gpu_cuda_data_dir" in os.environ.get("XLA_FLAGS", "")
    toolkits = (*Path("/usr/local").glob("cuda*/bin/ptxas"), *Path("/opt").glob("cuda*/bin/ptxas"))
    return any(map(_version, wheels)) or named or shutil.which("ptxas") is not None or bool(toolkits)


def _numbers(target: Target) -> tuple[int, ...]:
    """Which of the CUDA plugins know a GPU, newest first: CUDA 13 begins at capability 7.5."""
    assert target.gpu is not None
    capability = tuple(map(int, target.gpu.capability.split(".")))
    return (13, 12) if capability >= (7, 5) else (12,)


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
            f"{sys.executable} has no pip; install {' '.join(requirements(target))} as you "
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
