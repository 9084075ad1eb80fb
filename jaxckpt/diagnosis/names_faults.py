"""Policies of names that do less than they say: names that are nowhere, elsewhere, or on nothing that is read again."""

from collections.abc import Iterator, Sequence
from typing import Any

from jax.extend.core import primitives as prims

from jaxckpt import _compat
from jaxckpt.diagnosis.sites import Group, equations
from jaxckpt.diagnosis.texts import TEXTS
from jaxckpt.program.regions import names_of
from jaxckpt.result.findings import Finding


def name_findings(groups: Sequence[Group], losses: Sequence[Any], recomputing: Any) -> Iterator[Finding]:
    """What is wrong with the names in policies.

    Args:
        groups: the checkpoints, by line.
        losses: jaxprs of the differentiated functions.
        recomputing: the whole, differentiated, with checkpoints that save nothing: what still has a name in the part
            that is recomputed is read in the backward pass.
    """
    everywhere = {name for loss in losses for name in names_of(loss.eqns)}
    read = _names_recomputed(recomputing)
    for group in groups:
        told = {n for s in group.sites for n in _compat.names_in_policy(s.policy) if _compat.saves_name(s.policy, n)}
        inside = {name for site in group.sites for name in names_of(site.jaxpr.eqns)}
        kinds = {
            "names-nowhere": told - everywhere,
            "names-outside": (told & everywhere) - inside,
            "names-no-residual": (told & inside) - read,
        }
        for kind, names in kinds.items():
            if names:
                yield _finding(kind, group, names)


def _finding(kind: str, group: Group, names: set[str]) -> Finding:
    text, advice = TEXTS[kind]
    return Finding(
        kind=kind,
        source=group.source,
        text=text.format(names=", ".join(map(repr, sorted(names)))),
        advice=advice,
        size_bytes=None,
        flops=None,
        label="counted",
    )


def _names_recomputed(differentiated: Any) -> set[str]:
    """The names in the parts of a differentiated jaxpr that checkpoints run in the backward pass."""
    backward = (
        eqn for eqn in equations(differentiated) if eqn.primitive is prims.remat_p and eqn.params["differentiated"]
    )
    return {name for eqn in backward for name in names_of(eqn.params["jaxpr"].eqns)}
