"""Compilers of chips that are not here: a topology stands for the chip, and no driver or device is needed."""

import functools
import os
import re
from typing import Any

import jax

from jaxckpt.errors import TargetError
from jaxckpt.targets import Target

_INSTALL = {
    "tpu": "pip install 'jaxckpt[tpu]'",
    "cuda": "pip install --no-deps jax-cuda{cuda}-plugin=={jax} jax-cuda{cuda}-pjrt=={jax}",
}
# What the compiler says when a program needs more than the chip has: itself a measurement.
_REFUSED = re.compile(r"total memory required[^(]*\(([\d.]+)([KMG])\)|Used ([\d.]+)([KMG]) of", re.IGNORECASE)
_SCALE = {"K": 2**10, "M": 2**20, "G": 2**30}


def device(target: Target, topology: str | None) -> Any:
    """Return a device of the target to put arguments on, real or described.

    Args:
        target: the chip.
        topology: what follows the colon of a target's name; None is the smallest there is.

    Raises:
        TargetError: its compiler is not installed, with the command that installs it, or has no such topology.
    """
    if target.platform == "cpu":
        return jax.local_devices(backend="cpu")[0]
    return _topology(target, topology)[0]


@functools.lru_cache(maxsize=32)
def _topology(target: Target, topology: str | None) -> tuple[Any, ...]:
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    try:
        if target.gpu is None:
            name = f"{target.name}:{topology or target.topology}"
            found = topologies.get_topology_desc(platform="tpu", topology_name=name)
        else:
            found = topologies.get_topology_desc(
                platform="cuda", topology_name="", target_config=_gpu_config(target), topology=f"1x1x{topology or 1}"
            )
    except Exception as error:  # every backend raises its own kind
        raise TargetError(_why(target, topology, error)) from error
    return tuple(found.devices)


def _gpu_config(target: Target) -> str:
    """The compiler's description of a GPU, as text."""
    gpu = target.gpu
    assert gpu is not None
    info = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": gpu.shared_bytes,
        "threads_per_core_limit": 2048,
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
    fields = " ".join(f"{key}: {value}" for key, value in info.items())
    return (
        f"gpu_device_info {{ {fields} cuda_compute_capability {{ major: {gpu.capability} }} }} "
        f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} runtime_version {{ major: 12 minor: 9 }} '
        f'device_description_str: "{gpu.description}"'
    )


def _why(target: Target, topology: str | None, error: Exception) -> str:
    from jaxckpt import _compat

    install = _INSTALL[target.platform].format(jax=_compat.JAX_VERSION, cuda=_compat.CUDA_PLUGIN)
    where = f" with topology {topology!r}" if topology else ""
    return (
        f"the compiler for target={target.name!r}{where} cannot be used here ({str(error).splitlines()[0][:200]}). "
        f"If it is not installed: {install}"
    )


def refused_bytes(error: Exception) -> int | None:
    """Bytes that a compiler said a program needs when it refused it; None where the error says something else."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        return None
    sizes = [float(a or c) * _SCALE[(b or d).upper()] for a, b, c, d in _REFUSED.findall(text)]
    return int(max(sizes)) if sizes else None
