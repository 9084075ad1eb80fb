"""What a plan says about a program: its blocks, the tree of regions over them, and what each block saves."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ckptsolvers import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopPart:
    """Consecutive iterations of a loop that are run alike.

    Attributes:
        lengths: iterations of each level of scans of checkpointed scans, outermost first; their product is the number
            of iterations.
        body: the plan of one iteration, over the body's equations as flattening it numbers them.
        num_states: instead of levels, binomial checkpointing with this many carries held; None for levels.
    """

    lengths: tuple[int, ...]
    body: "Tree"
    num_states: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopPlan:
    """How a loop is run.

    Attributes:
        parts: in the order they run; each is a loop of its own.
    """

    parts: tuple[LoopPart, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchPlan:
    """How a conditional is run.

    Attributes:
        branches: the plan of each branch, over its equations as flattening it numbers them.
    """

    branches: tuple["Tree", ...]


# What a kept block saves by name; None leaves the block to JAX, without a checkpoint.
Saved = tuple[int, ...] | LoopPlan | BranchPlan | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """A program's plan.

    Attributes:
        blocks: `[n]`, positions of each block's equations.
        schedule: the regions.
        saved: `[n]`, what each block saves when it is kept.
    """

    blocks: tuple[tuple[int, ...], ...]
    schedule: Schedule
    saved: tuple[Saved, ...]


def saved_to_json(saved: Saved) -> Any:
    """A block's save as plain data."""
    if isinstance(saved, BranchPlan):
        return {"branches": [_tree_to_json(tree) for tree in saved.branches]}
    if not isinstance(saved, LoopPlan):
        return saved
    return {
        "parts": [
            {"lengths": part.lengths, "num_states": part.num_states, **_tree_to_json(part.body)} for part in saved.parts
        ]
    }


def _tree_to_json(tree: Tree) -> dict[str, Any]:
    return {
        "blocks": tree.blocks,
        "schedule": tree.schedule.to_json(),
        "saved": [saved_to_json(s) for s in tree.saved],
    }


def saved_from_json(data: Any) -> Saved:
    """Read what `saved_to_json` made.

    Raises:
        ValueError, TypeError, KeyError: it is something else.
    """
    if data is None:
        return None
    if not isinstance(data, dict):
        return tuple(map(int, data))
    if "branches" in data:
        return BranchPlan(branches=tuple(map(_tree_from_json, data["branches"])))
    return LoopPlan(parts=tuple(map(_part_from_json, data["parts"])))


def _part_from_json(data: dict[str, Any]) -> LoopPart:
    lengths = tuple(map(int, data["lengths"]))
    num_states = None if data["num_states"] is None else int(data["num_states"])
    if not lengths or min(lengths) < 1 or (num_states is not None and (num_states < 1 or len(lengths) > 1)):
        raise ValueError(f"a loop's lengths are {lengths}, the states it holds {num_states}")
    return LoopPart(lengths=lengths, body=_tree_from_json(data), num_states=num_states)


def _tree_from_json(data: dict[str, Any]) -> Tree:
    tree = Tree(
        blocks=blocks_from_json(data["blocks"]),
        schedule=Schedule.from_json(data["schedule"]),
        saved=tuple(map(saved_from_json, data["saved"])),
    )
    check_cover(tree.schedule, len(tree.blocks))
    return tree


def blocks_from_json(data: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Positions of each block's equations."""
    return tuple(tuple(map(int, block)) for block in data)


def check_cover(schedule: Schedule, num_blocks: int) -> None:
    """Refuse a schedule that does not cover this many blocks, each once and in order.

    Raises:
        ValueError: with the first block that is amiss.
    """
    at = 0
    for node, _ in schedule.walk():
        if node.start != at:
            raise ValueError(f"its schedule covers block {node.start} where {at} is due")
        at = node.stop if hasattr(node, "option") else at
    if at != num_blocks:
        raise ValueError(f"its schedule covers {at} blocks of {num_blocks}")
