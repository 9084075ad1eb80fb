"""Functions that a step differentiates without a decorator: found while `fit` and `jit` trace it.

JAX hands every function that it differentiates backward to one `vjp`. While a step is traced, what arrives there is
traced to a program of its own and bound as `auto_remat` binds a decorated one. Derivatives inside belong to the
outermost one; a function that calls a decorated one is left to that.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend.core as jex
from jax.core import Tracer

from jaxckpt import _compat
from jaxckpt.api.arguments import name_of
from jaxckpt.api.auto_remat import Call, auto_remat_p
from jaxckpt.errors import UnsupportedProgramError
from jaxckpt.program.effects import refuse_effects
from jaxckpt.program.flatten import flatten
from jaxckpt.program.interpret import run
from jaxckpt.program.ir import Program
from jaxckpt.search.step import FITTING, INSIDE, Choice
from jaxckpt.search.subjects import TREATED, Treated

_LOG = logging.getLogger("jaxckpt")


@functools.cache
def see_differentiated() -> bool:
    """See from here on what is differentiated in steps that are traced; False if this JAX shows nothing of it."""
    return _compat.hand_over_vjp(_hand)


def _hand() -> Callable[[Callable, bool], Callable] | None:
    if TREATED.value is not None and not INSIDE.value:
        return functools.partial(_as_treated, TREATED.value)
    choice = FITTING.value
    if choice is None or INSIDE.value or not choice.wants_undecorated:
        return None
    return functools.partial(_with_choice, choice)


def _with_choice(choice: Choice, fun: Callable, has_aux: bool) -> Callable:
    """The same function, which runs as is chosen where it is one of those that may be planned."""

    @functools.wraps(fun)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        with INSIDE(True):
            found = _traced(fun, args, kwargs, has_aux, choice.keep_checkpoints)
        if found.program is None or not choice.may_plan(found.program):
            # As it was traced: there are functions that can be called only once.
            return found.joined(jex.jaxpr_as_fun(found.closed)(*found.inputs[len(found.closed.consts) :]))
        call = Call(
            found.program, None, _name(fun), None, choice.solver, is_decorated=False, num_results=found.num_results
        )
        return found.joined(auto_remat_p.bind(*found.inputs, call=call))

    return chosen


def _as_treated(choice: Treated, fun: Callable, has_aux: bool) -> Callable:
    """The same function with other policies in its own regions, unless it calls a decorated one."""

    @functools.wraps(fun)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        with INSIDE(True):
            found = _traced(fun, args, kwargs, has_aux, True)
        if any(eqn.primitive is auto_remat_p for eqn in _equations(found.closed.jaxpr)):
            return found.joined(jex.jaxpr_as_fun(found.closed)(*found.inputs[len(found.closed.consts) :]))
        return found.joined(run(choice.program(found.closed.jaxpr), *found.inputs))

    return chosen


@dataclass(frozen=True, kw_only=True)
class _Found:
    """A function as a program, at a call.

    Attributes:
        closed: as it was traced.
        program: the flat program; None where it is not to be planned here.
        inputs: closed-over values and leaves of the arguments.
        num_results: how many of the program's outputs are differentiated, those that are no auxiliary results.
        out_tree: of the result.
        leaves: of the result, None where an output of the program stands.
    """

    closed: Any
    program: Program | None
    inputs: tuple[Any, ...]
    num_results: int
    out_tree: Any
    leaves: tuple[Any, ...]

    def joined(self, outputs: list[Any]) -> Any:
        """The function's result."""
        rest = iter(outputs)
        leaves = [next(rest) if leaf is _TRACED else leaf for leaf in self.leaves]
        return jax.tree.unflatten(self.out_tree, leaves)


_TRACED = object()


def _traced(
    fun: Callable, args: tuple[Any, ...], kwargs: dict[str, Any], has_aux: bool, keep_checkpoints: bool
) -> _Found:
    """Trace a function to a program."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    result: list[Any] = []

    def flat(*leaves: Any) -> list[Any]:
        args, kwargs = jax.tree.unflatten(tree, leaves)
        result.append(fun(*args, **kwargs))
        return [leaf for leaf in jax.tree.leaves(result[-1]) if isinstance(leaf, Tracer)]

    flat.__name__ = _name(fun)
    closed = jax.make_jaxpr(flat)(*leaves)
    # Auxiliary results may be anything: what is not traced is handed on as it is.
    out = result.pop()
    main = out[0] if has_aux and isinstance(out, tuple) and out else out
    out_leaves, out_tree = jax.tree.flatten(out)
    is_traced = [isinstance(leaf, Tracer) for leaf in out_leaves]
    num_results = sum(is_traced[: len(jax.tree.leaves(main))])
    return _Found(
        closed=closed,
        program=_program(closed, _name(fun), keep_checkpoints) if num_results else None,
        inputs=(*closed.consts, *leaves),
        num_results=num_results,
        out_tree=out_tree,
        leaves=tuple(_TRACED if dyn else leaf for leaf, dyn in zip(out_leaves, is_traced, strict=True)),
    )


def _program(closed: Any, name: str, keep_checkpoints: bool) -> Program | None:
    """The flat program of a function, if it may be planned: it calls no decorated one, and has no effect."""
    if any(eqn.primitive is auto_remat_p for eqn in _equations(closed.jaxpr)):
        return None
    program = flatten(closed.jaxpr, keep_checkpoints=keep_checkpoints)
    try:
        refuse_effects(program, name)
    except UnsupportedProgramError as error:
        _LOG.warning("%s is differentiated without a plan: %s", name, error)
        return None
    return program


def _equations(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jex.jaxprs_in_params(eqn.params):
            yield from _equations(inner)


def _name(fun: Callable) -> str:
    while isinstance(fun, functools.partial):
        fun = fun.func
    return name_of(fun)
