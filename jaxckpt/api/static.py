"""Arguments named by place and by name, static or donated, as `jax.jit` has them."""

import inspect
from collections.abc import Callable, Sequence

from jaxckpt.errors import OptionError

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
