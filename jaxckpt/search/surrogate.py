"""The bytes to expect of a candidate, from the model and from what compilers measured of its neighbours.

A surrogate in the sense of Bayesian optimisation. Its prior is the model's prediction, times a calibrated ratio. The
prediction error of one kind of candidates is a Brownian bridge between measured points, over the logarithm of predicted
bytes: interpolated linearly, with a variance that grows with the distance to the measured neighbours, and beyond the
outermost ones a random walk. Another kind's error counts too, halved and with more variance.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

# Plans whose predicted bytes are this far apart hold the same buffers of the compiler's own. Over pairs of plans of one
# program on CPU and H100 the bytes of one that is 10 % to 60 % larger or smaller are then off by 2.2 and 3.1 % in the
# median, and by 3.6 % with the ratio of measured to predicted bytes instead.
_ALIKE = 1.3
# How far predictions may be off, as shares of the bytes: before anything is measured, beside a plan of another kind, of
# a plan e times as large as the nearest that is known, and of one that is all but known.
_UNKNOWN, _OTHER_KIND, _PER_FOLD, _LEAST = 0.04, 0.03, 0.08, 0.002
# What plans of one kind are off by is half of what those of another kind are, give or take as much.
_SHARED = 0.5
# What the model misses is mostly a few buffers, which are as large in every plan. So predicted bytes are exceeded by
# hardly more than this share of themselves and this share of the unplanned program's; of the latter the less, the fewer
# e-folds away a measured plan of the kind is. Chosen on up to eight measured plans each of nested loops, branches, a
# chain, a residual network, a graph network, dropout, an LSTM and Equinox (CPU, jax 0.12), 40 budgets each, what lies
# between the plans interpolated: 0.6 % are over, and 1.3 % with a record of one plan, where a tenth and a twentieth of
# the predicted bytes left 6.6 and 7.8 %. On seven other models (revolve, a U-Net's skips, convolutions, a loss that
# differentiates, an ODE, Linen, 64 layers) none is over, and 0.4 % with a record (6.4 and 9.3 %); of an eighth,
# Haiku's, all 40 are, and 19 of 80 (38 and 20): there XLA fuses sums of all layers, which holds their operands. In
# exchange 5 % of the budgets are refused that something fits (2.3 and 0.5 %), and plans use 87.5 and 91.1 % of them
# (89.4 and 94.5 %).
_MISSED_SHARE, _MISSED_BUFFERS = 0.03, 0.04


def offset_at(place: float, places: Sequence[float], offsets: Sequence[float]) -> float:
    """The prediction error at a place: the bridge's mean, linear between measured points.

    A compiler's own buffers are as large in plans of like size, and a share of what much smaller ones take.

    Args:
        place: predicted bytes.
        places: `[num_known]` predicted bytes, ascending.
        offsets: `[num_known]` measured less expected bytes.
    """
    if not places:
        return 0.0
    return float(np.interp(place, places, offsets)) * min(1.0, _ALIKE * place / max(1e-9, places[0]))


class Surrogate:
    """Device bytes as a Brownian bridge between measured points; `BudgetSearch` compiles by expected improvement on it.

    Args:
        fixed_bytes: what every candidate takes.
        prior_ratio: measured over predicted bytes to expect before anything is measured, by predicted bytes.
        before: what was measured of the same program: kinds, predicted bytes and measured ones beyond the fixed ones.
        spread: how far from the prior the first one may be, as a share of its bytes.
        unplanned_bytes: predicted without a plan, beyond the fixed ones.
    """

    def __init__(
        self,
        fixed_bytes: int,
        *,
        prior_ratio: Callable[[int], float] = lambda predicted_bytes: 1.0,
        before: Sequence[tuple[int, int, float]] = (),
        spread: float = 0.0,
        unplanned_bytes: int = 0,
    ):
        self.fixed_bytes, self.before, self.spread = fixed_bytes, before, spread
        self.unplanned_bytes = unplanned_bytes
        self._prior_ratio = functools.cache(prior_ratio)
        self._measured: list[tuple[int, int, float]] = []  # as `before`
        self._known_offsets: dict[int | None, tuple[dict[int, float], dict[int, float]]] = {}

    def fresh(self) -> "Surrogate":
        """One that expects what is predicted, and knows of no record and no measurement."""
        return Surrogate(self.fixed_bytes)

    def observe(self, predicted_bytes: int, kind: int, device_bytes: int) -> None:
        """Learn what a candidate measured."""
        self._measured.append((kind, predicted_bytes, device_bytes - self.fixed_bytes))
        self._known_offsets.clear()

    def mean(self, predicted_bytes: int, kind: int | None = None) -> float:
        """Device bytes to expect of a candidate of a kind, or of any."""
        return self._prior(predicted_bytes) + self._offset(predicted_bytes, kind)[0]

    def at_most(self, predicted_bytes: int, kind: int) -> float:
        """Device bytes that a candidate hardly exceeds, for where it is not measured."""
        known = [p for k, p, _ in (*self.before, *self._measured) if k == kind]
        size, prior = self.mean(predicted_bytes, kind), self._prior(predicted_bytes)
        if not any(p <= predicted_bytes for p in known):
            # That larger plans take less than is predicted says little: what is missed there they may share in time.
            size = max(size, prior)
        nearest = min((abs(math.log(max(1, predicted_bytes) / max(1, p))) for p in known), default=1.0)
        missed = _MISSED_BUFFERS * min(1.0, nearest) * self.unplanned_bytes
        return size + _MISSED_SHARE * (size - self.fixed_bytes) + missed

    def chance(self, predicted_bytes: int, kind: int, budget_bytes: int) -> float:
        """The probability that a candidate fits the budget."""
        offset, variance = self._offset(predicted_bytes, kind)
        size = self._prior(predicted_bytes) + offset - self.fixed_bytes
        margin = 0.0 if self._measured else self.spread
        room = budget_bytes - self.fixed_bytes
        off = (room - size * (1 + margin)) / max(1e-9, abs(size) * math.sqrt(variance))
        # Student's distribution with two degrees of freedom: errors many times the usual one are rare, but there are.
        return 0.5 + off / (2 * math.sqrt(2 + off * off))

    def _prior(self, predicted_bytes: int) -> float:
        return self.fixed_bytes + predicted_bytes * self._prior_ratio(predicted_bytes)

    def _offset(self, predicted_bytes: int, kind: int | None) -> tuple[float, float]:
        """The prediction error's mean in bytes, and its variance as a share of the bytes, squared."""
        size, estimates = max(1, predicted_bytes), []
        for is_other, offsets in enumerate(self._offsets(kind)):
            if offsets:
                offset = offset_at(predicted_bytes, list(offsets), list(offsets.values()))
                offset *= _SHARED if is_other else 1
                other = _OTHER_KIND + abs(offset) / size if is_other else 0.0
                estimates.append((offset, _LEAST**2 + _PER_FOLD**2 * _distance(size, offsets) + other**2))
        if not estimates:
            return 0.0, _UNKNOWN**2
        # What is near says more than what is far, and what is of the same kind more than what is of another one.
        weights = sum(1 / variance for _, variance in estimates)
        mean = sum(offset / variance for offset, variance in estimates) / weights
        apart = sum(((offset - mean) / size) ** 2 / variance for offset, variance in estimates)
        return mean, (1 + apart) / weights

    def _offsets(self, kind: int | None) -> tuple[dict[int, float], dict[int, float]]:
        """Predicted bytes -> measured less expected bytes: of this kind, and of others."""
        if kind not in self._known_offsets:
            same, others = {}, {}
            for k, p, size in sorted([*self.before, *self._measured], key=lambda x: x[1]):
                (same if kind in (None, k) else others)[p] = size + self.fixed_bytes - self._prior(p)
            self._known_offsets[kind] = same, others
        return self._known_offsets[kind]


def _distance(size: int, places: Iterable[int]) -> float:
    """From a size to the measured ones in e-folds: a random walk's way beyond them, a bridge's between."""
    folds = [math.log(max(1, place) / size) for place in places]
    sides = [x for x in folds if x >= 0], [-x for x in folds if x <= 0]
    return 1 / sum(1 / max(1e-9, min(side)) for side in sides if side)
