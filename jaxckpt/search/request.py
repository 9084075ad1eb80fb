"""What a plan is asked to do."""

from dataclasses import dataclass
from typing import Any

from jaxckpt.search.calibration import Calibration
from jaxckpt.units import Budget


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a plan is asked to do; see `plan` for each."""

    budget: Budget | None
    max_cost: float | None
    cost: str = "time"
    solver: Any = "auto"
    target: str | None = None
    reserve_bytes: int = 0
    host_budget_bytes: int | None = None
    verify: bool = True
    calibration: Calibration | str | None = "auto"
    profile: bool = False
    max_compiles: int | None = None
    on_infeasible: str = "raise"
