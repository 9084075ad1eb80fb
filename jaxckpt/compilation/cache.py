"""What is kept on disk from run to run: where, and compiles that need not be made again.

JAX's own cache of compiled programs cannot be read back for a chip that is not here: it wants the chip's client. Sizes
are all that is needed of such a program, and they are a function of its text, the compiler and its options.
"""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_LOG = logging.getLogger("jaxckpt")
# Set to anything, measured sizes are neither read from disk nor written to it.
SWITCH = "JAXCKPT_NO_CACHE"


def folder(given: str | os.PathLike | None = None) -> Path:
    """Where plans and measurements are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given or Path(base) / "jaxckpt")


def digest(parts: Sequence[Any]) -> str:
    """A name for what makes a compile what it is."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]


def read(name: str) -> dict[str, Any] | None:
    """The sizes kept under a name, None if there are none that can be read."""
    try:
        found = json.loads(_path(name).read_text()) if SWITCH not in os.environ else None
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write(name: str, sizes: dict[str, Any]) -> None:
    """Keep sizes under a name; the file is there whole or not at all, and without a place for it nothing is kept."""
    if SWITCH in os.environ:
        return
    path = _path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(sizes))
    except OSError as error:
        _LOG.debug("a measurement could not be kept at %s: %s", path, error)


def _path(name: str) -> Path:
    return folder() / "measured" / f"{name}.json"


def write_text(path: Path, text: str) -> None:
    """Write a file so that others see the old one or the new one, never a part."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
