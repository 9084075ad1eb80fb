"""Conditionals: what a plan says of one, and running its branches as planned."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import lax

from jaxckpt import _compat
from jaxckpt.kinds.base import Applier
from jaxckpt.model.option import Save
from jaxckpt.model.tree import Tree
from jaxckpt.program.control_flow import Branch, branches_of
from jaxckpt.program.interpret import evaluate
from jaxckpt.program.ir import Constant, Equation


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchPlan(Save):
    """How a conditional is run.

    Attributes:
        branches: the plan of each branch, over its equations as flattening it numbers them.
    """

    kind: ClassVar[str] = "cond"
    branches: tuple[Tree, ...]


def run_conditional(
    equations: Sequence[Equation], plan: BranchPlan, prefix: str, values: dict[int, Any], applier: Applier
) -> None:
    """Run a block that ends with a conditional, each branch as its plan says; adds what is made to the values."""
    *before, eqn = equations
    evaluate(before, values)
    operands = [x.value if isinstance(x, Constant) else values[x] for x in eqn.inputs]
    # A conditional whose branch is known is inlined by compilers, so nothing keeps forward and backward apart.
    bodies = [
        applier.function(branch.body, tree, f"{prefix}.{i}")
        for i, (branch, tree) in enumerate(zip(branches_of(eqn), plan.branches, strict=True))
    ]
    values.update(zip(eqn.outputs, run_branches(eqn, operands, bodies), strict=True))


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
