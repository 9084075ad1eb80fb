"""Budgets in, sizes out: the one place where bytes meet text."""

import numbers
import re
from dataclasses import dataclass
from fractions import Fraction

from jaxckpt.errors import BudgetError

_SCALES = {"": 1, **{u: 1000**i for i, u in enumerate(("KB", "MB", "GB", "TB"), 1)}}
_SCALES |= {"B": 1, **{u: 1024**i for i, u in enumerate(("KiB", "MiB", "GiB", "TiB"), 1)}}
_BY_CASE = {name.lower(): scale for name, scale in _SCALES.items()}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*")
_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")
# No machine has more, and no budget has more digits than such a number.
_MOST_BYTES, _MOST_DIGITS, _MOST_SHOWN = 10**18, 40, 60
_ACCEPTED = 'an int of bytes, "8GB" (8e9 bytes), "8GiB" (8 x 2^30), or "80%" of the unplanned peak'


@dataclass(frozen=True, slots=True)
class Budget:
    """A budget as given: bytes, or a share of the unplanned peak."""

    size_bytes: int | None = None
    share: Fraction | None = None

    def resolve(self, unplanned_peak_bytes: int) -> int:
        """Return the bytes, of a share once the unplanned peak is known."""
        if self.size_bytes is not None:
            return self.size_bytes
        assert self.share is not None
        return int(self.share * unplanned_peak_bytes)


def parse_budget(budget: object, name: str = "budget") -> Budget:
    """Read a budget.

    Args:
        budget: an int of bytes, `"8GB"`, `"8GiB"` or `"80%"`.
        name: the argument's name, for errors.

    Returns:
        The budget.

    Raises:
        BudgetError: anything else, with what is accepted.

    Example:
        >>> parse_budget("8GiB").size_bytes
        8589934592
    """
    if isinstance(budget, str) and len(budget) <= _MOST_DIGITS and (match := _PERCENT.fullmatch(budget)):
        share = Fraction(match[1]) / 100
        if share <= 0:
            raise BudgetError(f"{name}={budget!r} must be above 0 %; accepted is {_ACCEPTED}")
        return Budget(share=share)
    return Budget(size_bytes=parse_bytes(budget, name))


def parse_bytes(size: object, name: str, *, least: int = 1) -> int:
    """Read a number of bytes.

    Raises:
        BudgetError: not an int or a string with a unit, or below `least`.
    """
    if isinstance(size, bool) or not isinstance(size, numbers.Integral | str):
        raise BudgetError(f"{name}={_shown(size)} is not accepted{_hint(size)}. Accepted is {_ACCEPTED}")
    if isinstance(size, str):
        match = _SIZE.fullmatch(size) if len(size) <= _MOST_DIGITS else None
        if match is None or match[2].lower() not in _BY_CASE:
            raise BudgetError(f"{name}={_shown(size)} cannot be read{_hint(size)}. Accepted is {_ACCEPTED}")
        size = int(Fraction(match[1]) * _BY_CASE[match[2].lower()])
    size = int(size)
    if size > _MOST_BYTES:
        raise BudgetError(f"{name}={_shown(size)} is more than any machine has. Accepted is {_ACCEPTED}")
    if size < least:
        raise BudgetError(f"{name}={_shown(size)} must be at least {least}. Accepted is {_ACCEPTED}")
    return size


def _shown(size: object) -> str:
    """A value as users wrote it, if that is short."""
    if isinstance(size, int) and size.bit_length() > 4 * _MOST_SHOWN:
        return f"a number of {size.bit_length()} bits"
    text = repr(size)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _hint(size: object) -> str:
    """How a number that is no int would be written."""
    if isinstance(size, bool):
        return ""
    try:
        number = float(size) if isinstance(size, str | numbers.Real) and len(str(size)) <= _MOST_DIGITS else 0.0
    except ValueError:
        return ""
    if 0 < number < 1:
        return f'; write "{number:.4g}GB" or "{100 * number:.4g}%"'
    if not 1 <= number <= _MOST_BYTES:
        return ""
    if number >= 1e6:
        return f'; write {int(number)} or "{number / 1e9:g}GB"'
    return f'; write "{number:g}GB" or "{number:g}%"'


def show_bytes(size_bytes: int) -> str:
    """Show a size both ways.

    Example:
        >>> show_bytes(8_000_000_000)
        '7.451 GiB (8,000,000,000 bytes)'
    """
    return f"{short_bytes(size_bytes)} ({size_bytes:,} bytes)"


def short_bytes(size_bytes: int) -> str:
    """Show a size in its natural binary unit.

    Example:
        >>> short_bytes(3 * 2**20)
        '3.000 MiB'
    """
    size, unit = float(size_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size_bytes} B" if unit == "B" else f"{size:.3f} {unit}"


def short_count(count: int) -> str:
    """Show a count of FLOPs with a decimal prefix.

    Example:
        >>> short_count(2_150_000_000)
        '2.15 G'
    """
    size, prefix = float(count), ""
    for prefix in ("", "K", "M", "G", "T", "P", "E"):
        if abs(size) < 1000 or prefix == "E":
            break
        size /= 1000
    return f"{count} " if prefix == "" else f"{size:.3g} {prefix}"
