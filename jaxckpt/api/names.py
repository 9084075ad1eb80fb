"""Which of a function's own names to save: a policy that production code can take over as it is printed."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxckpt.api.arguments import (
    check_argnums,
    check_flags,
    check_function,
    differentiates,
    is_differentiated_already,
    name_of,
)
from jaxckpt.api.differentiated import see_differentiated
from jaxckpt.api.named import choose_names, named_loss
from jaxckpt.api.plan import check_limits
from jaxckpt.errors import NotDifferentiableError, OptionError
from jaxckpt.result.names import Names
from jaxckpt.search.subjects import Named, NamedStep
from jaxckpt.targets.sharding import described, trace_placed


def names(
    fun: Callable,
    /,
    *args: Any,
    budget: int | str,
    cost: str = "time",
    target: str | None = None,
    reserve: int | str = 0,
    verify: bool = True,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    donate_argnums: int | Sequence[int] = (),
    only: Sequence[str] | None = None,
    max_compiles: int | None = None,
    on_infeasible: str = "raise",
) -> Names:
    """Choose which of a function's own names its own `jax.checkpoint` regions save, within a budget.

    The regions stay where they are. Each one in which values have names (`jax.ad_checkpoint.checkpoint_name`) gets the
    policy `save_only_these_names`, with one choice of names for all, whatever its own policy is. The result prints that
    policy as code and as lines of MaxText's configuration, so that the code that trains needs nothing of jaxckpt.

    Args:
        fun: a function of pytrees that is differentiated here, or a step that differentiates functions of its own with
            `jax.grad`, `value_and_grad`, `vjp` or `jacrev`: then their regions get the policy, and the whole step is
            counted and measured.
        *args: arrays or `ShapeDtypeStruct`s. With shardings on a mesh of several devices, sizes are those of each.
        budget: device bytes: an int, `"8GB"`, `"8GiB"`, or `"60%"` of what it takes without its own checkpoints.
        cost: what is minimised: "time", modelled for the target, or "flops".
        target: a chip's name; None is the default backend.
        reserve: device bytes to leave for what lives outside the function, as a budget is written.
        verify: compile what is chosen and measure it; otherwise it is predicted, and a margin is left.
        argnums: as in `jax.grad`; not for a step.
        has_aux: as in `jax.grad`; not for a step.
        donate_argnums: of a step, as in `jax.jit`.
        only: the names to choose among; None is every name in the program. The others are not saved.
        max_compiles: after so many compiles the best choice that was measured to fit is used; None is no such limit.
        on_infeasible: "raise", or "least" to take the choice with the least bytes, with a warning, where none fits.

    Returns:
        The names, each with its place, and what was measured. Up to ten names that do something, every choice is
        judged; beyond, branch and bound finds one, and says what no choice can be better than.

    Raises:
        BudgetError: a budget or a reserve that cannot be read.
        OptionError: an option that is none, or a function without regions or without names in them.
        InfeasibleBudgetError: no choice fits.
        NotDifferentiableError: nothing to differentiate.
        ShardingError: arguments on several devices, of which one does not say where it lies.
        TargetError: an unknown target, or a topology that it does not have.

    Where the target's compiler is not installed or fails, a warning says so and the choice is predicted.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jax.ad_checkpoint import checkpoint_name
        >>> @jax.checkpoint
        ... def layer(x, w):
        ...     h = checkpoint_name(x @ w, "h")
        ...     return x + checkpoint_name(jnp.tanh(h), "a") @ w
        >>> def loss(ws, x):
        ...     return jnp.sum(jax.lax.scan(lambda x, w: (layer(x, w), None), x, ws)[0] ** 2)
        >>> ws, x = jax.ShapeDtypeStruct((8, 64, 64), jnp.float32), jax.ShapeDtypeStruct((256, 64), jnp.float32)
        >>> found = names(loss, ws, x, budget="2MB", cost="flops")
        >>> print(found.code)
        jax.checkpoint_policies.save_only_these_names("h")
    """
    check_function(fun, "names")
    check_argnums(argnums)
    check_argnums(donate_argnums, "donate_argnums", len(args))
    check_flags(has_aux=has_aux)
    check_limits(max_compiles, on_infeasible)
    return choose_names(
        _subject(fun, args, cost, target, argnums, has_aux, donate_argnums),
        budget=budget,
        reserve=reserve,
        verify=verify,
        only=only,
        max_compiles=max_compiles,
        on_infeasible=on_infeasible,
    )


def _subject(
    fun: Callable,
    args: tuple[Any, ...],
    cost: str,
    target: str | None,
    argnums: Any,
    has_aux: bool,
    donate_argnums: int | Sequence[int],
) -> Named:
    """The function, differentiated here, or a step that differentiates functions of its own."""
    try:
        loss = named_loss(fun, args, cost, target, argnums, has_aux)
        is_step = is_differentiated_already(*loss.programs(True), within=True)
    except NotDifferentiableError:
        if not _differentiates(fun, args, target):
            raise
    else:
        if not is_step:
            if donate_argnums not in ((), []):
                raise OptionError("donate_argnums is for a step, and this function differentiates nothing itself")
            return loss
    see_differentiated()
    return NamedStep(target=target, cost=cost, label=name_of(fun), step=fun, args=args, donate_argnums=donate_argnums)


def _differentiates(fun: Callable, args: tuple[Any, ...], target: str | None) -> bool:
    with described(target):
        return differentiates(trace_placed(fun, args).program, within=True)
