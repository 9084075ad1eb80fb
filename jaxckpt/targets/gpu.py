"""XLA's compiler for NVIDIA GPUs: it reads operands as they lie, and its scheduler minds the memory."""

from collections.abc import Sequence
from typing import Any

from jaxckpt import _compat
from jaxckpt.program.ir import Equation
from jaxckpt.targets.compiler import Chip, Compiler
from jaxckpt.targets.describe import described_devices
from jaxckpt.targets.rules import FusionRules, added_scatters


class GpuCompiler(Compiler):
    """XLA's compiler for NVIDIA GPUs."""

    # Four plans of the scanned Llama on an H100: 4.3 with names saved, 6.6 without any checkpoint.
    stacking_passes = 4

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


def _gpu_config(target: Chip) -> str:
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
