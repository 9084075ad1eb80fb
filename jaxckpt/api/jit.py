"""`jax.jit` with a memory budget: one line of training code changes.

A call costs what a call of `jax.jit` costs, since it is one: every shape of arguments goes through one jitted function,
and nothing is looked up before it. Only where JAX has to trace or to lower again does it come back here. The function
under `jax.jit` raises when it is traced without leave, and so does an operation on its results when it is lowered: JAX
does not trace again when nothing but a sharding changes. Both happen before anything runs or is donated. What is
raised there is caught, the step is planned for these arguments, and the call is made again with leave.
"""

import contextvars
import functools
import logging
import os
import threading
import time
import types
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.extend.core as jex
from jax.core import Tracer
from jax.interpreters import ad, batching, mlir

from jaxckpt import _compat
from jaxckpt.api.arguments import check_flags, check_function, name_of
from jaxckpt.api.call_form import JitOptions, PlainForm, PureCall, form_of
from jaxckpt.api.differentiated import see_differentiated
from jaxckpt.api.fit import search_within
from jaxckpt.api.host import check_host_budget, offload_options
from jaxckpt.api.kept import kept_key, read_kept, warn_infeasible, write_kept
from jaxckpt.api.plan import check_limits
from jaxckpt.api.processes import Exchange, agreed
from jaxckpt.api.switch import is_disabled
from jaxckpt.compilation import cache
from jaxckpt.compilation.measure import Measurement
from jaxckpt.errors import JaxckptWarning, OptionError, TargetError, advise
from jaxckpt.model.time import check_cost
from jaxckpt.program.flatten import flatten
from jaxckpt.result.build import build_step
from jaxckpt.result.plan import Plan
from jaxckpt.result.step_plans import StepPlans
from jaxckpt.search.candidates import check_solver
from jaxckpt.search.step import Choice, Step, StepOptions, under
from jaxckpt.targets.chip import device_budget, find_target, is_here
from jaxckpt.targets.sharding import place
from jaxckpt.units import Budget, parse_budget, parse_bytes, short_bytes, short_count

_LOG = logging.getLogger("jaxckpt")
# A function keeps the plans of this many kinds of calls; beyond it, those of the latest half.
MOST_PLANS = 64
# A function that meets this many shapes is told how to meet fewer.
_MANY_SHAPES = 4
_DEVICE = "device"


