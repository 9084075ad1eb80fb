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
    layers = Layers(b.scope for memory in programs for b in memory.buffers)
    scopes = _Groups(temporaries, lambda b: tuple(layers.any(b.scope).split("/")) if b.scope else (b.source,))
    lines = _Groups(temporaries, lambda b: (b.source or layers.any(b.scope),))
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


def once(scope: str) -> str:
    """A scope without what is in it twice in a row, as a checkpoint's own scope is in what it recomputes.

    Example:
        >>> once("GPT2/h1/GPT2/h1/attn")
        'GPT2/h1/attn'
    """
    parts = scope.split("/")
    for length in range(len(parts) // 2, 0, -1):
        if parts[:length] == parts[length : 2 * length]:
            return once("/".join(parts[length:]))
    return scope


class Layers:
    """Names for scopes that are the same for all layers of a kind: with a star for a number that there are several of.

    Args:
        scopes: all that there are.

    Example:
        >>> Layers(["GPT2/h0/attn", "GPT2/h1/attn"]).any("GPT2/h0/attn")
        'GPT2/h*/attn'
    """

    def __init__(self, scopes: Iterable[str]):
        self._spellings: dict[str, set[str]] = defaultdict(set)
        for scope in set(scopes):
            for part in once(scope).split("/"):
                self._spellings[_NUMBER.sub("*", part)].add(part)

    def any(self, scope: str) -> str:
        """A scope as all layers of its kind have it."""
        return "/".join(map(self._part, once(scope).split("/")))

    def _part(self, part: str) -> str:
        starred = _NUMBER.sub("*", part)
        return starred if len(self._spellings[starred]) > 1 else part


def _fixed(buffer: Buffer) -> str:
    return {"argument": ARGUMENTS, "constant": ARGUMENTS, "result": RESULTS}.get(buffer.role, "")


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
        chosen: set[tuple[str, ...]] = {()}
        divided: set[tuple[str, ...]] = set()
        while True:
            for key in sorted(chosen - divided, key=lambda key: (-self._sizes[key], key)):
                parts = self._parts(key)
                # What is left of it, if much, is a part of its own.
                rest = self._sizes[key] - sum(self._sizes[part] for part in parts)
                stays = bool(key) and rest >= _LEAST_SHARE * self._sizes[key]
                if parts and len(chosen) - (not stays) + len(parts) <= len(BANDS):
                    chosen = (chosen if stays else chosen - {key}) | set(parts)
                    divided.add(key)
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
