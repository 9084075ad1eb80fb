"""What moved between two plans: their numbers, which blocks are kept, and what is saved."""

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ckptsolvers import Keep

from jaxckpt.model.option import Place
from jaxckpt.result.plan import Plan
from jaxckpt.units import short_bytes, short_count, show_bytes

# What is compared, and how it is shown.
_NUMBERS = {
    "budget_bytes": show_bytes,
    "unplanned_peak_bytes": show_bytes,
    "predicted_peak_bytes": show_bytes,
    "measured_peak_bytes": show_bytes,
    "least_peak_bytes": show_bytes,
    "constant_bytes": show_bytes,
    "host_budget_bytes": show_bytes,
    "host_bytes": show_bytes,
    "forward_flops": lambda x: f"{short_count(x)}FLOP",
    "recompute_flops": lambda x: f"{short_count(x)}FLOP",
    "recompute_cost": lambda x: f"{x:,}",
    "unplanned_cost": lambda x: f"{x:,}",
}
_TEXTS = ("target", "cost", "solver", "jax_version", "keeps_checkpoints", "max_cost")
_MOST_ROWS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Something that is another in the second plan.

    Attributes:
        name: an attribute of plans, where blocks are in the program, or what is saved.
        old: in the first plan; None where it has none.
        new: in the second.
    """

    name: str
    old: Any
    new: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanDiff:
    """What moved between two plans.

    Attributes:
        is_same_program: whether they are of one program; otherwise blocks are not compared.
        numbers: bytes, FLOPs and costs that differ, and what they are for.
        blocks: of each run of equations that is kept or recomputed otherwise, how often it runs again.
        saved: bytes of what is saved from forward to backward, where they differ.
    """

    is_same_program: bool
    numbers: tuple[Change, ...]
    blocks: tuple[Change, ...]
    saved: tuple[Change, ...]

    @property
    def is_empty(self) -> bool:
        """Whether the plans are alike."""
        return self.is_same_program and not (self.numbers or self.blocks or self.saved)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        """What a person reads."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        if self.is_empty:
            yield "the plans are alike"
        if not self.is_same_program:
            yield "the plans are of different programs: their numbers and what they save are compared, blocks are not"
        for change in self.numbers:
            shown = [_shown(change.name, x) for x in (change.old, change.new)]
            yield f"{change.name.replace('_', ' ')}: {shown[0]} -> {shown[1]}{_ratio(change)}"
        yield from _listed("blocks", [f"{c.name}: {_fate(c.old)} -> {_fate(c.new)}" for c in self.blocks])
        saved = [f"{c.name}: {short_bytes(c.old)} -> {short_bytes(c.new)}" for c in self.saved]
        yield from _listed("saved from forward to backward", saved)


def diff(old: Plan, new: Plan) -> PlanDiff:
    """Compare two plans.

    Args:
        old: the first.
        new: the second.
    """
    is_same = (old.fingerprint, old.keeps_checkpoints) == (new.fingerprint, new.keeps_checkpoints)
    names = (*_TEXTS, *_NUMBERS)
    pairs = ((name, getattr(old, name), getattr(new, name)) for name in names)
    return PlanDiff(
        is_same_program=is_same,
        numbers=tuple(Change(name=name, old=a, new=b) for name, a, b in pairs if a != b),
        blocks=tuple(_moved(old, new)) if is_same else (),
        saved=tuple(_saved(old, new)),
    )


def _moved(old: Plan, new: Plan) -> Iterator[Change]:
    """Runs of equations that one plan runs again more often than the other; plans may cut blocks differently."""
    ours, theirs = _fates(old), _fates(new)
    positions = sorted({*ours, *theirs})
    key = lambda p: (ours.get(p, _NO_PLAN)[0], theirs.get(p, _NO_PLAN)[0])  # noqa: E731
    for (a, b), group in itertools.groupby(positions, key):
        if a != b:
            run = list(group)
            first, last = run[0], run[-1]
            labels = dict.fromkeys((ours if first in ours else theirs)[p][1] for p in (first, last))
            yield Change(name=f"equations {first}-{last}  {' ... '.join(labels)}".rstrip(), old=a, new=b)


_NO_PLAN = (0, "")


def _fates(plan: Plan) -> dict[int, tuple[int, str]]:
    """For each equation, in how many regions it is recomputed, and its block's label."""
    if plan.schedule is None:
        return {}
    return {
        position: (depth, plan.block_labels[node.block])
        for node, depth in plan.schedule.walk()
        if isinstance(node, Keep)
        for position in plan.blocks[node.block]
    }


def _saved(old: Plan, new: Plan) -> Iterator[Change]:
    ours, theirs = _saved_bytes(old), _saved_bytes(new)
    names = sorted({*ours, *theirs}, key=lambda name: (-abs(ours.get(name, 0) - theirs.get(name, 0)), name))
    for name in names:
        if ours.get(name, 0) != theirs.get(name, 0):
            yield Change(name=name, old=ours.get(name, 0), new=theirs.get(name, 0))


def _saved_bytes(plan: Plan) -> dict[str, int]:
    found: dict[str, int] = {}
    for group in plan.saved:
        name = f"{group.shape_dtype} of {group.primitive} at {group.source} {group.scope}".rstrip()
        if group.place != Place.DEVICE.value:
            name += f" on the {group.place}"
        found[name] = found.get(name, 0) + group.size_bytes
    return found


def _shown(name: str, value: Any) -> str:
    return "none" if value is None else _NUMBERS.get(name, str)(value)


def _ratio(change: Change) -> str:
    if change.name not in _NUMBERS or not change.old or change.new is None:
        return ""
    return f" ({change.new / change.old - 1:+.1%})"


def _fate(depth: int) -> str:
    if not depth:
        return "kept"
    return "recomputed" if depth == 1 else f"recomputed {depth} deep"


def _listed(title: str, lines: list[str]) -> Iterator[str]:
    if not lines:
        return
    yield f"{title}:"
    yield from (f"  {line}" for line in lines[:_MOST_ROWS])
    if len(lines) > _MOST_ROWS:
        yield f"  and {len(lines) - _MOST_ROWS} more"
