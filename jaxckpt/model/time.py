"""How long equations take on a chip, or how many FLOPs they are."""

import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

from jaxckpt.errors import OptionError
from jaxckpt.memory.fusion import moved_bytes
from jaxckpt.program import primitives
from jaxckpt.program.flops import equation_cost, inner_bytes
from jaxckpt.program.ir import Equation, size_bytes
from jaxckpt.targets.chip import Target

# An exponential or a logarithm takes about this many operations.
_EXPENSIVE_FLOPS = 10


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
        times.append(math.ceil(1e12 * max(computing, num_bytes / target.bandwidth)))
    return times
