"""Whether a plan means the program it is applied to: its blocks, their order, and what each of them saves."""

import itertools
from collections import Counter
from collections.abc import Sequence

from ckptsolvers import Keep

from jaxckpt.kinds.base import kind_named
from jaxckpt.model.tree import Tree, check_cover
from jaxckpt.program.ir import Equation, Program


def check_tree(program: Program, tree: Tree, where: str = "", saves: str = "saved") -> None:
    """Refuse a plan that is not one of this program. Linear in its size.

    Args:
        program: the flat program.
        tree: its plan.
        where: the plan stands in a file, such as `block_saves[3].parts[0].`.
        saves: the name there of what the blocks save.

    Raises:
        ValueError: with the path of the first thing that is wrong.
    """
    if not len(tree.blocks) == len(tree.saved):
        raise ValueError(f"{where}{saves} has {len(tree.saved)} entries for {len(tree.blocks)} blocks")
    try:
        check_cover(tree.schedule, len(tree.blocks))
    except ValueError as error:
        raise ValueError(f"{where}schedule: {error}") from error
    _check_host(program, tree, where)
    blocks = [_equations(program, block, f"{where}blocks[{k}]") for k, block in enumerate(tree.blocks)]
    _check_order(program, tree, blocks, where)
    _check_effects(tree, blocks, where)
    for k, (block, save) in enumerate(zip(blocks, tree.saved, strict=True)):
        kind_named(save.kind).check(save, block, f"{where}{saves}[{k}]")


def _check_host(program: Program, tree: Tree, where: str) -> None:
    """Inputs wait on the host where one region around all of the program reads them."""
    is_whole = len(tree.schedule.nodes) == 1 and not isinstance(tree.schedule.nodes[0], Keep)
    for i, v in enumerate(tree.host):
        if not is_whole or v not in program.inputs or v in tree.host[:i]:
            raise ValueError(f"{where}host[{i}] is {v}, which is no input of one region around all, or is named twice")


def _equations(program: Program, block: Sequence[int], where: str) -> list[Equation]:
    num = len(program.equations)
    if not block or len(set(block)) != len(block):
        raise ValueError(f"{where} is empty or names an equation twice")
    for i, position in enumerate(block):
        if not 0 <= position < num:
            raise ValueError(f"{where}[{i}] is {position}, and the program has {num} equations")
    return [program.equations[position] for position in block]


def _check_order(program: Program, tree: Tree, blocks: Sequence[Sequence[Equation]], where: str) -> None:
    """What an equation reads was made before it, and every equation stands in a block."""
    num_blocks = Counter(itertools.chain.from_iterable(tree.blocks))
    # Cheap equations may stand in several blocks, in each that reads what they make.
    copied = {v for i, num in num_blocks.items() if num > 1 for v in program.equations[i].outputs}
    if not copied.isdisjoint(x for x in program.outputs if isinstance(x, int)):
        raise ValueError(f"{where}blocks: an equation that makes a result stands in several blocks")
    made = set(program.inputs)
    for k, block in enumerate(blocks):
        own: set[int] = set()
        for i, eqn in enumerate(block):
            if any(v not in made and v not in own for v in eqn.reads):
                raise ValueError(f"{where}blocks[{k}][{i}] reads what no equation before it makes")
            own.update(eqn.outputs)
        made |= own - copied
    if missing := set(range(len(program.equations))) - num_blocks.keys():
        raise ValueError(f"{where}blocks: no block has equation {min(missing)} of the program")


def _check_effects(tree: Tree, blocks: Sequence[Sequence[Equation]], where: str) -> None:
    """What has an effect runs once, in the program's order, and outside of regions."""
    outside = {node.block for node in tree.schedule.nodes if isinstance(node, Keep)}
    last = -1
    for k, (positions, block) in enumerate(zip(tree.blocks, blocks, strict=True)):
        for position, eqn in zip(positions, block, strict=True):
            if eqn.has_effects and (position <= last or k not in outside):
                raise ValueError(f"{where}blocks[{k}] has a side effect, which would come twice or in another order")
            last = position if eqn.has_effects else last
