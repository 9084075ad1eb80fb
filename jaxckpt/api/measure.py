"""The device bytes of a function, or of its value and gradient."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from jaxckpt.result.plan import Plan
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
    options = {"compiler_options": dict(compiler_options)} if compiler_options else {}
    static = static_argnums, static_argnames
    with described(target):
        found = subject_of(fun, args, kwargs, differentiate, argnums, has_aux, *static, verb="measure")
        return compiled_bytes(found.fun, found.specs, target, closed_over=found.constants, jit_options=options)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is compiled of a function.

    Attributes:
        fun: of the constants and the arguments, flat.
        specs: of the arguments.
        constants: arrays that the function closes over.
        is_differentiated: whether it is the value and gradient of the function.
    """

    fun: Callable
    specs: Sequence[Any]
    constants: Sequence[Any]
    is_differentiated: bool


def subject_of(
    fun: Callable,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    differentiate: bool | None,
    argnums: int | Sequence[int],
    has_aux: bool,
    static_argnums: int | Sequence[int],
    static_argnames: str | Sequence[str],
    *,
    verb: str,
    plan: Plan | None = None,
) -> Subject:
    """Trace a function, and its derivative where it is to be differentiated, under a plan where there is one.

    Args:
        fun: as in `measure`, like what follows.
        args: positional arguments.
        kwargs: named ones.
        differentiate: whether value and gradient, or the function itself.
        argnums: as in `jax.grad`.
        has_aux: as in `jax.grad`.
        static_argnums: as in `plan`.
        static_argnames: as in `plan`.
        verb: who asks, for messages; a gradient or a step is what `doctor` expects, and it is not warned of one.
        plan: one of this function.

    Raises:
        PlanMismatchError: the function or its shapes are not those of the plan.
    """
    check_function(fun, verb)
    check_argnums(argnums)
    check_flags(has_aux=has_aux, differentiate=differentiate is None or differentiate)
    call = bound_call(fun, args, kwargs, static_argnums, static_argnames, verb)
    keeps = plan is None or plan.keeps_checkpoints
    traced = trace_placed(call.fun, call.args, call.kwargs, keep_checkpoints=keeps)
    program = traced.program
    if plan is not None:
        plan.check(program)
    flat = functools.partial(run, program) if plan is None else plan.flat(program)
    goal = None if differentiate is False else _goal(traced, argnums, has_aux, differentiate is None)
    if differentiate is None and goal is None and verb != "doctor":
        say_measured_as_it_is()
    constants = program.closed_over
    if goal is None:
        specs = input_specs(program)[len(constants) :]
        return Subject(fun=flat, specs=specs, constants=constants, is_differentiated=False)
    specs = measured_specs(program, goal)
    return Subject(fun=goal.differentiated(flat), specs=specs, constants=constants, is_differentiated=True)


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
