"""Which packages are installed beside this one."""

from importlib import metadata
from importlib.util import find_spec


def version(name: str) -> str | None:
    """The version of a package that is installed, None if there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def is_importable(name: str) -> bool:
    """Whether a module is there to import."""
    return find_spec(name) is not None