def jit(
    fun: Callable | None = None,
    /,
    *,
    budget: int | str | None,
    cost: str = "time",
    solver: Any = "auto",
    target: str | None = None,
    reserve: int | str = 0,
    host_budget: int | str | None = None,
    keep_checkpoints: bool = True,
    cache_dir: str | os.PathLike | None = None,
    max_compiles: int | None = None,
    on_infeasible: str = "raise",
    static_argnums: int | Sequence[int] | None = None,
    static_argnames: str | Sequence[str] | None = None,
    donate_argnums: int | Sequence[int] | None = None,
    donate_argnames: str | Sequence[str] | None = None,
    in_shardings: Any = None,
    out_shardings: Any = None,
    keep_unused: bool = False,
    inline: bool = False,
    compiler_options: dict[str, Any] | None = None,
    device: Any = None,
    backend: str | None = None,
) -> Any:
    """Compile a step as `jax.jit` does, with the cheapest recomputation with which all of it fits the budget.

    The outermost functions that the step differentiates are planned, with no decorator: whatever it gives to
    `jax.grad`, `value_and_grad`, `vjp` or `jacrev`, or to a library's wrapper of them. Those that hold less than 1 % of
    what all of them hold are left alone. A function that calls one decorated with `auto_remat` is left to that one.

    Planning happens at the first call with arguments that `jax.jit` would trace or compile for: another tree, shape,
    dtype or weak type, another static value, sharding or JAX configuration. The log says what was planned and how long
    it took. Plans are kept on disk for the next process; several processes of one program use one plan.

    Args:
        fun: the step. Left out, a decorator is returned.
        budget: device bytes of the compiled step, on each device: an int, `"16GB"`, `"16GiB"`, `"80%"` of the step
            without plans, or `"device"`, which is what the target, or the device that is here, lets programs use, less
            a twentieth for what no program counts. None is `jax.jit` itself.
        cost: what is minimised: "time", modelled for the target, or "flops".
        solver: as in `plan`, for functions that are not decorated.
        target: a chip's name; None is the default backend. For one that is not here the step can be lowered, which
            measures it, but not called.
        reserve: device bytes to leave for what lives outside the step.
        host_budget: as in `fit`.
        keep_checkpoints: leave the step's own `jax.checkpoint` calls as they are.
        cache_dir: where plans are kept; None is the user's cache directory.
        max_compiles: as in `plan`.
        on_infeasible: as in `plan`.
        static_argnums: as in `jax.jit`, like what follows. As there, True, False and numbers are traced.
        static_argnames: as in `jax.jit`.
        donate_argnums: as in `jax.jit`.
        donate_argnames: as in `jax.jit`.
        in_shardings: as in `jax.jit`; without it the arguments say where they lie.
        out_shardings: as in `jax.jit`.
        keep_unused: as in `jax.jit`.
        inline: as in `jax.jit`.
        compiler_options: as in `jax.jit`; `jaxckpt.compiler_options()` are added.
        device: refused; put the arguments where the step is to run.
        backend: refused likewise.

    Returns:
        The jitted step: `lower`, `trace`, `eval_shape`, `clear_cache` and `__wrapped__` are as in `jax.jit`, and
        `plans`, `measurement` and `report()` tell of the arguments that were planned last. It cannot be called inside
        another transformation: the outermost jit is the one to plan.

    Raises:
        BudgetError: a budget, a reserve or a host budget that cannot be used, at once.
        OptionError: an option that is none, at once; at a call, a step that differentiates nothing that can be seen, or
            a call inside another transformation.
        InfeasibleBudgetError: no choice of plans fits, at a call. Nothing was donated then.

    Example:
        >>> import jax, jax.numpy as jnp, jaxckpt
        >>> def loss(w, x):
        ...     for _ in range(8):
        ...         x = jnp.tanh(x @ w)
        ...     return jnp.sum(x**2)
        >>> @jaxckpt.jit(budget="80%", donate_argnums=0)
        ... def step(w, x):
        ...     return w - 0.1 * jax.grad(loss)(w, x)
        >>> step(jnp.eye(64), jnp.ones((1024, 64))).shape, len(step.plans)
        ((64, 64), 1)
    """
    if device is not None or backend is not None:
        raise OptionError(
            "device and backend are not passed on to jax.jit, where they are deprecated; put the arguments on their "
            "device with jax.device_put, or use jax.default_device"
        )
    check_cost(cost)
    check_solver(solver)
    check_limits(max_compiles, on_infeasible)
    check_flags(keep_checkpoints=keep_checkpoints)
    if target is not None:
        find_target(target)
    rest = {"keep_unused": keep_unused, "inline": inline, "compiler_options": compiler_options}
    options = _Options(
        budget=None if budget is None or budget == _DEVICE else parse_budget(budget),
        is_planned=budget is not None,
        reserve_bytes=parse_bytes(reserve, "reserve", least=0),
        host_budget=None if budget is None else check_host_budget(host_budget, target),
        cost=cost,
        solver=solver,
        target=target,
        keep_checkpoints=keep_checkpoints,
        cache_dir=None if cache_dir is None else str(cache_dir),
        max_compiles=max_compiles,
        on_infeasible=on_infeasible,
        jit=JitOptions(
            static_argnums=static_argnums,
            static_argnames=static_argnames,
            donate_argnums=donate_argnums,
            donate_argnames=donate_argnames,
            in_shardings=in_shardings,
            out_shardings=out_shardings,
            rest={name: value for name, value in rest.items() if value},
        ),
    )
    return functools.partial(_jitted, options=options) if fun is None else _jitted(fun, options)


