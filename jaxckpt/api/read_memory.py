"""Where the device bytes of a function go: every buffer of its compiled program."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxckpt.api.arguments import check_argnums, check_function
from jaxckpt.api.host import offload_options
from jaxckpt.api.measure import subject_of
from jaxckpt.compilation.buffers import CompiledMemory
from jaxckpt.compilation.program_memory import program_memory
from jaxckpt.errors import OptionError
from jaxckpt.program.static import bound_call
from jaxckpt.result.plan import Plan
from jaxckpt.targets.chip import labelled_target
from jaxckpt.targets.sharding import described


def read_memory(
    fun: Callable,
    /,
    *args: Any,
    plan: Plan | None = None,
    target: str | None = None,
    differentiate: bool | None = None,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    donate_argnums: int | Sequence[int] = (),
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
    compiler_options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> CompiledMemory:
    """Compile a function, or its value and gradient, and read every buffer: when it is live, how large, whose line.

    Args:
        fun: a function of pytrees.
        *args: arrays or `ShapeDtypeStruct`s. Shardings on a mesh of several devices make the bytes those of each.
        plan: one of this function; the program is the one that was measured for it.
        target: a chip's name; None is the plan's, or the default backend.
        differentiate: as in `measure`.
        argnums: as in `jax.grad`.
        has_aux: as in `jax.grad`.
        donate_argnums: as in `jax.jit`. A function that gives arguments away is a whole step: it is compiled as it is,
            with the plans of decorated functions inside it.
        static_argnums: as in `plan`.
        static_argnames: as in `plan`.
        compiler_options: as in `measure`; a plan's own are added.
        **kwargs: named arguments of `fun`, as in `plan`.

    Returns:
        The buffers over the schedule, with live bytes and the heap's gaps at each step.

    Raises:
        OptionError: a static argument that `fun` does not have, a name that is neither an option nor one of its
            arguments, or `donate_argnums` with a plan or `differentiate`.
        NotDifferentiableError: nothing to differentiate.
        PlanMismatchError: the function or its shapes are not those of the plan.
        CompilerError: the target's compiler is not here, failed, or refused the program.
        ProgramFormatError: the compiler's description of the program is not as known; nothing is guessed.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
        >>> memory = read_memory(lambda x: jnp.sum(jnp.tanh(x @ x) ** 2), x)
        >>> all(a + b == memory.heap_bytes for a, b in zip(memory.live_bytes, memory.gap_bytes))
        True
        >>> memory.peak[0].size_bytes
        262144
    """
    if plan is not None and target is None:
        target = labelled_target(plan.target)
    options = dict(compiler_options or {})
    if plan is not None and plan.is_on_host:
        options |= offload_options(plan.target)
    static = static_argnums, static_argnames
    jit_options = {"compiler_options": options} if options else {}
    if donate_argnums != ():
        _check_step(fun, args, differentiate, donate_argnums, plan)
        call = bound_call(fun, args, kwargs, *static, "read_memory")
        step = functools.partial(_with_names, call.fun, len(call.args))
        specs = [*call.args, call.kwargs]
        return program_memory(step, specs, target, donate_argnums, jit_options=jit_options)
    with described(target):
        found = subject_of(fun, args, kwargs, differentiate, argnums, has_aux, *static, verb="read_memory", plan=plan)
        return program_memory(found.fun, found.specs, target, closed_over=found.constants, jit_options=jit_options)


def _check_step(fun: Callable, args: Sequence[Any], differentiate: Any, donated: Any, plan: Plan | None) -> None:
    check_function(fun, "read_memory")
    check_argnums(donated, "donate_argnums", len(args))
    if differentiate or plan is not None:
        raise OptionError(
            "donate_argnums is for a whole step, which is compiled as it is: leave differentiate and plan out; what "
            "the step differentiates has its plan by auto_remat or by plan.apply"
        )


def _with_names(fun: Callable, num_args: int, *given: Any) -> Any:
    """Call a function whose named arguments come last, in a dictionary."""
    return fun(*given[:num_args], **given[num_args])
