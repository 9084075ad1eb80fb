"""Loops of known length with few stored states: within a budget, or under the binomial schedule.

With a budget a scan is planned as inside any program. The binomial schedule of Griewank and Walther runs the fewest
steps for a number of stored states, as two loops and a table (`jaxckpt.kinds.binomial`).
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
from ckptsolvers.revolve import num_repeats
from jax import lax

from jaxckpt.api.auto_remat import auto_remat
from jaxckpt.errors import OptionError
from jaxckpt.kinds.scan_run import Run, run_loop
from jaxckpt.program.control_flow import loop_of
from jaxckpt.program.interpret import evaluate, outputs_of, run
from jaxckpt.program.ir import Constant, Equation, Program
from jaxckpt.program.trace import trace

# No schedule that runs a step more often is worth having.
_MAX_REPEATS = 200


def scan(
    body: Callable,
    init: Any,
    xs: Any = None,
    length: int | None = None,
    *,
    budget: int | str | None = None,
    num_checkpoints: int | None = None,
    reverse: bool = False,
) -> tuple[Any, Any]:
    """Do what `lax.scan` does, with a fixed number of stored states, or within a budget, when it is differentiated.

    With neither `budget` nor `num_checkpoints` it is a scan of checkpointed scans: about `sqrt(length)` states and what
    as many steps' backward reads are stored, and most steps run twice. The jaxpr does not grow with the length.

    Args:
        body: `(carry, x) -> (carry, y)`, as in `lax.scan`.
        init: the first carry.
        xs: pytree of arrays, `[length, ...]` each.
        length: the number of steps, where `xs` does not say.
        budget: device bytes of the loop's own value and gradient, as its compiled vjp takes: init, xs, closed-over
            arrays, results, cotangents, gradients, and every temporary between. The loop is planned as `auto_remat`
            would, when it is differentiated.
        num_checkpoints: how many states are held at once, the initial one included, by the binomial schedule: no other
            runs fewer steps. The state that is being worked on and what one step's own backward reads come on top. The
            program has one size whatever the length.
        reverse: from the last x to the first.

    Returns:
        The last carry and the stacked ys, as `lax.scan` does.

    Raises:
        BudgetError: a budget that cannot be read.
        OptionError: both `budget` and `num_checkpoints`, or a number of states that makes no sense for the length: so
            few that a step would run more than 200 times.
        InfeasibleBudgetError: no plan fits, when it is differentiated.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def step(x, _):
        ...     return jnp.sin(x), x
        >>> f = lambda x: jnp.sum(scan(step, x, length=100, num_checkpoints=5)[0])
        >>> g = lambda x: jnp.sum(jax.lax.scan(step, x, length=100)[0])
        >>> bool(jnp.allclose(jax.grad(f)(jnp.ones(3)), jax.grad(g)(jnp.ones(3))))
        True
    """
    check_options(budget, num_checkpoints)
    plain = functools.partial(lax.scan, body, length=length, reverse=reverse)
    if budget is not None:
        return auto_remat(plain, budget=budget)(init, xs)
    # lax.scan itself checks the arguments and settles the carry's types; its equation is then run another way.
    traced = trace(plain, (init, xs))
    program = traced.program
    loop = next((eqn for eqn in program.equations if loop_of(eqn) is not None), None)
    fun = functools.partial(run, program) if loop is None else _rewritten(program, loop, num_checkpoints)
    leaves = [x for x, dyn in zip(jax.tree.leaves((init, xs)), traced.is_array, strict=True) if dyn]
    return jax.tree.unflatten(traced.out_tree, fun(*traced.consts, *leaves))


def check_options(budget: Any, num_checkpoints: Any) -> None:
    """Refuse options of a loop that make no sense.

    Raises:
        OptionError: with what is accepted.
    """
    if budget is not None and num_checkpoints is not None:
        raise OptionError(f"give one of {budget=} and {num_checkpoints=}, not both")
    if num_checkpoints is None:
        return
    if isinstance(num_checkpoints, bool) or not isinstance(num_checkpoints, int):
        raise OptionError(f"{num_checkpoints=} is not a number of states; write an int of at least 1")
    if num_checkpoints < 1:
        raise OptionError(f"{num_checkpoints=} must be at least 1: the initial state is one of them")


def _rewritten(program: Program, loop: Equation, num_states: int | None) -> Callable[..., list[Any]]:
    """The program with its loop run under the binomial schedule, or as a scan of checkpointed scans."""
    runs = _square_root(loop) if num_states is None else [_binomial(loop, num_states)]

    def fun(*inputs: Any) -> list[Any]:
        env = dict(zip(program.inputs, inputs, strict=True))
        for eqn in program.equations:
            if eqn is not loop:
                evaluate([eqn], env)
                continue
            operands = [x.value if isinstance(x, Constant) else env[x] for x in eqn.inputs]
            results = run_loop(eqn, operands, runs)
            env.update(zip(eqn.outputs, results, strict=True))
        return outputs_of(program, env)

    return fun


def _square_root(eqn: Equation) -> list[Run]:
    """Chunks of the square root of the length; what is left over runs last, where nothing needs to be made again."""
    loop, length = loop_of(eqn), eqn.params["length"]
    assert loop is not None
    body, size = functools.partial(run, loop.body), math.isqrt(length)
    if size < 2:
        return [Run(lengths=(length,), body=body)]
    runs = [Run(lengths=(length // size, size), body=body)]
    return [*runs, Run(lengths=(length % size,), body=body)] if length % size else runs


def _binomial(eqn: Equation, num_states: int) -> Run:
    """All iterations under the binomial schedule.

    Raises:
        OptionError: so few states that a step would run too often.
    """
    loop = loop_of(eqn)
    assert loop is not None
    if num_repeats(loop.length, num_states) > _MAX_REPEATS:
        enough = next(c for c in itertools.count(num_states) if num_repeats(loop.length, c) <= _MAX_REPEATS)
        raise OptionError(
            f"num_checkpoints={num_states} for {loop.length:,} steps would run a step "
            f"{num_repeats(loop.length, num_states):,} times; give at least num_checkpoints={enough}"
        )
    return Run(lengths=(loop.length,), body=functools.partial(run, loop.body), num_states=num_states)
