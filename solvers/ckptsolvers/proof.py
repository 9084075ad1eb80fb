"""What every solution says of how good it is, whatever kind of problem it solves."""

from typing import Any


class Proof:
    """A solution's own claim: optimal for a class of schedules, or a bound on the work of all of them."""

    __slots__ = ()
    judgement: Any
    optimal_for: str | None
    bound_work: int | None

    @property
    def is_optimal(self) -> bool:
        """Whether the solver proved that its class holds nothing better."""
        return self.optimal_for is not None

    @property
    def gap(self) -> float | None:
        """Work above the bound, as a fraction of the work; None where no bound is known."""
        if self.bound_work is None:
            return None
        return (self.judgement.work - self.bound_work) / max(1, self.judgement.work)
