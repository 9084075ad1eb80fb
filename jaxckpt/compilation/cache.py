"""What is kept on disk from run to run: where, and compiles that need not be made again.

JAX's own cache of compiled programs cannot be read back for a chip that is not here: it wants the chip's client. Sizes
are all that is needed of such a program, and they are a function of its text, the compiler and its options.
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from jaxckpt.compilation.files import check_digest, keep_text, read_object, with_digest
from jaxckpt.compilation.records import check_record, record_of
from jaxckpt.errors import PlanFileError

_LOG = logging.getLogger("jaxckpt")
# Set to anything, measured sizes are neither read from disk nor written to it.
SWITCH = "JAXCKPT_NO_CACHE"
_T = TypeVar("_T")


def folder(given: str | os.PathLike | None = None) -> Path:
    """Where plans and measurements are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given or Path(base) / "jaxckpt")


def digest(parts: Sequence[Any]) -> str:
    """A name for what makes a compile what it is."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]


def read(name: str, shape: type[_T]) -> _T | None:
    """What is kept under a name.

    Args:
        name: as `digest` makes them.
        shape: the dataclass it is one of.

    Returns:
        None where there is nothing; what cannot be used is skipped with a warning.
    """
    if SWITCH in os.environ:
        return None
    path = _path(name)
    try:
        data = read_object(path, "kept measurement", folder())
        check_digest(data, str(path))
        del data["digest"]
        check_record(record_of(shape), data, str(path))
        return shape(**data)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (PlanFileError, OSError) as error:
        _LOG.warning("a kept measurement cannot be used and is made again: %s", error)
        return None


def write(name: str, sizes: dict[str, Any]) -> None:
    """Keep sizes under a name; the file is there whole or not at all, and without a place for it nothing is kept."""
    if SWITCH in os.environ:
        return
    path = _path(name)
    try:
        keep_text(path, json.dumps(with_digest(sizes)))
    except OSError as error:
        _LOG.debug("a measurement could not be kept at %s: %s", path, error)


def _path(name: str) -> Path:
    return folder() / "measured" / f"{name}.json"
