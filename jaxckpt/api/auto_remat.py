"""The decorator: a call-like primitive that plans when, and for what, it is differentiated.

Inside `vmap` a function sees one example's shapes, and a plan made there would be for the wrong program. The decorated
function is therefore traced and bound as one primitive, which is batched as a whole and planned only when it is
differentiated, at the shapes and for the tangents it then has.
"""

import functools
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import jax
import jax.extend.core as jex
from jax.interpreters import ad, batching, mlir

from jaxckpt import _compat
from jaxckpt.api.arguments import check_flags, check_function, name_of
from jaxckpt.api.host import offload_options
from jaxckpt.api.kept import kept_or_made, plan_key
from jaxckpt.api.plan import make_request, plan_program
from jaxckpt.api.processes import Exchange, agreed
from jaxckpt.api.switch import is_disabled
from jaxckpt.apply import ON_DEVICE
from jaxckpt.compilation.objective import Objective, input_specs, output_objective
from jaxckpt.errors import JaxckptWarning, NotDifferentiableError
from jaxckpt.program.dataflow import dependent_values
from jaxckpt.program.describe import Description
from jaxckpt.program.effects import refuse_effects
from jaxckpt.program.flatten import PROGRAM_CALLS
from jaxckpt.program.interpret import run
from jaxckpt.program.ir import Program, has_symbolic_shapes, is_differentiable, spec_of
from jaxckpt.program.nnx import pure
from jaxckpt.program.same_call import Itself, Recent
from jaxckpt.program.static import bind_static, places_and_names
from jaxckpt.program.trace import Memory, trace
from jaxckpt.result.plan import Plan
from jaxckpt.search.request import Request
from jaxckpt.search.step import FITTING
from jaxckpt.units import short_bytes, short_count

_LOG = logging.getLogger("jaxckpt")


def auto_remat(
    fun: Callable | None = None,
    /,
    *,
    budget: int | str | None = None,
    cost: str = "time",
    solver: Any = "auto",
    target: str | None = None,
    reserve: int | str = 0,
    host_budget: int | str | None = None,
    verify: bool = True,
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
    cache_dir: str | os.PathLike | None = None,
    keep_checkpoints: bool = True,
    max_compiles: int | None = None,
    on_infeasible: str = "raise",
) -> Callable:
    """Give back the same function, which recomputes as a plan within the budget says when it is differentiated.

    The plan is made the first time a program is differentiated, for what really is (the tangents that are not zero),
    compiled and measured unless `verify` is false, and kept on disk for the next run. Where everything fits, there is
    none, unless one makes loops stack so much less that the step is modelled to be 5 % faster.

    Args:
        fun: a function of pytrees. Arrays and numbers among their leaves are traced; True and False, and all that is
            neither, are static, as is what is no array in an Equinox module. Left out, a decorator is returned.
        budget: device bytes of its value and gradient: an int, `"8GB"`, `"8GiB"`, or `"80%"` of the unplanned peak.
            None leaves the plan to `jit` and `fit`, and outside of them runs the function unchanged.
        cost: what is minimised: "time", modelled for the target, or "flops".
        solver: as in `plan`.
        target: a chip's name; None is the default backend.
        reserve: device bytes to leave for what lives outside the function, such as optimizer state.
        host_budget: as in `plan`. On GPUs, compile with `compiler_options=jaxckpt.compiler_options(plan)`, as `jit` and
            `fit` do by themselves; a warning says so where it may be needed.
        verify: compile the plan and measure it before it is used.
        static_argnums: positional arguments to treat as static. As in `jax.jit`, their names are read off the
            function's signature where no names are given, so that they may be passed by name.
        static_argnames: arguments to treat as static by name; where no positions are given, by place too.
        cache_dir: where plans are kept; None is the user's cache directory.
        keep_checkpoints: leave the function's own `jax.checkpoint` calls as they are; otherwise they are inlined, and
            the plan alone decides what is recomputed.
        max_compiles: as in `plan`.
        on_infeasible: as in `plan`.

    Returns:
        A function with the same arguments and results. As under `jax.jit`, the same call is traced once: what `fun`
        reads besides its arguments is fixed then. Static values are the same by type and value, functions by identity.
        Calls with an object that may change among their static values, such as the `self` of a method, are traced each
        time.

    Raises:
        BudgetError: a budget, a reserve or a host budget that cannot be used, at once.
        OptionError: a solver or a cost that is not one of those there are, or a static argument that the function does
            not have, at once.
        InfeasibleBudgetError: no plan fits, when it is differentiated.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> @auto_remat(budget="80%")
        ... def loss(w, x):
        ...     for _ in range(8):
        ...         x = jnp.tanh(x @ w)
        ...     return jnp.sum(x**2)
        >>> jax.grad(loss)(jnp.eye(64), jnp.ones((1024, 64))).shape
        (64, 64)
    """
    options = {"budget": budget, "cost": cost, "solver": solver, "target": target, "reserve": reserve}
    limits: dict[str, Any] = {"max_compiles": max_compiles, "on_infeasible": on_infeasible, "host_budget": host_budget}
    if fun is None:
        return functools.partial(
            auto_remat,
            **options,
            verify=verify,
            static_argnums=static_argnums,
            static_argnames=static_argnames,
            cache_dir=cache_dir,
            keep_checkpoints=keep_checkpoints,
            **limits,
        )
    check_function(fun, "auto_remat")
    check_flags(verify=verify, keep_checkpoints=keep_checkpoints)
    request = None if budget is None else make_request(budget, None, cost, solver, target, reserve, verify, **limits)
    positions, names = places_and_names(fun, static_argnums, static_argnames)
    decorated = _Decorated(
        fun=fun,
        request=request,
        positions=positions,
        names=names,
        cache_dir=None if cache_dir is None else str(cache_dir),
        keep_checkpoints=keep_checkpoints,
        solver=solver,
    )

    @functools.wraps(fun)
    def with_plan(*args: Any, **kwargs: Any) -> Any:
        return decorated(*args, **kwargs)

    return with_plan


