"""A page in one line: does it fit, by how much, on which chip, at what cost."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxckpt.result._protocols import PlanLike
from jaxckpt.result.page.content import Content
from jaxckpt.targets.chip import known_chips
from jaxckpt.units import short_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One number: what it is of, the number, and where it comes from."""

    title: str
    number: str
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a page says first.

    Attributes:
        word: "Fits", "Does not fit" or, without a budget, "Planned".
        is_good: whether it fits, or has nothing to fit into.
        sentence: the rest of the line.
        tiles: the numbers behind it.
    """

    word: str
    is_good: bool
    sentence: str
    tiles: tuple[Tile, ...]


def verdict(content: Content) -> Verdict:
    """The verdict of a page."""
    target, peak, label = _peak(content)
    before, before_label = _before(content)
    budget = budget_of(content)
    cost, number, cost_label = _cost(content)
    each, of = (", per device", " per device") if is_sharded(content) else ("", "")
    spare = None if budget is None else budget - peak
    words = [f"{short_bytes(peak)}{of} on {target}"]
    if spare is not None:
        words.append(f"{short_bytes(abs(spare))} {'below' if spare >= 0 else 'above'} the budget")
    words.append(f"at {cost}")
    fits = spare is None or spare >= 0
    tiles = [
        Tile(title="Peak under the plan", number=short_bytes(peak), label=label + each),
        Tile(
            title="Without a plan",
            number="not compiled" if before is None else short_bytes(before),
            label=before_label + each,
        ),
    ]
    if before:
        tiles.append(Tile(title="Taken off", number=f"{1 - peak / before:.1%}", label="of the bytes without a plan"))
    if spare is not None:
        tiles.append(Tile(title="Budget left", number=short_bytes(spare), label=f"of {short_bytes(budget or 0)}{each}"))
    tiles.append(Tile(title="Cost", number=number, label=cost_label))
    word = "Planned" if budget is None else "Fits" if fits else "Does not fit"
    return Verdict(word=word, is_good=fits, sentence=", ".join(words), tiles=tuple(tiles))


def is_sharded(content: Content) -> bool:
    """Whether bytes are those of each of several devices."""
    return any(plan.split > 1 for plan in content.plans)


def budget_of(content: Content) -> int | None:
    """What had to hold it, in bytes; None where a cost was the limit."""
    return content.plans[0].budget_bytes if content.step is None else content.step.budget_bytes


def chip_bytes(content: Content) -> int | None:
    """What the chip has; None where that is the host's, or is not known."""
    chip = known_chips().get(_peak(content)[0].partition(":")[0].lower())
    return None if chip is None else chip.memory_bytes


def _peak(content: Content) -> tuple[str, int, str]:
    if content.step is not None:
        measured = content.step.measurement
        return measured.target, measured.device_bytes, "measured, whole step"
    plan = content.plans[0]
    return plan.target, plan.peak_bytes, "predicted" if plan.measured_peak_bytes is None else "measured"


def _before(content: Content) -> tuple[int | None, str]:
    unplanned, step, plan = content.reading.unplanned, content.step, content.plans[0]
    if step is not None and step.unplanned is not None:
        return step.unplanned.device_bytes, "measured, whole step"
    if step is None and plan.is_unplanned_measured:
        return plan.unplanned_peak_bytes, "measured"
    if unplanned is not None:
        return unplanned.totals.device_bytes, "estimated" if unplanned.is_estimated else "as compiled for this page"
    return (None, "") if step is not None else (plan.unplanned_peak_bytes, "predicted")


def _cost(content: Content) -> tuple[str, str, str]:
    """In words, as a number, and where it comes from."""
    share = cost_share(content.plans)
    of = "step time" if content.plans[0].cost == "time" else "FLOPs"
    label = f"{of}, {'modelled' if of == 'step time' else 'counted'}"
    if share is None:
        return "no cost: nothing is recomputed", "none", label
    return f"{abs(share):.1%} {'more' if share >= 0 else 'less'} {of}", f"{share:+.1%}", label


def cost_share(plans: Sequence[PlanLike]) -> float | None:
    """What plans add to the cost of what they are of; None where they add nothing."""
    extra = sum(plan.recompute_cost for plan in plans)
    return extra / max(1, sum(plan.unplanned_cost for plan in plans)) if extra else None
