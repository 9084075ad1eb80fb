"""What a search returns: the candidate it chose, and the numbers it chose it by."""

from dataclasses import dataclass

from jaxckpt.compilation.measure import Measurement
from jaxckpt.model.schedules import Candidate
from jaxckpt.search.analysis import Analysis


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The candidate that a search chose for one program.

    Attributes:
        analysis: of the program.
        candidate: the chosen one; None leaves the program without a plan.
        budget_bytes: what had to hold it, `reserve` taken off; None without a budget.
        max_cost: the limit on cost, as a fraction of the unplanned cost; None without one.
        host_budget_bytes: what had to hold what is sent to the host; None where nothing is.
        num_worse_on_host: how many plans that send values there were compiled and take more of the device than one
            that costs no more and sends none.
        unplanned_peak_bytes: device bytes without a plan.
        predicted_peak_bytes: device bytes of the candidate, from the model.
        measurement: of the program under it; None if it was not compiled.
        next_peak_bytes: measured device bytes of the next cheaper candidate; None if it was not compiled.
        expected_least_bytes: device bytes of the candidate that takes least, predicted where not measured.
        least_peak_bytes: the same, None where it was not measured.
        is_unplanned_measured: whether `unplanned_peak_bytes` was measured.
        is_stopped: whether `max_compiles` ended the search.
        num_compiles: how many programs were compiled.
        calibration: hash of the calibration record; None without one.
    """

    analysis: Analysis
    candidate: Candidate | None
    unplanned_peak_bytes: int
    predicted_peak_bytes: int
    expected_least_bytes: int
    budget_bytes: int | None = None
    max_cost: float | None = None
    host_budget_bytes: int | None = None
    num_worse_on_host: int = 0
    measurement: Measurement | None = None
    next_peak_bytes: int | None = None
    is_unplanned_measured: bool = False
    least_peak_bytes: int | None = None
    is_stopped: bool = False
    num_compiles: int = 0
    calibration: str | None = None
