"""Buffers of one allocation as spans of bytes over steps, and that no two of them lie on each other."""

import bisect
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace

from jaxckpt.errors import ProgramFormatError


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Values at one place that take over from each other: one buffer.

    Attributes:
        values: in the order in which they are made.
        offset: in its allocation.
        size: in bytes.
        start: first step.
        end: last step.
    """

    values: tuple[int, ...]
    offset: int
    size: int
    start: int
    end: int


def check_apart(pieces: Iterable[Piece], allocation: int) -> None:
    """See that no two buffers take the same bytes at one step, so that their sum is what is taken.

    Raises:
        ProgramFormatError: two do.
    """
    events = sorted(
        itertools.chain.from_iterable(((p.start, 1, p), (p.end + 1, 0, p)) for p in pieces if p.size),
        key=lambda event: (event[0], event[1], event[2].offset),
    )
    taken: list[tuple[int, int]] = []
    for step, is_start, piece in events:
        span = piece.offset, piece.offset + piece.size
        at = bisect.bisect_left(taken, span)
        if not is_start:
            del taken[at]
            continue
        if (at and taken[at - 1][1] > span[0]) or (at < len(taken) and taken[at][0] < span[1]):
            raise ProgramFormatError(f"two buffers of allocation {allocation} lie at one place at step {step}")
        taken.insert(at, span)


def one_after_another(pieces: list[Piece], *, strict: bool) -> list[Piece]:
    """Let a buffer end before the one that is written over it in the step that reads it last.

    Args:
        pieces: of one allocation.
        strict: whether a longer overlap is left for `check_apart` to refuse; otherwise the earlier buffer ends.
    """
    pieces = sorted(pieces, key=lambda p: (p.start, p.end))
    found = []
    for i, piece in enumerate(pieces):
        end = piece.end
        for later in itertools.islice(pieces, i + 1, None):
            if later.start > piece.end:
                break
            apart = later.offset >= piece.offset + piece.size or piece.offset >= later.offset + later.size
            if not apart and (not strict or later.start == piece.end):
                end = later.start - 1
                break
        if end >= piece.start:
            found.append(replace(piece, end=end))
    return found
