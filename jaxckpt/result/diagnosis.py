"""What ails a function that has checkpoints of its own, as a record that prints itself and is JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from jaxckpt.compilation.records import Signed, check_record, record_of
from jaxckpt.errors import PlanFileError
from jaxckpt.result.diagnosis_report import show_diagnosis
from jaxckpt.result.findings import Checkpoint, Examined, Finding, Label, Offer, Share, Where

SCHEMA = 1
FORMAT = "jaxckpt diagnosis"


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis(Examined):
    """What ails a function that has checkpoints of its own. Its `str` is the report."""

    @property
    def is_healthy(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of what was found, each once."""
        return tuple(dict.fromkeys(finding.kind for finding in self.findings))

    def report(self, *, color: bool = False) -> str:
        """The report, at most 80 columns wide."""
        return show_diagnosis(self, color=color)

    def __str__(self) -> str:
        """The report a person reads."""
        return self.report()

    def to_json(self) -> dict[str, Any]:
        """The record as plain data, with its format and the number of its schema."""
        return {"format": FORMAT, "schema": SCHEMA, **_plain(asdict(self))}

    @classmethod
    def from_json(cls, data: Any, where: str = "this") -> "Diagnosis":
        """Read what `to_json` made.

        Raises:
            PlanFileError: anything else, or another schema; with the path of every violation.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise PlanFileError(f"{where} is not a diagnosis")
        if data.get("schema") != SCHEMA:
            raise PlanFileError(f"{where} has schema {data.get('schema')!r}, and this jaxckpt reads {SCHEMA}")
        values = {name: value for name, value in data.items() if name not in ("format", "schema")}
        check_record(_RECORD, values, where)
        return _read(values)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


_SHARES = list[record_of(Share)]
_WHERE = record_of(Where, scopes=_SHARES, lines=_SHARES)
_OFFER = record_of(Offer, label=Label)
_RECORD = record_of(
    Examined,
    findings=list[record_of(Finding, size_bytes=Signed | None, flops=Signed | None, label=Label)],
    checkpoints=list[record_of(Checkpoint, saved_bytes=Signed | None, recomputed_flops=Signed, label=Label)],
    where=_WHERE | None,
    same_cost=_OFFER | None,
    same_bytes=_OFFER | None,
)


def _read(values: dict[str, Any]) -> Diagnosis:
    made = dict(values)
    made["findings"] = tuple(Finding(**x) for x in values["findings"])
    made["checkpoints"] = tuple(Checkpoint(**x) for x in values["checkpoints"])
    for name in ("flags", "notes"):
        made[name] = tuple(values[name])
    if values["where"] is not None:
        shares = {name: tuple(Share(**x) for x in values["where"][name]) for name in ("scopes", "lines")}
        made["where"] = Where(**{**values["where"], **shares})
    for name in ("same_cost", "same_bytes"):
        made[name] = None if values[name] is None else Offer(**values[name])
    return Diagnosis(**{f.name: made[f.name] for f in fields(Examined)})
