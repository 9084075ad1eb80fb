"""The device bytes of a function, or of its value and gradient."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxckpt.api.arguments import (
    check_argnums,
    check_flags,
    check_function,
    differentiates,
    is_differentiated_already,
    say_measured_as_it_is,
)
from jaxckpt.compilation.measure import Measurement, compiled_bytes
from jaxckpt.compilation.objective import Objective, input_specs, measured_specs, objective
from jaxckpt.errors import NotDifferentiableError
from jaxckpt.program.interpret import run
from jaxckpt.program.static import bound_call
from jaxckpt.program.trace import Traced
from jaxckpt.targets.sharding import described, trace_placed


def measure(
    fun: Callable,
    /,
    *args: Any,
    target: str | None = None,
    differentiate: bool | None = None,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
    compiler_options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Measurement:
    """Compile a function, or its value and gradient, and read the device bytes.

    Args:
        fun: a function of pytrees.
        *args: arrays or `ShapeDtypeStruct`s. Shardings on a mesh of several devices make the bytes those of each.
        target: a chip's name; None is the default backend.
        differentiate: measure value and gradient (for a result that is not scalar, the vjp), or `fun` itself. None is
            value and gradient, but for a gradient or a step, which is measured as it is, with a warning.
        argnums: as in `jax.grad`.
        has_aux: as in `jax.grad`.
        static_argnums: as in `plan`.
        static_argnames: as in `plan`.
        compiler_options: as in `jax.jit`, beside those that the target needs anyway; `compiler_options(plan)` for a
            plan that sends values to the host.
        **kwargs: named arguments of `fun`, as in `plan`.

    Returns:
        The bytes, in parts.

    Raises:
        OptionError: a static argument that `fun` does not have, or a name that is neither an option nor one of its
            arguments.
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
    check_function(fun, "measure")
    check_argnums(argnums)
    check_flags(has_aux=has_aux, differentiate=differentiate is None or differentiate)
    call = bound_call(fun, args, kwargs, static_argnums, static_argnames, "measure")
    options = {"compiler_options": dict(compiler_options)} if compiler_options else {}
    with described(target):
        traced = trace_placed(call.fun, call.args, call.kwargs)
        program = traced.program
        plain = functools.partial(run, program)
        constants = program.closed_over
        goal = None if differentiate is False else _goal(traced, argnums, has_aux, differentiate is None)
        if differentiate is None and goal is None:
            say_measured_as_it_is()
        if goal is None:
            fun, specs = plain, input_specs(program)[len(constants) :]
        else:
            fun, specs = goal.differentiated(plain), measured_specs(program, goal)
        return compiled_bytes(fun, specs, target, closed_over=constants, jit_options=options)


def _goal(traced: Traced, argnums: Any, has_aux: bool, may_be_step: bool) -> Objective | None:
    """What is differentiated; None of a gradient or a step, which is measured as it is."""
    try:
        goal = objective(traced, argnums, has_aux)
    except NotDifferentiableError:
        if not (may_be_step and differentiates(traced.program, within=True)):
            raise
        goal = None
    if goal is None or (may_be_step and is_differentiated_already(traced.program, goal, within=True)):
        return None
    return goal
