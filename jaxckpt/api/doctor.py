"""What ails a function that has checkpoints of its own, and what to do about it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxckpt import _compat
from jaxckpt.api.arguments import check_argnums, check_flags, check_function, is_count, name_of
from jaxckpt.api.differentiated import see_differentiated
from jaxckpt.api.measure import subject_of
from jaxckpt.diagnosis.examine import examine
from jaxckpt.diagnosis.offers import with_offers
from jaxckpt.diagnosis.subject import Subject
from jaxckpt.errors import OptionError
from jaxckpt.program.nnx import pure
from jaxckpt.program.static import bound_call
from jaxckpt.result.diagnosis import Diagnosis
from jaxckpt.targets.sharding import described

# More are predicted; and of them so many are for plans.
_MOST_COMPILES, _FOR_PLANS = 12, 3


def doctor(
    fun: Callable,
    /,
    *args: Any,
    target: str | None = None,
    differentiate: bool | None = None,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    donate_argnums: int | Sequence[int] = (),
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
    compiler_options: Mapping[str, Any] | None = None,
    plan: bool = True,
    max_compiles: int = _MOST_COMPILES,
    **kwargs: Any,
) -> Diagnosis:
    """Say what is wrong with a function's own `jax.checkpoint` calls, where its bytes go, and what a plan would do.

    Causes are looked for in the traced program: where each checkpoint stands, what its policy names, what loops and
    collectives save. What is about bytes is then compiled with and without. A checkpoint is taken out while the
    function is traced, so that JAX differentiates the function without it; those of one line of source go together.

    Args:
        fun: a loss, which is differentiated here; or a gradient, or a step that differentiates functions of its own,
            which is taken as it is.
        *args: arrays or `ShapeDtypeStruct`s. Shardings on a mesh of several devices make the bytes those of each.
        target: a chip's name; None is the default backend.
        differentiate: as in `measure`.
        argnums: as in `jax.grad`, of a loss.
        has_aux: as in `jax.grad`, of a loss.
        donate_argnums: of a step, as in `jax.jit`.
        static_argnums: as in `plan`.
        static_argnames: as in `plan`.
        compiler_options: as in `measure`; those that decide which recomputation survives are examined too.
        plan: say what a plan would take in place of the function's own checkpoints.
        max_compiles: at most so many programs are compiled; what is beyond is predicted, and says so.
        **kwargs: named arguments of `fun`, as in `plan`.

    Returns:
        The diagnosis. Its `str` is a report, `is_healthy` says whether nothing was found.

    Raises:
        OptionError: `max_compiles` below 1, an option that is none, or a static argument that `fun` does not have.
        NotDifferentiableError: nothing to differentiate.
        ShardingError: arguments on several devices, of which one does not say where it lies.
        CompilerError: the target's compiler is not here, or failed.
        TargetError: an unknown target, or a topology that it does not have.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> @jax.checkpoint
        ... def loss(ws, x):
        ...     for w in ws:
        ...         x = jnp.tanh(x @ w)
        ...     return jnp.sum(x**2)
        >>> ws, x = [jax.ShapeDtypeStruct((8, 8), jnp.float32)] * 6, jax.ShapeDtypeStruct((64, 8), jnp.float32)
        >>> doctor(loss, ws, x, plan=False).kinds
        ('whole-function',)
    """
    check_function(fun, "doctor")
    check_argnums(argnums)
    check_argnums(donate_argnums, "donate_argnums", len(args))
    check_flags(has_aux=has_aux, plan=plan, differentiate=differentiate is None or differentiate)
    if not is_count(max_compiles) or max_compiles < 1:
        raise OptionError(f"max_compiles={max_compiles!r} is not accepted; write how many programs, at least 1")
    see_differentiated()
    options = dict(compiler_options or {})
    with described(target):
        subject, is_step = _subject(
            fun, args, kwargs, differentiate, argnums, has_aux, donate_argnums, (static_argnums, static_argnames)
        )
        subject.target, subject.most_compiles = target, int(max_compiles)
        subject.jit_options = {"compiler_options": options} if options else {}
        for_plans = min(_FOR_PLANS, max(0, subject.most_compiles - 4)) if plan else 0
        made = examine(subject, name_of(fun), is_step, options, for_plans)
        return with_offers(made, subject) if plan and made.checkpoints else made


def _subject(
    fun: Callable,
    args: Any,
    kwargs: Any,
    differentiate: bool | None,
    argnums: Any,
    has_aux: bool,
    donate_argnums: Any,
    static: tuple[Any, Any],
) -> tuple[Subject, bool]:
    """What is examined, and whether it is a step."""

    def made() -> tuple[Subject, bool]:
        found = None
        if donate_argnums in ((), []):
            found = _loss(fun, args, kwargs, differentiate, argnums, has_aux, *static)
        return found or _step(fun, args, kwargs, donate_argnums, *static), found is None

    with _compat.plain_checkpoints():
        subject, is_step = made()
    if _compat.barrier_flags():
        subject.as_set = made()[0].fun
    return subject, is_step


def _loss(fun: Callable, args: Any, kwargs: Any, differentiate: bool | None, *rest: Any) -> Subject | None:
    """A function that is differentiated here; None of a gradient or a step."""
    if differentiate is False:
        return None
    argnums, has_aux, *static = rest
    found = subject_of(fun, args, kwargs, differentiate, argnums, has_aux, *static, verb="doctor")
    if not found.is_differentiated:
        return None
    return Subject(fun=found.fun, specs=found.specs, target=None, closed_over=found.constants)


def _step(
    fun: Callable, args: Any, kwargs: Any, donate_argnums: Any, static_argnums: Any, static_argnames: Any
) -> Subject:
    """A step, called as its user calls it: what it differentiates is differentiated in each trace anew."""
    call = bound_call(fun, args, kwargs, static_argnums, static_argnames, "doctor")
    own = pure(call.fun, call.args, call.kwargs, returns_all=donate_argnums not in ((), []))
    step, specs = own.positional
    return Subject(fun=step, specs=specs, target=None, donate_argnums=donate_argnums)
