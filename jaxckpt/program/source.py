"""Source lines that are the same on every machine: relative to the project or the package that the file is in."""

import functools
import re
from pathlib import Path, PurePath

_PACKAGES = ("site-packages", "dist-packages")
_PROJECT = ("pyproject.toml", ".git")
_SUMMARY = re.compile(r"(?P<file>.+?)(?P<line>:\d+(?::\d+)?(?: \(.*\))?)")


def relative_source(summary: str) -> str:
    """`file:line (function)` with the file as `relative_file` has it; other text as it is."""
    found = _SUMMARY.fullmatch(summary)
    return relative_file(found["file"]) + found["line"] if found else summary


@functools.lru_cache(maxsize=4096)
def relative_file(file: str) -> str:
    """A file as its project or its package names it, with slashes.

    Returns:
        The path below the innermost `site-packages`, or below the nearest folder with a `pyproject.toml` or a `.git`,
        or the file's name where there is neither.
    """
    path = PurePath(file)
    for i in reversed(range(len(path.parts))):
        if path.parts[i] in _PACKAGES:
            return PurePath(*path.parts[i + 1 :]).as_posix()
    full = Path(file).absolute()
    root = next((parent for parent in full.parents if _is_project(parent)), full.parent)
    return full.relative_to(root).as_posix()


@functools.lru_cache(maxsize=1024)
def _is_project(folder: Path) -> bool:
    try:
        return any((folder / name).exists() for name in _PROJECT)
    except OSError:
        return False
