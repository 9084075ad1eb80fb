"""A jaxpr becomes a flat program: calls inlined, values numbered, dead code left out."""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.extend.core as jex
from jax.extend.core import primitives as prims

from jaxckpt.program.interpret import run
from jaxckpt.program.ir import Atom, Constant, Equation, Program, live_equations, spec_of

# Calls that stand for their body and nothing else.
_INLINED = {prims.jit_p: "jaxpr", prims.closed_call_p: "call_jaxpr"}
# Calls with a derivative of their own.
_RULED = {prims.custom_jvp_call_p: "call_jaxpr", prims.custom_vjp_call_p: "call_jaxpr"}
# Primitives whose parameter `call` holds a flat program: decorated functions inside the one that is traced.
PROGRAM_CALLS: set[Any] = set()


def flatten(jaxpr: Any, *, keep_checkpoints: bool = True, is_differentiated: bool = False) -> Program:
    """Flatten a jaxpr: number its values, inline calls, and leave out what no output and no effect needs.

    Args:
        jaxpr: what to flatten.
        keep_checkpoints: leave checkpoints as they are; otherwise inline them, in loops and branches too.
        is_differentiated: it will not be differentiated again, so calls with rules for that are inlined too.

    Returns:
        The program.
    """
    inlined = _INLINED | (_RULED if is_differentiated else {}) | ({} if keep_checkpoints else {prims.remat_p: "jaxpr"})
    avals: list[Any] = []
    equations: list[Equation] = []

    def new(var: Any) -> int:
        avals.append(var.aval)
        return len(avals) - 1

    def enter(eqn: Any, operands: Iterable[Atom], stacks: tuple[Any, ...], calls: tuple[Any, ...]) -> list[Atom]:
        """Copy the equations inside a call."""
        inner = eqn.params[inlined[eqn.primitive]]
        # Closed-over arrays of a nested jaxpr are operands like any other.
        held = zip(getattr(inner, "consts", ()), _opened(inner).constvars, strict=True)
        return walk(_opened(inner), (*(Constant(c, v.aval) for c, v in held), *operands), stacks, calls)

    def insert(program: Program, operands: Sequence[Atom], call: Any, stacks: Any, calls: Any) -> list[Atom]:
        """Copy a flat program's equations, its values renumbered."""
        env = dict(zip(program.inputs, operands, strict=True))
        read = lambda x: env[x] if isinstance(x, int) else x  # noqa: E731
        for eqn in program.equations:
            if eqn.primitive in inlined:  # a call that the inner program keeps
                infos = (eqn.source_info, *eqn.call_infos, call.source_info, *calls)
                env.update(
                    zip(eqn.outputs, enter(eqn, map(read, eqn.inputs), (*stacks, *eqn.name_stacks), infos), strict=True)
                )
                continue
            for v in eqn.outputs:
                avals.append(program.avals[v])
                env[v] = len(avals) - 1
            equations.append(
                replace(
                    eqn,
                    params=eqn.params if keep_checkpoints else _without_checkpoints(eqn),
                    inputs=tuple(map(read, eqn.inputs)),
                    outputs=tuple(env[v] for v in eqn.outputs),
                    call_infos=(*eqn.call_infos, call.source_info, *calls),
                    name_stacks=(*stacks, *eqn.name_stacks),
                )
            )
        return list(map(read, program.outputs))

    def walk(jaxpr: Any, operands: Iterable[Atom], stacks: tuple[Any, ...], calls: tuple[Any, ...]) -> list[Atom]:
        env: dict[Any, Atom] = dict(zip([*jaxpr.constvars, *jaxpr.invars], operands, strict=True))

        def read(atom: Any) -> Atom:
            return Constant(atom.val, atom.aval) if isinstance(atom, jex.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            inputs = tuple(map(read, eqn.invars))
            eqn_stacks = (*stacks, eqn.source_info.name_stack)
            if eqn.primitive in inlined:
                env.update(zip(eqn.outvars, enter(eqn, inputs, eqn_stacks, (eqn.source_info, *calls)), strict=True))
                continue
            if eqn.primitive in PROGRAM_CALLS:
                env.update(
                    zip(eqn.outvars, insert(eqn.params["call"].program, inputs, eqn, eqn_stacks, calls), strict=True)
                )
                continue
            outputs = tuple(map(new, eqn.outvars))
            env.update(zip(eqn.outvars, outputs, strict=True))
            equations.append(
                Equation(
                    primitive=eqn.primitive,
                    params=eqn.params if keep_checkpoints else _without_checkpoints(eqn),
                    inputs=inputs,
                    outputs=outputs,
                    source_info=eqn.source_info,
                    call_infos=calls,
                    name_stacks=eqn_stacks,
                    ctx=eqn.ctx,
                    effects=eqn.effects,
                )
            )
        return [read(v) for v in jaxpr.outvars]

    inputs = tuple(new(v) for v in [*jaxpr.constvars, *jaxpr.invars])
    outputs = tuple(walk(jaxpr, inputs, (), ()))
    live = live_equations(equations, outputs)
    return Program(
        avals=avals,
        inputs=inputs,
        equations=tuple(live),
        outputs=outputs,
        keeps_checkpoints=keep_checkpoints,
    )


def _opened(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


# Where a checkpoint inside is inlined too; others, such as `custom_vjp`, say themselves how they are differentiated.
_ENTERED = (prims.scan_p, prims.while_p, prims.cond_p)


def _without_checkpoints(eqn: Any) -> dict[str, Any]:
    """An equation's parameters, with the checkpoints in a loop's body and in branches inlined."""
    if eqn.primitive not in _ENTERED:
        return eqn.params
    return {k: tuple(map(_inlined, v)) if k == "branches" else _inlined(v) for k, v in eqn.params.items()}


def _inlined(value: Any) -> Any:
    if not hasattr(value, "eqns") or not has_checkpoints(_opened(value).eqns):
        return value
    program = flatten(_opened(value), keep_checkpoints=False)
    # Closed-over arrays come first among the inputs, and are none of the new jaxpr's.
    fun = functools.partial(run, program, *value.consts)
    return jax.make_jaxpr(fun)(*(spec_of(program.avals[v]) for v in program.inputs[len(value.consts) :]))


def has_checkpoints(equations: Iterable[Any]) -> bool:
    """Whether there is a `jax.checkpoint` among equations, inside others too."""
    return any(
        eqn.primitive is prims.remat_p or any(has_checkpoints(j.eqns) for j in jex.jaxprs_in_params(eqn.params))
        for eqn in equations
    )