def _jitted(fun: Callable, options: "_Options") -> Callable:
    check_function(fun, "jit")
    if options.is_planned and not is_disabled():
        see_differentiated()
        return PlannedJit(fun, options)
    if not options.is_planned:
        _say_unplanned(name_of(fun))
    return UnplannedJit(fun, options)


@functools.cache
def _say_unplanned(name: str) -> None:
    _LOG.warning("%s has budget=None: it is jax.jit, and nothing in it is planned", name)


@dataclass(frozen=True, kw_only=True)
class _Options:
    """What a step is planned for. Without a budget that is planned, it is that of the device."""

    budget: Budget | None
    is_planned: bool
    reserve_bytes: int
    host_budget: int | None
    cost: str
    solver: Any
    target: str | None
    keep_checkpoints: bool
    cache_dir: str | None
    max_compiles: int | None
    on_infeasible: str
    jit: JitOptions

    @property
    def run(self) -> JitOptions:
        """The keywords with which steps run: with the compiler options under which recomputation survives."""
        here = is_here(self.target)
        ours = _compat.here_options() if here else find_target(self.target).compiler.compile_options
        own = self.jit.rest.get("compiler_options") or {}
        sending = {} if self.host_budget is None else offload_options(self.target)
        merged = {**(ours or {}), **sending, **own}
        rest = {**self.jit.rest, **({"compiler_options": merged} if merged else {})}
        return JitOptions(**{**self.jit.__dict__, "rest": rest})


_INSIDE = (
    "called inside jit, vmap, grad or a loop, where it cannot be planned: the outermost jit is the one to plan. Give "
    "jaxckpt.jit the whole step, and call the undecorated function, its __wrapped__, inside"
)


class _NeedsPlanError(OptionError):
    """JAX traces or lowers for arguments that nothing was planned for; users see it where another program does."""

    def __init__(self) -> None:
        super().__init__(f"a step of jaxckpt.jit is {_INSIDE}")


