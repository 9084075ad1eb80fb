"""The arguments that several verbs have, checked before any work."""

import numbers
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxckpt import _compat
from jaxckpt.compilation.objective import Objective
from jaxckpt.errors import JaxckptWarning, NotDifferentiableError, OptionError
from jaxckpt.program.ir import Program
from jaxckpt.program.nnx import position_of


def check_function(fun: Any, verb: str) -> None:
    """Refuse what cannot be called.

    Raises:
        OptionError: with how the verb is written.
    """
    if not callable(fun):
        hint = '; a budget is written budget="1GB"' if isinstance(fun, str | int) else ""
        raise OptionError(f"{verb} takes a function, and was given {str(fun)[:60]!r}{hint}")


def name_of(fun: Any) -> str:
    """A function's name in messages; an object that is called has its class's."""
    return getattr(fun, "__name__", type(fun).__name__)


def is_count(value: Any) -> bool:
    """Whether a value is a whole number, of Python's or NumPy's, and neither True nor False."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_flags(**flags: Any) -> None:
    """Refuse flags that are neither True nor False.

    Raises:
        OptionError: with the first one.
    """
    for name, value in flags.items():
        if not isinstance(value, bool | np.bool_):
            raise OptionError(f"{name}={str(value)[:60]!r} is not accepted; write {name}=True or {name}=False")


def check_argnums(argnums: Any, name: str = "argnums", num_args: int | None = None) -> None:
    """Refuse positions that are no integers, or of arguments that are not there.

    Args:
        argnums: a position, a `nnx.DiffState` of one, or a sequence of them.
        name: the argument's name.
        num_args: how many arguments there are, where that is known already.

    Raises:
        OptionError: with what is accepted.
    """
    given = list(argnums) if isinstance(argnums, Sequence) and not isinstance(argnums, str) else [argnums]
    for one in map(position_of, given):
        if isinstance(one, bool) or not isinstance(one, numbers.Integral):
            raise OptionError(f"{name}={argnums!r} is not accepted; write the position of an argument, or several")
        if num_args is not None and not -num_args <= int(one) < num_args:
            raise OptionError(f"{name}={argnums!r} names an argument that is not there; the call has {num_args}")


def is_differentiated_already(program: Program, goal: Objective, *, within: bool = False) -> bool:
    """Whether a function is a gradient or a step: it differentiates, and its result is no loss.

    Args:
        program: the function's.
        goal: what of it would be differentiated.
        within: whether a derivative inside a loop or a branch counts, such as one that is accumulated.
    """
    return not goal.is_scalar and differentiates(program, within=within)


def differentiates(program: Program, *, within: bool) -> bool:
    """Whether something is differentiated in a program, or, if that counts, in one of its loops or branches."""
    return any(
        any("transpose(" in str(s) for s in eqn.name_stacks) or (within and _compat.is_differentiated_within(eqn))
        for eqn in program.equations
    )


def refuse_differentiated(program: Program, goal: Objective, verb: str) -> None:
    """Refuse a gradient or a step where a loss is expected.

    Raises:
        NotDifferentiableError: with what to call instead.
    """
    if is_differentiated_already(program, goal):
        raise NotDifferentiableError(
            f"{verb} differentiates a loss itself, and was given a function that differentiates already: give it the "
            "loss, or give the whole step to jaxckpt.jit or jaxckpt.fit, or to jaxckpt.names for its own names; "
            "jaxckpt.measure measures it as it is"
        )


def say_measured_as_it_is() -> None:
    """Say that a gradient or a step was not differentiated once more."""
    warnings.warn(
        "the function differentiates already, and is measured as it is; differentiate=False says so, and "
        "differentiate=True differentiates it once more",
        JaxckptWarning,
        stacklevel=4,
    )
