"""Everything that touches private JAX or asks for its version. No other module does.

Each entry says which public name it stands in for, so that it can go when JAX has one.
"""

import contextlib
import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jaxlib.version
from jax._src import (
    api_util,
    callback,
    checkify,
    config,
    core,
    debugging,
    source_info_util,  # no public way to read or restore an equation's source
)
from jax._src.export import shape_poly
from jax._src.interpreters.partial_eval import DynamicJaxprTrace
from jax._src.lax import parallel
from jax._src.lax.control_flow import conditionals
from jax._src.mesh import AbstractDevice
from jax.extend.core import jaxprs_in_params
from jax.extend.core.primitives import jit_p, name_p, remat_p
from jax.interpreters import ad, partial_eval

JAX_VERSION = jax.__version__
JAXLIB_VERSION: str = jaxlib.version.__version__


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(x) for x in re.findall(r"\d+", version)[:2])


# Before 0.12 the CPU compiler removes optimization barriers before it merges common subexpressions, so recomputation
# is merged back and jax.checkpoint saves nothing. Disabling the pass that does it restores the barriers.
CPU_UNDOES_REMAT = _release(JAXLIB_VERSION) < (0, 12)
CPU_REMAT_OPTIONS: dict[str, Any] = {"xla_disable_hlo_passes": "cse_barrier_expander"} if CPU_UNDOES_REMAT else {}


def here_options() -> dict[str, Any]:
    """Compiler options with which recomputation survives on the default backend."""
    return dict(CPU_REMAT_OPTIONS) if jax.default_backend() == "cpu" else {}


def here_undoes_remat() -> bool:
    """Whether the default backend merges recomputation back unless a compiler option forbids it, and none does."""
    return CPU_UNDOES_REMAT and jax.default_backend() == "cpu" and not cpu_option_is_set()


def enclosing_jit_keeps_remat() -> bool:
    """Whether a `jax.jit` that is being traced was given the compiler options with which recomputation survives.

    JAX tells nobody inside, but each jit that is under way has a record of its options in a frame of the stack.
    """
    frame: Any = sys._getframe()
    while frame is not None:
        for value in frame.f_locals.values():
            given = getattr(value, "compiler_options_kvs", None) if type(value).__name__ == "PjitInfo" else None
            if given and _keeps_remat(dict(given)):
                return True
        frame = frame.f_back
    return False


def _keeps_remat(options: dict[str, Any]) -> bool:
    disabled = str(options.get("xla_disable_hlo_passes", "")).split(",")
    return "cse_barrier_expander" in disabled


# The primitives without a public name that jax.numpy's functions bind.
UNNAMED_PRIMITIVES = frozenset(filter(None, [getattr(conditionals, "platform_index_p", None)]))
# Collectives over named axes, not all of which have public names, and those that add up or compare.
REDUCING = frozenset(
    getattr(parallel, f"{name}_p")
    for name in ("psum", "psum_invariant", "pmax", "pmin")
    if hasattr(parallel, f"{name}_p")
)
COLLECTIVES = REDUCING | frozenset(
    getattr(parallel, f"{name}_p")
    for name in ("all_gather", "all_gather_invariant", "reduce_scatter", "all_to_all", "ppermute", "ragged_all_to_all")
    if hasattr(parallel, f"{name}_p")
)
GATHERS = frozenset(
    getattr(parallel, f"{name}_p") for name in ("all_gather", "all_gather_invariant") if hasattr(parallel, f"{name}_p")
)
# Which of the CUDA plugins is published for this JAX.
CUDA_PLUGIN = 12 if _release(JAXLIB_VERSION) < (0, 12) else 13


def source_line(source_info: Any) -> str:
    """`file:line (function)` of the user's frame that made an equation; empty where there is none."""
    summary = source_info_util.summarize(source_info)
    return "" if summary.startswith("<") else summary


@contextlib.contextmanager
def source_context(source_info: Any, name_stacks: tuple[Any, ...], ctx: Any) -> Iterator[None]:
    """Bind primitives as if at an equation's own place: its traceback, its name stack, its context."""
    stack = source_info_util.current_name_stack()
    for part in name_stacks:
        stack = stack + part
    with source_info_util.user_context(source_info.traceback, name_stack=stack), ctx.manager:
        yield


def stack_elements(name_stacks: tuple[Any, ...]) -> tuple[Any, ...]:
    """The scopes of name stacks, outermost first."""
    return tuple(element for part in name_stacks for element in part.stack)


def stack_of(elements: tuple[Any, ...]) -> Any:
    """The name stack of these scopes."""
    return source_info_util.NameStack(elements)


