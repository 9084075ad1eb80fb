"""Which buffers make one band of a picture: few enough to be told apart, the same for all programs of a page."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from jaxckpt.compilation.buffers import GAPS, RESERVED, UNATTRIBUTED, Buffer, CompiledMemory
from jaxckpt.result.page.palette import ARGUMENTS, BANDS, OTHER, PHASES, RESULTS

Label = Callable[[Buffer], str]
# A part of a scope that holds less than this of its parent's bytes is no reason to divide it.
_LEAST_SHARE = 0.02
_FIRST = (ARGUMENTS, RESULTS)
_LAST = (OTHER, UNATTRIBUTED, RESERVED, GAPS)
_NUMBER = re.compile(r"\d+")


def groupings(programs: Sequence[CompiledMemory]) -> dict[str, Label]:
    """Name -> what a buffer belongs to: by scope, by line or by phase."""
    temporaries = [b for memory in programs for b in memory.peak if not _fixed(b) and b.place == "device"]
    scopes, lines = _Groups(temporaries, _scope_path), _Groups(temporaries, lambda b: (b.source or _scope(b),))
    return {
        "scope": lambda b: _fixed(b) or scopes.label(b),
        "line": lambda b: _fixed(b) or lines.label(b),
        "phase": lambda b: _fixed(b) or b.phase,
    }


def ordered(labels: Iterable[str], sizes: Callable[[str], int]) -> list[str]:
    """Labels from the ground up: what is there throughout, then the largest, then the rest and what no buffer takes."""
    phases = tuple(PHASES)

    def rank(label: str) -> tuple:
        if label in _FIRST:
            return 0, _FIRST.index(label)
        if label in _LAST:
            return 3, _LAST.index(label)
        return (1, phases.index(label)) if label in phases else (2, -sizes(label), label)

    return sorted(labels, key=rank)


def any_layer(scope: str) -> str:
    """A scope with its numbers left out, which is the same for all layers of a kind.

    Example:
        >>> any_layer("GPT2/h11/attn")
        'GPT2/h*/attn'
    """
    return _NUMBER.sub("*", scope)


def _fixed(buffer: Buffer) -> str:
    return {"argument": ARGUMENTS, "constant": ARGUMENTS, "result": RESULTS}.get(buffer.role, "")


def _scope(buffer: Buffer) -> str:
    return any_layer(buffer.scope)


def _scope_path(buffer: Buffer) -> tuple[str, ...]:
    return tuple(_scope(buffer).split("/")) if buffer.scope else (buffer.source,)


class _Groups:
    """A tree of names, divided where most bytes are until there are as many parts as colours."""

    def __init__(self, buffers: Iterable[Buffer], path: Callable[[Buffer], tuple[str, ...]]):
        self._path = path
        self._sizes: dict[tuple[str, ...], int] = defaultdict(int)
        for buffer in buffers:
            parts = path(buffer)
            for depth in range(len(parts) + 1):
                self._sizes[parts[:depth]] += buffer.size_bytes
        self._chosen = self._divide()

    def label(self, buffer: Buffer) -> str:
        """The part that a buffer belongs to; empty where nothing is known of it."""
        parts = self._path(buffer)
        if not any(parts):
            return ""
        for depth in range(len(parts), 0, -1):
            if parts[:depth] in self._chosen:
                return "/".join(parts[:depth])
        return OTHER

    def _divide(self) -> set[tuple[str, ...]]:
        chosen = {()}
        while True:
            by_size = sorted(chosen, key=lambda key: (-self._sizes[key], key))
            for key in by_size:
                parts = self._parts(key)
                # What is left of a divided scope is in "other".
                if parts and len(chosen) - 1 + len(parts) <= len(BANDS):
                    chosen = chosen - {key} | set(parts)
                    break
            else:
                return self._largest() if chosen == {()} else chosen

    def _parts(self, key: tuple[str, ...]) -> list[tuple[str, ...]]:
        below = [k for k in self._sizes if len(k) == len(key) + 1 and k[: len(key)] == key and any(k)]
        worth = [k for k in below if self._sizes[k] >= _LEAST_SHARE * self._sizes[key]]
        return sorted(worth)

    def _largest(self) -> set[tuple[str, ...]]:
        """The largest of more names at the top than there are colours."""
        names = [key for key in self._sizes if len(key) == 1 and any(key)]
        return set(sorted(names, key=lambda key: (-self._sizes[key], key))[: len(BANDS)])
