"""The device bytes of a function, or of its value and gradient."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from jaxckpt.compilation.measure import Measurement, compiled_bytes
from jaxckpt.compilation.objective import input_specs, measured_specs, objective
from jaxckpt.program.interpret import run
from jaxckpt.targets.sharding import described, trace_placed


def measure(
    fun: Callable,
    *args: Any,
    target: str | None = None,
    differentiate: bool = True,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
) -> Measurement:
    """Compile a function, or its value and gradient, and read the device bytes.

    Args:
        fun: a function of pytrees.
        *args: arrays or `ShapeDtypeStruct`s. Shardings on a mesh of several devices make the bytes those of each.
        target: a chip's name; None is the default backend.
        differentiate: measure value and gradient (for a result that is not scalar, the vjp) and not `fun` itself.
        argnums: as in `jax.grad`.
        has_aux: as in `jax.grad`.

    Returns:
        The bytes, in parts.

    Raises:
        NotDifferentiableError: nothing to differentiate.
        ShardingError: arguments on several devices, of which one does not say where it lies.
        CompilerError: the target's compiler is not here, or failed.
        TargetError: an unknown target, or a topology that it does not have.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
        >>> measure(lambda x: jnp.sum(jnp.tanh(x) ** 2), x).argument_bytes
        262144
    """
    with described(target):
        traced = trace_placed(fun, args)
        program = traced.program
        plain = functools.partial(run, program)
        constants = program.closed_over
        if not differentiate:
            return compiled_bytes(plain, input_specs(program)[len(constants) :], target, closed_over=constants)
        goal = objective(traced, argnums, has_aux)
        return compiled_bytes(goal.differentiated(plain), measured_specs(program, goal), target, closed_over=constants)
