"""Loops and conditionals taken apart: what `lax.scan` repeats, and what `lax.cond` and `lax.switch` choose between."""

import functools
from dataclasses import dataclass
from typing import Any

from jax.extend.core import primitives as prims

from jaxckpt import _compat
from jaxckpt.program import primitives
from jaxckpt.program.flatten import flatten
from jaxckpt.program.ir import Equation, Program


@dataclass(frozen=True, kw_only=True)
class Loop:
    """A `lax.scan` taken apart.

    Attributes:
        body: one iteration: its inputs are the loop's constants, the carry and a slice of each stacked input; its
            outputs the carry and a slice of each stacked output.
        length: number of iterations.
        num_consts: how many of the body's inputs are the same in every iteration.
        num_carry: how many are carried from one to the next.
        reverse: whether it runs from the last slice to the first.
        unroll: how many iterations XLA sees at once.
    """

    body: Program
    length: int
    num_consts: int
    num_carry: int
    reverse: bool
    unroll: int

    @property
    def consts(self) -> tuple[int, ...]:
        """The body's inputs that are the same in every iteration."""
        return self.body.inputs[: self.num_consts]

    @property
    def carry(self) -> tuple[int, ...]:
        """The body's inputs that come from the iteration before."""
        return self.body.inputs[self.num_consts : self.num_consts + self.num_carry]

    @property
    def slices(self) -> tuple[int, ...]:
        """The body's inputs that are slices of stacked arrays."""
        return self.body.inputs[self.num_consts + self.num_carry :]


def loop_of(eqn: Equation) -> Loop | None:
    """Take a scan of two or more iterations apart; None for every other equation, and where its body has effects."""
    if eqn.primitive is not prims.scan_p or eqn.params["length"] < 2 or eqn.params["jaxpr"].consts or eqn.has_effects:
        return None
    num_consts, num_carry = _compat.scan_layout(eqn.params)
    return Loop(
        body=_body(eqn.params["jaxpr"].jaxpr),
        length=eqn.params["length"],
        num_consts=num_consts,
        num_carry=num_carry,
        reverse=eqn.params["reverse"],
        unroll=int(eqn.params["unroll"]),
    )


@functools.lru_cache(maxsize=256)
def _body(jaxpr: Any) -> Program:
    return flatten(jaxpr)


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
    if eqn.primitive is not prims.cond_p or set(eqn.params) != {"branches"} or eqn.has_effects:
        return ()
    jaxprs = eqn.params["branches"]
    if any(jaxpr.consts for jaxpr in jaxprs):
        return ()
    branches = tuple(Branch(body=_body(getattr(jaxpr, "jaxpr", jaxpr))) for jaxpr in jaxprs)
    heavy = any(_is_heavy(e) for branch in branches for e in branch.body.equations)
    return branches if heavy else ()


def _is_heavy(eqn: Equation) -> bool:
    return eqn.primitive not in primitives.READS_FUSED


def is_planned_inside(eqn: Equation) -> bool:
    """Whether an equation has options of its own: loops and conditionals."""
    return loop_of(eqn) is not None or bool(branches_of(eqn))
