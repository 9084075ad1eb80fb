"""The names to save: a record that prints the policy as code, and as MaxText's configuration."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxckpt.compilation.measure import Measurement
from jaxckpt.program.regions import Region
from jaxckpt.units import short_bytes, short_count, show_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Name:
    """A name that `checkpoint_name` gives.

    Attributes:
        name: as it is written.
        place: where its values are from forward to backward: "device", or "remat" for nowhere.
        size_bytes: what they hold on each device if the name is saved beside the others that are.
        spared_cost: what of a step's cost that spares, in the unit of the cost.
        source: the first line that gives it.
        idle: why saving it does nothing, whatever else is saved; empty where it does something.
    """

    name: str
    place: str
    size_bytes: int
    spared_cost: int
    source: str
    idle: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """Which of a function's own names its `jax.checkpoint` regions save within a budget. Its `str` is the report.

    Attributes:
        target: for which chip.
        cost: what was minimised, "time" (picoseconds, modelled) or "flops".
        budget_bytes: device bytes that were given, `reserve_bytes` taken off.
        reserve_bytes: what is left of the budget for others.
        names: every name, in the order of the program.
        measurement: of the program with these names saved; None where nothing was compiled.
        predicted_peak_bytes: what was expected of them.
        unplanned_peak_bytes: device bytes without the function's own checkpoints, of which a budget may be a share.
        is_unplanned_measured: or predicted.
        written_peak_bytes: with the policies that stand in the program; None where that was not compiled.
        written_flops: of a step under those.
        least_peak_bytes: the least of what was measured, or predicted where nothing was.
        unplanned_flops: of a step without checkpoints.
        recompute_flops: what is done again.
        unplanned_cost: of a step without checkpoints, in the unit of the cost.
        recompute_cost: what is done again, and what saving takes, in that unit.
        bound_recompute_cost: no choice that is expected to fit takes less.
        num_judged: how many choices were judged, of those that differ; None for branch and bound.
        is_stopped: whether `max_compiles` ended a search that would have gone on.
        num_compiles: how many programs were compiled.
        regions: the function's `jax.checkpoint` regions as they are written.
    """

    target: str
    cost: str
    budget_bytes: int
    reserve_bytes: int
    names: tuple[Name, ...]
    measurement: Measurement | None
    predicted_peak_bytes: int
    unplanned_peak_bytes: int
    is_unplanned_measured: bool
    written_peak_bytes: int | None
    written_flops: int
    least_peak_bytes: int
    unplanned_flops: int
    recompute_flops: int
    unplanned_cost: int
    recompute_cost: int
    bound_recompute_cost: int
    num_judged: int | None
    is_stopped: bool
    num_compiles: int
    regions: tuple[Region, ...]

    @property
    def saved(self) -> tuple[str, ...]:
        """The names to save."""
        return tuple(name.name for name in self.names if name.place == "device")

    @property
    def measured_peak_bytes(self) -> int | None:
        """Device bytes with these names saved, as the target's compiler counts them."""
        return None if self.measurement is None else self.measurement.device_bytes

    @property
    def peak_bytes(self) -> int:
        """The same, or what is predicted where nothing was measured."""
        return self.predicted_peak_bytes if self.measurement is None else self.measurement.device_bytes

    @property
    def policy(self) -> Callable[..., Any]:
        """The policy, for `jax.checkpoint(layer, policy=...)`."""
        return jax.checkpoint_policies.save_only_these_names(*self.saved)

    @property
    def code(self) -> str:
        """The policy as code."""
        listed = ", ".join(f'"{name}"' if '"' not in name else repr(name) for name in self.saved)
        return f"jax.checkpoint_policies.save_only_these_names({listed})"

    @property
    def maxtext(self) -> str:
        """The policy as lines of MaxText's configuration."""
        lines = [f"{name.name}: {name.place}" for name in self.names if name.idle != NOWHERE]
        return "\n".join(["remat_policy: custom", *lines])

    def to_json(self) -> dict[str, Any]:
        """The record under its attributes' names, with the policy in both forms."""
        made = dataclasses.asdict(self)
        made["regions"] = [
            {key: sorted(v) if isinstance(v, frozenset) else v for key, v in region.items()}
            for region in made["regions"]
        ]
        return {**made, "saved": list(self.saved), "code": self.code, "maxtext": self.maxtext}

    def __str__(self) -> str:
        """The report."""
        return "\n".join(_lines(self))