@dataclass(eq=False)
class _Entry:
    """What is known of one kind of call."""

    key: Hashable
    same: Hashable
    label: str
    found: StepPlans
    keep_checkpoints: bool

    def choice(self) -> Choice:
        """What the step's functions do; a new one for each trace, so that nothing inside is found traced."""
        return Choice(keep_checkpoints=self.keep_checkpoints, chosen=self.found.chosen)

    def run(self, fun: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Trace the step with its plans.

        Raises:
            PlanMismatchError: it differentiates other functions than it did when it was planned.
        """
        return under(self.choice(), fun)(*args, **kwargs)


# The entry that JAX has leave to trace and lower for.
_LEAVE: contextvars.ContextVar[_Entry | None] = contextvars.ContextVar("leave", default=None)

_guard_p = jex.Primitive("jaxckpt_guard")
_guard_p.def_impl(lambda x: x)
_guard_p.def_abstract_eval(lambda x: x)


def _lower_guard(ctx: Any, x: Any) -> list[Any]:
    del ctx
    if _LEAVE.get() is None:
        raise _NeedsPlanError
    return [x]  # nothing is left of it in the program


def _refuse_guard(*args: Any, **params: Any) -> Any:
    del args, params
    raise _NeedsPlanError


mlir.register_lowering(_guard_p, _lower_guard)
batching.primitive_batchers[_guard_p] = _refuse_guard
ad.primitive_jvps[_guard_p] = _refuse_guard


def _guarded(result: Any, given: Any) -> Any:
    """The same result, which cannot be lowered without leave."""
    leaves, tree = jax.tree.flatten(result)
    arguments = {id(x) for x in jax.tree.leaves(given)}
    traced = [x for x in leaves if isinstance(x, Tracer)]
    # JAX hands arguments on to results without lowering them.
    one = next((x for x in traced if id(x) not in arguments), next(iter(traced), None))
    if one is None:
        return result
    guard = _guard_p.bind(one)
    return jax.tree.unflatten(tree, [guard if x is one else x for x in leaves])


class _Variant:
    """A jitted function, with the entry that each kind of trace in it belongs to."""

    def __init__(self, form: Any, fun: Callable):
        self.form = form
        self.owners: dict[Hashable, _Entry] = {}

        @functools.wraps(fun)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            entry = _LEAVE.get()
            if entry is None:
                raise _NeedsPlanError
            return _guarded(entry.run(fun, args, kwargs), (args, kwargs))

        self.jitted = form.jitted(guarded)
        self.call = form.caller(self.jitted)


class PlannedJit:
    """A step under `jax.jit` that is planned for each kind of arguments; `jaxckpt.jit` makes them."""

    def __init__(self, fun: Callable, options: _Options):
        functools.update_wrapper(self, fun)
        self._fun, self._options = fun, options
        self._label = name_of(fun)
        self._lock = threading.RLock()
        self._entries: dict[Hashable, _Entry] = {}
        self._shapes: set[Any] = set()
        self._last: _Entry | None = None
        self._variants: list[_Variant] = []
        self._by_shardings: dict[Any, _Variant] = {}
        self._fast: Callable = self._reset()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the step, planned for these arguments."""
        try:
            return self._fast(*args, **kwargs)
        except _NeedsPlanError:
            pass
        except (TypeError, ValueError):
            self._refuse_inside()
            # Of leaves that JAX cannot trace, there are those of Equinox modules and of flax NNX.
            if type(form_of(self._fun, self._options.run, args, kwargs)) is PlainForm:
                raise
        except jax.errors.JaxRuntimeError as error:
            advise(error)
            raise
        return self._slow(args, kwargs)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """As a method."""
        return self if instance is None else types.MethodType(self, instance)

    def __repr__(self) -> str:
        return f"jaxckpt.jit of {self._fun!r}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _jitted, (self._fun, self._options)

    @property
    def plans(self) -> tuple[Plan, ...]:
        """Of the functions that the step differentiates, at the arguments that were planned last."""
        return () if self._last is None else self._last.found.plans

    @property
    def measurement(self) -> Measurement | None:
        """Of the whole step, at the arguments that were planned last."""
        return None if self._last is None else self._last.found.measurement

    def report(self) -> str:
        """What a person reads: of each kind of arguments the step's bytes and its plans."""
        if not self._entries:
            return f"{self._label} is planned when it is first called"
        shown = "\n\n".join(str(entry.found) for entry in list(self._entries.values()))
        return f"{self._label}, planned for {len(self._entries)} kinds of arguments\n{shown}"

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        """Plan for these arguments or specs and trace the step, as `jax.jit(...).trace`."""
        return self._traced(args, kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """Plan for these arguments or specs and lower the step, as `jax.jit(...).lower`; the target may be away."""
        target = self._options.target
        platforms = {} if target is None else {"lowering_platforms": (find_target(target).platform,)}
        return self._traced(args, kwargs).lower(**platforms)

    def eval_shape(self, *args: Any, **kwargs: Any) -> Any:
        """The shapes of the results, as `jax.jit(...).eval_shape`; nothing is planned for that."""
        return jax.jit(self._fun, **self._options.jit.keywords()).eval_shape(*args, **kwargs)

    def clear_cache(self) -> None:
        """Drop the compiled programs; plans stay."""
        with self._lock:
            self._fast = self._reset()

    def _reset(self) -> Callable:
        self._by_shardings = {}
        self._variants = [_Variant(PlainForm(self._fun, self._options.run), self._fun)]
        return self._variants[0].call

    def _refuse_inside(self) -> None:
        if not _compat.is_outermost():
            raise OptionError(f"{self._label} is {_INSIDE}")

    def _slow(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Plan for new arguments, or find the plan again, and call with leave to trace and lower."""
        if _compat.jit_is_disabled():
            return self._fun(*args, **kwargs)
        self._refuse_inside()
        if not is_here(self._options.target):
            raise TargetError(
                f"{self._label} is planned for {self._options.target}, which is not here; .lower(...) compiles it, or "
                "leave target out"
            )
        with self._lock:
            entry, form = self._entry(args, kwargs)
            variant = self._variant(entry, form)
            _compat.forget_fast_calls(variant.jitted)
        leave = _LEAVE.set(entry)
        try:
            result = variant.call(*args, **kwargs)
        except jax.errors.JaxRuntimeError as error:
            advise(error)
            raise
        finally:
            _LEAVE.reset(leave)
        with self._lock:
            self._last = entry
            if variant in self._variants:
                self._by_shardings[_leaf_shardings(args, kwargs)] = variant
                self._fast = variant.call if len(self._variants) == 1 else self._by_leaves
        return result

    def _by_leaves(self, *args: Any, **kwargs: Any) -> Any:
        """Where equal shapes with other shardings have other plans, the leaves say which: 0.3 µs for each."""
        variant = self._by_shardings.get(_leaf_shardings(args, kwargs), self._variants[0])
        return variant.call(*args, **kwargs)

    def _variant(self, entry: _Entry, form: Any) -> _Variant:
        """The jitted function that holds this entry, or may."""
        for variant in self._variants:
            if type(variant.form) is type(form) and variant.owners.setdefault(entry.same, entry) is entry:
                return variant
        made = _Variant(form, self._fun)
        made.owners[entry.same] = entry
        if not any(variant.owners for variant in self._variants):
            self._variants = []  # of the other form
        self._variants.append(made)
        return made

    def _entry(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[_Entry, Any]:
        form = form_of(self._fun, self._options.run, args, kwargs)
        call = form.split(self._fun, args, kwargs)
        same = (type(form), call.same, _compat.jit_context())
        key = (same, call.shardings)
        if key not in self._entries:
            self._entries[key] = self._planned(call, key, same)
            self._note_shapes(call)
            self._forget()
        self._entries[key] = entry = self._entries.pop(key)  # the latest again
        return entry, form

    def _note_shapes(self, call: PureCall) -> None:
        if call.shapes in self._shapes or len(self._shapes) == _MANY_SHAPES:
            return
        self._shapes.add(call.shapes)
        if len(self._shapes) == _MANY_SHAPES:
            warnings.warn(
                f"{self._label} meets its {_MANY_SHAPES}th shape of arguments, and each is planned and compiled: pad "
                "to a few sizes, such as the last batch to the size of the others and lengths to powers of two, with a "
                "mask for what is padding",
                JaxckptWarning,
                stacklevel=5,
            )

    def _forget(self) -> None:
        if len(self._entries) > MOST_PLANS:
            self._entries = dict(list(self._entries.items())[-MOST_PLANS // 2 :])
            self._fast = self._reset()

    def _traced(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._refuse_inside()
        options = self._options
        with self._lock:
            entry, form = self._entry(args, kwargs)
            self._last = entry
        traced = lambda *args, **kwargs: entry.run(self._fun, args, kwargs)  # noqa: E731
        if options.target is None:
            jitted = form.jitted(functools.wraps(self._fun)(traced))
            return jitted.trace(*args, **kwargs) if type(form) is PlainForm else self._pure(form, traced, args, kwargs)
        return self._pure(form, traced, args, kwargs)

    def _pure(self, form: Any, traced: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The step as a function of specs, on the target's devices."""
        call = form.split(traced, args, kwargs)
        placed, _ = place(call.args, self._options.target)
        return jax.jit(call.fun, donate_argnums=call.donate_argnums, **self._options.run.measured()).trace(*placed)

    def _planned(self, call: PureCall, key: Hashable, same: Hashable) -> _Entry:
        started = time.perf_counter()
        options = self._options
        step = Step(
            functools.wraps(self._fun)(call.fun),
            call.args,
            StepOptions(
                cost=options.cost,
                target=options.target,
                solver=options.solver,
                host_budget=options.host_budget,
                keep_checkpoints=options.keep_checkpoints,
                donated=(call.donate_argnums, ()),
                jit=options.jit.measured(),
            ),
        )
        exchange = Exchange(label=self._label, write=StepPlans.to_json, read=functools.partial(_taken, step))
        found = agreed(exchange, lambda: _kept_or_made(step, options))
        planned = [plan for plan in found.plans if plan.schedule is not None]
        _LOG.info(
            "planned %s: %s of %d functions that it differentiates, step %s measured, %sFLOP recomputed, in %.1f s",
            self._label,
            len(planned),
            len(step.free.functions),
            short_bytes(found.measurement.device_bytes),
            short_count(sum(plan.recompute_flops for plan in planned)),
            time.perf_counter() - started,
        )
        return _Entry(key, same, self._label, found, options.keep_checkpoints)


class UnplannedJit(PlannedJit):
    """`jax.jit` itself, with the attributes of a planned step."""

    def _reset(self) -> Callable:
        self._plain = jax.jit(self._fun, **self._options.jit.keywords())
        return self._plain

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the step."""
        try:
            return self._fast(*args, **kwargs)
        except jax.errors.JaxRuntimeError as error:
            advise(error)
            raise

    def report(self) -> str:
        """What a person reads."""
        return f"{self._label} is not planned"

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        """As `jax.jit(...).trace`."""
        return self._plain.trace(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """As `jax.jit(...).lower`."""
        return self._plain.lower(*args, **kwargs)


def _leaf_shardings(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    return tuple([getattr(x, "sharding", None) for x in jax.tree.leaves((args, kwargs))])


def _kept_or_made(step: Step, options: _Options) -> StepPlans:
    path = _path(step, options)
    found = read_kept(path, StepPlans.load_kept, lambda plans: _check(plans, step))
    if found is not None:
        if found.measurement.device_bytes > found.budget_bytes:
            warn_infeasible(found.budget_bytes, found.measurement.device_bytes)
        return found
    wanted = options.budget or Budget(size_bytes=device_budget(options.target))
    fitted = search_within(
        step,
        wanted,
        options.reserve_bytes,
        max_compiles=options.max_compiles,
        on_infeasible=options.on_infeasible,
    )
    made = StepPlans.of(build_step(fitted), tuple(goal for _, goal in step.analyses))
    write_kept(path, made)
    return made


def _path(step: Step, options: _Options) -> Path | None:
    """Where a step's plans are kept; None where they are not: a name must say all that they depend on."""
    whole = flatten(step.closed.jaxpr)
    functions = step.free.functions.values()
    programs = [whole, *(f.program for f in functions)]
    solvers = [f.solver for f in functions]
    if any(p.description.opaque for p in programs) or not all(isinstance(s, str) for s in solvers):
        return None
    specs = [(x.shape, str(x.dtype), x.weak_type, str(x.sharding)) for x in jax.tree.leaves(step.args)]
    parts = (
        *(p.fingerprint() for p in programs),
        *(f.goal for f in functions),
        *solvers,
        specs,
        step.donate_argnums,
        sorted((name, str(value)) for name, value in step.options.jit.items()),
        options.budget or device_budget(options.target),
        (options.reserve_bytes, options.host_budget, options.cost, options.keep_checkpoints, options.target),
        (options.max_compiles, options.on_infeasible),
    )
    return cache.folder(options.cache_dir) / f"step-{kept_key(parts, options.target)}.json"


def _check(plans: StepPlans, step: Step) -> None:
    plans.check({key: f.program for key, f in step.free.functions.items()})


def _taken(step: Step, data: dict[str, Any]) -> StepPlans:
    """The plans of process 0, for this process's own step."""
    found = StepPlans.from_json(data, "the plans of process 0")
    _check(found, step)
    return found
