"""The library that draws a page's charts, as text that a page carries with it. Only this needs the extra `html`."""

import functools
import importlib
import importlib.util
from typing import Any

from jaxckpt.errors import OptionError

# Module -> the package it comes in.
_NEEDED = {"vl_convert": "vl-convert-python", "jinja2": "jinja2"}


def check_installed() -> None:
    """Refuse to begin a page that cannot be drawn, before the work that it is about.

    Raises:
        OptionError: with what to install.
    """
    missing = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise OptionError(f"a page needs {' and '.join(missing)}, which is not here: pip install 'jaxckpt[html]'")


@functools.cache
def script() -> str:
    """Vega, Vega-Lite and vega-embed as one script, the same text for the same version of the package."""
    return f"(()=>{{{_vl_convert().javascript_bundle()}}})();"


def versions() -> dict[str, str]:
    """The versions of what draws."""
    vl_convert = _vl_convert()
    return {"Vega": vl_convert.get_vega_version(), "Vega-Lite": vl_convert.get_vegalite_versions()[-1]}


def _vl_convert() -> Any:
    check_installed()
    return importlib.import_module("vl_convert")