@dataclass(frozen=True, kw_only=True, eq=False)
class _Decorated:
    """What a decorated function does. Where it is sent to another process, it goes without what it remembers."""

    fun: Callable
    request: Request | None
    positions: tuple[int, ...]
    names: tuple[str, ...]
    cache_dir: str | None
    keep_checkpoints: bool
    solver: Any
    _memory: Memory = field(default_factory=Memory, init=False)
    # Equal calls are one program, and one program is one call: what is known of it is found again.
    _calls: Recent["Call"] = field(default_factory=lambda: Recent(64), init=False)

    def __reduce__(self) -> Any:
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        return _restored, (given,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        fun, label = self.fun, name_of(self.fun)
        if is_disabled():
            return fun(*args, **kwargs)
        if self.request is None and FITTING.value is None:
            _warn_no_budget()
            return fun(*args, **kwargs)
        if _compat.jit_is_disabled():
            return fun(*args, **kwargs)  # nothing is traced, operation by operation
        bound = bind_static(fun, args, kwargs, self.positions, self.names)
        state = pure(bound.fun, bound.args, bound.kwargs)
        traced = trace(
            state.fun,
            state.args,
            state.kwargs,
            self._memory,
            (fun, bound.static),
            keep_checkpoints=self.keep_checkpoints,
        )
        program = traced.program
        refuse_effects(program, label)
        leaves = traced.dynamic(jax.tree.leaves((state.args, state.kwargs)))
        make = lambda: Call(program, self.request, label, self.cache_dir, solver=self.solver)  # noqa: E731
        call = self._calls.get(Itself(program), make)
        results = auto_remat_p.bind(*traced.consts, *leaves, call=call)
        return state.finish(jax.tree.unflatten(traced.out_tree, results))


def _restored(given: dict[str, Any]) -> _Decorated:
    return _Decorated(**given)


def compiler_options(plan: Plan | None = None) -> dict[str, Any]:
    """Return what `jax.jit(..., compiler_options=...)` needs for recomputation to survive on this backend.

    Without a plan it is empty everywhere but on CPU with jaxlib before 0.12, whose compiler merges recomputation back.

    Args:
        plan: one that may send values to the host, with the options that its target's compiler needs for that.
    """
    return {**_compat.here_options(), **(offload_options(plan.target) if plan is not None and plan.is_on_host else {})}


@dataclass(frozen=True, eq=False)
class Call:
    """The parameter of the primitive: a program and how to plan it; without a request that is left to `fit` and `jit`.

    Attributes:
        program: what is run.
        request: how it is planned on its own.
        label: the function's name.
        cache_dir: where plans are kept; None is the user's cache directory.
        solver: which finds its schedules in a step.
        is_decorated: by hand; otherwise it was found in a step.
        num_results: how many of its outputs have cotangents; None is the first if that is a loss, and otherwise all.
    """

    program: Program
    request: Request | None
    label: str
    cache_dir: str | None
    solver: Any = "auto"
    is_decorated: bool = True
    num_results: int | None = None
    _known: Recent[Any] = field(default_factory=lambda: Recent(64), init=False)

    def remembered(self, key: Any, make: Callable[[], Any]) -> Any:
        """What was made for this call before. In `fit` it depends on what is tried, so nothing is kept."""
        if self.request is None:
            return make()
        return self._known.get(key, make)

    def __repr__(self) -> str:
        return f"{self.label}:{self.program.fingerprint()[:8]}"

    @property
    def description(self) -> Description:
        """Where it is a parameter of another program, in a loop's body, it stands for its own."""
        return self.program.description

    def plain(self, *inputs: Any) -> list[Any]:
        """Run the program without a plan."""
        return run(self.program, *inputs)

    @functools.cached_property
    def compiled(self) -> Callable[..., list[Any]]:
        """The program without a plan, shared with others only where they cannot be told apart."""
        contexts = _compat.contexts(self.program.equations)
        if not self.program.description.is_exact or len(contexts) > 1:
            return jax.jit(self.plain)
        return _RUNS.get((self.program.fingerprint(), *contexts), lambda: jax.jit(self.plain))

    def planned(self, active: tuple[int, ...]) -> Callable[..., list[Any]]:
        """Return the program with the plan for these differentiated inputs."""
        try:
            goal = _objective(self.program, active, self.num_results)
        except NotDifferentiableError:
            return self.plain
        if has_symbolic_shapes(self.program):
            _warn_symbolic(self.label)
            return self.plain
        if self.request is None:
            fitting = FITTING.value
            if fitting is None:
                return self.plain
            return fitting.planned(
                self.program,
                goal,
                label=self.label,
                is_decorated=self.is_decorated,
                solver=self.solver,
            )
        found = _find_plan(self, goal, self.request)
        if found.schedule is None:
            return self.plain
        if _compat.here_undoes_remat() and FITTING.value is None and not _compat.enclosing_jit_keeps_remat():
            _warn_on_old_cpu()
        if found.is_on_host:
            _warn_without_options(found.target)
        return found.flat(self.program)


auto_remat_p = jex.Primitive("auto_remat")
auto_remat_p.multiple_results = True
# A decorated function inside a planned one is part of it: the outer budget is the one that counts.
PROGRAM_CALLS.add(auto_remat_p)


# Compiled programs whose fingerprint says all that they do: no function is called, no device named.
_RUNS: Recent[Callable[..., list[Any]]] = Recent(256)


@auto_remat_p.def_impl
def _impl(*args: Any, call: Call) -> list[Any]:
    # Without a derivative there is nothing to plan.
    return call.compiled(*args)


@auto_remat_p.def_effectful_abstract_eval
def _abstract(*avals: Any, call: Call) -> tuple[list[Any], Any]:
    del avals
    results = [call.program.avals[x] if isinstance(x, int) else x.aval for x in call.program.outputs]
    return results, frozenset().union(*(eqn.effects for eqn in call.program.equations))


mlir.register_lowering(auto_remat_p, mlir.lower_fun(lambda *args, call: call.plain(*args), multiple_results=True))


def _batch(axis: Any, args: Sequence[Any], dims: Sequence[Any], *, call: Call) -> tuple[list[Any], list[int]]:
    """Batch the whole program; it is planned at the batched shapes, should it be differentiated."""
    avals = tuple(map(jax.typeof, args))
    in_axes = tuple(dims)  # None where not mapped

    def make(out_axes: list[Any]) -> tuple[tuple[Any, ...], Call, list[Any]]:
        batched = jax.vmap(
            call.plain,
            in_axes=in_axes,
            out_axes=out_axes,
            axis_name=axis.name,
            axis_size=axis.size,
            spmd_axis_name=axis.spmd_name or None,
        )
        traced = trace(batched, list(map(spec_of, avals)))
        return traced.consts, replace(call, program=traced.program), out_axes

    def made() -> tuple[tuple[Any, ...], Call, list[Any]]:
        pairs = zip(call.program.inputs, in_axes, strict=True)
        mapped = dependent_values(call.program, [v for v, dim in pairs if dim is not None])
        out_axes = [0 if x in mapped else None for x in call.program.outputs]
        try:
            return make(out_axes)
        except ValueError:  # what asks for its place on the axis is mapped too
            return make([0] * len(out_axes))

    consts, whole, out_axes = call.remembered(("vmap", axis, in_axes, avals), made)
    return auto_remat_p.bind(*consts, *args, call=whole), out_axes


batching.fancy_primitive_batchers[auto_remat_p] = _batch


def _checked(check: Callable, error: Any, *args: Any, call: Call) -> tuple[Any, list[Any]]:
    """Make the errors of `checkify` values of the program, which is planned with them."""

    def with_errors(error: Any, *args: Any) -> tuple[list[Any], Any]:
        closed = jax.make_jaxpr(call.plain)(*args)
        found, results = check(closed, error, *args)
        return results, found  # the loss stays in front

    operands = (error, *args)
    traced = trace(with_errors, jax.tree.map(lambda x: spec_of(jax.typeof(x)), operands))
    whole = replace(call, program=traced.program)
    results = auto_remat_p.bind(*traced.consts, *jax.tree.leaves(operands), call=whole)
    outs, found = jax.tree.unflatten(traced.out_tree, results)
    return found, outs


_compat.register_check(auto_remat_p, _checked)


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, call: Call) -> tuple[list[Any], list[Any]]:
    active = tuple(i for i, t in enumerate(tangents) if not _compat.is_zero(t))
    _warn_if_mapped(call, primals)
    planned = call.planned(active)

    def on_active(*values: Any) -> list[Any]:
        return planned(*_replaced(primals, active, values))

    results, moved = jax.jvp(on_active, [primals[i] for i in active], [tangents[i] for i in active])
    zero = lambda x: ad.Zero(jax.typeof(x).to_tangent_aval())  # noqa: E731
    return results, [
        zero(x) if jax.typeof(t).dtype == jax.dtypes.float0 else t for x, t in zip(results, moved, strict=True)
    ]


