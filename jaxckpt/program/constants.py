"""The arrays that a program closes over, which are constants of the user's own jit."""

from collections.abc import Iterable, Iterator
from typing import Any

import jax
from jax.core import Tracer

from jaxckpt.program.ir import Program, size_bytes


def program_constant_bytes(program: Program) -> int:
    """Bytes of the arrays that a program closes over, each once."""
    return _total([*program.closed_over, *_inside(program.equations)])


def jaxpr_constant_bytes(closed: Any) -> int:
    """The same of a closed jaxpr."""
    return _total([*closed.consts, *_inside(closed.jaxpr.eqns)])


def _total(values: Iterable[Any]) -> int:
    # Numbers without a shape are part of the operations that read them.
    arrays = {id(x): x for x in values if getattr(x, "shape", ()) and not isinstance(x, Tracer)}
    return sum(size_bytes(jax.typeof(x)) for x in arrays.values())


def _inside(equations: Iterable[Any]) -> Iterator[Any]:
    """Constants among the operands of equations, and those of jaxprs in their parameters."""
    for eqn in equations:
        for operand in eqn.invars if hasattr(eqn, "invars") else eqn.inputs:
            yield getattr(operand, "val", getattr(operand, "value", None))
        for param in eqn.params.values():
            for inner in param if isinstance(param, tuple | list) else (param,):
                if hasattr(inner, "eqns"):
                    yield from getattr(inner, "consts", ())
                    yield from _inside(inner.eqns)
