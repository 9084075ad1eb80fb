"""One distinct block in numbers of its own, and its forward and backward as one list of equations."""

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxckpt.model.cut import Span
from jaxckpt.program.flatten import flatten
from jaxckpt.program.interpret import evaluate
from jaxckpt.program.ir import Equation, Program, is_differentiable, live_equations, size_bytes, spec_of
from jaxckpt.targets.rules import Layouts


class LocalBlock:
    """A block in numbers of its own, so that equal blocks look equal."""

    def __init__(
        self,
        program: Program,
        span: Span,
        active: Collection[int],
        arguments: Collection[int],
        results: Collection[int],
        invariant: Collection[int] | None,
        layouts: Layouts,
        *,
        is_last: bool = False,
        is_repeated: bool = False,
    ):
        self.program, self.span, self.active = program, span, active
        self.values = [*span.inputs, *(v for eqn in span.equations for v in eqn.outputs)]
        self.active_inputs = [v for v in span.inputs if v in active]
        # An input that is no argument, its cotangent waits in a buffer of its own.
        self.crossing = [v for v in span.inputs if v not in arguments]
        self.outputs = span.outputs
        self.active_outputs = [v for v in span.outputs if v in active]
        self.results = [v for v in span.outputs if v in results]
        self.layouts = layouts
        # In a loop's body forward and backward are loops of their own, which no compiler mixes.
        self.is_body = invariant is not None
        # All of its kind may be treated alike, as all iterations are.
        self.is_repeated = is_repeated or self.is_body
        # The backward waits for nothing but the forward, and a compiler runs it right behind that.
        self.is_last = is_last and not self.is_body
        self.invariant = [v for v in span.inputs if v in (invariant or ())]
        self.is_whole_body = self.is_body and not self.crossing and len(self.results) == len(self.outputs)

    def signature(self) -> str:
        """A digest: blocks with equal ones need only one analysis."""
        number = {v: i for i, v in enumerate(self.values)}
        block = Program(
            avals=self.program.avals,
            inputs=tuple(self.span.inputs),
            equations=self.span.equations,
            outputs=tuple(self.outputs),
        )
        flags = [
            [number[v] for v in group]
            for group in (self.active_inputs, self.crossing, self.active_outputs, self.results, self.invariant)
        ]
        # Other blocks decide how the target holds what crosses the cuts.
        crossing = [
            (self.layouts.held_bytes(v), self.layouts.features.get(v)) for v in (*self.span.inputs, *self.outputs)
        ]
        flags += [crossing, [self.is_last, self.is_repeated]]
        return hashlib.sha256("\n".join((*block.lines(), repr(flags))).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Joint:
    """A block's forward and backward as one list of equations."""

    avals: list[Any]
    forward: list[Equation]
    backward: list[Equation]
    value: dict[int, int]  # the block's values to the joint program's
    residuals: list[int]  # forward values that the backward reads, inputs left out
    cotangents: list[int]  # of the active outputs
    waiting: list[int]  # cotangents of inputs that are no arguments
    gradients: list[int]  # cotangents of arguments


def differentiate(local: LocalBlock, run: Callable[[dict[int, Any]], None] | None = None) -> Joint:
    """Trace a block with its backward.

    Args:
        local: the block.
        run: adds what its equations make to a dict of values; None runs them as they are.

    Returns:
        Its forward and backward.
    """
    program, span = local.program, local.span
    interior = [v for eqn in span.equations for v in eqn.outputs]

    def joint(inputs: list[Any], cotangents: list[Any]) -> Any:
        env = dict(zip(span.inputs, inputs, strict=True))

        def forward(*active: Any) -> Any:
            inner = env | dict(zip(local.active_inputs, active, strict=True))
            # A name is a value of its own: what an operation's derivative reads of its unnamed result is made again
            # even where the named one is saved, so the model must see both.
            if run is None:
                evaluate(span.equations, inner, dict.fromkeys(interior, "value"))
            else:
                run(inner)
            return [inner[v] for v in local.active_outputs], [inner[v] for v in interior]

        _, pull, values = jax.vjp(forward, *(env[v] for v in local.active_inputs), has_aux=True)
        return values, pull(cotangents)

    inputs = [spec_of(program.avals[v]) for v in span.inputs]
    cotangents = [spec_of(program.avals[v].to_ct_aval()) for v in local.active_outputs]
    closed = jax.make_jaxpr(joint)(inputs, cotangents)
    flat = flatten(closed.jaxpr, is_differentiated=True)
    inputs = flat.inputs[len(closed.consts) :]
    cotangents = inputs[len(span.inputs) :]
    values = dict(zip(span.inputs, inputs, strict=False))
    made, grads = flat.outputs[: len(interior)], flat.outputs[len(interior) :]
    values |= {v: x for v, x in zip(interior, made, strict=True) if isinstance(x, int)}
    gradients = dict(zip(local.active_inputs, grads, strict=True))

    late = set(cotangents)
    backward = []
    for eqn in flat.equations:
        if not late.isdisjoint(eqn.reads):
            late.update(eqn.outputs)
            backward.append(eqn)
    backward = live_equations(backward, grads)
    forward = [eqn for eqn in flat.equations if late.isdisjoint(eqn.outputs)]
    made_forward = {v for eqn in forward for v in eqn.outputs}
    read = dict.fromkeys(v for eqn in backward for v in eqn.reads if v in made_forward)
    read |= dict.fromkeys(v for v in grads if isinstance(v, int) and v in made_forward)
    ints = lambda atoms: [x for x in atoms if isinstance(x, int)]  # noqa: E731
    return Joint(
        avals=flat.avals,
        forward=forward,
        backward=backward,
        value=values,
        residuals=list(read),
        cotangents=list(cotangents),
        waiting=ints(gradients[v] for v in local.active_inputs if v in set(local.crossing)),
        gradients=ints(gradients[v] for v in local.active_inputs if v not in set(local.crossing)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outside:
    """Bytes around the loop or the conditional that a block ends with.

    Attributes:
        operands: made in the block, and held for the backward; those from elsewhere are held anyway.
        results: of the block, where the program does not count them.
        cotangents: of results and operands, and those that wait.
    """

    operands: int
    results: int
    cotangents: int


def outside(local: LocalBlock) -> Outside:
    """Return what a block that ends with a loop or a conditional takes outside of that."""
    *before, last = local.span.equations
    size = lambda vs: sum(size_bytes(local.program.avals[v]) for v in vs)  # noqa: E731
    made = {v for eqn in before for v in eqn.outputs}.intersection(last.reads)
    waiting = [v for v in local.active_inputs if v in local.crossing]
    return Outside(
        operands=size(made),
        results=size(v for v in local.outputs if v not in local.results),
        cotangents=size([*local.active_outputs, *waiting, *made.intersection(local.active)]),
    )


def differentiated_ends(local: LocalBlock, body: Program, operands: Sequence[Any]) -> tuple[set[int], set[int]]:
    """Inputs and outputs of a body that a block's last equation runs, as far as tangents flow through them outside.

    Args:
        local: the block.
        body: the body.
        operands: the equation's, one for each of the body's inputs.
    """
    results = zip(body.outputs, local.span.equations[-1].outputs, strict=True)
    return (
        {
            v
            for v, x in zip(body.inputs, operands, strict=True)
            if isinstance(x, int) and x in local.active and is_differentiable(body.avals[v])
        },
        {x for x, v in results if isinstance(x, int) and v in local.active and is_differentiable(body.avals[x])},
    )
