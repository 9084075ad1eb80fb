"""XLA's compiler for NVIDIA GPUs: it reads operands as they lie, and its scheduler minds the memory."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxckpt import _compat
from jaxckpt.program.ir import Equation
from jaxckpt.targets import packages
from jaxckpt.targets.compiler import Chip, Compiler
from jaxckpt.targets.describe import described_devices
from jaxckpt.targets.rules import FusionRules, added_scatters

# Where XLA finds ptxas and libdevice, by CUDA's version; a CUDA toolkit on the machine has them too.
_ASSEMBLERS = {12: ("nvidia-cuda-nvcc-cu12",), 13: ("nvidia-cuda-nvcc>=13", "nvidia-nvvm>=13")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """What a GPU's compiler asks of the chip beside its memory and bandwidth.

    Attributes:
        description: as the driver names it, which is JAX's `device_kind`.
        capability: CUDA's compute capability, such as "9.0".
        num_cores: streaming multiprocessors.
        fpus: float32 units of each.
        threads: that each holds at once.
        clock_ghz: of the cores.
        l2_bytes: of the second cache.
        shared_bytes: of shared memory of each core.
        block_shared_bytes: of it that one block of threads may ask for.
    """

    description: str
    capability: str
    num_cores: int
    fpus: int
    threads: int
    clock_ghz: float
    l2_bytes: int
    shared_bytes: int
    block_shared_bytes: int


class GpuCompiler(Compiler):
    """XLA's compiler for NVIDIA GPUs."""

    # Four plans of the scanned Llama on an H100: 4.3 with names saved, 6.6 without any checkpoint.
    stacking_passes = 4
    # XLA_PYTHON_CLIENT_MEM_FRACTION changes it where the device is.
    usable_share = 0.75
    host_memory = "pinned_host"
    # Without it XLA's own rematerialization takes buffers on the host for device memory, and makes values again.
    offload_options = {"xla_gpu_enable_host_memory_offloading": True}  # noqa: RUF012  # read only
    facts = Gpu
    part = "gpu"
    backend = "gpu"
    nearest = "h100"

    def rules(self, avals: Sequence[Any], equations: Sequence[Equation] = ()) -> FusionRules:
        """Return what it fuses, copies and adds.

        It makes what is costly again for each of its readers: the exponentials of a softmax are no buffer beside its
        operand.
        """
        del avals
        return FusionRules(repeats_expensive=True, scatters=added_scatters(equations))

    def devices(self, target: Chip, topology: str | None) -> tuple[Any, ...]:
        """Described devices of one host."""
        asked = {"platform": "cuda", "topology_name": "", "target_config": _gpu_config(target)}
        layout = f"1x1x{int(topology or 1)}"
        try:
            return described_devices(**asked, topology=layout)
        except NotImplementedError:
            # JAX looked for a GPU before, found no driver, and left the plugin out.
            _compat.register_cuda_plugin()
            return described_devices(**asked, topology=layout)

    def requirements(self, target: Chip) -> list[str]:
        """JAX's plugin for CUDA, in two parts, and CUDA's assembler."""
        number = min(_compat.CUDA_PLUGIN, max(_numbers(target)))
        return [*(f"{name}=={_compat.JAXLIB_VERSION}" for name in _plugin(number)), *_ASSEMBLERS[number]]

    def installed(self) -> str | None:
        """The version of JAX's plugin for CUDA; that for the newest CUDA if there are several."""
        return next(filter(None, (packages.version(_plugin(n)[0]) for n in (13, 12))), None)

    def problem(self, target: Chip) -> str:
        """Why it cannot compile for a chip here: both parts have to be of jaxlib's version, and of a fitting CUDA."""
        if missing := super().problem(target):
            return missing
        parts = {n: {name: v for name in _plugin(n) if (v := packages.version(name))} for n in (13, 12)}
        right = [n for n, found in parts.items() if len(found) == 2 and set(found.values()) == {_compat.JAXLIB_VERSION}]
        if set(right) & set(_numbers(target)):
            return "" if _has_assembler() else "lacks CUDA's assembler (ptxas and libdevice); install it"
        if right:
            return (
                f"is that of CUDA 12: capability {target.facts.capability} is gone from CUDA {right[0]}; install it, "
                "in an environment of its own,"
            )
        shown = ", ".join(f"{name} {version}" for found in parts.values() for name, version in found.items())
        if all(len(found) < 2 for found in parts.values()):
            return f"is half installed (there is only {shown}); install both"
        return f"does not match jaxlib {_compat.JAXLIB_VERSION} ({shown}); install the right one"

    def wrong_facts(self, facts: Gpu) -> str:
        """A capability that cannot be read."""
        major, dot, minor = facts.capability.partition(".")
        is_read = dot and major.isdigit() and minor.isdigit()
        return "" if is_read else f'capability={facts.capability!r} is not like "9.0"'

    def device_kind(self, facts: Gpu) -> str:
        """As the driver names it."""
        return facts.description


def _plugin(number: int) -> tuple[str, str]:
    """The packages of JAX's plugin for a version of CUDA."""
    return f"jax-cuda{number}-plugin", f"jax-cuda{number}-pjrt"


def _numbers(target: Chip) -> tuple[int, ...]:
    """Which of the CUDA plugins know a GPU, newest first: CUDA 13 begins at capability 7.5."""
    capability = tuple(map(int, target.facts.capability.split(".")))
    return (13, 12) if capability >= (7, 5) else (12,)


def _has_assembler() -> bool:
    """Whether ptxas is somewhere that XLA looks for it: in a wheel, on the path, in a toolkit."""
    wheels = ("nvidia-cuda-nvcc", "nvidia-cuda-nvcc-cu12")
    named = "CUDA_ROOT" in os.environ or "xla_gpu_cuda_data_dir" in os.environ.get("XLA_FLAGS", "")
    toolkits = (*Path("/usr/local").glob("cuda*/bin/ptxas"), *Path("/opt").glob("cuda*/bin/ptxas"))
    return any(map(packages.version, wheels)) or named or shutil.which("ptxas") is not None or bool(toolkits)


def _gpu_config(target: Chip) -> str:
    """The compiler's description of a GPU, as text."""
    gpu: Gpu = target.facts
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
