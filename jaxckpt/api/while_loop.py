"""Loops whose length nobody knows before they end, differentiable in reverse: online checkpointing.

"New algorithms for optimal online checkpointing" (Stumm, Walther, 2010); related to "Minimal repetition dynamic
checkpointing algorithm for unsteady adjoint calculation" (Wang, Moin, Iaccarino, 2009). While the loop runs, a fixed
number of its states is held such that they are a good set wherever it ends; `ckptsolvers.online` has the rules, and
counts what they cost: as little as revolve, which knows the length beforehand, to beta(c, 2) steps.

The backward pass restores the latest held state, advances to where revolve would put the next one with the slots that
are free by then, and reverses a step once it stands right before it. Both passes are loops in the compiled program, so
neither depends on the bound.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as prims

from jaxckpt.api.scan import check_options
from jaxckpt.compilation.measure import compiled_bytes
from jaxckpt.compilation.objective import measured_specs, output_objective
from jaxckpt.errors import InfeasibleBudgetError, NotDifferentiableError, OptionError
from jaxckpt.kinds.online import checkpointed_while
from jaxckpt.program.interpret import evaluate, outputs_of, run
from jaxckpt.program.ir import Constant, Equation, Program, is_differentiable, size_bytes
from jaxckpt.program.trace import trace
from jaxckpt.search.budget_search import BudgetSearch
from jaxckpt.search.surrogate import Surrogate
from jaxckpt.units import Budget, parse_budget, show_bytes


def while_loop(
    cond: Callable,
    body: Callable,
    init: Any,
    *,
    max_steps: int,
    budget: int | str | None = None,
    num_checkpoints: int | None = None,
) -> Any:
    """Do what `lax.while_loop` does for at most `max_steps` steps, and differentiate it in reverse.

    Its own forward mode is not defined, as of any `jax.custom_vjp`; forward over reverse, as in `jax.hessian`, is.

    Args:
        cond: `state -> bool`; the loop ends when it is false, or after `max_steps` steps.
        body: `state -> state`.
        init: the first state, a pytree of arrays.
        max_steps: the most steps that are run. Memory does not depend on it.
        budget: device bytes of the loop's own value and gradient; as many states are held as are measured to fit.
        num_checkpoints: how many states are held at once, the initial one included and the current one and the one
            before it not; about `sqrt(max_steps)` if neither is given.

    Returns:
        The last state.

    Raises:
        BudgetError: a budget that cannot be read.
        OptionError: both `budget` and `num_checkpoints`, or a number below 1.
        InfeasibleBudgetError: not even one held state fits.

    Example:
        >>> import jax
        >>> def root(a):
        ...     step = lambda x: 0.5 * (x + a / x)
        ...     return while_loop(lambda x: abs(x * x - a) > 1e-3, step, a, max_steps=50)
        >>> print(f"{jax.grad(root)(9.0):.3f}")
        0.167

    Source: Stumm and Walther 2010; Griewank and Walther 2000 for the way back.
    """
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
        raise OptionError(f"{max_steps=} is not a number of steps; write an int of at least 1")
    check_options(budget, num_checkpoints)
    # lax.while_loop itself checks the arguments and settles the state's types; its equation is then run another way.
    traced = trace(functools.partial(lax.while_loop, cond, body), (init,))
    program = traced.program
    loop = next((eqn for eqn in program.equations if eqn.primitive is prims.while_p), None)
    leaves = [x for x, dyn in zip(jax.tree.leaves(init), traced.is_array, strict=True) if dyn]
    if loop is None:
        fun = functools.partial(run, program)
    elif budget is not None:
        fun = _within(program, loop, max_steps, parse_budget(budget))
    else:
        fun = _rewritten(program, loop, max_steps, num_checkpoints or math.ceil(math.sqrt(max_steps)))
    return jax.tree.unflatten(traced.out_tree, fun(*traced.consts, *leaves))


def _rewritten(program: Program, loop: Equation, max_steps: int, num_states: int) -> Callable[..., list[Any]]:
    """The program with its loop run as an online-checkpointed one."""

    def fun(*inputs: Any) -> list[Any]:
        env = dict(zip(program.inputs, inputs, strict=True))
        for eqn in program.equations:
            if eqn is not loop:
                evaluate([eqn], env)
                continue
            operands = [x.value if isinstance(x, Constant) else env[x] for x in eqn.inputs]
            run_loop = checkpointed_while(eqn.params, max_steps, min(num_states, max_steps))
            env.update(zip(eqn.outputs, run_loop(*map(jnp.asarray, operands)), strict=True))
        return outputs_of(program, env)

    return fun


def _within(program: Program, loop: Equation, max_steps: int, budget: Budget) -> Callable[..., list[Any]]:
    """The program whose loop holds as many states as are measured to fit, its value and gradient compiled."""
    inputs = tuple(i for i, v in enumerate(program.inputs) if is_differentiable(program.avals[v]))
    most = _rewritten(program, loop, max_steps, max_steps)
    try:
        goal = output_objective(program, inputs, len(program.outputs))
    except NotDifferentiableError:
        return most
    # What follows the loop decides its results' cotangents, so they are arguments.
    goal = replace(goal, is_scalar=False)
    specs, constants = measured_specs(program, goal), program.closed_over
    counts = sorted({math.ceil(max_steps ** (i / 16)) for i in range(17)})
    functions = [_rewritten(program, loop, max_steps, count) for count in counts]
    unplanned = compiled_bytes(goal.differentiated(most), specs, None, closed_over=constants)
    fixed, budget_bytes = unplanned.device_bytes - unplanned.temp_bytes, budget.resolve(unplanned.device_bytes)
    state = sum(size_bytes(program.avals[v]) for v in loop.outputs)
    search = BudgetSearch(
        Surrogate(fixed),
        [count * state for count in counts],
        # How often a step runs again grows with the logarithm; a run is about a third of the step's cost.
        [math.log2(max(1, max_steps / count)) / 3 for count in counts],
        lambda i: compiled_bytes(goal.differentiated(functions[i]), specs, None, closed_over=constants).device_bytes,
    )
    chosen = search.cheapest(budget_bytes)
    if chosen is not None:
        return functions[chosen]
    least = search.least_bytes
    assert least is not None, "a search that found nothing that fits has looked for the least"
    raise InfeasibleBudgetError(
        f"no number of held states of the while loop fits budget={show_bytes(budget_bytes)}. The least that was "
        f"measured is {show_bytes(least)}; with every state held it is {show_bytes(unplanned.device_bytes)}, of which "
        f"{show_bytes(fixed)} are arguments, results and gradients",
        budget_bytes=budget_bytes,
        least_peak_bytes=least,
        expected_least_bytes=least,
        unplanned_peak_bytes=unplanned.device_bytes,
        measured=True,
        num_compiles=len(search.known) + 1,
        forced_by=(("arguments, results and gradients of the while loop", fixed, ""),),
    )
