"""How long equations take on a chip, or how many FLOPs they are."""

import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

from jaxckpt import _compat
from jaxckpt.errors import OptionError
from jaxckpt.memory.fusion import moved_bytes
from jaxckpt.program import primitives
from jaxckpt.program.flops import equation_cost, inner_bytes
from jaxckpt.program.ir import Equation, size_bytes
from jaxckpt.targets.chip import Target

# An exponential or a logarithm takes about this many operations.
_EXPENSIVE_FLOPS = 10
# Memory is about this many times as fast as links between chips: 7.4 on an H100 (NVLink), 8 on a v5e, 5 on a v5p.
_MEMORY_TO_LINK = 8
# What one step from neighbour to neighbour takes, however few bytes.
_LATENCY_S = 1e-6


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
    check_cost(cost)
    return count_flops if cost == "flops" else functools.partial(_roofline, target)


def check_cost(cost: str) -> None:
    """Refuse what nothing can be minimised by.

    Raises:
        OptionError: `cost` is neither "time" nor "flops".
    """
    if cost not in ("time", "flops"):
        raise OptionError(f'cost={cost!r} is not accepted; write cost="time" or cost="flops"')


def stacking_time(timer: Timer, target: Target, num_bytes: int) -> int:
    """What it takes to stack bytes in a loop's forward and to read them in its backward, in the unit of the timer."""
    if timer is count_flops:
        return 0
    return math.ceil(1e12 * target.compiler.stacking_passes * num_bytes / target.bandwidth)


def count_flops(equations: Sequence[Equation], avals: list[Any], kept: Collection[int]) -> list[int]:
    """FLOPs of each equation, whatever outlives them."""
    del kept
    return [equation_cost(eqn, avals).flops for eqn in equations]


def _roofline(target: Target, equations: Sequence[Equation], avals: list[Any], kept: Collection[int]) -> list[int]:
    """Picoseconds: the longer of computing and moving bytes. A chain that fuses moves its ends' bytes only, once."""
    moved = moved_bytes(equations, lambda v: size_bytes(avals[v]), kept=kept)
    times = []
    for eqn, num_bytes in zip(equations, moved, strict=True):
        found = equation_cost(eqn, avals)
        others = found.flops - sum(found.matmul_flops.values())
        others *= _EXPENSIVE_FLOPS if eqn.primitive in primitives.EXPENSIVE else 1
        computing = others / target.vector_flops
        for dtype, flops in found.matmul_flops.items():
            computing += flops / target.matmul_flops.get(dtype, target.matmul_flops["other"])
        if eqn.primitive not in primitives.FUSIBLE:
            num_bytes = max(num_bytes, inner_bytes(eqn))
        moving = num_bytes / target.bandwidth
        if eqn.primitive in _compat.COLLECTIVES:
            moving = max(moving, _collective_s(eqn, avals, target))
        times.append(math.ceil(1e12 * max(computing, moving)))
    return times


def _collective_s(eqn: Equation, avals: list[Any], target: Target) -> float:
    """Seconds of a collective on a ring: each device sends its part of the bytes to its neighbour, step by step.

    A reduction sends what it reads twice (reduce, then gather); gathers and exchanges send the larger of what they
    read and what they make.
    """
    sizes = _compat.axis_sizes()
    axes = eqn.params.get("axes") or eqn.params.get("axis_name") or ()
    num_devices = math.prod(sizes.get(name, 1) for name in (axes if isinstance(axes, tuple) else (axes,)))
    if num_devices < 2:
        return 0.0
    read = sum(size_bytes(avals[x]) for x in eqn.reads)
    made = sum(size_bytes(avals[v]) for v in eqn.outputs)
    num_bytes = 2 * read if eqn.primitive in _compat.REDUCING else max(read, made)
    share = (num_devices - 1) / num_devices
    return _LATENCY_S * (num_devices - 1) + share * num_bytes * _MEMORY_TO_LINK / target.bandwidth