def _linearize(is_vjp: bool, nonzeros: Sequence[bool], *primals: Any, call: Call) -> Any:
    """Linearize as the planned program under `jit`: JAX's own rule for that keeps every kind of remat."""
    _warn_if_mapped(call, primals)
    active = tuple(i for i, nonzero in enumerate(nonzeros) if nonzero)

    is_twice = _compat.num_reverse(primals) > 0
    with ON_DEVICE(is_twice):
        params = call.remembered((active, is_twice), lambda: _under_jit(call.program, call.planned(active)))
    with _compat.named_errors(functools.partial(_differentiated, call, active), *primals):
        return _compat.linearize_jit(is_vjp, nonzeros, *primals, **params)


def _under_jit(program: Program, fun: Callable[..., list[Any]]) -> dict[str, Any]:
    """The parameters of the `jit` that runs a program so."""
    with jax.disable_jit(False):
        closed = jax.make_jaxpr(jax.jit(fun))(*input_specs(program))
    (eqn,) = closed.jaxpr.eqns
    return eqn.params


def _differentiated(call: Call, active: tuple[int, ...], *primals: Any) -> None:
    """Run the program, and what its derivative makes in the forward, operation by operation."""
    on_active = lambda *values: call.plain(*_replaced(primals, active, values))  # noqa: E731
    jax.vjp(on_active, *(primals[i] for i in active))


