"""The table of what is saved, in as many columns as there are: short places, and the rest folded into one row."""

from collections.abc import Sequence

from rich.table import Table

from jaxckpt.model.option import Place
from jaxckpt.result._protocols import Group
from jaxckpt.units import short_bytes

# Rows before the others are folded into one.
_FEW = 10
# An operation's name is cut at so many characters.
_OPERATION = 13
_GAP = 2
# Columns that may be cut.
_VALUE, _OF, _WHERE = 1, 2, 3
_SHORT_TYPES = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}


def saved_table(groups: Sequence[Group], *, width: int, is_sharded: bool = False, all_rows: bool = False) -> Table:
    """The table, at most ten rows of it and one for the others unless all are asked for.

    Args:
        groups: what is saved, largest first.
        width: columns of the terminal.
        is_sharded: whether bytes are those of each device.
        all_rows: whether to show every row.
    """
    total = sum(g.size_bytes for g in groups)
    title = f"saved from forward to backward{', per device' * is_sharded}: {short_bytes(total)}"
    on_host = sum(g.size_bytes for g in groups if g.place == Place.HOST.value)
    if on_host:
        title += f", {short_bytes(on_host)} of it on the host"
    heads = ["bytes", "value", "of", "where", *(["at"] if on_host else []), "scope"]
    shown = groups if all_rows or len(groups) <= _FEW + 1 else groups[:_FEW]
    rows = [_row(group, bool(on_host)) for group in shown]
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
    widths = _widths(heads, rows, width)
    for name, most in zip(heads, widths, strict=True):
        table.add_column(name, justify="right" if name == "bytes" else "left", no_wrap=True, width=most)
    for row in rows:
        table.add_row(*(_cut(text, most, i) for i, (text, most) in enumerate(zip(row, widths, strict=True))))
    if rest := groups[len(shown) :]:
        table.add_row(
            short_bytes(sum(g.size_bytes for g in rest)), f"{sum(g.count for g in rest):,} others", "", "--all"
        )
    return table


def short_shape(shape_dtype: str) -> str:
    """A shape as XLA writes it; other text as it is.

    Example:
        >>> short_shape("bfloat16[8,1024]")
        'bf16[8,1024]'
    """
    name = shape_dtype.partition("[")[0].rstrip("0123456789")
    return _SHORT_TYPES.get(name, name) + shape_dtype[len(name) :]


def short_place(source: str) -> str:
    """The file and the line of a source, without folders, column and function.

    Example:
        >>> short_place("flax/linen/linear.py:1205:11 (Embed.attend)")
        'linear.py:1205'
    """
    file, _, rest = source.partition(" ")[0].rsplit("/", 1)[-1].partition(":")
    return f"{file}:{rest.partition(':')[0]}" if rest else file


def _row(group: Group, has_host: bool) -> list[str]:
    times = f"{group.count} x " if group.count > 1 else ""
    value = times + short_shape(group.shape_dtype)
    place = [group.place] if has_host else []
    return [short_bytes(group.size_bytes), value, group.primitive, short_place(group.source), *place, group.scope]


def _widths(heads: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[int]:
    """What each column takes: where it is too much the scope gives way first, and the value last."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    widths[_OF] = min(widths[_OF], _OPERATION)
    scope = len(heads) - 1
    for column, least in ((scope, 14), (_OF, 7), (_WHERE, 15), (scope, 6), (_VALUE, 12)):
        over = sum(widths) + _GAP * (len(widths) - 1) - width
        widths[column] -= max(0, min(over, widths[column] - least))
    return widths


def _cut(text: str, most: int, column: int) -> str:
    """Of a path the end, which says more than its beginning; of other texts the beginning."""
    if len(text) <= most:
        return text
    return f"{text[: most - 1]}…" if column in (_OF, _VALUE) else f"…{text[len(text) - most + 1 :]}"
