"""Effects that no plan can keep out of its regions."""

from typing import Any

import jax

from jaxckpt import _compat
from jaxckpt.errors import UnsupportedProgramError
from jaxckpt.program.interpret import run
from jaxckpt.program.ir import Program, is_differentiable, spec_of


def refuse_effects(program: Program, what: str) -> None:
    """Refuse a program with effects that a plan cannot keep out of its regions. Calls of Python and checks it can.

    Raises:
        UnsupportedProgramError: with the first such operation's line.
        NotImplementedError: JAX's own, where JAX has no derivative of the program either: the loops that it may have
            next carry mutable references, and their derivative is still to come.
    """
    for eqn in program.equations:
        if eqn.has_effects and not all(map(_compat.can_stand_alone, eqn.effects)):
            _differentiate(program)
            raise UnsupportedProgramError(
                f"{eqn.primitive.name} at {eqn.source or 'an unknown line'} has side effects, which would happen again "
                f"in every recomputation; move it out of {what}"
            )


def _differentiate(program: Program) -> None:
    """Let JAX differentiate a program, for the error it may raise."""
    specs = [spec_of(program.avals[v]) for v in program.inputs]
    wanted = [i for i, v in enumerate(program.inputs) if is_differentiable(program.avals[v])]

    def derivative(*inputs: Any) -> Any:
        def of(*some: Any) -> list[Any]:
            given = dict(zip(wanted, some, strict=True))
            return run(program, *(given.get(i, x) for i, x in enumerate(inputs)))

        return jax.vjp(of, *(inputs[i] for i in wanted))[0]

    try:
        jax.eval_shape(derivative, *specs)
    except NotImplementedError:
        raise
    except Exception:  # said of this copy of the program alone, such as of an axis that is not here
        return
