"""Where things are kept, and how they are written: whole or not at all."""

import contextlib
import os
import tempfile
from pathlib import Path


def cache_directory(cache_dir: str | os.PathLike | None = None) -> Path:
    """The directory that was named, or the user's own."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_dir or Path(base) / "jaxckpt")


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
