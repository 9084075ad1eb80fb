"""What a plan in place of a function's own checkpoints would take: at the same work, and at the same bytes."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from jaxckpt.diagnosis.subject import Subject
from jaxckpt.errors import OptionError, UnsupportedProgramError
from jaxckpt.result.diagnosis import Diagnosis
from jaxckpt.result.findings import Offer
from jaxckpt.search.shared_budget import Picks
from jaxckpt.search.step import Step, StepOptions

# How many plans are compiled to find one at the same bytes.
_MOST_TRIES = 3


def with_offers(found: Diagnosis, subject: Subject) -> Diagnosis:
    """Add what plans would take, measured as long as compiles are left.

    Args:
        found: the diagnosis of a function with checkpoints.
        subject: what was examined.
    """
    donated = subject.donate_argnums
    places = (donated,) if isinstance(donated, int) else tuple(donated)
    options = StepOptions(
        cost="flops",
        target=subject.target,
        keep_checkpoints=False,
        donated=(places, ()),
        jit=subject.jit_options,
    )
    fun = functools.partial(subject.fun, *subject.closed_over)
    try:
        step = Step(fun, tuple(subject.specs), options)
        paths = list(_paths(step))
    except (OptionError, UnsupportedProgramError) as error:
        return replace(found, notes=(*found.notes, f"nothing was planned: {str(error)[:200]}"))
    if len(paths) < 2:
        return replace(found, notes=(*found.notes, "there is no plan for what it differentiates"))
    return _Offers(found, subject, step, paths).added()


def _paths(step: Step) -> Iterator[Picks]:
    """From the least bytes to no plan, all functions together."""
    for i in range(max(map(len, step.options_of), default=0)):
        yield tuple(min(i, len(row) - 1) for row in step.options_of)


class _Offers:
    def __init__(self, found: Diagnosis, subject: Subject, step: Step, paths: list[Picks]):
        self.found, self.subject, self.step, self.paths = found, subject, step, paths
        self.total = max(1, sum(step.analyses[key].unplanned_cost for key in step.keys))
        self.notes: list[str] = []

    def added(self) -> Diagnosis:
        """The diagnosis with its offers."""
        offers = self._same_cost(), self._same_bytes()
        for what, offer in zip(("work", "bytes"), offers, strict=True):
            if offer is None:
                self.notes.append(f"no plan was found that takes less at the same {what}")
        return replace(
            self.found,
            same_cost=offers[0],
            same_bytes=offers[1],
            notes=(*self.found.notes, *self.notes),
            num_compiles=self.subject.num_compiles,
        )

    def _same_cost(self) -> Offer | None:
        """The plan with the least bytes that recomputes no more."""
        limit = self.found.flops - self.found.bare_flops
        cheap = [p for p in self.paths if self._flops(p) <= limit]
        if not cheap:
            return None
        offer = self._offer(min(cheap, key=lambda p: (self._expected(p), self._flops(p))))
        return offer if offer.device_bytes < self.found.device_bytes else None

    def _same_bytes(self) -> Offer | None:
        """The plan with the least work that takes no more bytes; where it does, one that is expected to take fewer."""
        most, off = self.found.device_bytes, 1.0
        again = self.found.flops - self.found.bare_flops
        for _ in range(_MOST_TRIES):
            small = [p for p in self.paths if self._expected(p) * off <= most and self._flops(p) < again]
            if not small:
                return None
            picks = min(small, key=lambda p: (self._flops(p), self._expected(p)))
            offer = self._offer(picks)
            if offer.device_bytes <= most:
                return offer
            off = offer.device_bytes / max(1, self._expected(picks))
        return None

    def _flops(self, picks: Picks) -> int:
        return round(self.step.cost(picks) * self.total)

    def _expected(self, picks: Picks) -> int:
        """Device bytes: the model's, off by as much as they are without any checkpoint."""
        step, bare = self.step, self.found.bare_bytes
        predicted, unplanned = (self._peak(p) for p in (picks, step.without))
        fixed = step.predicted_bytes(0)
        ratio = 1.0 if bare is None else max(0, bare - fixed) / max(1, unplanned)
        return fixed + round(predicted * ratio)

    def _peak(self, picks: Picks) -> int:
        return max(row[i] for row, i in zip(self.step.peaks, picks, strict=True))

    def _offer(self, picks: Picks) -> Offer:
        label: Any = "predicted"
        device_bytes = self._expected(picks)
        if picks in self.step.measured or self.subject.can_compile:
            self.subject.num_compiles += picks not in self.step.measured
            device_bytes, label = self.step.measure(picks).device_bytes, "measured"
        return Offer(device_bytes=device_bytes, recomputed_flops=self._flops(picks), label=label)