def _replaced(primals: Sequence[Any], active: tuple[int, ...], values: Sequence[Any]) -> list[Any]:
    full = list(primals)
    for i, value in zip(active, values, strict=True):
        full[i] = value
    return full


ad.primitive_jvps[auto_remat_p] = _jvp
if not _compat.set_linearize_rule(auto_remat_p, _linearize):
    _LOG.debug("this JAX has no linearize rules; recomputation is lost under JAX_REMAT3=1")
# What is linear holds nothing for its transpose, so there is nothing to plan.
_compat.set_transpose_rule(
    auto_remat_p, lambda call: call.remembered("transpose", lambda: _under_jit(call.program, call.plain))
)

# By fingerprint: a plan is applied to the program of whoever asks.
_PLANS: Recent[Plan] = Recent(1024)


def _objective(program: Program, active: tuple[int, ...], num_results: int | None) -> Objective:
    """What is differentiated: these inputs, and of the outputs the loss where there is one."""
    if num_results is not None:
        return output_objective(program, active, num_results)
    outputs = [program.avals[x] if isinstance(x, int) else x.aval for x in program.outputs]
    is_loss = bool(outputs) and outputs[0].shape == () and is_differentiable(outputs[0])
    # A scalar in front is the loss, and what follows it has no cotangent.
    return output_objective(program, active, 1 if is_loss else len(outputs))


