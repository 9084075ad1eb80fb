"""What may be wrong with the checkpoints of a line, from where they stand: each is then confirmed by a compile."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax.extend.core as jex
from jax.extend.core import primitives as prims

from jaxckpt import _compat
from jaxckpt.diagnosis.sites import Group, Site, eqn_flops, equations, is_loop
from jaxckpt.diagnosis.subject import Change
from jaxckpt.program.primitives import MATMULS

# Of the function's FLOPs, what a checkpoint around the whole of it has at least, and what is left after the last layer.
_WHOLE, _LITTLE = 0.9, 0.2
# Of a checkpoint's FLOPs, what is in a loop or a shard_map that it is around.
_MOST = 0.8

# The finding is true if the change takes no more bytes to speak of (and less work); if it takes fewer bytes, or makes
# the compiler leave more of the recomputation; if it takes no more bytes.
Rule = Literal["spares work", "spares bytes", "harmless"]


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """A cause that may be at work.

    Attributes:
        kind: of the finding that it would be.
        source: the line.
        change: what is done to that line's checkpoints to see.
        rule: what then makes it a finding.
        named: what the text names.
    """

    kind: str
    source: str
    change: Change
    rule: Rule
    named: tuple[tuple[str, str], ...] = ()


def suspects_of(groups: Sequence[Group]) -> list[Suspect]:
    """One cause of each kind of trouble at most for each line, the most telling first."""
    found: list[Suspect] = []
    for group in groups:
        found += _about_barriers(group)
        found.append(_about_saving(group))
    return found


def _about_saving(group: Group) -> Suspect:
    """Why the checkpoints may save nothing; the last is no reason, but worth a look."""
    kind, named = "saves-nothing", ()
    if all(_is_around(site, _compat.is_shard_map) for site in group.sites):
        kind = "whole-shard-map"
    elif all(_is_around(site, is_loop) and not _has_checkpoint_in_loop(site) for site in group.sites):
        kind = "loop-from-outside"
    elif all(site.is_at_top and site.share >= _WHOLE for site in group.sites):
        kind = "whole-function" if group.sites[0].policy is None else "flat-policy"
    elif all(site.outer and site.loops == site.outer_loops for site in group.sites):
        kind, named = "nested", (("outer", group.sites[0].outer[-1]),)
    elif all(_is_last(site) for site in group.sites):
        kind = "last-layer"
    return Suspect(kind=kind, source=group.source, change="out", rule="spares work", named=named)


def _about_barriers(group: Group) -> Iterator[Suspect]:
    if any(not site.loops and not site.has_barriers for site in group.sites):
        yield Suspect(kind="cse-outside-loop", source=group.source, change="barriers", rule="spares bytes")
    if all(site.has_barriers and site.loops > site.outer_loops for site in group.sites):
        yield Suspect(kind="cse-in-loop", source=group.source, change="no barriers", rule="harmless")


def _is_last(site: Site) -> bool:
    return site.is_at_top and site.share < _WHOLE and site.later_flops <= _LITTLE * site.flops


def _is_around(site: Site, what: Callable[[Any], bool]) -> bool:
    """Whether most of what is inside is inside such an equation, calls looked through."""
    total, inside = 0, 0
    todo = [site.jaxpr]
    while todo:
        for eqn in todo.pop().eqns:
            if what(eqn):
                inside += eqn_flops(eqn)
            elif eqn.primitive in _CALLS:
                todo += jex.jaxprs_in_params(eqn.params)
                continue
            total += eqn_flops(eqn)
    return bool(inside) and inside >= _MOST * total


_CALLS = frozenset({prims.jit_p, prims.closed_call_p})


def _has_checkpoint_in_loop(site: Site) -> bool:
    return any(
        eqn.primitive is prims.remat_p
        for loop in equations(site.jaxpr)
        if is_loop(loop)
        for jaxpr in jex.jaxprs_in_params(loop.params)
        for eqn in equations(jaxpr)
    )


def misses_kernels(group: Group) -> bool:
    """Whether a policy that saves what some operations make is given a Pallas kernel, and does not save that."""
    return any(map(_misses_kernels, group.sites))


def _misses_kernels(site: Site) -> bool:
    kernels = [eqn for eqn in equations(site.jaxpr) if _compat.is_kernel(eqn)]
    if site.policy is None or not kernels or not _saves_products(site):
        return False
    return all(_compat.policy_says(site.policy, eqn) == "remat" for eqn in kernels)


def _saves_products(site: Site) -> bool:
    products = (e for e in equations(site.jaxpr) if e.primitive in MATMULS)
    return any(_compat.policy_says(site.policy, eqn) != "remat" for eqn in products)
