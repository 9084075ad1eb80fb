"""Chips: what they hold, how fast they compute and move bytes."""

import difflib
import functools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxckpt import costs, liveness
from jaxckpt.errors import OptionError, TargetError
from jaxckpt.trace import Equation, size_bytes

# An exponential or a logarithm takes about this many operations.
_EXPENSIVE_FLOPS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """What a GPU's compiler asks of the chip beside its memory and bandwidth."""

    description: str
    num_cores: int
    l2_bytes: int
    clock_ghz: float
    shared_bytes: int
    block_shared_bytes: int
    fpus: int
    capability: int


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
        gpu: what a GPU's compiler asks, None for others.
        topology: the smallest topology of a TPU that holds one chip.
    """

    name: str
    platform: str
    memory_bytes: int | None
    bandwidth: float
    matmul_flops: dict[str, float]
    vector_flops: float
    gpu: Gpu | None = None
    topology: str = ""

    def __hash__(self) -> int:
        return hash(self.name)


def _rates(bf16: float, f32: float) -> dict[str, float]:
    return {"bfloat16": bf16, "float16": bf16, "int8": 2 * bf16, "": f32}


def _gpu(
    name: str, memory_bytes: int, bandwidth: float, bf16: float, f32: float, vector: float, about: tuple
) -> Target:
    description, num_cores, l2_bytes, clock_ghz, shared_bytes, block_shared_bytes, fpus, capability = about
    return Target(
        name=name,
        platform="cuda",
        memory_bytes=memory_bytes,
        bandwidth=bandwidth,
        matmul_flops=_rates(bf16, f32),
        vector_flops=vector,
        gpu=Gpu(
            description=description,
            num_cores=num_cores,
            l2_bytes=l2_bytes,
            clock_ghz=clock_ghz,
            shared_bytes=shared_bytes,
            block_shared_bytes=block_shared_bytes,
            fpus=fpus,
            capability=capability,
        ),
    )


def _tpu(name: str, memory_bytes: int, bandwidth: float, bf16: float, vector: float, topology: str) -> Target:
    return Target(
        name=name,
        platform="tpu",
        memory_bytes=memory_bytes,
        bandwidth=bandwidth,
        # A float32 product takes six passes of bfloat16 ones.
        matmul_flops=_rates(bf16, bf16 / 6),
        vector_flops=vector,
        topology=topology,
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
        _gpu(
            *("v100", 16935682048, 898.048e9, 125e12, 15.7e12, 15.7e12),
            ("Tesla V100-SXM2-16GB", 80, 6291456, 1.53, 98304, 98304, 64, 7),
        ),
        _gpu(
            *("a100", 85100068864, 2039.04e9, 312e12, 156e12, 19.5e12),
            ("NVIDIA A100-SXM4-80GB", 108, 41943040, 1.41, 167936, 166912, 64, 8),
        ),
        _gpu(
            *("h100", 84978434048, 3352.32e9, 989e12, 494e12, 67e12),
            ("NVIDIA H100 80GB HBM3", 132, 52428800, 1.98, 233472, 232448, 128, 9),
        ),
        _gpu(
            *("h200", 151397597184, 4800e9, 989e12, 494e12, 67e12),
            ("NVIDIA H200", 132, 52428800, 1.98, 233472, 232448, 128, 9),
        ),
        _gpu(
            *("b200", 191514411008, 7672.32e9, 2250e12, 1125e12, 75e12),
            ("NVIDIA B200", 148, 132644864, 1.965, 233472, 232448, 128, 10),
        ),
        _tpu("v4", 32 * _GIB, 1228e9, 275e12, 4.3e12, "2x2x1"),
        _tpu("v5e", 16 * _GIB, 819e9, 197e12, 3.1e12, "1x1"),
        _tpu("v5p", 95 * _GIB, 2765e9, 459e12, 7.2e12, "2x2x1"),
        _tpu("v6e", 32 * _GIB, 1640e9, 918e12, 14e12, "1x1"),
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


Timer = Callable[[Sequence[Equation], list[Any], Collection[int]], list[int]]


def timer(cost: str, target: Target) -> Timer:
    """Return what equations cost: FLOPs, or modelled picoseconds on the target.

    Args:
        cost: "time" or "flops".
        target: the chip.

    Returns:
        A function of equations in order, the shapes of all values, and the values that outlive the equations, to one
        cost for each equation.

    Raises:
        OptionError: `cost` is neither "time" nor "flops".
    """
    if cost == "flops":
        return lambda equations, avals, kept: [costs.cost(eqn, avals).flops for eqn in equations]
    if cost != "time":
        raise OptionError(f'cost={cost!r} is not accepted; write cost="time" or cost="flops"')
    return functools.partial(_roofline, target)


def _roofline(target: Target, equations: Sequence[Equation], avals: list[Any], kept: Collection[int]) -> list[int]:
    """Picoseconds: the longer of computing and moving bytes. A chain that fuses moves its ends' bytes only, once."""
    moved = liveness.moved_bytes(equations, lambda v: size_bytes(avals[v]), kept=kept)
    times = []
    for eqn, num_bytes in zip(equations, moved, strict=True):
        rate = target.vector_flops
        if costs.is_matmul(eqn):
            rate = target.matmul_flops.get(costs.matmul_dtype(eqn, avals), target.matmul_flops[""])
        elif eqn.primitive in costs.EXPENSIVE:
            rate /= _EXPENSIVE_FLOPS
        flops = costs.cost(eqn, avals).flops
        if eqn.primitive not in costs.FUSIBLE:
            num_bytes = max(num_bytes, costs.inner_bytes(eqn))
        times.append(math.ceil(1e12 * max(flops / rate, num_bytes / target.bandwidth)))
    return times
