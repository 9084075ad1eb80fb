"""Arguments named by place and by name, static or donated, as `jax.jit` has them."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxckpt.errors import OptionError
from jaxckpt.program.objects import call_unchanged

_BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def places_and_names(
    fun: Callable,
    argnums: int | Sequence[int] | None,
    argnames: str | Sequence[str] | None,
    kind: str = "static",
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Find the places and the names of arguments of a kind.

    Args:
        fun: whose signature tells one by the other, where only one is given and it has a signature.
        argnums: places, negative ones from the end.
        argnames: names.
        kind: "static" or "donate", for errors.

    Returns:
        Places and names. As under `jax.jit`, where both are given they are as they are.

    Raises:
        OptionError: a place or a name that the function does not have.
    """
    places = (argnums,) if isinstance(argnums, int) else tuple(argnums or ())
    names = (argnames,) if isinstance(argnames, str) else tuple(argnames or ())
    if not places and not names:
        return (), ()
    try:
        parameters = inspect.signature(fun).parameters
    except (TypeError, ValueError):
        return places, names  # one that is written in C has none
    by_place = [name for name, p in parameters.items() if p.kind in _BY_PLACE]
    kinds = {p.kind for p in parameters.values()}
    takes_any = inspect.Parameter.VAR_POSITIONAL in kinds
    for place in places:
        if not takes_any and not -len(by_place) <= place < len(by_place):
            raise OptionError(f"{kind}_argnums={place} is no argument of the function, which takes {len(by_place)}")
    for name in names:
        if inspect.Parameter.VAR_KEYWORD not in kinds and (
            name not in parameters or parameters[name].kind is inspect.Parameter.POSITIONAL_ONLY
        ):
            raise OptionError(f"{kind}_argnames={name!r} is no argument of the function: {', '.join(parameters)}")
    if not takes_any:
        places = tuple(place % len(by_place) for place in places)
    named = lambda name: parameters[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD  # noqa: E731
    if not places:
        places = tuple(i for i, name in enumerate(by_place) if name in names and named(name))
    elif not names:
        names = tuple(name for i, name in enumerate(by_place) if i in places and named(name))
    return places, names


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """A call whose static arguments are fixed.

    Attributes:
        fun: of the other arguments.
        args: positional ones; an empty tuple stands where a static one was, so that positions are those of the call.
        kwargs: named ones.
        static: places, names and values of the static ones.
    """

    fun: Callable
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    static: tuple[Any, ...] = ()


def bind_static(
    fun: Callable, args: Sequence[Any], kwargs: Mapping[str, Any], places: Sequence[int], names: Sequence[str]
) -> Bound:
    """Fix the static arguments of a call, so that only the others are traced.

    Args:
        fun: what is called.
        args: its positional arguments.
        kwargs: its named ones.
        places: of static arguments, as `places_and_names` has them.
        names: likewise.
    """
    if not places and not names:
        return Bound(fun=fun, args=tuple(args), kwargs=dict(kwargs))
    fixed = {p % len(args): args[p] for p in sorted(places) if -len(args) <= p < len(args)}
    fixed_names = {name: kwargs[name] for name in names if name in kwargs}

    def inner(*given: Any, **named: Any) -> Any:
        full = tuple(fixed.get(i, x) for i, x in enumerate(given))
        return call_unchanged(fun, full, {**named, **fixed_names})

    inner.__name__ = getattr(fun, "__name__", type(fun).__name__)
    return Bound(
        fun=inner,
        args=tuple(() if i in fixed else x for i, x in enumerate(args)),
        kwargs={name: x for name, x in kwargs.items() if name not in fixed_names},
        static=(tuple(fixed), *fixed.values(), tuple(fixed_names), *fixed_names.values()),
    )


def bound_call(
    fun: Callable,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    argnums: int | Sequence[int],
    argnames: str | Sequence[str],
    verb: str,
) -> Bound:
    """A call as the verbs are given it: a function, its arguments, and which of them are static.

    Raises:
        OptionError: a static argument that the function does not have, or a name that is neither an option of the verb
            nor an argument of the function.
    """
    check_names(fun, kwargs, verb)
    return bind_static(fun, args, kwargs, *places_and_names(fun, argnums, argnames))


def check_names(fun: Callable, kwargs: Mapping[str, Any], verb: str) -> None:
    """Refuse names that are neither options of a verb nor arguments of the function.

    Raises:
        OptionError: with the first one.
    """
    if not kwargs:
        return
    try:
        parameters = inspect.signature(fun).parameters
    except (TypeError, ValueError):
        return
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for name in kwargs:
        if name not in parameters or parameters[name].kind is inspect.Parameter.POSITIONAL_ONLY:
            raise OptionError(
                f"{name!r} is neither an option of {verb} nor an argument of the function, which takes "
                f"{', '.join(parameters) or 'none'}"
            )
