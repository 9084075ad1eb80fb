"""`host_budget`: the host's memory as a place for saved values, refused where there is none."""

from typing import Any

import jax

from jaxckpt import _compat
from jaxckpt.errors import BudgetError
from jaxckpt.targets.chip import device_label, find_target, is_here, known_chips
from jaxckpt.targets.compiler import Compiler
from jaxckpt.targets.registry import own_compiler
from jaxckpt.units import parse_bytes

_POLICY = "save_and_offload_only_these_names"


def check_host_budget(host_budget: Any, target: str | None) -> int | None:
    """Read a host budget.

    Args:
        host_budget: an int of bytes, `"8GB"` or `"8GiB"`; None where nothing is sent to the host.
        target: the chip's name, None for the default backend.

    Raises:
        BudgetError: anything else, or a platform or a JAX without such memory, by its name.
    """
    if host_budget is None:
        return None
    if isinstance(host_budget, str) and host_budget.strip().endswith("%"):
        raise BudgetError(
            f"host_budget={host_budget!r} is a share, and there is nothing of the host's memory that it is a share of; "
            'give bytes, such as "64GB"'
        )
    size = parse_bytes(host_budget, "host_budget", least=0)
    kind = find_target(target).compiler.host_memory
    if not kind:
        raise BudgetError(
            f"host_budget={host_budget!r}: the compiler for target={device_label(target)!r} keeps nothing in the "
            "host's memory; leave host_budget out"
        )
    if not hasattr(jax.checkpoint_policies, _POLICY):
        raise BudgetError(
            f"host_budget={host_budget!r}: this JAX, {_compat.JAX_VERSION}, has no jax.checkpoint_policies.{_POLICY}; "
            "upgrade JAX or leave host_budget out"
        )
    if is_here(target):
        device = jax.local_devices()[0]
        kinds = [memory.kind for memory in device.addressable_memories()]
        if kind not in kinds:
            raise BudgetError(
                f"host_budget={host_budget!r}: {device.device_kind} has no memory {kind!r}, only {', '.join(kinds)}; "
                "leave host_budget out"
            )
    return size


def offload_options(target: str | None) -> dict[str, Any]:
    """Options of the compiler that programs need which send values to the host.

    Args:
        target: a chip's name, or the name of a backend as plans have it; None is the default backend.
    """
    return dict(_compiler(target).offload_options or {})


def _compiler(target: str | None) -> Compiler:
    name = (target or jax.default_backend()).partition(":")[0].lower()
    chip = known_chips().get(name)
    return own_compiler(name) if chip is None else chip.compiler
