"""Device bytes, as the target's own compiler counts them.

Whatever is compiled to be measured passes one door: `compiled_bytes`, `lowered_for` and with it `pool.side_by_side`, in
this process or in one of its own. `through` puts another one there, which may refuse, count or answer.
"""

import contextlib
import contextvars
import functools
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

import jax
from jax.experimental import checkify

from jaxckpt import _compat
from jaxckpt.compilation import cache, process
from jaxckpt.compilation.compiled import Compiled, read
from jaxckpt.compilation.compiled import num_asked as num_asked_of
from jaxckpt.compilation.host import host_bytes
from jaxckpt.errors import SEE_DOCTOR, CompilerError
from jaxckpt.program.ir import size_bytes
from jaxckpt.targets import install
from jaxckpt.targets.chip import Target, device_label, find_target
from jaxckpt.targets.sharding import local_bytes, on_every_device, place, step_split
from jaxckpt.units import show_bytes

_LOG = logging.getLogger("jaxckpt")
_SLOW_S = 2.0
# What a library's lowering rules raise; an alarm or a full memory is no such thing, and passes.
_NOT_LOWERED = (NotImplementedError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, AssertionError)
# Larger ones are measured as arguments, and taken off.
_MOST_CONSTANT_BYTES = 2**28
_PART = (
    "{} a part of a program cannot be compiled on its own; decorate it without a budget and let jaxckpt.fit measure "
    "the whole step"
)
# Quicker ones are made again.
_WORTH_KEEPING_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What a compiled program takes on one device.

    Attributes:
        device_bytes: arguments + outputs - aliased + temporaries; what is compared with a budget.
        argument_bytes: of the program's arguments.
        output_bytes: of its results, gradients among them.
        alias_bytes: of results that reuse an argument's buffer.
        temp_bytes: of everything in between.
        code_bytes: of the program itself; not counted.
        target: for which chip.
        compile_s: how long the compiler took, when it did: what took more than a second is kept on disk.
        is_at_most: whether the compiler says no more than that the bytes are not above this.
        host_bytes: on the host, for each device: arguments, results and what waits there for a backward.
        is_host_predicted: whether those are counted in the traced program, where the compiler does not tell them apart.
        num_rematerialized: instructions that XLA's own rematerialization made again; None where that is not known.
        num_recomputed: products and convolutions that checkpoints make again in the compiled program; None where that
            is not known.
        num_asked: the same in the program that the compiler was given.
    """

    device_bytes: int
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    code_bytes: int
    target: str
    compile_s: float
    is_at_most: bool = False
    host_bytes: int = 0
    is_host_predicted: bool = False
    num_rematerialized: int | None = None
    num_recomputed: int | None = None
    num_asked: int | None = None

    def __str__(self) -> str:
        """One line a person reads."""
        at_most = "at most " if self.is_at_most else ""
        host = ""
        if self.host_bytes:
            label = "predicted" if self.is_host_predicted else "measured"
            host = f", and {show_bytes(self.host_bytes)} on the host ({label})"
        return f"{at_most}{show_bytes(self.device_bytes)} measured for {self.target}{host}"


def compiled_bytes(
    fun: Callable,
    specs: Sequence[Any],
    target: str | None,
    donate_argnums: int | Sequence[int] = (),
    closed_over: Sequence[Any] = (),
    jit_options: Mapping[str, Any] = MappingProxyType({}),
) -> Measurement:
    """Compile a function for a target and read what it takes.

    Args:
        fun: what to compile.
        specs: its positional arguments, pytrees of arrays or `ShapeDtypeStruct`s.
        target: a chip's name; None is the default backend.
        donate_argnums: as in `jax.jit`.
        closed_over: arrays that `fun` takes before the others and that are constants of the program.
        jit_options: other keywords of `jax.jit`; compiler options are added to the target's own.

    Raises:
        CompilerError: the target's compiler is not here, or failed.
    """
    return lowered_for(fun, specs, target, donate_argnums, closed_over, jit_options)()


def lowered_for(
    fun: Callable,
    specs: Sequence[Any],
    target: str | None,
    donate_argnums: int | Sequence[int] = (),
    closed_over: Sequence[Any] = (),
    jit_options: Mapping[str, Any] = MappingProxyType({}),
    dump_options: Mapping[str, Any] = MappingProxyType({}),
) -> Callable[[], Measurement]:
    """Trace and lower a function as `compiled_bytes` does; what is returned compiles it, in any thread.

    With `dump_options`, compiler options that change nothing but what the compiler writes down, it is compiled whether
    or not its sizes are known, and they are not kept.
    """
    if closed_over:
        return _lowered_with_constants(fun, specs, target, closed_over, jit_options, dump_options)
    chip = find_target(target)
    if jax.sharding.get_abstract_mesh().manual_axes:
        raise CompilerError(_PART.format("inside shard_map"))
    placed, num_devices = place(specs, target)
    label = device_label(target, num_devices)
    started = time.perf_counter()
    given = dict(jit_options)
    own_options = given.pop("compiler_options", None) or {}
    traced = jax.jit(fun, donate_argnums=donate_argnums, **given).trace(*placed)
    if any(map(_compat.is_check_effect, traced.jaxpr.effects)):
        # Nothing with a check is compiled before its errors are values.
        fun = checkify.checkify(fun)
        traced = jax.jit(fun, donate_argnums=donate_argnums, **given).trace(*placed)
    if any(map(_compat.is_axis_effect, traced.jaxpr.effects)):
        raise CompilerError(_PART.format("where named axes are mapped"))
    try:
        lowered = traced.lower() if target is None else traced.lower(lowering_platforms=(chip.platform,))
    except _NOT_LOWERED as error:
        said = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise CompilerError(f"the program cannot be lowered for target={label!r}: {said}") from error
    options = {**(chip.compiler.compile_options or {}), **own_options} or None
    host = 0 if chip.compiler.counts_host else -(-host_bytes(traced.jaxpr) // step_split(placed))
    name = cache.digest((lowered.as_text(), chip, num_devices, options, host, *_versions(chip), *dump_options))
    kept = None if dump_options else cache.read(name, Measurement)
    if kept is not None:
        found = replace(kept, target=label)
        return lambda: found
    options = {**(options or {}), **dump_options} or None
    if target is not None and process.SWITCH in os.environ:
        compiled = process.sizes_later(fun, placed, donate_argnums, target, options)
    else:
        compiled = lambda: read(lowered.compile(compiler_options=options))  # noqa: E731
    refusal = functools.partial(_refusal, fun, placed, donate_argnums, label)
    lowering_s = time.perf_counter() - started

    def asked() -> Measurement:
        started = time.perf_counter()
        found = _compiled(compiled, chip, label, refusal)
        found = _without_host(found, host)
        num_asked = None if found.num_recomputed is None else num_asked_of(lowered.as_text(debug_info=True))
        return replace(found, num_asked=num_asked, compile_s=lowering_s + time.perf_counter() - started)

    def finished() -> Measurement:
        found = _DOOR.get()(name, asked)
        if found.compile_s > _WORTH_KEEPING_S and not dump_options:
            cache.write(name, asdict(found))
        return replace(found, target=label)

    return finished


def _lowered_with_constants(
    fun: Callable,
    specs: Sequence[Any],
    target: str | None,
    closed_over: Sequence[Any],
    jit_options: Mapping[str, Any],
    dump_options: Mapping[str, Any],
) -> Callable[[], Measurement]:
    """The same of a function of constants, which the user's own jit compiles into the program."""
    num_bytes = sum(x.nbytes for x in closed_over)
    if num_bytes <= _MOST_CONSTANT_BYTES:
        fun = functools.partial(fun, *closed_over)
        return lowered_for(fun, specs, target, jit_options=jit_options, dump_options=dump_options)
    # As text they would take several times their bytes. As arguments they change nothing that is held in between.
    everywhere = on_every_device(jax.tree.leaves(list(specs)))
    constants = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere) for x in closed_over]
    finish = lowered_for(fun, [*constants, *specs], target, jit_options=jit_options, dump_options=dump_options)

    def finished() -> Measurement:
        found = finish()
        return replace(
            found, device_bytes=found.device_bytes - num_bytes, argument_bytes=found.argument_bytes - num_bytes
        )

    return finished


