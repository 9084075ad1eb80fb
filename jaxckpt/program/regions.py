"""A program's own `jax.checkpoint` regions and the names inside: what they are, and other policies in their place."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax.extend.core as jex
from jax.extend.core import primitives as prims

from jaxckpt import _compat
from jaxckpt.program.ir import Program
from jaxckpt.program.source import relative_source

# Set in the parameters of every equation that is in the part of a region that runs in the backward pass.
AGAIN = "jaxckpt_again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A `jax.checkpoint` inside a program.

    Attributes:
        source: the user's line, such as `model.py:12 (decoder)`.
        names: those that occur inside, in order.
        saves: of those, the ones that its own policy saves.
        offloads: of those, the ones that its own policy keeps in host memory.
        told: the names that its own policy was made with, as far as that can be seen, whether they occur or not.
        num_others: how many other operations inside have results that its own policy saves.
    """

    source: str
    names: tuple[str, ...]
    saves: frozenset[str]
    offloads: frozenset[str]
    told: frozenset[str]
    num_others: int

    @property
    def is_about_names(self) -> bool:
        """Whether its policy may be replaced by one that saves nothing but names; see `with_policy`."""
        return bool(self.names) or not self.num_others


def regions_of(equations: Any) -> list[Region]:
    """The outermost regions among equations, in loops and branches too, each shape of them once."""
    found = dict.fromkeys(_region(eqn) for eqn in _outermost(equations))
    return list(found)


def names_of(equations: Any) -> dict[str, str]:
    """Each name that `checkpoint_name` gives among equations, in order, and the first line that does."""
    found: dict[str, str] = {}
    for eqn in _all(equations):
        if eqn.primitive is prims.name_p:
            found.setdefault(eqn.params["name"], relative_source(_compat.source_line(eqn.source_info)))
    return found


def _outermost(equations: Any) -> Iterator[Any]:
    for eqn in equations:
        if eqn.primitive is prims.remat_p:
            yield eqn
        else:
            for jaxpr in jex.jaxprs_in_params(eqn.params):
                yield from _outermost(jaxpr.eqns)


def _all(equations: Any) -> Iterator[Any]:
    for eqn in equations:
        yield eqn
        for jaxpr in jex.jaxprs_in_params(eqn.params):
            yield from _all(jaxpr.eqns)


def _region(eqn: Any) -> Region:
    policy, inside = eqn.params["policy"], list(_all(eqn.params["jaxpr"].eqns))
    said = {"save": set(), "offload": set()}
    num_others = 0
    for one in inside:
        if policy is None or (one.primitive is not prims.name_p and list(jex.jaxprs_in_params(one.params))):
            continue
        what = _compat.policy_says(policy, one)
        if one.primitive is prims.name_p:
            if what in said:
                said[what].add(one.params["name"])
        else:
            num_others += what != "remat"
    return Region(
        source=relative_source(_compat.source_line(eqn.source_info)),
        names=tuple(dict.fromkeys(e.params["name"] for e in inside if e.primitive is prims.name_p)),
        saves=frozenset(said["save"]),
        offloads=frozenset(said["offload"]),
        told=_compat.names_in_policy(policy),
        num_others=num_others,
    )


def with_policy(program: Program, policy: Callable[..., Any]) -> Program:
    """The same program, with this policy, which saves nothing but names, for the regions that are about names.

    Those are the ones in which a name occurs, and those whose own policy saves nothing but names: where there is none,
    the one does what the other does. A region without names whose policy saves other values is left as it is.
    """
    rewrite = _Rewrite(lambda eqn, is_again: (eqn.primitive, _with_policy(eqn, policy), False))
    equations = []
    for eqn in program.equations:
        _, params = rewrite.changed(eqn, False)
        equations.append(eqn if params is eqn.params else replace(eqn, params=params))
    return replace(program, equations=tuple(equations))


def _with_policy(eqn: Any, policy: Callable[..., Any]) -> dict[str, Any]:
    if eqn.primitive is not prims.remat_p or not _region(eqn).is_about_names:
        return eqn.params
    return {**eqn.params, "policy": policy}


def opened(jaxpr: Any) -> Any:
    """A differentiated jaxpr without regions; what one of them runs in the backward pass has the parameter `AGAIN`."""
    return _Rewrite(_opened).jaxpr(jaxpr, False)


def _opened(eqn: Any, is_again: bool) -> tuple[Any, dict[str, Any], bool]:
    if eqn.primitive is prims.remat_p:
        params = {"call_jaxpr": eqn.params["jaxpr"]}
        return prims.closed_call_p, params, is_again or bool(eqn.params["differentiated"])
    return eqn.primitive, {**eqn.params, AGAIN: True} if is_again else eqn.params, is_again


class _Rewrite:
    """Changes equations in a jaxpr and in all those inside; what stays the same stays one object.

    Args:
        change: from an equation, and whether it is in the backward part of a region, to its primitive, its parameters,
            and the same of the equations inside.
    """

    def __init__(self, change: Callable[[Any, bool], tuple[Any, dict[str, Any], bool]]):
        self._change = change
        self._known: dict[tuple[int, bool], tuple[Any, Any]] = {}

    def changed(self, eqn: Any, is_again: bool) -> tuple[Any, dict[str, Any]]:
        """An equation's primitive and parameters."""
        primitive, params, is_again = self._change(eqn, is_again)
        inner = {key: self._value(value, is_again) for key, value in params.items()}
        same = all(value is params[key] for key, value in inner.items())
        return primitive, params if same else inner

    def jaxpr(self, given: Any, is_again: bool) -> Any:
        """A jaxpr, closed or not."""
        key = id(given), is_again
        if key not in self._known:
            bare = getattr(given, "jaxpr", given)
            eqns = []
            for eqn in bare.eqns:
                primitive, params = self.changed(eqn, is_again)
                same = primitive is eqn.primitive and params is eqn.params
                eqns.append(eqn if same else eqn.replace(primitive=primitive, params=params))
            made = given
            if any(a is not b for a, b in zip(eqns, bare.eqns, strict=True)):
                made = bare.replace(eqns=eqns)
                made = made if bare is given else given.replace(jaxpr=made)
            self._known[key] = given, made  # kept alive, as the key wants it
        return self._known[key][1]

    def _value(self, value: Any, is_again: bool) -> Any:
        if isinstance(value, tuple | list) and any(map(_is_jaxpr, value)):
            made = [self._value(v, is_again) for v in value]
            return value if all(a is b for a, b in zip(made, value, strict=True)) else type(value)(made)
        return self.jaxpr(value, is_again) if _is_jaxpr(value) else value


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") and hasattr(value, "replace")
