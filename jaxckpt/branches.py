"""Conditionals: the branches that `lax.cond` and `lax.switch` choose between, and running them as planned."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as prims

from jaxckpt import _compat, costs
from jaxckpt.scans import loop_of
from jaxckpt.trace import Constant, Equation, Program, flatten


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One branch of a conditional, which like a loop's body runs forward and backward in computations of its own.

    Attributes:
        body: its program, from the conditional's operands to its results.
    """

    body: Program

    @property
    def consts(self) -> tuple[int, ...]:
        """What is the same in every iteration, as a loop has it."""
        return ()

    @property
    def slices(self) -> tuple[int, ...]:
        """Its inputs, which are there without being held for it."""
        return self.body.inputs


def branches_of(eqn: Equation) -> tuple[Branch, ...]:
    """The branches of a conditional that is worth planning inside: one of them makes something that takes a buffer.

    Returns:
        Empty for every other equation, where a branch has effects, and where the branches are for different platforms.
    """
    if eqn.primitive is not prims.cond_p or set(eqn.params) != {"branches"} or eqn.effects:
        return ()
    jaxprs = eqn.params["branches"]
    if any(jaxpr.consts for jaxpr in jaxprs):
        return ()
    branches = tuple(Branch(body=_body(getattr(jaxpr, "jaxpr", jaxpr))) for jaxpr in jaxprs)
    heavy = any(_is_heavy(e) for branch in branches for e in branch.body.equations)
    return branches if heavy else ()


def _is_heavy(eqn: Equation) -> bool:
    return eqn.primitive not in costs.READS_FUSED


def is_planned_inside(eqn: Equation) -> bool:
    """Whether an equation has options of its own: loops and conditionals."""
    return loop_of(eqn) is not None or bool(branches_of(eqn))


@functools.lru_cache(maxsize=256)
def _body(jaxpr: Any) -> Program:
    return flatten(jaxpr)


def run_branches(eqn: Equation, operands: Sequence[Any], bodies: Sequence[Callable[..., list[Any]]]) -> list[Any]:
    """Run a conditional.

    Args:
        eqn: the conditional.
        operands: its operands, the number of the branch first.
        bodies: its branches, from flat inputs to flat outputs.

    Returns:
        The conditional's results.
    """
    index, *rest = operands
    branches = [functools.partial(_run, branch, body) for branch, body in zip(branches_of(eqn), bodies, strict=True)]
    with _compat.source_context(eqn.source_info, eqn.name_stacks, eqn.ctx):
        return list(lax.switch(index, branches, *rest))


def _run(branch: Branch, body: Callable[..., list[Any]], *inputs: Any) -> list[Any]:
    return [
        jnp.asarray(y, x.aval.dtype) if isinstance(x, Constant) else y
        for x, y in zip(branch.body.outputs, body(*inputs), strict=True)
    ]