# What every compile passes: the digest of a lowered program, its target and the versions, and what compiles it.
Door = Callable[[str, Callable[[], Measurement]], Measurement]
_DOOR: contextvars.ContextVar[Door] = contextvars.ContextVar("door", default=lambda name, compile_: compile_())


@contextlib.contextmanager
def through(door: Door) -> Iterator[None]:
    """Let every compile inside pass a door, those in other threads of a pool too.

    What was compiled before and is kept on disk is read from there and passes none.

    Args:
        door: given a digest of the lowered program, its target and the versions, and a function that compiles it,
            returns what it takes. It may refuse by raising, or answer without compiling.

    Example:
        >>> import jax
        >>> names = []
        >>> with through(lambda name, compile_: names.append(name) or compile_()):
        ...     found = compiled_bytes(lambda x: x + 1, [jax.ShapeDtypeStruct((4,), "float32")], None)
        >>> len(names), found.output_bytes
        (1, 16)
    """
    token = _DOOR.set(door)
    try:
        yield
    finally:
        _DOOR.reset(token)


def _versions(chip: Target) -> tuple[Any, ...]:
    """What else than its text decides how a program is compiled and its bytes are counted."""
    flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    return _compat.JAXLIB_VERSION, install.installed(chip), chip.compiler_name and chip.compiler, *flags


