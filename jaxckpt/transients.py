"""What the backward of a branch needs while all that its forward handed over stays where it is.

The operands of a conditional live until it ends, so unlike in a program nothing that was saved is freed on the way.
"""

from dataclasses import replace
from typing import Any

from ckptsolvers import Keep, Problem, Schedule, simulate
from ckptsolvers.schedule import Node, region

from jaxckpt.block_model import EVERYTHING


def transient_bytes(blocks: Any, node: Node) -> int:
    """Most bytes alive at once in the backward of one node of a schedule, beyond what was handed over.

    Args:
        blocks: the branch's blocks.
        node: one of its schedule's outermost nodes.

    Returns:
        Bytes.
    """
    if isinstance(node, Keep):
        option = blocks.problem.blocks[node.block].options[node.option]
        transients = blocks.transients[node.block]
        if transients:
            return transients[node.option]
        # A checkpoint copies what it is given, since a conditional's operands are not its own.
        return option.backward_peak_bytes - (option.saved_bytes if option.name == EVERYTHING else 0)
    alone = Schedule((_shifted(node, node.start),))
    return simulate(_part(blocks.problem, node.start, node.stop), alone).peak_bytes


def _shifted(node: Node, by: int) -> Node:
    if isinstance(node, Keep):
        return Keep(node.block - by, node.option)
    return region(tuple(_shifted(child, by) for child in node.children))


def _part(problem: Problem, start: int, stop: int) -> Problem:
    """Consecutive blocks on their own: what they make for others is held by those, and takes nothing here."""
    kept = [i for k in range(start, stop) for i in problem.outputs[k]]
    values = []
    for i in kept:
        value = problem.values[i]
        inside = tuple(r - start for r in value.read_by if r < stop)
        is_last = len(inside) < len(value.read_by)
        values.append(
            replace(
                value,
                size_bytes=0 if is_last else value.size_bytes,
                made_by=value.made_by - start,
                read_by=(*inside, stop - start) if is_last else inside,
            )
        )
    # Positions among inputs and outputs mean others here; they only let go of something earlier.
    blocks = tuple(
        replace(block, options=tuple(replace(o, saved_outputs=(), unread_inputs=()) for o in block.options))
        for block in problem.blocks[start:stop]
    )
    return Problem(blocks=blocks, values=tuple(values))
