"""Schemas of what is in files, checked by pydantic: every violation is named by its path."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Annotated, Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from jaxckpt.errors import PlanFileError

# More violations than these are counted, not listed.
_MAX_SHOWN, _MAX_LISTED = 10, 200
# Tags of alternatives begin so; they are no part of a path.
TAG = "<"


class Record(BaseModel):
    """An object of a file: no value is converted, and no name is there but the record's own."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, defer_build=True)


# A position or a number of a value, a count that is at least 1, and bytes or FLOPs.
Index = Annotated[int, Field(ge=0, le=10**9)]
Positive = Annotated[int, Field(ge=1, le=10**15)]
Size = Annotated[int, Field(ge=0, le=10**30)]
Signed = Annotated[int, Field(ge=-(10**30), le=10**30)]


_TYPES: dict[Any, Any] = {
    int: Size,
    int | None: Annotated[int | None, Field(ge=0, le=10**30)],
    float: float,
    float | None: float | None,
    bool: bool,
    str: str,
    str | None: str | None,
    tuple[str, ...]: list[str],
}


def record_of(shape: type, **own: Any) -> type[Record]:
    """The schema of a dataclass as `json` has it.

    Args:
        shape: a dataclass. Its numbers are not negative.
        own: types of fields for which that does not say all.
    """
    hints = get_type_hints(shape)
    types: dict[str, Any] = {f.name: (own.get(f.name) or _TYPES[hints[f.name]], ...) for f in fields(shape)}
    return create_model(shape.__name__, __base__=Record, **types)


def check_record(shape: type[Record], data: Any, where: str) -> None:
    """Check data against a schema.

    Args:
        shape: the schema.
        data: plain data.
        where: it is from.

    Raises:
        PlanFileError: with each violation, by its path.
    """
    try:
        shape.model_validate(data)
    except ValidationError as error:
        raise PlanFileError(f"{where} is damaged: {_violations(error, shape, data)}") from None


def path_of(location: Sequence[int | str]) -> str:
    """A place in nested data, such as `block_saves[3].parts[0].lengths[1]`."""
    parts = [f"[{x}]" if isinstance(x, int) else f".{x}" for x in location if not str(x).startswith(TAG)]
    return "".join(parts).removeprefix(".")


def _violations(error: ValidationError, shape: type[Record], data: Any) -> str:
    num = error.error_count()
    if num > _MAX_LISTED:
        # A list of all would take more room than the data; those near the beginning of each list say enough.
        try:
            shape.model_validate(_head(data))
        except ValidationError as shorter:
            error = shorter
        if error.error_count() > _MAX_LISTED:
            return f"it is wrong in {num:,} places"
    found = error.errors(include_url=False, include_context=False, include_input=False)
    shown = [f"{path_of(e['loc']) or 'it'}: {_plain(e['msg'])}" for e in found[:_MAX_SHOWN]]
    return "; ".join(shown) + (f"; and {num - len(shown):,} more" if num > len(shown) else "")


def _plain(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:200]


def _head(data: Any) -> Any:
    if isinstance(data, dict):
        return {name: _head(value) for name, value in list(data.items())[:40]}
    return [_head(x) for x in data[:3]] if isinstance(data, list) else data
