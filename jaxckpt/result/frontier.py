"""The trade-off of peak bytes against step cost, as a record."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from jaxckpt.result.plan import Plan
from jaxckpt.result.report import show_frontier


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One way to run the program.

    Attributes:
        name: "plan", "unplanned", or the hand-written policy.
        predicted_peak_bytes: device bytes of value and gradient, from the model.
        measured_peak_bytes: the same from the compiler; None if it was not compiled.
        recompute_flops: beyond those of the unplanned value and gradient.
        host_bytes: on the host, measured where it was compiled and the compiler tells them, else predicted.
        cost_ratio: the step's cost as a fraction of the unplanned step's.
        plan: the plan; None for the others.
    """

    name: str
    predicted_peak_bytes: int
    measured_peak_bytes: int | None
    recompute_flops: int
    cost_ratio: float
    plan: Plan | None = None
    host_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """Measured where it was compiled, else predicted."""
        return self.predicted_peak_bytes if self.measured_peak_bytes is None else self.measured_peak_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Frontier:
    """The trade-off of peak bytes against step cost.

    Attributes:
        points: plans and hand-written policies, least bytes first.
        cost: "time" or "flops".
        target: for which chip.
        fingerprint: of the program.
        forward_flops: of one forward pass.
        num_candidates: how many plans these were chosen from.
        calibration: hash of the record that predictions were corrected by; None where there was none.
    """

    points: tuple[Point, ...]
    cost: str
    target: str
    fingerprint: str
    forward_flops: int
    num_candidates: int
    calibration: str | None = None

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plans, least bytes first."""
        return tuple(point.plan for point in self.points if point.plan is not None)

    @property
    def is_measured(self) -> bool:
        """Whether its points were compiled."""
        return all(point.measured_peak_bytes is not None for point in self.points)

    def to_json(self) -> dict[str, Any]:
        """Its numbers as plain data; `plan` is the position among `plans`."""
        plans, points = list(self.plans), []
        for point in self.points:
            at = next((i for i, plan in enumerate(plans) if plan is point.plan), None)
            points.append({f.name: getattr(point, f.name) for f in dataclasses.fields(point)} | {"plan": at})
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return json.loads(json.dumps(own | {"points": points}))

    def __str__(self) -> str:
        """The table a person reads."""
        return show_frontier(self)