NOWHERE = "it occurs nowhere in the program"


def _lines(found: Names) -> Iterator[str]:
    active = [name for name in found.names if not name.idle]
    instead = f"instead of {short_bytes(found.unplanned_peak_bytes)} without checkpoints"
    guess = "" if found.is_unplanned_measured else " (predicted)"
    share = found.recompute_flops / max(1, found.unplanned_flops)
    yield (
        f"Names for {found.target}: {len(found.saved)} of {len(active)} saved, {short_bytes(found.peak_bytes)} "
        f"{instead}{guess}, {share:.1%} of the step's FLOPs done again."
    )
    yield from _table(_sizes(found))
    yield ""
    yield from _table(
        [
            ("name", "place", "holds", "spares", "first line"),
            *((n.name, n.place, short_bytes(n.size_bytes), _shown(found, n.spared_cost), n.source) for n in active),
        ]
    )
    for name in found.names:
        if name.idle:
            yield f"{name.name} does nothing: {name.idle}."
    yield from _about_regions(found)
    yield ""
    yield f"policy={found.code}"
    yield ""
    yield "In MaxText's configuration:"
    yield found.maxtext


def _sizes(found: Names) -> Iterator[tuple[str, ...]]:
    at_most = " at most" if found.measurement and found.measurement.is_at_most else ""
    yield "budget", show_bytes(found.budget_bytes), "given"
    label = "measured" if found.is_unplanned_measured else "predicted"
    yield "without checkpoints", show_bytes(found.unplanned_peak_bytes), label
    if found.written_peak_bytes is not None:
        again = f"measured, {short_count(found.written_flops - found.unplanned_flops)}FLOP done again"
        yield "as it is written", show_bytes(found.written_peak_bytes), again
    label = "predicted" if found.measurement is None else f"measured{at_most}"
    yield "these names saved", show_bytes(found.peak_bytes), label
    yield "the least", show_bytes(found.least_peak_bytes), label
    share = found.recompute_flops / max(1, found.unplanned_flops)
    yield "done again", f"{short_count(found.recompute_flops)}FLOP, {share:.2%} of the step", "counted"
    if found.cost == "time":
        share = found.recompute_cost / max(1, found.unplanned_cost)
        yield "", f"{share:.2%} of the step's time, and what saving takes", "modelled"
    bound = _shown(found, found.bound_recompute_cost)
    if found.num_judged is not None:
        yield "bound", bound, f"of {found.num_judged} choices that differ, all judged"
    else:
        gap = (found.recompute_cost - found.bound_recompute_cost) / max(1, found.unplanned_cost)
        yield "bound", bound, f"by branch and bound; {gap:.2%} of the step between"
    stopped = "and no more were made; with more there may be a better choice" if found.is_stopped else ""
    yield "compiles", str(found.num_compiles), stopped


def _shown(found: Names, cost: int) -> str:
    if found.cost == "flops":
        return f"{short_count(cost)}FLOP"
    return f"{cost / max(1, found.unplanned_cost):.2%} of the step"


def _about_regions(found: Names) -> Iterator[str]:
    """Where the policy belongs, and what stands there now."""
    for region in found.regions:
        where = f"jax.checkpoint at {region.source or 'an unknown line'}"
        if not region.is_about_names:
            yield f"{where} has no names inside, and its own policy: it stays as it is."
            continue
        now = [f"saves {', '.join(sorted(region.saves))}"] if region.saves else []
        now += [f"offloads {', '.join(sorted(region.offloads))}"] if region.offloads else []
        now += [f"saves the results of {region.num_others} other operations"] if region.num_others else []
        yield f"{where} takes the policy; as it is written it {' and '.join(now) or 'saves nothing'}."


def _table(rows: Iterator[tuple[str, ...]] | Sequence[tuple[str, ...]]) -> Iterator[str]:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
