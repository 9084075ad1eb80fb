"""Loops of known length, run in parts: levels of scans of checkpointed scans, or a binomial loop."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxckpt import _compat
from jaxckpt.kinds.base import Applier
from jaxckpt.kinds.binomial import binomial_loop
from jaxckpt.model.option import Save
from jaxckpt.model.tree import Tree
from jaxckpt.program.control_flow import Loop, loop_of
from jaxckpt.program.interpret import evaluate
from jaxckpt.program.interpret import run as run_program
from jaxckpt.program.ir import Constant, Equation

# One iteration: carry and slices to carry and slices, flat lists all.
Step = Callable[[list[Any], list[Any]], tuple[list[Any], list[Any]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopPart:
    """Consecutive iterations of a loop that are run in one way.

    Attributes:
        lengths: iterations of each level of scans of checkpointed scans, outermost first; their product is the number
            of iterations.
        body: the plan of one iteration, over the body's equations as flattening it numbers them.
        num_states: instead of levels, binomial checkpointing with this many carries held; None for levels.
    """

    lengths: tuple[int, ...]
    body: Tree
    num_states: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopPlan(Save):
    """How a loop is run.

    Attributes:
        parts: in the order they run; each is a loop of its own.
    """

    kind: ClassVar[str] = "scan"
    parts: tuple[LoopPart, ...]

    @property
    def is_on_host(self) -> bool:
        """Whether an iteration sends something to the host."""
        return any(part.body.is_on_host for part in self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Consecutive iterations.

    Attributes:
        lengths: iterations of each level of scans of checkpointed scans, outermost first.
        body: one iteration, from its flat inputs to its flat outputs.
        num_states: instead of levels, binomial checkpointing with this many carries held.
    """

    lengths: tuple[int, ...]
    body: Callable[..., list[Any]]
    num_states: int | None = None

    @property
    def length(self) -> int:
        """How many iterations."""
        return math.prod(self.lengths)


def run_planned(
    equations: Sequence[Equation], plan: LoopPlan, prefix: str, values: dict[int, Any], applier: Applier
) -> None:
    """Run a block that ends with a scan, each part as its plan says; adds what is made to the values."""
    *before, eqn = equations
    evaluate(before, values)
    operands = [x.value if isinstance(x, Constant) else values[x] for x in eqn.inputs]
    loop = loop_of(eqn)
    assert loop is not None, "only a scan has a plan of its own"
    runs = [_run(loop, part, f"{prefix}.{i}", applier) for i, part in enumerate(plan.parts)]
    values.update(zip(eqn.outputs, run_loop(eqn, operands, runs), strict=True))


def _run(loop: Loop, part: LoopPart, prefix: str, applier: Applier) -> Run:
    # A binomial loop runs an iteration's forward and backward together.
    body = applier.function(loop.body, part.body, prefix, is_body=part.num_states is None)
    return Run(lengths=part.lengths, body=body, num_states=part.num_states)


def run_loop(eqn: Equation, operands: Sequence[Any], runs: Sequence[Run]) -> list[Any]:
    """Run a scan.

    Args:
        eqn: the scan.
        operands: its operands.
        runs: its iterations in the order they run.

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
            start = loop.length - done - run.length if loop.reverse else done
            part = stacked if run.length == loop.length else [x[start : start + run.length] for x in stacked]
            carry, results = _run_part(loop, run, consts, carry, part)
            made.append(results)
            done += run.length
        parts = zip(*(reversed(made) if loop.reverse else made), strict=True)
        return [*carry, *(part[0] if len(part) == 1 else jnp.concatenate(part) for part in parts)]


def _run_part(loop: Loop, run: Run, consts: list, carry: list, stacked: list) -> tuple[list, list]:
    if run.num_states is None:
        return _run_levels(functools.partial(_iterate, loop, run.body, consts), carry, stacked, run.lengths, loop)
    return binomial_loop(
        functools.partial(_iterate, loop, functools.partial(run_program, loop.body)),
        functools.partial(_iterate, loop, run.body),
        consts,
        carry,
        stacked,
        length=run.length,
        num_states=run.num_states,
        reverse=loop.reverse,
    )


def _iterate(loop: Loop, body: Callable, consts: list, carry: list, slices: list) -> tuple[list, list]:
    outputs = [
        jnp.asarray(y, x.aval.dtype) if isinstance(x, Constant) else y
        for x, y in zip(loop.body.outputs, body(*consts, *carry, *slices), strict=True)
    ]
    return outputs[: loop.num_carry], outputs[loop.num_carry :]


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
