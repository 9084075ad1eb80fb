"""Loops of known length: what `lax.scan` repeats, and running it as levels of scans of checkpointed scans."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as prims

from jaxckpt import _compat
from jaxckpt.trace import Constant, Equation, Program, flatten

# One iteration: carry and slices to carry and slices, flat lists all.
Step = Callable[[list[Any], list[Any]], tuple[list[Any], list[Any]]]


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
    """Take a scan of two or more iterations apart; None for every other equation."""
    if eqn.primitive is not prims.scan_p or eqn.params["length"] < 2 or eqn.params["jaxpr"].consts:
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


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive iterations, run as levels of scans of checkpointed scans: their lengths, outermost first."""

    lengths: tuple[int, ...]
    body: Callable[..., list[Any]]


def run_loop(eqn: Equation, operands: Sequence[Any], runs: Sequence[Run]) -> list[Any]:
    """Run a scan.

    Args:
        eqn: the scan.
        operands: its operands.
        runs: its iterations in the order they run; a body goes from the flat inputs of one to its flat outputs.

    Returns:
        The scan's results.
    """
    loop = loop_of(eqn)
    assert loop is not None
    consts, rest = list(operands[: loop.num_consts]), list(operands[loop.num_consts :])
    carry, stacked = rest[: loop.num_carry], rest[loop.num_carry :]
    made, done = [], 0
    with _compat.source_context(eqn.source_info, eqn.name_stacks, eqn.ctx):
        for run in runs:
            length = math.prod(run.lengths)
            start = loop.length - done - length if loop.reverse else done
            part = stacked if length == loop.length else [x[start : start + length] for x in stacked]
            carry, results = _run_levels(_step(loop, consts, run.body), carry, part, run.lengths, loop)
            made.append(results)
            done += length
        parts = zip(*(reversed(made) if loop.reverse else made), strict=True)
        return [*carry, *(part[0] if len(part) == 1 else jnp.concatenate(part) for part in parts)]


def _step(loop: Loop, consts: list[Any], body: Callable[..., list[Any]]) -> Step:
    def step(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        outputs = [
            jnp.asarray(y, x.aval.dtype) if isinstance(x, Constant) else y
            for x, y in zip(loop.body.outputs, body(*consts, *carry, *slices), strict=True)
        ]
        return outputs[: loop.num_carry], outputs[loop.num_carry :]

    return step


def _run_levels(step: Step, carry: list, stacked: list, lengths: Sequence[int], loop: Loop) -> tuple[list, list]:
    length, *inner = lengths
    if not inner:
        unroll = loop.unroll if length % max(1, loop.unroll) == 0 else 1
        return lax.scan(step, carry, stacked, length=length, reverse=loop.reverse, unroll=unroll)
    size = math.prod(inner)
    chunks = [x.reshape(length, size, *x.shape[1:]) for x in stacked]

    def chunk(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        return _run_levels(step, carry, slices, inner, loop)

    # Forward and backward are loops of their own, so no compiler can merge what one makes with the other's.
    carry, made = lax.scan(jax.checkpoint(chunk, prevent_cse=False), carry, chunks, length=length, reverse=loop.reverse)
    return carry, [y.reshape(length * size, *y.shape[2:]) for y in made]
