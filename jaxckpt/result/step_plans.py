"""The plans of a whole step at one shape of its arguments, as they are kept on disk."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxckpt.compilation.files import check_digest, read_object, with_digest
from jaxckpt.compilation.measure import Measurement
from jaxckpt.compilation.objective import Objective
from jaxckpt.compilation.records import Index, check_record, record_of
from jaxckpt.errors import PlanFileError, PlanMismatchError
from jaxckpt.program.ir import Program
from jaxckpt.result.fitted import Fitted
from jaxckpt.result.plan import Plan
from jaxckpt.search.step import Key, Runner
from jaxckpt.units import show_bytes

_FORMAT = "jaxckpt step"
_SCHEMA = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlans:
    """What a step does at one shape of its arguments.

    Attributes:
        plans: of the functions it differentiates, in their order. Their peaks are predicted: the step was measured.
        goals: what of each is differentiated.
        measurement: of the whole step.
        unplanned: the same without plans; None where nobody compiled it.
        num_compiles: how many steps were compiled to find it.
        calibration: the hash of the record it was found with; None without one.
    """

    plans: tuple[Plan, ...]
    goals: tuple[Objective, ...]
    measurement: Measurement
    unplanned: Measurement | None
    num_compiles: int
    calibration: str | None

    @classmethod
    def of(cls, fitted: Fitted, goals: tuple[Objective, ...]) -> "StepPlans":
        """What is kept of a fitted step."""
        return cls(
            plans=fitted.plans,
            goals=goals,
            measurement=fitted.measurement,
            unplanned=fitted.unplanned,
            num_compiles=fitted.num_compiles,
            calibration=fitted.calibration,
        )

    @property
    def chosen(self) -> dict[Key, Runner]:
        """How the functions run that have a plan."""
        pairs = zip(self.plans, self.goals, strict=True)
        return {(plan.fingerprint, goal): plan.flat for plan, goal in pairs if plan.schedule is not None}

    def check(self, programs: Mapping[Key, Program]) -> None:
        """Refuse a step that differentiates others than these.

        Raises:
            PlanMismatchError: it differentiates other functions.
            PlanFileError: a plan is none of its program.
        """
        for plan, goal in zip(self.plans, self.goals, strict=True):
            program = programs.get((plan.fingerprint, goal))
            if program is None:
                raise PlanMismatchError("the step differentiates other functions than its plans are of; plan again")
            plan.check(program)

    def __str__(self) -> str:
        """What a person reads: the step's bytes, then each plan's report."""
        rows = [f"step      {self.measurement}"]
        if self.unplanned is not None:
            rows.append(f"unplanned {show_bytes(self.unplanned.device_bytes)} measured")
        return "\n".join([*rows, *map(str, self.plans)])

    def to_json(self) -> dict[str, Any]:
        """Plain data, with a digest of it all."""
        data = {
            "format": _FORMAT,
            "schema": _SCHEMA,
            "plans": [plan.to_json() for plan in self.plans],
            "goals": [asdict(goal) for goal in self.goals],
            "measurement": asdict(self.measurement),
            "unplanned": None if self.unplanned is None else asdict(self.unplanned),
            "num_compiles": self.num_compiles,
            "calibration": self.calibration,
        }
        return with_digest(json.loads(json.dumps(data)))  # lists for tuples

    def to_text(self) -> str:
        """The same as the text of a file."""
        return json.dumps(self.to_json(), indent=1) + "\n"

    @classmethod
    def load_kept(cls, path: Path, folder: str | os.PathLike) -> "StepPlans":
        """Read a file of a cache's folder.

        Raises:
            PlanFileError: it is none, is damaged, or is of another schema.
            OSError: it is not there or cannot be read.
        """
        return cls.from_json(read_object(path, _FORMAT, Path(folder)), str(path))

    @classmethod
    def from_json(cls, data: Any, where: str) -> "StepPlans":
        """Read what `to_json` made.

        Raises:
            PlanFileError: anything else, or another schema.
        """
        if not isinstance(data, dict) or (data.get("format"), data.get("schema")) != (_FORMAT, _SCHEMA):
            raise PlanFileError(f"{where} is no {_FORMAT} of schema {_SCHEMA}")
        values = {name: value for name, value in data.items() if name not in ("format", "schema", "digest")}
        check_record(_RECORD, values, where)
        check_digest(data, where)
        if len(data["plans"]) != len(data["goals"]):
            raise PlanFileError(f"{where} is damaged: it has {len(data['plans'])} plans for {len(data['goals'])} goals")
        sizes = [None if m is None else Measurement(**m) for m in (data["measurement"], data["unplanned"])]
        assert sizes[0] is not None
        return cls(
            plans=tuple(Plan.from_json(plan, where) for plan in data["plans"]),
            goals=tuple(Objective(**{**goal, **_tuples(goal)}) for goal in data["goals"]),
            measurement=sizes[0],
            unplanned=sizes[1],
            num_compiles=data["num_compiles"],
            calibration=data["calibration"],
        )


_Sizes = record_of(Measurement)
_RECORD = record_of(
    StepPlans,
    plans=list[dict[str, Any]],  # with a schema of their own
    goals=list[record_of(Objective, inputs=list[Index], outputs=list[Index])],
    measurement=_Sizes,
    unplanned=_Sizes | None,
)


def _tuples(goal: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(goal[name]) for name in ("inputs", "outputs")}