def show_stack(elements: tuple[Any, ...]) -> str:
    """Scopes as text."""
    return str(stack_of(elements))


def scope_named(name: str) -> Any:
    """A scope as `jax.named_scope` makes it."""
    (scope,) = source_info_util.NameStack().extend(name).stack
    return scope


def within_stack(elements: tuple[Any, ...]) -> contextlib.AbstractContextManager:
    """Inside, operations stand under these scopes too."""
    if not elements:
        return contextlib.nullcontext()
    return source_info_util.set_name_stack(source_info_util.current_name_stack() + stack_of(elements))


def num_reverse(values: Any) -> int:
    """In how many derivatives in reverse some of these values are primals."""
    from jax._src.interpreters import ad as private_ad

    kind, found = getattr(private_ad, "LinearizeTracer", ()), set()
    for value in values:
        while isinstance(value, core.Tracer):
            if isinstance(value, kind):
                found.add(id(value._trace))
            value = getattr(value, "primal", getattr(value, "val", None))
    return len(found)


def described_device(kind: str, platform: str) -> contextlib.AbstractContextManager:
    """Inside, what is traced is lowered for a device of this kind, where a Pallas kernel's lowering asks for one."""
    has_kernels = any(name.startswith("jax._src.pallas") for name in sys.modules)
    if not (kind and has_kernels and jax.sharding.get_abstract_mesh().empty):
        return contextlib.nullcontext()
    device = AbstractDevice(device_kind=kind, num_cores=1, platform={"cuda": "gpu"}.get(platform, platform))
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def policy_says(policy: Any, eqn: Any) -> str:
    """What a checkpoint policy does with an equation's results: "save", "offload" or "remat"."""
    case = policy(eqn.primitive, *(v.aval for v in eqn.invars), **eqn.params)
    if isinstance(case, bool):
        return "save" if case else "remat"
    return {"Offloadable": "offload", "SaveableType": "save"}.get(type(case).__name__, "remat")


def names_in_policy(policy: Any) -> frozenset[str]:
    """The names that a checkpoint policy of JAX's was made with; it holds them in a closure or in attributes."""
    cells = [cell.cell_contents for cell in getattr(policy, "__closure__", None) or ()]
    held = [*cells, *getattr(policy, "__dict__", {}).values()]
    sets = [x for x in held if isinstance(x, set | frozenset | tuple | list)]
    return frozenset(name for x in sets for name in x if isinstance(name, str))


def contexts(equations: Any) -> set[Any]:
    """The contexts that equations were traced in, those of nested jaxprs too; JAX makes each but once."""
    found = {eqn.ctx for eqn in equations}
    for eqn in equations:
        for jaxpr in jaxprs_in_params(eqn.params):
            found |= contexts(jaxpr.eqns)
    return found


def dce(jaxpr: Any) -> Any:
    """Remove dead equations, inside nested jaxprs too (`jax.interpreters.partial_eval.dce_jaxpr`)."""
    closed_over = jaxpr.jaxpr
    live, _ = partial_eval.dce_jaxpr(closed_over, [True] * len(closed_over.outvars), instantiate=True)
    return live


def set_linearize_rule(primitive: Any, rule: Any) -> bool:
    """Register a linearize rule; False where this JAX has no such table.

    Without one, differentiation falls back on the JVP rule, which loses rematerialization under `JAX_REMAT3=1`.
    """
    from jax._src.interpreters import ad as private_ad

    table = getattr(private_ad, "primitive_linearizations", None)
    if table is None:
        return False
    table[primitive] = rule
    return True


def linearize_jit(is_vjp: bool, nonzeros: Any, *primals: Any, **params: Any) -> Any:
    """JAX's linearize rule of `jit`, in whatever form this JAX has it."""
    from jax._src.interpreters import ad as private_ad

    return private_ad.primitive_linearizations[jit_p](is_vjp, nonzeros, *primals, **params)


def set_transpose_rule(primitive: Any, params_of: Any) -> None:
    """Transpose a primitive as JAX does the `jit` that does the same, in whatever form this JAX has the rule.

    Args:
        primitive: like `jit` it has a list of results.
        params_of: from its parameters to those of that `jit`.
    """
    from jax._src.interpreters import ad as private_ad

    for name in ("fancy_transposes", "primitive_transposes"):
        table = getattr(private_ad, name, {})
        if jit_p in table:
            table[primitive] = functools.partial(_transpose_as_jit, table[jit_p], params_of)
            return


