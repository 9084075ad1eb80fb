"""Conditionals: running their branches as planned."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxckpt import _compat
from jaxckpt.program.control_flow import Branch, branches_of
from jaxckpt.program.ir import Constant, Equation


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
