"""Files that may have been damaged or put there by somebody else: read within bounds, checked, written whole.

Plans, calibration records and kept measurements are JSON objects with a digest of their own content. Whatever a file's
bytes are, reading it takes less than a second and 100 MiB, and ends in the object or in `PlanFileError`.
"""

import contextlib
import hashlib
import json
import os
import secrets
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxckpt.errors import PlanFileError

# A program of ten thousand operations has a plan of half a megabyte with some 25,000 values, and regions as deep as
# this cannot be traced: JAX recurses some twenty frames for each.
MAX_BYTES = 4 * 2**20
MAX_VALUES = 100_000
MAX_DEPTH = 256
_MAX_DIGITS = 40
_PART = ".part"
# What a process that was killed left behind is nobody's after so long.
_STALE_S = 3600
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def content_digest(data: Mapping[str, Any]) -> str:
    """SHA-256 of an object's canonical JSON (sorted keys, no spaces, ASCII), its own `digest` left out."""
    content = {name: value for name, value in data.items() if name != "digest"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def with_digest(data: Mapping[str, Any]) -> dict[str, Any]:
    """An object as plain data, with the digest of its content."""
    plain = json.loads(json.dumps(data))
    return {**plain, "digest": content_digest(plain)}


def check_digest(data: Mapping[str, Any], where: str) -> None:
    """Refuse an object whose content is not what its digest was made of.

    Raises:
        PlanFileError: it is not, or there is none.
    """
    try:
        is_right = data.get("digest") == content_digest(data)
    except (ValueError, TypeError, RecursionError) as error:
        raise PlanFileError(f"{where} is damaged: {error}") from error
    if not is_right:
        raise PlanFileError(f"{where} is damaged: its content does not match its digest; make it again")


def read_object(path: str | os.PathLike, what: str, folder: Path | None = None) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: of the file.
        what: it should be, for messages.
        folder: of the cache it is in. Then a file of another user, and a link that leads out of it, are refused.

    Raises:
        PlanFileError: it is no regular file, too large, or no JSON object.
        OSError: it is not there, or cannot be read.
    """
    return parsed(_read_bytes(Path(path), folder), str(path), what)


def parsed(content: bytes, where: str, what: str) -> dict[str, Any]:
    """Read a JSON object from bytes; sizes, numbers, depth and names are bounded, and no name stands twice.

    Raises:
        PlanFileError: it is anything else.
    """
    try:
        text = content.decode()
        if text.count(",") + text.count("[") + text.count("{") > MAX_VALUES:
            raise ValueError(f"it has more than {MAX_VALUES:,} values")
        data = json.loads(text, parse_int=_int, parse_float=_float, parse_constant=_constant, object_pairs_hook=_object)
        _check_depth(data)
        if not isinstance(data, dict):
            raise ValueError(f"it is {type(data).__name__}, not an object")
    except (ValueError, RecursionError, MemoryError) as error:
        raise PlanFileError(f"{where} is not a {what}, or is truncated: {error}") from error
    return data


def check_writable(path: str | os.PathLike) -> Path:
    """Find the file that a path stands for, links followed.

    Raises:
        PlanFileError: it is there and is no regular file, or there is no folder for it.
    """
    target = Path(os.path.realpath(path))
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        if not target.parent.is_dir():
            raise PlanFileError(
                f"{path} cannot be written: there is no folder {target.parent}; make it first"
            ) from None
        return target
    _refuse_special(path, mode)
    return target


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a file so that others see the old one or the new one, never a part; a link to a file stays one.

    Raises:
        PlanFileError: the path is no regular file's.
        OSError: it cannot be written; the old file is as it was.
    """
    _replace(check_writable(path), text)


def keep_text(path: Path, text: str) -> None:
    """Write a file of the cache, in place of whatever bears its name, and clear away what killed processes left.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, text)
    for part in path.parent.glob(f"*{_PART}"):
        with contextlib.suppress(OSError):
            if time.time() - part.lstat().st_mtime > _STALE_S:
                part.unlink()


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}{_PART}")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if path.is_file() and not path.is_symlink():
            with contextlib.suppress(OSError):
                part.chmod(stat.S_IMODE(path.stat().st_mode))
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def _read_bytes(path: Path, folder: Path | None) -> bytes:
    target = Path(os.path.realpath(path))
    if folder is not None and not target.is_relative_to(os.path.realpath(folder)):
        raise PlanFileError(f"{path} is a link that leads out of {folder}")
    # Devices are not even opened, and pipes could wait for ever.
    _refuse_special(path, target.stat().st_mode)
    handle = os.open(target, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))
    with open(handle, "rb") as file:
        state = os.fstat(handle)
        _refuse_special(path, state.st_mode)
        if folder is not None and hasattr(os, "geteuid") and state.st_uid != os.geteuid():
            raise PlanFileError(f"{path} belongs to another user, {state.st_uid}")
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise PlanFileError(f"{path} has more than {MAX_BYTES:,} bytes, which no plan has")
    return content


def _refuse_special(path: str | os.PathLike, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise PlanFileError(f"{path} is {kind}, not a regular file; give the path of a file")


def _int(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"it has a number of {len(text)} digits")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if value - value != 0:
        raise ValueError(f"it has the number {text[:_MAX_DIGITS]}, which is not finite")
    return value


def _constant(text: str) -> Any:
    raise ValueError(f"it has the number {text}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has one name twice")
    return found


def _check_depth(data: Any) -> None:
    level, depth = [data], 0
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
        lists = [x for x in level if isinstance(x, (list, dict))]
        level = [y for x in lists for y in (x.values() if isinstance(x, dict) else x)]
        depth += 1
