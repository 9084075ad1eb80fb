"""Schemas of plans in files: the tree of regions, blocks, and what each block saves as its kind says."""

from typing import Annotated, Any

from pydantic import Discriminator, Field, PlainValidator, Tag

from jaxckpt.compilation.records import TAG, Index, Record
from jaxckpt.kinds.base import split_save

_KEEP, _RECOMPUTE = f"{TAG}keep>", f"{TAG}recompute>"


class RegionRecord(Record):
    """A region that is recomputed."""

    recompute: Annotated[list["NodeRecord"], Field(min_length=1)]


# `[block, option]` or a region.
NodeRecord = Annotated[
    Annotated[list[Index], Field(min_length=2, max_length=2), Tag(_KEEP)] | Annotated[RegionRecord, Tag(_RECOMPUTE)],
    Discriminator(lambda node: _KEEP if isinstance(node, list) else _RECOMPUTE),
]
# Choosing among so many blocks takes longer than anybody waits.
_FEW = Field(max_length=10_000)
BlockRecords = Annotated[list[Annotated[list[Index], Field(min_length=1)]], _FEW]


def _check_save(data: Any) -> Any:
    kind, rest = split_save(data)
    kind.schema.model_validate(rest)
    return data


# What a block saves, as the schema of its kind has it.
SaveRecords = Annotated[list[Annotated[Any, PlainValidator(_check_save)]], _FEW]

ScheduleRecord = Annotated[list[NodeRecord], _FEW]


class TreeRecord(Record):
    """A program's plan: blocks, the schedule over them, and what each saves."""

    blocks: BlockRecords
    schedule: ScheduleRecord
    saved: SaveRecords
    # Inputs that wait on the host; left out where there are none.
    host: Annotated[list[Index], _FEW] | None = None