def _transpose_as_jit(rule: Any, params_of: Any, cotangents: Any, *args: Any, **params: Any) -> Any:
    return rule(cotangents, *args, **params_of(**params))


def is_mapped(value: Any) -> bool:
    """Whether a value is one example's view inside `vmap`."""
    from jax._src.interpreters import batching

    return isinstance(value, batching.BatchTracer)


def is_zero(tangent: Any) -> bool:
    """Whether a tangent is symbolically zero."""
    return isinstance(tangent, ad.Zero)


def cpu_option_is_set() -> bool:
    """Whether XLA_FLAGS already keep the barriers on CPU."""
    import os

    return "cse_barrier_expander" in os.environ.get("XLA_FLAGS", "")


def register_cuda_plugin() -> None:
    """Register the CUDA plugin that JAX left out when it found no driver (no public way to ask again)."""
    import importlib

    for number in (13, 12):
        try:
            plugin = importlib.import_module(f"jax_plugins.xla_cuda{number}")
        except ImportError:
            continue
        plugin.initialize()
        return


def without_gradient(exported: Any) -> Any:
    """An exported program that can be pickled (its own format needs flatbuffers, which JAX does not bring along)."""
    return dataclasses.replace(exported, _get_vjp=None)


@functools.cache
def described_cpu_devices(number: int) -> tuple[Any, ...]:
    """CPU devices to compile for, more than the process has (`topologies` has none for CPU)."""
    from jaxlib import xla_client

    return tuple(xla_client.make_cpu_client(num_devices=number).devices())


def is_axis_effect(effect: Any) -> bool:
    """Whether an effect only says that a mapped axis is named, as a collective does."""
    return isinstance(effect, core.NamedAxisEffect)


def is_check_effect(effect: Any) -> bool:
    """Whether an effect is a check of `checkify`."""
    return isinstance(effect, checkify.ErrorEffect)


def can_stand_alone(effect: Any) -> bool:
    """Whether an operation may run where it stands and nowhere else: calls of Python, checks, names of axes.

    Others change arrays in place.
    """
    return isinstance(effect, _STANDING_ALONE)


# Prints, debuggers, `io_callback`, checks of errors and of symbolic shapes.
_STANDING_ALONE = tuple(
    getattr(module, name)
    for module, name in (
        (core, "NamedAxisEffect"),
        (debugging, "DebugEffect"),
        (debugging, "OrderedDebugEffect"),
        (callback, "IOEffect"),
        (callback, "OrderedIOEffect"),
        (checkify, "ErrorEffect"),
        (shape_poly, "ShapeAssertionEffect"),
    )
    if hasattr(module, name)
)


def jit_is_disabled() -> bool:
    """Whether `jax.disable_jit` holds here (no public way to ask that type checkers know)."""
    return config.disable_jit.value


def axis_sizes() -> dict[Any, int]:
    """Sizes of the named axes that are mapped here (public JAX has one name's size at a time)."""
    return dict(core.get_axis_env().axis_sizes)


@contextlib.contextmanager
def named_errors(fun: Any, *args: Any) -> Iterator[None]:
    """Say which operation made a value that `jax_debug_nans` or `jax_debug_infs` refuses, as `jax.jit` does.

    Args:
        fun: what runs inside, operation by operation.
        *args: its arguments.

    Raises:
        FloatingPointError: JAX's own.
    """
    try:
        yield
    except api_util.InternalFloatingPointError as error:
        api_util.maybe_recursive_nan_check(error, fun, args, {})


def register_check(primitive: Any, rule: Any) -> None:
    """Register how `checkify` makes the errors inside a primitive values (no public way).

    Args:
        primitive: without a rule, its insides are not checked.
        rule: of `(check, error, *operands, **params)` to an error and the results, where `check` makes the same of
            `(closed_jaxpr, error, *operands)`.
    """
    num_leading = 1 if hasattr(checkify, "CheckifyContext") else 0  # before 0.12 error codes are counted globally

    def with_check(*args: Any, **params: Any) -> tuple[Any, list[Any]]:
        context, (error, errors, *operands) = args[:num_leading], args[num_leading:]
        check = lambda jaxpr, error, *xs: checkify.checkify_jaxpr(*context, jaxpr, errors, error, *xs)  # noqa: E731
        return rule(check, error, *operands, **params)

    checkify.error_checks[primitive] = with_check


@functools.cache
def is_jax_own(primitive: Any) -> bool:
    """Whether a primitive is one of JAX's: some module of its has it."""
    modules = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "jax"]
    return any(value is primitive for module in modules for value in list(vars(module).values()))


