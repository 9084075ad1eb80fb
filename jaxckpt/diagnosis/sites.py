"""The `jax.checkpoint` calls of a differentiated function: where each stands, and what is in it."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax.extend.core as jex
from jax.extend.core import primitives as prims

from jaxckpt import _compat
from jaxckpt.program.flops import jaxpr_cost
from jaxckpt.program.source import relative_source


@dataclass(frozen=True, kw_only=True)
class Site:
    """One `jax.checkpoint` in a function's jaxpr before it is differentiated.

    Attributes:
        source: the user's line that calls it.
        jaxpr: what is inside.
        policy: its policy, None for none.
        has_barriers: whether `prevent_cse` holds for any of its operands.
        loops: the number of loops around it inside the function, without those of a single iteration.
        outer: the lines of the checkpoints around it, outermost first.
        outer_loops: `loops` of the innermost checkpoint around it; 0 without one.
        share: of the function's FLOPs, all iterations counted.
        flops: those.
        later_flops: of what the function does after it.
    """

    source: str
    jaxpr: Any
    policy: Any
    has_barriers: bool
    loops: int
    outer: tuple[str, ...]
    outer_loops: int
    share: float
    flops: int
    later_flops: int

    @property
    def is_at_top(self) -> bool:
        """Whether nothing but calls is around it."""
        return not self.loops and not self.outer


@dataclass(frozen=True, kw_only=True)
class Group:
    """The checkpoints of one line of source.

    Attributes:
        source: the line.
        sites: the checkpoints that it makes.
    """

    source: str
    sites: tuple[Site, ...]

    @property
    def flops(self) -> int:
        """Of the forward pass, what is in them."""
        return sum(site.flops for site in self.sites)


def line_of(source_info: Any) -> str:
    """A line as it is shown and grouped by."""
    return relative_source(_compat.source_line(source_info))


def checkpoint_line(line: str, jaxpr: Any) -> str:
    """The line of a `jax.checkpoint`: where it is called, or, where jaxckpt is who calls it, what is checkpointed.

    Args:
        line: that of the call, as JAX has it.
        jaxpr: what is inside.
    """
    shown = relative_source(line)
    return relative_source(_compat.defined_at(jaxpr)) or shown if not shown or shown.startswith("jaxckpt/") else shown


def groups_of(jaxprs: Sequence[Any]) -> tuple[Group, ...]:
    """The checkpoints in differentiated functions, by line, in the order of the program."""
    found: dict[str, list[Site]] = defaultdict(list)
    for jaxpr in jaxprs:
        total = max(1, jaxpr_flops(jaxpr))
        for site in _sites(jaxpr, _Around(total=total)):
            found[site.source].append(site)
    return tuple(Group(source=source, sites=tuple(sites)) for source, sites in found.items())


@dataclass(frozen=True, kw_only=True)
class _Around:
    total: int
    trips: int = 1
    loops: int = 0
    outer: tuple[str, ...] = ()
    outer_loops: int = 0
    later: int = 0


def _sites(jaxpr: Any, around: _Around) -> Iterator[Site]:
    costs = [eqn_flops(eqn) * around.trips for eqn in jaxpr.eqns]
    later = around.later + sum(costs)
    for eqn, cost in zip(jaxpr.eqns, costs, strict=True):
        later -= cost
        inside = _inside(eqn, around, later)
        if eqn.primitive is prims.remat_p:
            site = Site(
                source=checkpoint_line(_compat.source_line(eqn.source_info), eqn.params["jaxpr"]),
                jaxpr=eqn.params["jaxpr"],
                policy=eqn.params["policy"],
                has_barriers=_any(eqn.params["prevent_cse"]),
                loops=around.loops,
                outer=around.outer,
                outer_loops=around.outer_loops,
                share=cost / around.total,
                flops=cost,
                later_flops=later,
            )
            yield site
            inside = _Around(
                total=around.total,
                trips=around.trips,
                loops=around.loops,
                outer=(*around.outer, site.source),
                outer_loops=around.loops,
                later=later,
            )
        for inner in jex.jaxprs_in_params(eqn.params):
            yield from _sites(inner, inside)


def _inside(eqn: Any, around: _Around, later: int) -> _Around:
    trips = trips_of(eqn)
    return _Around(
        total=around.total,
        trips=around.trips * trips,
        loops=around.loops + is_loop(eqn),
        outer=around.outer,
        outer_loops=around.outer_loops,
        later=later,
    )


def trips_of(eqn: Any) -> int:
    """How often what is inside an equation runs; 1 where nobody knows."""
    return eqn.params["length"] if eqn.primitive is prims.scan_p else 1


def is_loop(eqn: Any) -> bool:
    """Whether an equation is a loop to the compiler: a scan of one iteration, or unrolled in full, is none."""
    if eqn.primitive is prims.scan_p:
        return eqn.params["length"] > max(1, int(eqn.params["unroll"]))
    return eqn.primitive is prims.while_p


def eqn_flops(eqn: Any) -> int:
    """FLOPs of one equation with what is inside it, a Pallas kernel's in all programs of its grid."""
    if _compat.is_kernel(eqn):
        return jaxpr_cost(eqn.params["jaxpr"]).flops * _compat.kernel_cost(eqn)[1]
    inner = list(jex.jaxprs_in_params(eqn.params))
    if not inner or eqn.primitive is prims.while_p:
        return jaxpr_cost(_One(eqn)).flops
    each = [jaxpr_flops(jaxpr) for jaxpr in inner]
    if eqn.primitive is prims.cond_p:
        return max(each)
    # Custom rules have their own derivative beside the function, which is the first.
    return each[0] * trips_of(eqn)


def jaxpr_flops(jaxpr: Any) -> int:
    """FLOPs of a jaxpr, as `eqn_flops` counts them."""
    return sum(map(eqn_flops, jaxpr.eqns))


class _One:
    """One equation as a jaxpr."""

    def __init__(self, eqn: Any):
        self.eqns = (eqn,)


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr and those inside."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jex.jaxprs_in_params(eqn.params):
            yield from equations(inner)


def _any(given: Any) -> bool:
    return any(given) if isinstance(given, tuple) else bool(given)
