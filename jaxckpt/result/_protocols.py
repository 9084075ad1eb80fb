"""What a report reads of a plan and of a frontier, under the names and with the units of their attributes.

A report imports nothing but this, so that plans and frontiers may print themselves with it. Members are properties
because the records are frozen.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ckptsolvers import Schedule

from jaxckpt.compilation.measure import Measurement
from jaxckpt.model.option import Save
from jaxckpt.program.ir import Program


class Group(Protocol):
    """Saved values of one shape."""

    @property
    def source(self) -> str: ...

    @property
    def primitive(self) -> str: ...

    @property
    def scope(self) -> str: ...

    @property
    def shape_dtype(self) -> str: ...

    @property
    def count(self) -> int: ...

    @property
    def size_bytes(self) -> int: ...

    @property
    def place(self) -> str: ...


class PlanLike(Protocol):
    """A plan, as far as it is reported."""

    @property
    def budget_bytes(self) -> int | None: ...

    @property
    def max_cost(self) -> float | None: ...

    @property
    def unplanned_peak_bytes(self) -> int: ...

    @property
    def written_peak_bytes(self) -> int | None: ...

    @property
    def predicted_peak_bytes(self) -> int: ...

    @property
    def measured_peak_bytes(self) -> int | None: ...

    @property
    def peak_bytes(self) -> int: ...

    @property
    def is_at_most(self) -> bool: ...

    @property
    def num_rematerialized(self) -> int | None: ...

    @property
    def num_recomputed(self) -> int | None: ...

    @property
    def num_asked(self) -> int | None: ...

    @property
    def flags(self) -> Sequence[str]: ...

    @property
    def host_budget_bytes(self) -> int | None: ...

    @property
    def host_bytes(self) -> int: ...

    @property
    def measured_host_bytes(self) -> int | None: ...

    @property
    def link_bytes(self) -> int: ...

    @property
    def idle_time(self) -> int: ...

    @property
    def num_worse_on_host(self) -> int: ...

    @property
    def next_peak_bytes(self) -> int | None: ...

    @property
    def least_peak_bytes(self) -> int | None: ...

    @property
    def expected_least_bytes(self) -> int: ...

    @property
    def is_unplanned_measured(self) -> bool: ...

    @property
    def is_stopped(self) -> bool: ...

    @property
    def is_profiled(self) -> bool: ...

    @property
    def forward_flops(self) -> int: ...

    @property
    def recompute_flops(self) -> int: ...

    @property
    def recompute_cost(self) -> int: ...

    @property
    def unplanned_cost(self) -> int: ...

    @property
    def cost(self) -> str: ...

    @property
    def solver(self) -> str: ...

    @property
    def target(self) -> str: ...

    @property
    def num_compiles(self) -> int: ...

    @property
    def calibration(self) -> str | None: ...

    @property
    def parameter_bytes(self) -> int: ...

    @property
    def constant_bytes(self) -> int: ...

    @property
    def saved(self) -> Sequence[Group]: ...

    @property
    def schedule(self) -> Schedule | None: ...

    @property
    def blocks(self) -> Sequence[Sequence[int]]: ...

    @property
    def block_saves(self) -> Sequence[Save]: ...

    @property
    def block_labels(self) -> Sequence[str]: ...

    @property
    def unknown(self) -> Sequence[str]: ...

    @property
    def split(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def schedule_digest(self) -> str: ...

    @property
    def jax_version(self) -> str: ...


class AppliedLike(Protocol):
    """A plan, as far as it is compiled again."""

    @property
    def target(self) -> str: ...

    @property
    def cost(self) -> str: ...

    @property
    def keeps_checkpoints(self) -> bool: ...

    @property
    def is_on_host(self) -> bool: ...

    @property
    def schedule(self) -> Schedule | None: ...

    def check(self, program: Program) -> None: ...

    def flat(self, program: Program) -> Callable[..., list[Any]]: ...


class StepLike(Protocol):
    """A step with its plans, as far as it is reported."""

    @property
    def plans(self) -> Sequence[PlanLike]: ...

    @property
    def measurement(self) -> Measurement: ...

    @property
    def unplanned(self) -> Measurement | None: ...

    @property
    def budget_bytes(self) -> int: ...

    @property
    def num_compiles(self) -> int: ...

    @property
    def is_stopped(self) -> bool: ...

    @property
    def calibration(self) -> str | None: ...

    @property
    def constant_bytes(self) -> int: ...


class PointLike(Protocol):
    """A point of a frontier."""

    @property
    def name(self) -> str: ...

    @property
    def peak_bytes(self) -> int: ...

    @property
    def host_bytes(self) -> int: ...

    @property
    def recompute_flops(self) -> int: ...

    @property
    def cost_ratio(self) -> float: ...

    @property
    def plan(self) -> PlanLike | None: ...


class FrontierLike(Protocol):
    """A frontier, as far as it is reported."""

    @property
    def points(self) -> Sequence[PointLike]: ...

    @property
    def plans(self) -> Sequence[PlanLike]: ...

    @property
    def cost(self) -> str: ...

    @property
    def target(self) -> str: ...

    @property
    def forward_flops(self) -> int: ...

    @property
    def num_candidates(self) -> int: ...

    @property
    def is_measured(self) -> bool: ...