def is_callback(primitive: Any) -> bool:
    """Whether a primitive calls Python, as its parameter `callback` says."""
    names = ((callback, "pure_callback_p"), (callback, "io_callback_p"), (debugging, "debug_callback_p"))
    return any(primitive is getattr(module, name, None) for module, name in names)


def held_jaxpr(primitive: Any) -> Any:
    """What a primitive of the new kind stands for: under `JAX_REMAT3=1` checkpoints and names are such ones."""
    held = getattr(primitive, "jaxpr", None)
    if held is None:
        held = jax.make_jaxpr(primitive.expand)(*primitive.in_avals)
    return getattr(held, "jaxpr", held)


def is_staged() -> bool:
    """Whether operations here are added to a jaxpr, rather than run, however often they are differentiated."""
    trace = core.trace_ctx.trace
    while trace is not None:
        if isinstance(trace, DynamicJaxprTrace):
            return True
        trace = getattr(trace, "parent_trace", None)
    return False


def checks_each_operation() -> bool:
    """Whether `jax_debug_nans` or `jax_debug_infs` is set."""
    return bool(config.debug_nans.value or config.debug_infs.value)


def ordered_checkpoints() -> contextlib.AbstractContextManager:
    """Let `jax.checkpoint` inside be of the kind that recomputes in order.

    Under `JAX_REMAT3=1` a compiler merges recomputation back before 0.12, where such checkpoints have no barriers, and
    with `JAX_REMAT_BARRIER_NO_COTANGENTS=1`, where the barriers wait for nothing.
    """
    state, waits_less = getattr(config, "remat3", None), getattr(config, "remat_barrier_no_cotangents", None)
    if state is None or not state.value:
        return contextlib.nullcontext()
    is_unordered = _release(JAX_VERSION) < (0, 12) or (waits_less is not None and waits_less.value)
    return state(False) if is_unordered else contextlib.nullcontext()


def draws_numbers_apart() -> bool:
    """Whether no random number depends on another one drawn with it (`jax_threefry_partitionable`)."""
    return bool(config.threefry_partitionable.value)


def scan_layout(params: dict[str, Any]) -> tuple[int, int]:
    """How many of a scan's operands are constants and how many are carried; the rest are stacked."""
    if "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def distributed_client() -> Any:
    """The client of `jax.distributed`'s key-value store; None in a process of its own."""
    from jax._src import distributed

    return distributed.global_state.client


# Given a function and whether it returns auxiliary results, what is differentiated in its place.
Handover = Callable[[Callable, bool], Callable]


def hand_over_vjp(asks: Callable[[], Handover | None]) -> bool:
    """Let functions that JAX differentiates backward pass through a hand that a caller may hold out.

    `grad`, `value_and_grad` and `jacrev`, and the libraries' wrappers of them, call one `vjp` of JAX's own module,
    which is `jax.vjp` too. It is replaced in both places (there is no public way to see what is differentiated).

    Args:
        asks: the hand that is held out where it is called; None leaves everything as it is.

    Returns:
        Whether this JAX has such a function.
    """
    from jax._src import api

    original = getattr(api, "vjp", None)
    if original is None or original is not getattr(jax, "vjp", None):
        return False
    if hasattr(original, "hands_over"):
        return True

    @functools.wraps(original)
    def vjp(fun: Callable, *primals: Any, has_aux: bool = False, **options: Any) -> Any:
        hand = asks()
        return original(fun if hand is None else hand(fun, has_aux), *primals, has_aux=has_aux, **options)

    vjp.hands_over = True  # type: ignore[attr-defined]
    api.vjp = jax.vjp = vjp
    return True


# Whether a call happens outside of every transformation: jit, vmap, grad, a loop's body.
is_outermost: Callable[[], bool] = core.trace_state_clean


def jit_context() -> Any:
    """What of JAX's configuration decides what a function is traced to, as `jax.jit` has it in its keys."""
    return config.trace_context()


def backward_lines(closed: Any) -> list[str]:
    """The lines whose operations are differentiated backward in a jaxpr, as `source_line` shows them."""
    found = dict.fromkeys(map(source_line, _backward([getattr(closed, "jaxpr", closed)])))
    return [line for line in found if line]


def is_differentiated_within(eqn: Any) -> bool:
    """Whether an equation, of a jaxpr or a flat program, has a derivative in a jaxpr among its parameters."""
    return any(True for _ in _backward(list(jaxprs_in_params(eqn.params))))


