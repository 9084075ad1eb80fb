"""Chips: what they hold, how fast they compute and move bytes."""

import difflib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from jaxckpt import costs
from jaxckpt.errors import TargetError
from jaxckpt.trace import Equation, size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A chip and the compiler that speaks for it.

    Attributes:
        name: as users write it.
        platform: JAX's platform name.
        memory_bytes: device memory, None where it is the host's.
        bandwidth: bytes per second to and from that memory.
        matmul_flops: FLOP per second of the matrix units by dtype; "" is every other dtype.
        vector_flops: FLOP per second of everything else.
    """

    name: str
    platform: str
    memory_bytes: int | None
    bandwidth: float
    matmul_flops: dict[str, float]
    vector_flops: float


def _chip(
    name: str, platform: str, memory_bytes: int, bandwidth: float, bf16: float, f32: float, vector: float
) -> Target:
    rates = {"bfloat16": bf16, "float16": bf16, "int8": 2 * bf16, "": f32}
    return Target(
        name=name,
        platform=platform,
        memory_bytes=memory_bytes,
        bandwidth=bandwidth,
        matmul_flops=rates,
        vector_flops=vector,
    )


_GIB = 2**30
_TARGETS = {
    t.name: t
    for t in (
        # A few cores of a current x86 server; plans depend on the ratios only.
        Target(
            name="cpu",
            platform="cpu",
            memory_bytes=None,
            bandwidth=1.5e10,
            matmul_flops={"": 1e11, "float64": 5e10},
            vector_flops=2e10,
        ),
        _chip("v100", "cuda", 16935682048, 898.048e9, 125e12, 15.7e12, 15.7e12),
        _chip("a100", "cuda", 85100068864, 2039.04e9, 312e12, 156e12, 19.5e12),
        _chip("h100", "cuda", 84978434048, 3352.32e9, 989e12, 494e12, 67e12),
        _chip("h200", "cuda", 151397597184, 4.8e12, 989e12, 494e12, 67e12),
        _chip("b200", "cuda", 191514411008, 7672.32e9, 2250e12, 1125e12, 75e12),
        _chip("v4", "tpu", 32 * _GIB, 1228e9, 275e12, 275e12 / 6, 4.3e12),
        _chip("v5e", "tpu", 16 * _GIB, 819e9, 197e12, 197e12 / 6, 3.1e12),
        _chip("v5p", "tpu", 95 * _GIB, 2765e9, 459e12, 459e12 / 6, 7.2e12),
        _chip("v6e", "tpu", 32 * _GIB, 1640e9, 918e12, 918e12 / 6, 14e12),
    )
}


def find(name: str | None) -> Target:
    """Return a target by name, or the one that the default backend stands for.

    Raises:
        TargetError: an unknown name, with the nearest ones.
    """
    if name is None:
        platform = jax.default_backend()
        return _TARGETS.get({"gpu": "h100", "tpu": "v5e"}.get(platform, platform), _TARGETS["cpu"])
    chip = name.split(":")[0].lower() if isinstance(name, str) else ""
    if chip not in _TARGETS:
        near = difflib.get_close_matches(chip, _TARGETS, 3, 0.3) or sorted(_TARGETS)
        raise TargetError(f"target={name!r} is not known; did you mean {' or '.join(map(repr, near))}?")
    return _TARGETS[chip]


def timer(cost: str, target: Target) -> Callable[[Equation, list[Any]], int]:
    """Return what an equation costs: FLOPs, or modelled picoseconds on the target.

    Raises:
        ValueError: `cost` is neither "time" nor "flops".
    """
    if cost == "flops":
        return lambda eqn, avals: costs.cost(eqn, avals).flops
    if cost != "time":
        raise ValueError(f'cost={cost!r} is not accepted; write cost="time" or cost="flops"')
    return functools.partial(_roofline, target)


def _roofline(target: Target, eqn: Equation, avals: list[Any]) -> int:
    """Picoseconds: the longer of computing and moving bytes; what is fused moves its result only."""
    cost = costs.cost(eqn, avals)
    if eqn.primitive in costs.ALIAS or eqn.primitive in costs.FOLDED:
        return 0
    rate, moved = target.vector_flops, cost.moved_bytes
    if costs.is_matmul(eqn):
        rate = target.matmul_flops.get(costs.matmul_dtype(eqn, avals), target.matmul_flops[""])
    elif eqn.primitive in costs.FUSIBLE:
        moved = sum(size_bytes(avals[v]) for v in eqn.outputs)
    return math.ceil(1e12 * max(cost.flops / rate, moved / target.bandwidth))
