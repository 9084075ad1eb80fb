"""What every solution says of how good it is, whatever kind of problem it solves."""

from typing import Any

NESTED = "nested schedules of this order"


class Proof:
    """A solution's own claim: how far its work is, at most, from the least work of a class of schedules."""

    __slots__ = ()
    judgement: Any
    budget_bytes: int
    solver: str
    bound_work: int | None
    bound_for: str

    @property
    def is_optimal(self) -> bool:
        """Whether the class is proven to hold nothing better."""
        return self.gap == 0

    @property
    def optimal_for(self) -> str | None:
        """The class in which no other schedule does less work within the budget, or None where that is not proven."""
        return self.bound_for if self.is_optimal else None

    @property
    def gap(self) -> float | None:
        """Work above the bound, as a fraction of the work; None where no bound is known."""
        if self.bound_work is None:
            return None
        return (self.judgement.work - self.bound_work) / max(1, self.judgement.work)

    def __str__(self) -> str:
        """One line: the solver, the work, the peak, and what is proven of it."""
        judged = self.judgement
        found = f"{self.solver}: work {judged.work:,}, peak {judged.peak_bytes:,} of {self.budget_bytes:,} bytes"
        return f"{found}; {claim(judged.work, self.bound_work, self.bound_for)}"


def claim(work: int, bound: int | None, bound_for: str) -> str:
    """What is proven of an amount of work, in words."""
    if bound is None:
        return "no bound is known"
    if work == bound:
        return f"optimal among {bound_for}"
    return f"at most {100 * (work - bound) / work:.2g} % above the least of {bound_for} (bound {bound:,})"
