"""A whole step with its plans, as a record."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxckpt.compilation.measure import Measurement
from jaxckpt.result.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A step whose plans fit.

    Attributes:
        step: jitted, with the plans inside. At other trees, shapes or dtypes it raises `PlanMismatchError`.
        plans: of the decorated functions, in the order they are differentiated. Their peaks are predicted: it is the
            step that was measured.
        measurement: of the whole step.
        unplanned: the same without plans; None where it was expected so far above the budget, in bytes, that nobody
            compiled it.
        num_compiles: how many steps were compiled to find it.
        next_bytes: the least that was measured at a batch larger by one, which does not fit; None from `fit`.
        calibration: the hash of the record it was found with; None without one.
        batch: what `largest_batch` found; None from `fit`.
    """

    step: Callable
    plans: tuple[Plan, ...]
    measurement: Measurement
    unplanned: Measurement | None
    num_compiles: int
    batch: int | None = None
    next_bytes: int | None = None
    calibration: str | None = None