def _backward(jaxprs: list[Any]) -> Iterator[Any]:
    """Where operations come from that are differentiated backward, in jaxprs and those inside."""
    while jaxprs:
        for eqn in jaxprs.pop().eqns:
            if "transpose(" in str(eqn.source_info.name_stack):
                yield eqn.source_info
            jaxprs += jaxprs_in_params(eqn.params)


def forget_fast_calls(jitted: Any) -> None:
    """Let a jitted function look at its next calls anew; what it traced and compiled stays.

    A kind of call that once raised is never fast again otherwise (there is no public way to clear that alone).
    """
    clear = getattr(jitted, "_clear_cache", None)
    if clear is not None:
        clear()


def default_device() -> Any:
    """Where uncommitted arrays are used: as `jax.default_device` says, or the first device."""
    return jax.config.jax_default_device or jax.devices()[0]  # type: ignore[attr-defined]


# Given a checkpoint's line and its parameters, the parameters to bind it with, or None to run what is inside instead.
CheckpointHand = Callable[[str, dict[str, Any]], dict[str, Any] | None]


def hand_over_checkpoints(asks: Callable[[], CheckpointHand | None]) -> None:
    """Let each `jax.checkpoint` pass through a hand that a caller may hold out while a function is traced.

    A checkpoint is bound once where it is called, before anything is differentiated, and again wherever JAX evaluates a
    jaxpr that has it inside (there is no public way to see either). `remat_p.bind` is replaced, as JAX replaces it too.

    Args:
        asks: the hand that is held out where it is called; None leaves everything as it is.
    """
    original = remat_p.bind
    if hasattr(original, "hands_over"):
        return
    # The operation keeps the line of who called `jax.checkpoint`.
    source_info_util.register_exclusion(__file__)

    def bind(*args: Any, **params: Any) -> Any:
        hand = None if params["differentiated"] else asks()
        given = params if hand is None else hand(source_line(source_info_util.current()), params)
        return core.eval_jaxpr(params["jaxpr"], (), *args) if given is None else original(*args, **given)

    bind.hands_over = True  # type: ignore[attr-defined]
    remat_p.bind = bind


def plain_checkpoints() -> contextlib.AbstractContextManager:
    """Let `jax.checkpoint` inside be the primitive that `hand_over_checkpoints` sees, whatever `JAX_REMAT3` says."""
    state = getattr(config, "remat3", None)
    return state(False) if state is not None and state.value else contextlib.nullcontext()


def barrier_flags() -> tuple[str, ...]:
    """JAX's flags under which checkpoints have no barriers, or such as wait for nothing; none elsewhere."""
    if isinstance(ordered_checkpoints(), contextlib.nullcontext):
        return ()
    waits_less = getattr(config, "remat_barrier_no_cotangents", None)
    weak = waits_less is not None and waits_less.value
    return ("JAX_REMAT3=1", *(("JAX_REMAT_BARRIER_NO_COTANGENTS=1",) if weak else ()))


def is_kernel(eqn: Any) -> bool:
    """Whether an equation calls a Pallas kernel (its primitive has no public name)."""
    return eqn.primitive.name == "pallas_call"


def runs_kernel(primitive: Any, params: dict[str, Any]) -> bool:
    """Whether a primitive calls a Pallas kernel, itself or in a jaxpr among its parameters."""
    if primitive.name == "pallas_call":
        return True
    return any(runs_kernel(eqn.primitive, eqn.params) for jaxpr in jaxprs_in_params(params) for eqn in jaxpr.eqns)


def is_shard_map(eqn: Any) -> bool:
    """Whether an equation is a `jax.shard_map` (its primitive has no public name)."""
    return eqn.primitive.name == "shard_map"


def kernel_cost(eqn: Any) -> tuple[str, int]:
    """A Pallas kernel's name and in how many programs of its grid it runs."""
    params = eqn.params
    grid = getattr(params.get("grid_mapping"), "grid", ())
    trips = 1
    for size in grid:
        trips *= size if isinstance(size, int) else 1
    info = params.get("name_and_src_info")
    return str(params.get("name") or getattr(info, "name", "") or "kernel"), trips


def saves_name(policy: Any, name: str) -> bool:
    """Whether a checkpoint policy keeps a value of this name, on the device or on the host."""
    case = policy(name_p, name=name)
    if isinstance(case, bool):
        return case
    return type(case).__name__ in ("Offloadable", "SaveableType")


def defined_at(jaxpr: Any) -> str:
    """`file:line (function)` of the function that a jaxpr was traced from; empty where it does not say."""
    info = getattr(getattr(jaxpr, "debug_info", None), "func_src_info", "") or ""
    name, _, place = info.rpartition(" at ")
    return f"{place} ({name})" if name and place else ""
