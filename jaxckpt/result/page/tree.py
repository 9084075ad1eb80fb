"""The tree of regions: as rows of a chart, and as nested lists in words."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ckptsolvers import Keep
from ckptsolvers.schedule import Node

from jaxckpt.kinds.base import kind_named
from jaxckpt.result._protocols import PlanLike
from jaxckpt.result.regions import runs, span


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """A node of the tree in words: "keep" or "recompute", what, and what is inside."""

    kind: str
    text: str
    inside: tuple["Branch", ...] = ()


def branches(plan: PlanLike) -> tuple[Branch, ...]:
    """The tree in words; empty where the program runs as it is."""
    return () if plan.schedule is None else tuple(_branches(plan.schedule.nodes, plan))


def region_rows(plan: PlanLike) -> dict[str, Any] | None:
    """The rows of the chart, with how many blocks and levels there are; None where there is no schedule."""
    if plan.schedule is None:
        return None
    rows = list(_rows(plan.schedule.nodes, plan, 0))
    return {"blocks": len(plan.blocks), "depth": 1 + max(row["depth"] for row in rows), "rows": rows}


# Regions nest some twenty deep at most, so recursion is safe here.
def _branches(nodes: Sequence[Node], plan: PlanLike) -> Iterator[Branch]:
    for run in runs(nodes):
        first, last = run[0], run[-1]
        if isinstance(first, Keep):
            saves = [(node.start, plan.block_saves[node.start]) for node in run]
            said = [f"block {k}: {line}" for k, save in saves for line in kind_named(save.kind).describe(save)]
            inside = tuple(Branch(kind="", text=line) for line in said)
            yield Branch(kind="keep", text=f"keep {span(first.start, last.stop, plan)}", inside=inside)
        else:
            nested = any(not isinstance(child, Keep) for child in first.children)
            inside = tuple(_branches(first.children, plan)) if nested else ()
            yield Branch(kind="recompute", text=f"recompute {span(first.start, first.stop, plan)}", inside=inside)


def _rows(nodes: Sequence[Node], plan: PlanLike, depth: int) -> Iterator[dict[str, Any]]:
    for run in runs(nodes):
        if isinstance(run[0], Keep):
            yield from (_row(*part, plan, depth) for part in _kept(run[0].start, run[-1].stop, plan))
        else:
            yield _row(run[0].start, run[0].stop, "recompute", "", plan, depth)
            yield from _rows(run[0].children, plan, depth + 1)


def _kept(start: int, stop: int, plan: PlanLike) -> Iterator[tuple[int, int, str, str]]:
    """Kept blocks: those in a row that are left to JAX together, and each that saves a part of its values alone."""
    for is_left, group in itertools.groupby(range(start, stop), lambda k: plan.block_saves[k].is_left_to_jax):
        blocks = list(group)
        if is_left:
            yield blocks[0], blocks[-1] + 1, "keep", "saves what its backward reads"
            continue
        for k in blocks:
            save = plan.block_saves[k]
            num = len(save.named_values)
            said = "; ".join(kind_named(save.kind).describe(save)) or f"saves {num} value{'s' * (num != 1)} by name"
            yield k, k + 1, "part", said


def _row(start: int, stop: int, kind: str, said: str, plan: PlanLike, depth: int) -> dict[str, Any]:
    blocks, _, what = span(start, stop, plan).partition("  ")
    place = {"start": start, "stop": stop, "depth": depth, "bottom": depth + 0.92}
    return {**place, "kind": _KINDS[kind], "color": KIND_COLORS[kind], "blocks": blocks, "what": what, "saves": said}


_KINDS = {"keep": "kept whole", "part": "kept in part", "recompute": "recomputed"}
KIND_COLORS = {"keep": "#56B4E9", "part": "#009E73", "recompute": "#E69F00"}
