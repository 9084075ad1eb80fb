"""What a command is about: `MODULE:FUNCTION` becomes a function, and its arguments."""

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class UsageError(Exception):
    """Something on the command line that cannot be used."""


def function_and_args(options: argparse.Namespace) -> tuple[Callable, tuple]:
    """The function that a command names, and its arguments.

    Raises:
        UsageError: they are not there.
    """
    fun, make = function_and_maker(options)
    args = make() if callable(make) else make
    return fun, args if isinstance(args, tuple) else (args,)


def function_and_maker(options: argparse.Namespace) -> tuple[Callable, Any]:
    """The function that a command names, and what makes its arguments, or is them.

    Raises:
        UsageError: they are not there.
    """
    module, name = _load(options.function)
    fun = _attribute(module, name, options.function)
    if not callable(fun):
        raise UsageError(f"{options.function} is {type(fun).__name__}, not a function")
    if options.args:
        args_module, args_name = _load(options.args)
        return fun, _attribute(args_module, args_name, options.args)
    make = getattr(module, "example_args", None)
    if make is None:
        raise UsageError(
            f"{options.function.rpartition(':')[0]} has no example_args; give --args MODULE:FUNCTION, a function that "
            "returns the tuple of arguments as arrays or ShapeDtypeStructs"
        )
    return fun, make


def _load(reference: str) -> tuple[Any, str]:
    module, separator, name = reference.rpartition(":")
    if not separator or not module or not name:
        raise UsageError(f"{reference!r} is not MODULE:FUNCTION, such as examples.gpt2:loss or model.py:loss")
    if module.endswith(".py"):
        path = Path(module)
        if not path.exists():
            raise UsageError(f"{module} does not exist")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, loaded)
        spec.loader.exec_module(loaded)
        return loaded, name
    sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(module), name
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name):
            raise UsageError(f"there is no module {module!r} here: {error}") from error
        raise


def _attribute(module: Any, name: str, reference: str) -> Any:
    if not hasattr(module, name):
        raise UsageError(f"{reference!r}: {module.__name__} has no {name!r}")
    return getattr(module, name)