def _compiled(
    compiled: Callable[[], Compiled], chip: Target, label: str, refusal: Callable[[int], Measurement]
) -> Measurement:
    """Compile and read the sizes; a refusal that says how much the program takes is a measurement too."""
    started = time.perf_counter()
    try:
        with watched(label):
            found = compiled()
    except (jax.errors.JaxRuntimeError, process.FailedError, NotImplementedError) as error:
        needed = chip.compiler.refused_bytes(error)
        if needed is None:
            said = (str(error).splitlines() or [type(error).__name__])[0][:300]
            needs = any(word in said for word in ("ptxas", "PTX", "libdevice"))
            advice = f". Its assembler comes with: {install.shown_command(chip)}" if needs else ""
            advice += f". {SEE_DOCTOR}" if "RESOURCE_EXHAUSTED" in str(error) else ""
            raise CompilerError(f"the compiler for target={label!r} failed: {said}{advice}") from error
        return refusal(needed)
    if time.perf_counter() - started > _SLOW_S:
        _log_slow(label)
    stats = found.stats
    assert stats is not None, "every backend that jaxckpt plans for reports its memory"
    device_bytes = chip.compiler.device_bytes(stats)
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return Measurement(
        device_bytes=device_bytes,
        argument_bytes=stats.argument_size_in_bytes,
        output_bytes=stats.output_size_in_bytes,
        alias_bytes=stats.alias_size_in_bytes,
        temp_bytes=max(0, device_bytes - held),
        code_bytes=stats.generated_code_size_in_bytes,
        host_bytes=chip.compiler.host_bytes(stats),
        target=label,
        compile_s=0.0,
        is_at_most=chip.compiler.says_at_most(stats),
        num_rematerialized=found.num_rematerialized,
        num_recomputed=found.num_recomputed,
    )


def _without_host(found: Measurement, host: int) -> Measurement:
    """What a compiler counts that takes the host's memory for the device's own, without what is on the host."""
    if not host:
        return found
    host = min(host, found.temp_bytes)
    return replace(
        found,
        device_bytes=found.device_bytes - host,
        temp_bytes=found.temp_bytes - host,
        host_bytes=host,
        is_host_predicted=True,
    )


@contextlib.contextmanager
def show_progress(show: Callable[[str], contextlib.AbstractContextManager]) -> Iterator[None]:
    """Enter what `show` makes of a line of text around every compile inside."""
    token = SHOW.set(show)
    try:
        yield
    finally:
        SHOW.reset(token)


def show_nothing(text: str) -> contextlib.AbstractContextManager:
    """Say nothing while something compiles."""
    del text
    return contextlib.nullcontext()


SHOW: contextvars.ContextVar[Callable[[str], contextlib.AbstractContextManager]] = contextvars.ContextVar(
    "show", default=show_nothing
)


def watched(label: str) -> contextlib.AbstractContextManager:
    """What shows that a compile is under way."""
    return SHOW.get()(f"compiling for {label}")


def _refusal(
    fun: Callable, specs: Sequence[Any], donate_argnums: int | Sequence[int], target: str, needed: int
) -> Measurement:
    """The compiler will not build a program of this size for the chip, which says how large it is."""
    leaves = jax.tree.leaves(list(specs))
    arguments = sum(local_bytes(leaf, getattr(leaf, "sharding", None)) for leaf in leaves)
    split = step_split(leaves)
    results = Counter((x.shape, x.dtype) for x in jax.tree.leaves(jax.eval_shape(fun, *specs)))
    donated = Counter((x.shape, x.dtype) for x in donated_leaves(specs, donate_argnums))
    outputs, aliased = (
        sum(count * -(-size_bytes(jax.ShapeDtypeStruct(*kind)) // split) for kind, count in kinds.items())
        for kinds in (results, results & donated)
    )
    return Measurement(
        device_bytes=needed,
        argument_bytes=arguments,
        output_bytes=outputs,
        alias_bytes=aliased,
        temp_bytes=max(0, needed - (arguments + outputs - aliased)),
        code_bytes=0,
        target=target,
        compile_s=0.0,
    )


def donated_leaves(args: Sequence[Any], donate_argnums: int | Sequence[int]) -> list[Any]:
    """Those of a call's arguments that give their buffers away."""
    numbers = (donate_argnums,) if isinstance(donate_argnums, int) else donate_argnums
    return jax.tree.leaves([args[i] for i in numbers])


@functools.cache
def _log_slow(target: str) -> None:
    _LOG.info("compiling for %s takes more than %.0f s a plan; verify=False predicts and skips it", target, _SLOW_S)
