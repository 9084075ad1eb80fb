"""The problem where bytes on the host have a price: the dual of the host's memory and of the links to it.

What a schedule holds on the host is one sum, and what its links carry is another row each way. Their dual is a price
of each byte, so that a solver of bytes against time needs no third axis: it is asked at prices from nothing to so high
that nothing is sent, and what it finds is judged in the problem without them.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from ckptsolvers import Option, Problem

from jaxckpt.model.option import NO_ROOM

# Prices between the lowest at which a byte matters and the highest at which one is sent.
_NUM_PRICES, _RATIO = 8, 2
# A price has no answer between two sums of few pieces, so the first of so many blocks that may send are tried alone.
_MAX_PREFIXES = 4


def on_device(problem: Problem) -> Problem:
    """The problem where nothing is sent to the host: itself where nothing can be."""
    return _with_options(problem, lambda option: _never(option) if option.host_bytes else option)


def priced(problem: Problem, host_budget: int) -> list[Problem]:
    """The problem at one price after another, the first one nothing.

    Args:
        problem: with options that send values to the host; none are made of others.
        host_budget: bytes of the host; what sends more by itself is left out.
    """
    sent = [o.host_bytes for block in problem.blocks for o in block.options if 0 < o.host_bytes <= host_budget]
    if not sent:
        return []
    # At the highest one the least that may be sent costs what all blocks take.
    highest = max(1, problem.forward_time) / min(sent)
    prices = (0.0, *(highest / _RATIO**i for i in reversed(range(_NUM_PRICES))))
    return [_with_options(problem, lambda option, price=price: _at(option, price, host_budget)) for price in prices]


def first_senders(problem: Problem, host_budget: int) -> Iterator[Problem]:
    """The problem where none but the first one, two, three ... of its blocks send values to the host."""
    senders = [k for k, block in enumerate(problem.blocks) if any(option.host_bytes for option in block.options)]
    for last in senders[:-1][:_MAX_PREFIXES]:
        blocks = [
            replace(
                block,
                options=tuple(
                    _at(o, 0.0, host_budget) if k <= last or not o.host_bytes else _never(o) for o in block.options
                ),
            )
            for k, block in enumerate(problem.blocks)
        ]
        yield replace(problem, blocks=tuple(blocks))


def _at(option: Option, price: float, host_budget: int) -> Option:
    if not option.host_bytes:
        return option
    if option.host_bytes > host_budget:
        return _never(option)
    return replace(option, recompute_time=option.recompute_time + math.ceil(price * option.host_bytes))


def _never(option: Option) -> Option:
    return replace(option, forward_peak_bytes=NO_ROOM, backward_peak_bytes=NO_ROOM)


def _with_options(problem: Problem, change: Callable[[Option], Option]) -> Problem:
    if not any(option.host_bytes for block in problem.blocks for option in block.options):
        return problem
    blocks = [replace(block, options=tuple(map(change, block.options))) for block in problem.blocks]
    return replace(problem, blocks=tuple(blocks))
