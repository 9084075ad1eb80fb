"""Compilers of chips that are not here: a topology stands for the chip, and no driver or device is needed."""

import contextlib
import functools
import os
import re
from collections.abc import Iterator
from typing import Any

import jax

from jaxckpt import _compat
from jaxckpt.errors import CompilerError, TargetError
from jaxckpt.targets import install
from jaxckpt.targets.chip import Target

# What the compiler says when a program needs more than the chip has: itself a measurement.
_REFUSED = re.compile(r"total memory required[^(]*\(([\d.]+)([KMGT])\)|Used ([\d.]+)([KMGT]) of", re.IGNORECASE)
_SCALE = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


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
    if target.platform == "tpu":
        found = _topology(target, topology)
        return found if topology else found[:1]
    number = int(topology or 1)
    if target.platform == "cpu":
        here = _cpu_devices()
        return here[:number] if len(here) >= number else _compat.described_cpu_devices(number)
    return _topology(target, str(number))


def _cpu_devices() -> tuple[Any, ...]:
    try:
        return tuple(jax.local_devices(backend="cpu"))
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out, and its compiler is needed all the same
        return ()


@functools.lru_cache(maxsize=32)
def _topology(target: Target, topology: str | None) -> tuple[Any, ...]:
    if problem := install.unusable(target):
        raise CompilerError(problem)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    try:
        if target.tpu is not None:
            with _shared_libtpu():
                return _describe(
                    platform="tpu", topology_name=f"{target.tpu.compiler}:{topology or target.tpu.topology}"
                )
        asked = {"platform": "cuda", "topology_name": "", "target_config": _gpu_config(target)}
        try:
            return _describe(**asked, topology=f"1x1x{topology}")
        except NotImplementedError:
            # JAX looked for a GPU before, found no driver, and left the plugin out.
            _compat.register_cuda_plugin()
            return _describe(**asked, topology=f"1x1x{topology}")
    except Exception as error:  # every backend raises its own kind
        raise _explained(target, topology, error) from error


@contextlib.contextmanager
def _shared_libtpu() -> Iterator[None]:
    """Let several processes have libtpu: its lock guards chips, and a compiler uses none."""
    name = "ALLOW_MULTIPLE_LIBTPU_LOAD"
    if name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]


def _describe(**asked: str) -> tuple[Any, ...]:
    from jax.experimental import topologies

    return tuple(topologies.get_topology_desc(**asked).devices)


def _gpu_config(target: Target) -> str:
    """The compiler's description of a GPU, as text."""
    gpu = target.gpu
    assert gpu is not None
    info = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": gpu.shared_bytes,
        "threads_per_core_limit": gpu.threads,
        "core_count": gpu.num_cores,
        "fpus_per_core": gpu.fpus,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": int(target.bandwidth),
        "l2_cache_size": gpu.l2_bytes,
        "clock_rate_ghz": gpu.clock_ghz,
        "device_memory_size": target.memory_bytes,
        "shared_memory_per_block_optin": gpu.block_shared_bytes,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    major, minor = gpu.capability.split(".")
    fields = " ".join(f"{key}: {value}" for key, value in info.items())
    return (
        f"gpu_device_info {{ {fields} cuda_compute_capability {{ major: {major} minor: {minor} }} }} "
        f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} runtime_version {{ major: 12 minor: 9 }} '
        f'device_description_str: "{gpu.description}"'
    )


def _explained(target: Target, topology: str | None, error: Exception) -> TargetError:
    said = (str(error).splitlines() or [type(error).__name__])[0][:200]
    if "opology" in said and topology and target.tpu is not None:
        return TargetError(
            f"target={target.name!r} has no topology {topology!r} ({said}). Layouts that exist are "
            f"{' and '.join(target.layouts)}, for example"
        )
    return CompilerError(
        f"the compiler for target={target.name!r} cannot be used here ({said}). If it is broken, install it "
        f"again with: {install.shown_command(target)}"
    )


def refused_bytes(error: Exception) -> int | None:
    """Bytes that a compiler said a program needs when it refused it; None where the error says something else."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        return None
    sizes = [float(a or c) * _SCALE[(b or d).upper()] for a, b, c, d in _REFUSED.findall(text)]
    return int(max(sizes)) if sizes else None
