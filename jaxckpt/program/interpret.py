"""Flat programs and their equations, run: each equation bound again at its own place."""

from collections.abc import Iterable
from typing import Any

from jax.ad_checkpoint import checkpoint_name

from jaxckpt import _compat
from jaxckpt.program.ir import Constant, Equation, Program


def evaluate(equations: Iterable[Equation], env: dict[int, Any], names: dict[int, str] | None = None) -> None:
    """Run equations on traced or concrete values.

    Args:
        equations: in order.
        env: value number to value; what is made is added to it.
        names: values to pass through `checkpoint_name`, under these names; those that are there already, first.
    """
    names = names or {}
    for v in env.keys() & names.keys():
        env[v] = checkpoint_name(env[v], names[v])
    for eqn in equations:
        operands = [x.value if isinstance(x, Constant) else env[x] for x in eqn.inputs]
        with _compat.source_context(eqn.source_info, eqn.name_stacks, eqn.ctx):
            results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
            if not eqn.primitive.multiple_results:
                results = [results]
            for v, result in zip(eqn.outputs, results, strict=True):
                if v in names:
                    result = checkpoint_name(result, names[v])
                env[v] = result


def outputs_of(program: Program, env: dict[int, Any]) -> list[Any]:
    """Read a program's outputs from the values that running it made."""
    return [x.value if isinstance(x, Constant) else env[x] for x in program.outputs]


def run(program: Program, *inputs: Any) -> list[Any]:
    """Run a program on flat inputs, without a plan."""
    env = dict(zip(program.inputs, inputs, strict=True))
    evaluate(program.equations, env)
    return outputs_of(program, env)
