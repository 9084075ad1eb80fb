"""Values of a loop's iterations that wait on the host: which of them, and what that takes of the device and of time.

Iterations are alike. What one of them sends has its forward's time to leave, and what one fetches has its backward's
time to come back; what the link needs beyond that is idle time, in each iteration. Values are sent largest first: each
takes the link as long as its bytes, whatever it is worth, and few large ones travel better than many small ones.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from jaxckpt.kinds.base import Analyser
from jaxckpt.kinds.body import Body, Iteration
from jaxckpt.kinds.scan_divisions import Part, mixes
from jaxckpt.model.option import SavedValues
from jaxckpt.model.pareto import pareto
from jaxckpt.model.time import count_flops
from jaxckpt.program.ir import can_be_saved

# Values of one iteration that may be sent; more are no help where each is a small part of them all.
_MAX_SENT = 8


def offloaded(body: Body, iterations: Sequence[Iteration], analyser: Analyser) -> list[Iteration]:
    """Plans of an iteration with some of what it holds on the host.

    They are of bodies inside one checkpoint, which saves values or recomputes in parts: there it is known of each value
    that nothing else holds it.

    Args:
        body: the loop's.
        iterations: its plans with everything on the device.
        analyser: of the target, whose link to the host it is.
    """
    if analyser.host_budget is None:
        return []
    found = [plan for iteration in iterations for plan in _sending(body, iteration, analyser)]
    return pareto(found, lambda i: (i.stacked_bytes, i.host_bytes, i.peak_bytes, i.again.time + i.idle))


def divisions(length: int, plans: Sequence[Iteration], sending: Sequence[Iteration], most: int) -> Iterator[tuple]:
    """Loops of which all iterations send, or the first ones, as many as the host has room for.

    Args:
        length: of the loop.
        plans: of an iteration with everything on the device.
        sending: those with something on the host.
        most: bytes that the host has room for.
    """
    for plan in sending:
        num = min(length, most // plan.host_bytes)
        if num == length:
            yield (Part((length,), plan),)
        # One iteration is no loop to a compiler.
        num = min(num, length - 2)
        if num > 1:
            for other in plans:
                yield Part((num,), plan), Part((length - num,), other)
    for parts in mixes(length, [*plans, *sending]):
        if 0 < sum(part.length * part.plan.host_bytes for part in parts) <= most:
            yield parts


def _sending(body: Body, iteration: Iteration, analyser: Analyser) -> Iterator[Iteration]:
    """A plan with its largest values on the host: one, two, and so on, and as many as the link moves in time."""
    saves, avals = iteration.tree.saved, body.loop.body.avals
    is_one = len(saves) == 1 and not iteration.is_wrapped and isinstance(saves[0], SavedValues)
    if not (is_one or iteration.is_wrapped):
        return
    values = saves[0].named_values if is_one else ()
    held = [v for v in (*values, *body.read_carries(iteration)) if can_be_saved(avals[v])]
    size = lambda v: analyser.target.compiler.sent_bytes(avals[v])  # noqa: E731
    large = sorted((v for v in held if size(v) >= analyser.target.compiler.least_offload_bytes), key=lambda v: -size(v))
    large = large[:_MAX_SENT]
    sets = {frozenset(large[: i + 1]) for i in range(len(large))}
    room = _room(body, iteration, analyser)
    fitting: list[int] = []
    for v in large:
        if size(v) <= room:
            room -= size(v)
            fitting.append(v)
    for sent in sorted({*sets, frozenset(fitting)} - {frozenset()}, key=sorted):
        num_bytes = sum(map(size, sent))
        held_bytes = body.whole.layouts.held_bytes
        host = tuple(v for v in large if v in sent)
        kept = SavedValues(tuple(v for v in values if v not in sent), host)
        tree = replace(iteration.tree, saved=(kept,)) if is_one else replace(iteration.tree, host=host)
        yield replace(
            iteration,
            tree=tree,
            stacked_bytes=iteration.stacked_bytes - sum(map(held_bytes, sent)),
            host_bytes=num_bytes,
            idle=_idle(body, iteration, analyser, num_bytes),
        )


def _times(body: Body, iteration: Iteration) -> tuple[int, int]:
    """What an iteration's forward and backward take."""
    forward = body.forward.time
    return forward, max(0, body.whole.unplanned_cost - forward + iteration.again.time)


def _room(body: Body, iteration: Iteration, analyser: Analyser) -> int:
    """Bytes that the link moves each way while an iteration runs anyway."""
    if analyser.timer is count_flops:
        return 0
    return int(min(_times(body, iteration)) * analyser.target.host_bandwidth / 1e12)


def _idle(body: Body, iteration: Iteration, analyser: Analyser, num_bytes: int) -> int:
    """What an iteration waits for the link, in its forward and in its backward."""
    if analyser.timer is count_flops:
        return 0
    moving = math.ceil(1e12 * num_bytes / analyser.target.host_bandwidth)
    return sum(max(0, moving - time) for time in _times(body, iteration))