def _find_plan(call: Call, goal: Objective, request: Request) -> Plan:
    """The plan of this program for these inputs: from memory, process 0, disk, or made now."""
    program = call.program
    key = plan_key(program, goal, request)

    def taken(data: dict[str, Any]) -> Plan:
        plan = Plan.from_json(data, "the plan of process 0")
        plan.check(program)
        return plan

    def planned() -> Plan:
        found = plan_program(program, goal, request, call.cache_dir)
        _LOG.info(
            "planned %s: peak %s of budget %s, %sFLOP recomputed",
            call.label,
            short_bytes(found.peak_bytes),
            short_bytes(found.budget_bytes or 0),
            short_count(found.recompute_flops),
        )
        return found

    def make() -> Plan:
        exchange = Exchange(label=call.label, write=Plan.to_json, read=taken)
        return agreed(exchange, lambda: kept_or_made(program, goal, request, call.cache_dir, planned))

    if program.description.opaque:  # another program may have this fingerprint
        return call.remembered(("plan", goal), make)
    return _PLANS.get(key, make)


def _warn_if_mapped(call: Call, primals: Sequence[Any]) -> None:
    # A step is measured as a whole, whatever its functions are planned at.
    if call.request is not None and any(map(_compat.is_mapped, primals)):
        _warn_mapped()


@functools.cache
def _warn_mapped() -> None:
    warnings.warn(
        "a decorated function is differentiated inside vmap: it is planned at one example's shapes, and the budget "
        "holds for one example. Differentiate outside, as in grad(lambda w: mean(vmap(loss)(w))), for a plan at the "
        "mapped shapes",
        JaxckptWarning,
        3,
    )


@functools.cache
def _warn_symbolic(label: str) -> None:
    warnings.warn(
        f"{label} is differentiated at symbolic shapes, whose bytes are not known: it runs without a plan. Export it "
        "at shapes of numbers for one",
        JaxckptWarning,
        3,
    )


@functools.cache
def _warn_no_budget() -> None:
    warnings.warn(
        "auto_remat without a budget runs the function unchanged outside of fit and jit; give budget=...",
        JaxckptWarning,
        3,
    )


@functools.cache
def _warn_without_options(target: str) -> None:
    missing = [name for name in offload_options(target) if name not in os.environ.get("XLA_FLAGS", "")]
    if missing:
        warnings.warn(
            f"the plan sends values to the host, and without {', '.join(missing)} XLA takes them for device memory. "
            "Compile with jax.jit(..., compiler_options=jaxckpt.compiler_options(plan)), use jaxckpt.jit or "
            f"jaxckpt.fit, or set XLA_FLAGS=--{missing[0]}=true",
            JaxckptWarning,
            3,
        )


@functools.cache
def _warn_on_old_cpu() -> None:
    warnings.warn(
        "on CPU, jaxlib before 0.12 merges recomputation back and saves no memory. Compile with "
        "jax.jit(..., compiler_options=jaxckpt.compiler_options()), or set "
        "XLA_FLAGS=--xla_disable_hlo_passes=cse_barrier_expander",
        JaxckptWarning,
        3,
    )
